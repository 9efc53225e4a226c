"""The drill's story: shadow, canary, full, one fault after the other, and the way back each time, with checks."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from normadapt.pilot.faults import FAULTS
from normadapt.pilot.rehearsal import BATCH, TICK, Rehearsal, Stuck, Tally, are_all_equal, are_equal
from normadapt.pilot.stages import Cause, Stage
from normadapt.store import Store

_OPERATOR = "the drill"
_ENOUGH = 0.03  # share of right answers that a snapshot may fall behind the source by, on the few images of a check
_CHECK = 40  # requests of such a check
_GOES_ON = 8000  # images until a fault that goes on trips a second time: the canary that finds it sees one in a hundred


@dataclass(frozen=True)
class Expectation:
    """What is expected of a fault.

    Args:
        by: "guards" that need no label; "labels" at the latest, if it does harm; "nobody": what no guard can see;
            "neither": the source cannot answer it either, so that going back would not help.
        within: Items until then; for "nobody" and "neither" how long it lasts.
        why: For people, where nothing trips.
        learned: Whether statistics may follow it; frames without a picture are no evidence.
    """

    by: str
    within: int
    why: str = ""
    learned: bool = True


EXPECTED: dict[str, Expectation] = {
    "drift": Expectation("guards", 4000),
    "noise": Expectation("nobody", 4000, "there is no right answer to lose"),
    "poisoned": Expectation("labels", 6000),
    "frozen": Expectation("nobody", 1500, "the source is fooled alike"),
    "dark": Expectation("nobody", 1500, "nothing is learned from it", learned=False),
    "nan": Expectation("neither", 10 * BATCH, "nobody could answer"),
    "constant": Expectation("nobody", 1500, "nothing is learned from it", learned=False),
    "inverted": Expectation("guards", 2000),
}
"""The drill's faults in their turn; the last one goes on after the first roll back."""


_FINDERS = {
    "guards": "a guard trips",
    "labels": "a guard trips, late labels at the latest, or there is no harm",
    "nobody": "by chance, if at all,",
}


class Story(Rehearsal):
    """The story: each method is a step or two of it."""

    def let_in(self) -> None:
        """Shadow, the canary's steps and full, each passed by itself."""
        self.begin("shadow")
        same = True
        while self.pilot.stage in (Stage.OFF, Stage.SHADOW):
            if self.sent > 20 * self.plan.shadow.items:
                raise Stuck("shadow", "labels let it on", "; ".join(self.pilot.verdict().reasons))
            before = self.pilot.stage
            expected, _ = self.send()
            same &= before is Stage.OFF or are_equal(self.output, expected)
        got = f"{self.sent:,} images, {'every answer' if same else 'NOT every answer'} the source's"
        self.add("shadow", "both answer, the source is heard", got, ok=same)
        self.climb("canary")
        self.begin("full")
        tally = Tally()
        self.until(lambda: self.pilot.position.rollbacks == 0 and self._passed_full(), 20 * self.plan.full.items, tally)
        number = self.pilot.status()["snapshot"]
        self.add(
            "full",
            "adapted, no worse than the source",
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
            how = "labels let it on" if passed else f"{self.moves[-1].cause.value}: {self.moves[-1].reason}"
            self.add(
                f"{name} {position.share:.0%}",
                f"{position.share:.0%} adapted, weights to {rule.max_weight:g}; labels let it on",
                f"{share:.1%} of {items:,} images; {how}",
                ok=passed and abs(share - position.share) <= 0.01 + 2 * (position.share / items) ** 0.5,
                share=share,
                images=items,
            )
            if not passed:
                raise Stuck(f"{name} {position.share:.0%}", "the next step", "the trial cannot go on")

    def restart(self) -> None:
        """The process ends; another one goes on from the store."""
        self.begin("restart")
        self.pilot.close()
        before = self.pilot.position, self.pilot.status()["items"], self._evidence()
        self.pilot = self.open()
        after = self.pilot.position, self.pilot.status()["items"], self._evidence()
        self.send()
        got = f"{self.pilot.stage.value}, {after[1]:,} images, snapshot {self.pilot.status()['snapshot']}"
        same = before == after
        self.add("restart", "another process goes on from the store", got if same else f"NOT the same: {got}", ok=same)

    def _evidence(self) -> list[float]:
        return [state.log_value for state in self.pilot.watch.states.values()]

    def fault(self, name: str) -> None:
        """A fault, until a guard trips or its time is over."""
        fault, wanted = FAULTS[name], EXPECTED[name]
        self.begin(f"fault: {name}")
        self.change = fault.make(torch.Generator().manual_seed(self.seed))
        if wanted.by == "neither":
            self.unanswerable(name)
            return
        tally, first, statistics_before = Tally(), self.sent, self._statistics()
        self.before = self.pilot.status()["snapshot"]
        usual = statistics.median(self.took) if self.took else None
        while self.sent - first < wanted.within and self.pilot.stage is not Stage.ROLLED_BACK:
            expected, took = self.send(tally, self.change, fault.legible)
            if self.pilot.stage is Stage.FULL:
                self.took.append(took)
        items = self.sent - first
        if self.pilot.stage is not Stage.ROLLED_BACK:
            seen = "no guard trips" if wanted.by == "nobody" else f"{_FINDERS[wanted.by]} within {wanted.within:,}"
            why = f": {wanted.why}" if wanted.why else ""
            harmless = wanted.by == "labels" and tally.gain > -_ENOUGH
            kept = wanted.learned or are_all_equal(statistics_before, self._statistics())
            told = f"; statistics {'as before' if kept else 'CHANGED'}" if not wanted.learned else ""
            self.add(
                f"fault: {name}",
                f"{seen}{why}",
                f"none in {items:,} images" + (f"; {tally}" if tally.images else "") + told,
                ok=(wanted.by == "nobody" or harmless) and kept,
                gap=not harmless,
                caught=False,
                images=items,
            )
            return
        trip = next(event for event in reversed(self.pilot.events) if event.kind == "trip").facts
        by_label = trip["guard"] == "labelled_error"
        served = by_label or are_equal(self.output, expected)  # a label trips after an answer has gone out
        head = self.pilot.store.head().number if self.pilot.store is not None else 0
        number = self.pilot.status()["snapshot"]
        by = "late labels" if by_label else trip["guard"]
        got = f"{by} after {items:,}; snapshot {number} {took:.0f} ms later"
        if not served:
            got += "; NOT answered by the source"
        self.add(
            f"fault: {name}",
            f"{_FINDERS[wanted.by]} within {wanted.within:,}",
            got,
            ok=served and head == number and number > 0 and (wanted.by == "labels" or not by_label),
            caught=True,
            guard=trip["guard"],
            reason=trip["reason"],
            images=items,
            snapshot=number,
            ms=took,
            usual_ms=usual,
        )

    def _statistics(self) -> dict[str, torch.Tensor]:
        """Those in use."""
        return {key: value.clone() for key, value in self.pilot.adapted.state_dict().items()}

    def unanswerable(self, name: str) -> None:
        """Inputs that no model can answer: the source's answers go out, nothing is learned and nothing rolled back."""
        fault, wanted = FAULTS[name], EXPECTED[name]
        before, first, same = self.pilot.adapted.snapshot(), self.sent, True
        while self.sent - first < wanted.within and self.pilot.stage is Stage.FULL:
            expected, _ = self.send(None, self.change, fault.legible)
            same &= are_equal(self.output, expected)
        kept = are_all_equal(before, self.pilot.adapted.snapshot())
        stays = self.pilot.stage is Stage.FULL
        self.add(
            f"fault: {name}",
            f"the source answers, nothing is learned, no roll back: {wanted.why}",
            f"{'every answer' if same else 'NOT every answer'} the source's; "
            f"statistics {'as before' if kept else 'CHANGED'}; {'still full' if stays else 'NOT full'} after "
            f"{self.sent - first:,}",
            ok=same and kept and stays,
            caught=False,
            images=self.sent - first,
        )

    def go_on(self) -> None:
        """The camera is repaired, and nothing had to be done."""
        self.begin("repaired")
        tally = Tally()
        for _ in range(_CHECK):
            self.send(tally)
        self.add(
            "repaired",
            "adapted goes on, no worse than the source",
            str(tally),
            ok=self.pilot.serving == "adapted" and tally.gain > -_ENOUGH,
            serving=self.pilot.serving,
            right=tally.ours / tally.images,
            source_right=tally.theirs / tally.images,
        )

    def recover(self, *, alone: bool) -> None:
        """The camera is repaired: the last good snapshot answers, then the canary begins again.

        Args:
            alone: Whether labels lead it to full again; else an operator's word does.
        """
        self.begin("repaired")
        if self.pilot.stage is Stage.FULL:  # nobody saw it: what it taught the model may be in the last snapshots
            self._operator_goes_back()
        serving, tally = self.pilot.serving, Tally()
        stop = min(_CHECK, int(self.plan.cool_down / TICK) - 2)
        for _ in range(stop):
            self.send(tally)
        self.add(
            "repaired",
            f"{serving}, no worse than the source",
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
                f"canary {self.plan.shares[0]:.0%}",
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
        """The same fault goes on: the snapshot trips, or the canary that begins again after the cool-down.

        Unless the canary, whose weights are limited, sees in it what the source sees: then there is nothing to find.
        """
        self.begin("it goes on")
        first, unlike = self.sent, 0
        while self.sent - first < _GOES_ON and self.pilot.serving != "source":
            expected, _ = self.send(None, self.change, FAULTS[name].legible)
            unlike += int((self.output.argmax(1) != expected.argmax(1)).sum())
        position, items = self.pilot.position, self.sent - first
        if self.pilot.stage is Stage.CANARY and unlike == 0:
            self.add(
                f"{name} goes on",
                "second trip, or nothing to find: every answer of the class that the source gives",
                f"no trip in {items:,}, and no answer of another class: no harm",
                ok=True,
                gap=True,
                images=items,
            )
            return
        self.add(
            f"{name} goes on",
            f"second trip, in the canary at the latest: all to the source within {_GOES_ON:,}",
            f"{self.pilot.serving} answers all after {items:,}; {unlike:,} answers were of another class",
            ok=self.pilot.serving == "source" and position.share == 0 and position.rollbacks == 2,
            images=items,
        )
        self.begin("repaired")
        same = True
        for _ in range(int(self.plan.cool_down / TICK) + 5):
            expected, _ = self.send()
            same &= are_equal(self.output, expected)
        waits = self.pilot.position.waits and self.pilot.stage is Stage.ROLLED_BACK
        self.add(
            "repaired",
            "the source, until an operator says more",
            f"{'every answer' if same else 'NOT every answer'} the source's; {'waits' if waits else 'does NOT wait'}",
            ok=same and waits,
        )
        self.begin("promote")
        self.pilot.promote(_OPERATOR, force=True)  # a step before it may have failed: that is told, not raised
        where = self.pilot.position
        self.send()
        self.add(
            "promote",
            f"an operator's word: canary {self.plan.shares[0]:.0%}",
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
            "log and snapshots are whole",
            got if found.ok else "; ".join(found.problems),
            ok=found.ok,
            events=found.events,
            snapshots=found.snapshots,
            trips=trips,
        )
