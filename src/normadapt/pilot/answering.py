"""How a request is answered: by the arms that are asked, judged before it goes out, by the source on any trouble.

An answer that the guards trip on is never given out: the same request gets the source's.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from normadapt.observation import Observation
from normadapt.pilot.arms import Arms, Request
from normadapt.pilot.routing import Route, route
from normadapt.pilot.rows import RowsError, put_rows
from normadapt.pilot.signals import answers
from normadapt.pilot.stages import Stage
from normadapt.pilot.trial import Trial
from normadapt.pilot.watch import Trip
from normadapt.predictions import Predictions


class Compared(NamedTuple):
    """What an observer of a pilot is shown of items that both models answered.

    Args:
        items: How many.
        agreeing: Of these, given the same class by both.
        time: By the pilot's clock, seconds.
    """

    items: int
    agreeing: int
    time: float


class Desk:
    """Answers requests as the trial stands.

    Args:
        trial: Where it stands, and what guards and labels remember.
        arms: Both models.
        predictions: Maps an output to class probabilities, or None for the default.
    """

    def __init__(self, trial: Trial, arms: Arms, predictions: Predictions | None) -> None:
        self._trial = trial
        self._arms = arms
        self._predictions = predictions
        self.observations: tuple[Observation, ...] = ()

    def answer(self, request: Request) -> Any:
        """The answer that goes out.

        Raises:
            Exception: What the model itself raises for this request, and nothing else.
        """
        answered = self._trial.answered
        way = self._route(request)
        with self._arms.stream(request.stream):
            if way is None or not way.asked:
                output, arm = self._arms.source(request), 0
            else:
                output, arm = self._answer_by_arms(request, way)
        answered["requests"] += 1
        answered["items"] += request.count
        answered["source"] += request.count - arm
        answered["snapshot" if self._trial.position.stage is Stage.ROLLED_BACK else "adapted"] += arm
        return output

    def _route(self, request: Request) -> Route | None:
        """Who is asked; None for nobody but the source."""
        position, plan = self._trial.position, self._trial.plan
        rolled_back = position.stage is Stage.ROLLED_BACK and not position.share
        if position.stage is Stage.OFF or rolled_back or request.count == 0:
            return None
        first = self._trial.answered["items"]
        items = request.ids or [f"item {first + place}" for place in range(request.count)]
        units = items if plan.unit == "request" else [request.stream] * request.count
        return route(position, units, items, plan.paired_share, plan.salt)

    def _answer_by_arms(self, request: Request, way: Route) -> tuple[Any, int]:
        """The output, and how many of its items the arm answered."""
        trial, arms = self._trial, self._arms
        theirs = arms.source(request) if way.whole else None  # what the model raises itself is the caller's
        try:
            started = time.perf_counter()
            ours = arms.ours(request, way.asked, adapting=trial.adapting)
            seconds = time.perf_counter() - started
        except Exception as error:  # adapting may not cost a request its answer
            trip: Trip | None = Trip("error", None, None, len(way.asked), f"the adapted model raised {error!r}")
        else:
            trip = self._judge(request, way, ours, theirs, seconds)
        if trip is not None:
            theirs = arms.source(request) if theirs is None else theirs
            trial.trip(trip)
            return theirs, 0
        if not way.served:
            return theirs, 0
        try:
            return put_rows(theirs, ours, way.asked, request.count), len(way.asked)
        except RowsError as error:
            trial.keeper.tally("answers without rows", reason=str(error))
            return theirs, 0

    def _judge(self, request: Request, way: Route, ours: Any, theirs: Any, seconds: float) -> Trip | None:
        """Show the guards what the models answered, paired where both did, and remember it for labels."""
        trial = self._trial
        try:
            for pair in self._arms.pairs(request, way, ours, theirs):
                rows = trial.watch.measure(
                    pair.source,
                    pair.adapted,
                    pair.inputs,
                    predictions=self._predictions,
                    seconds=seconds if pair.first else None,
                    adapted=self._arms.adapted if pair.first else None,
                    items=len(way.asked),
                )
                trip = trial.take(rows, len(pair.places))
                if trip is not None:
                    return trip
                wanted = request.ids is not None or self.observations
                if wanted and pair.source is not None:
                    ours_said = answers(pair.adapted, self._predictions)
                    theirs_said = answers(pair.source, self._predictions)
                    if ours_said is None or theirs_said is None:
                        continue
                    if request.ids is not None:
                        names = [request.ids[place] for place in pair.places]
                        classes = pair.adapted.shape[1] if self._predictions is None else None  # of logits (n, K)
                        trial.remember(names, ours_said.classes, theirs_said.classes, classes)
                    self._show(request.stream, ours_said.classes, theirs_said.classes)
        except Exception as error:  # a guard that cannot see is no guard
            return Trip("judging", None, None, len(way.asked), f"the guards could not judge: {error!r}")
        return None

    def _show(self, stream: str, ours: list[int], theirs: list[int]) -> None:
        """Tell whoever looks on how many items got the same class from both."""
        if self.observations:
            agreeing = sum(a == b for a, b in zip(ours, theirs, strict=True))
            compared = Compared(len(ours), agreeing, self._trial.keeper.now)
            for observation in self.observations:
                observation.show(stream, compared)
