"""A trial on the demo's real model, request by request: what the drill tells its story with.

USPSNet, trained on USPS digits, answers MNIST digits (`normadapt.demo`). Every answer comes from a `Pilot` with a store
on the disk; only the clock is turned by hand, half a minute a request, because baking times would take hours. Labels
come late, for those images that a person could still tell.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normadapt.demo import mnist_digits, normalized, usps_net
from normadapt.pilot.faults import Change
from normadapt.pilot.pilot import Pilot
from normadapt.pilot.plan import Plan
from normadapt.pilot.stages import Transition

BATCH, TICK, LATE = 16, 30.0, 10
"""Images a request; seconds between two on the drill's clock; requests until labels come."""


@dataclass(frozen=True)
class Step:
    """A step of the drill, and whether it went as expected.

    Args:
        at: Images answered when it began.
        name: What happens.
        expected: What should come of it.
        got: What came of it.
        ok: Whether the two agree.
        gap: Whether it shows what guards cannot see.
        facts: Numbers.
    """

    at: int
    name: str
    expected: str
    got: str
    ok: bool
    gap: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Stuck(Exception):  # noqa: N818 (no error: the drill ends here, and says so)
    """A step did not come to its end."""

    def __init__(self, name: str, expected: str, got: str) -> None:
        super().__init__(got)
        self.name = name
        self.expected = expected


@dataclass
class Tally:
    """Right answers: of what went out, and of the source on the same images."""

    images: int = 0
    ours: int = 0
    theirs: int = 0

    def __str__(self) -> str:
        if not self.images:
            return "no image that could be told"
        return f"{self.ours / self.images:.1%} right, source {self.theirs / self.images:.1%}"

    @property
    def gain(self) -> float:
        """Share of right answers beyond the source's."""
        return (self.ours - self.theirs) / self.images if self.images else 0.0


class Rehearsal:
    """A pilot on the demo's model and images, with a clock that is turned by hand and labels that come late.

    Args:
        store: Folder of a new store.
        plan: The trial's.
        seed: Of the order of the images.
        progress: Called with the number of images answered so far, and what happens.
        opened: Called with every pilot that is opened, to look on.
    """

    def __init__(
        self,
        store: Path,
        plan: Plan,
        seed: int,
        progress: Callable[[int, str], None] | None,
        opened: Callable[[Pilot], object] | None = None,
    ) -> None:
        self.model = usps_net()
        self.digits, self.labels = mnist_digits(seed)
        self.seed = seed
        self.now = time.time()
        self.plan = plan
        self.folder = store
        self.moves: list[Transition] = []
        self._opened = opened
        self.pilot = self.open()
        self.sent = 0
        self.steps: list[Step] = []
        self.took: list[float] = []  # milliseconds of requests in full
        self.doing = ""
        self._began = 0
        self._progress = progress
        self._coming: deque[tuple[list[int], list[int]]] = deque()

    def open(self) -> Pilot:
        """A pilot on the store, new or resumed."""
        pilot = Pilot(
            self.model, store=self.folder, plan=self.plan, clock=lambda: self.now, on_transition=self.moves.append
        )
        if self._opened is not None:
            self._opened(pilot)
        return pilot

    # -- traffic -------------------------------------------------------------------------------------------------

    def send(self, tally: Tally | None = None, change: Change | None = None, legible: int = 1) -> tuple[Tensor, float]:
        """One request; the source's answer to it and the milliseconds that it took."""
        numbers = torch.arange(self.sent, self.sent + BATCH)
        places = numbers % len(self.digits)
        inputs, labels = normalized(self.digits[places]), self.labels[places]
        inputs = inputs if change is None else change(inputs)
        self.now += TICK
        start = time.perf_counter()
        self.output = self.pilot(inputs, ids=numbers.tolist())
        took = 1e3 * (time.perf_counter() - start)
        expected: Tensor = self.model(inputs)
        told = torch.arange(BATCH) % legible == 0 if legible else torch.zeros(BATCH, dtype=torch.bool)
        if tally is not None:
            tally.images += int(told.sum())
            tally.ours += int((self.output.argmax(1) == labels)[told].sum())
            tally.theirs += int((expected.argmax(1) == labels)[told].sum())
        self._coming.append((numbers[told].tolist(), labels[told].tolist()))
        if len(self._coming) > LATE:
            for id_, label in zip(*self._coming.popleft(), strict=True):
                self.pilot.label(id_, label)
        self.sent += BATCH
        if self._progress is not None:
            self._progress(self.sent, self.doing)
        return expected, took

    def until(self, done: Callable[[], bool], limit: int, tally: Tally | None = None) -> None:
        """Requests until something is so.

        Raises:
            Stuck: If it is not after so many images.
        """
        stop = self.sent + limit
        while not done():
            if self.sent >= stop:
                verdict = "; ".join(self.pilot.verdict().reasons)
                raise Stuck(self.doing, "the next stage", f"still {self.pilot.stage.value}: {verdict}")
            self.send(tally)

    def begin(self, doing: str) -> None:
        """Another step."""
        self.doing, self._began = doing, self.sent

    def add(self, name: str, expected: str, got: str, *, ok: bool, gap: bool = False, **facts: Any) -> None:
        """Note how a step went."""
        self.steps.append(Step(self._began, name, expected, got, ok, gap, facts))


def are_all_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two states have the same tensors, equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two answers are equal to the bit, NaN included."""
    return torch.equal(one.nan_to_num(), other.nan_to_num())
