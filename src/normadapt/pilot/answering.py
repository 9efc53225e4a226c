"""How a request is answered: by the arms that are asked, judged before it goes out, by the source on any trouble.

An answer that the guards trip on is never given out: the same request gets the source's.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from normadapt.adapted.observation import Observers
from normadapt.layers.predictions import Predictions
from normadapt.pilot.arms import Arms, Pair, Request
from normadapt.pilot.guards import NonFinite
from normadapt.pilot.routing import Route, route
from normadapt.pilot.rows import put_rows
from normadapt.pilot.signals import Signals, answers, signals, source_key
from normadapt.pilot.stages import Stage
from normadapt.pilot.trial import Trial
from normadapt.pilot.watch import Trip


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


class _Joined(NamedTuple):
    """Answers of both models in one; a model's own output may be None."""

    output: Any


class Desk:
    """Answers requests as the trial stands.

    Args:
        trial: Where it stands, and what guards and labels remember.
        arms: Both models.
        predictions: Maps an output to class probabilities, or None for the default.
        observers: Are shown how answers agree.
    """

    def __init__(self, trial: Trial, arms: Arms, predictions: Predictions | None, observers: Observers) -> None:
        self._trial = trial
        self._arms = arms
        self._predictions = predictions
        self.observers = observers
        self._own = [guard for guard in trial.plan.guards if isinstance(guard, NonFinite) and guard.own_only]

    def answer(self, request: Request) -> Any:
        """The answer that goes out.

        Raises:
            Exception: What the model itself raises for this request, and nothing else.
        """
        answered = self._trial.answered
        if request.no_ids:
            self._trial.keeper.tally("strange ids", reason=request.no_ids)
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
        try:
            return route(position, units, items, plan.paired_share, plan.salt)
        except Exception as error:  # an id that cannot be hashed may not cost the request its answer
            self._trial.keeper.tally("routing trouble", reason=repr(error))
            return None

    def _answer_by_arms(self, request: Request, way: Route) -> tuple[Any, int]:
        """The output, and how many of its items the arm answered."""
        trial, arms = self._trial, self._arms
        theirs = arms.source(request) if way.whole else None  # what the model raises itself is the caller's
        held, joined, shared = arms.adapted.hold(), None, False
        try:
            started = time.perf_counter()
            ours = arms.ours(request, way.asked, adapting=trial.adapting)
            seconds = time.perf_counter() - started
        except Exception as error:  # adapting may not cost a request its answer
            trip: Trip | None = Trip("error", None, None, len(way.asked), f"the adapted model raised {error!r}")
        else:
            joined = self._join(request, way, ours, theirs)
            trip, shared = self._judge(request, way, ours, theirs, seconds, counts=joined is not None)
        if trip is None and not shared and joined is not None:
            return joined.output, len(way.asked) if way.served else 0
        theirs = arms.source(request) if theirs is None else theirs
        if trip is not None:
            trial.trip(trip)
        elif shared:
            arms.adapted.rewind(held)  # what nobody could answer may teach nothing
        return theirs, 0

    def _join(self, request: Request, way: Route, ours: Any, theirs: Any) -> _Joined | None:
        """What would go out; None where the answers of both cannot be put together, and the source's has to do."""
        if not way.served:
            return _Joined(theirs)
        try:
            return _Joined(put_rows(theirs, ours, way.asked, request.count))
        except Exception as error:  # an output of any type may come along
            self._trial.keeper.tally("answers without rows", reason=str(error) or repr(error))
            return None

    def _judge(
        self, request: Request, way: Route, ours: Any, theirs: Any, seconds: float, *, counts: bool
    ) -> tuple[Trip | None, bool]:
        """Show the guards what the models answered, paired where both did, and remember it for labels.

        Args:
            request: The request.
            way: Who was asked.
            ours: The arm's answer.
            theirs: The source's to the whole request, if it was asked for that.
            seconds: How long the arm took.
            counts: Whether these items are answered by the arm, or would be.

        Returns:
            A trip, and whether an item is not finite in both models' answers: then the source answers.
        """
        trial = self._trial
        try:
            measured = [
                self._measure(request, way, pair, seconds) for pair in self._arms.pairs(request, way, ours, theirs)
            ]
            names = [guard.name for guard in self._own]
            shared = sum(sum(rows.get(source_key(name), ())) for _, rows in measured for name in names)
            if shared:  # the request is as if it had not come, but for what adapting alone did to it
                measured = [(pair, {name: rows.get(name, []) for name in names}) for pair, rows in measured]
                trial.keeper.tally("answers not finite", items=int(shared), reason="of the source, too: no harm done")
            for pair, rows in measured:
                trip = trial.take(rows, len(pair.places) if counts and not shared else 0)
                if trip is not None:
                    return trip, False
                if (request.ids is not None or self.observers) and pair.source is not None and not shared:
                    self._remember(request, pair)
        except Exception as error:  # a guard that cannot see is no guard
            return Trip("judging", None, None, len(way.asked), f"the guards could not judge: {error!r}"), False
        return None, bool(shared)

    def _measure(self, request: Request, way: Route, pair: Pair, seconds: float) -> tuple[Pair, Signals]:
        """A pair, and what the guards look at in it.

        Where an answer is not finite the source is asked whether it does better, if it was not asked yet.
        """
        watch = self._trial.watch
        rows = watch.measure(
            pair.source,
            pair.adapted,
            pair.inputs,
            predictions=self._predictions,
            seconds=seconds if pair.first else None,
            adapted=self._arms.adapted if pair.first else None,
            items=len(way.asked),
            stream=request.stream,
        )
        if pair.source is None and any(any(rows.get(guard.name, ())) for guard in self._own):
            source = self._arms.source(request, pair.places)
            rows.update(signals(self._own, source, pair.adapted, pair.inputs, predictions=self._predictions))
        return pair, rows

    def _remember(self, request: Request, pair: Pair) -> None:
        """Keep the classes that both models gave, for labels and for whoever looks on."""
        ours, theirs = answers(pair.adapted, self._predictions), answers(pair.source, self._predictions)
        if ours is None or theirs is None:
            return
        if request.ids is not None:
            if len(ours.classes) == len(pair.places):
                names = [request.ids[place] for place in pair.places]
                classes = pair.adapted.shape[1] if self._predictions is None else None  # of logits (n, K)
                self._trial.remember(names, ours.classes, theirs.classes, classes)
            else:
                told = f"{len(ours.classes)} answers to {len(pair.places)} items"
                self._trial.keeper.tally("labels cannot come", reason=told)
        self._show(request.stream, ours.classes, theirs.classes)

    def _show(self, stream: str, ours: list[int], theirs: list[int]) -> None:
        """Tell whoever looks on how many items got the same class from both."""
        if self.observers:
            agreeing = sum(a == b for a, b in zip(ours, theirs, strict=True))
            self.observers.show(stream, Compared(len(ours), agreeing, self._trial.keeper.now))
