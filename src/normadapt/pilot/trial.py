"""One trial under way: where it stands, what its guards have seen, what labels say, and what each event does to it.

Knows the adapted model only through its keeper and its policy's ceiling; asks no model for answers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normadapt.adapted._adapt import AdaptedModel
from normadapt.errors import NormadaptError
from normadapt.pilot.baseline import BURSTS_SHOW
from normadapt.pilot.ceiling import Ceiling, describe_policy
from normadapt.pilot.keeper import ANSWERED, STATE, Keeper
from normadapt.pilot.late_labels import Answered, LateLabels
from normadapt.pilot.plan import Plan, StageRule
from normadapt.pilot.resuming import document, resume
from normadapt.pilot.routing import Id
from normadapt.pilot.signals import Signals, labelled_signals
from normadapt.pilot.stages import Cause, Position, Stage, Transition, advance, same_place
from normadapt.pilot.status import STATUS, status
from normadapt.pilot.timing import TrafficTime
from normadapt.pilot.verdict import QUIET, Findings, Outcome, Verdict, incomplete, judge, warnings
from normadapt.pilot.watch import Trip, Watch


class Trial:
    """State and memory of a pilot.

    Args:
        plan: What is wanted.
        adapted: The model on trial.
        keeper: Where good snapshots, events and state go.
        clock: Gives seconds.

    Raises:
        PlanError: If the plan sets a ceiling to the weight and the policy has none.
    """

    def __init__(self, plan: Plan, adapted: AdaptedModel, keeper: Keeper, clock: Callable[[], float]) -> None:
        self.plan = plan
        self.keeper = keeper
        self.time = TrafficTime(clock, plan.idle)
        self.position = Position()
        self.watch = Watch(plan.guards, plan.alpha)
        self.labels = LateLabels(plan.remember, plan.label_margin, plan.label_alpha)
        self.era = self.visit = 0  # roll backs and transitions: see `Answered`
        self.items = 0  # answered by the arm in this stage
        self.answered: Counter[str] = Counter()
        self.failure = ""
        self.transitions: list[Transition] = []
        self.since_commit = self._since_save = 0  # items
        self._lowest: dict[str, tuple[float, int]] = {}  # by guard: log e-value, and the moment
        self.policy = describe_policy(adapted.policy)
        self._ceiling = Ceiling(adapted, (plan.shadow, *plan.canary, plan.full))
        self.keeper.now = self.time.now()
        resume(self)

    # -- what stands ---------------------------------------------------------------------------------------------

    @property
    def rule(self) -> StageRule:
        """What the present stage asks for; of a pilot that is off or rolled back, what its next one will."""
        match self.position.stage:
            case Stage.CANARY:
                return self.plan.canary[self.position.step]
            case Stage.FULL:
                return self.plan.full
            case Stage.ROLLED_BACK if self.position.learned:
                return self.plan.canary[0]
            case _:
                return self.plan.shadow

    @property
    def serving(self) -> str:
        """Who answers the share: "source", "adapted" or "snapshot N"."""
        if self.position.share == 0:
            return "source"
        if self.position.stage is not Stage.ROLLED_BACK:
            return "adapted"
        return "snapshot in memory" if self.keeper.number is None else f"snapshot {self.keeper.number}"

    @property
    def adapting(self) -> bool:
        """Whether the arm's model adapts to what it answers."""
        return self.position.stage is not Stage.ROLLED_BACK and not self.position.paused

    def findings(self) -> Findings:
        """What has been seen in the stage so far."""
        loudest = max(self.watch.states.values(), key=lambda state: state.log_value, default=None)
        return Findings(
            stage=self.position.stage,
            items=self.items,
            baked=self.time.counted,
            gap=self.time.gap(),
            loudest="" if loudest is None else loudest.guard.name,
            loudness=0.0 if loudest is None else loudest.log_value / self.watch.threshold,
            labels=self.labels.count,
            label_evidence=self.labels.evidence,
            labels_against=self.labels.against >= self.labels.threshold,
            paused=self.position.paused,
            failure=self.failure,
        )

    def verdict(self) -> Verdict:
        """On the present stage."""
        return judge(self.findings(), self.rule, self.plan, self.labels.threshold)

    # -- what happens --------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A request has come: time goes on, a new pilot starts, a cool-down may be over."""
        self.time.tick()
        self.keeper.now = self.time.last or 0.0
        if self.time.trouble is not None:
            self.keeper.tally("clock trouble", reason=self.time.trouble)
        if self.position.stage is Stage.OFF:
            self.move(Cause.STARTED)
        elif self.position.stage is Stage.ROLLED_BACK and self.time.counted >= self.plan.cool_down:
            self.move(Cause.COOLED, reason=f"{self.time.counted:.0f} s under traffic")

    def take(self, rows: Signals, items: int) -> Trip | None:
        """What guards measured on some items of the arm: learned from in shadow, judged elsewhere."""
        if self.position.stage is not Stage.SHADOW:
            trip = self._update(rows, self.keeper.moment)
        else:  # nothing is normal yet; only the hard guards know what harm is
            trip = self.watch.update({guard.name: rows.get(guard.name, []) for guard in self.plan.guards if guard.hard})
            if trip is None:
                self.watch.learn(rows)
        if trip is None:
            self.items += items
            self.keeper.moment += items
            self.since_commit += items
        return trip

    def _update(self, rows: Signals, moment: int) -> Trip | None:
        """Show the guards some rows of items from that moment, and remember when each had the least evidence."""
        trip = self.watch.update(rows)
        for name, state in self.watch.states.items():
            value = state.log_value
            if rows.get(name) and value <= self._lowest.get(name, (value, 0))[0]:
                self._lowest[name] = value, moment
        return trip

    def trip(self, trip: Trip) -> None:
        """Harm was found: back to the last good snapshot, or to the source.

        Evidence began to rise when harm began, or later: the longer it took to be enough, the less sure is when. What
        was kept since then, or before by as many items as it took (`commit_every` at least), is good no longer.
        """
        self.keeper.note("trip", stage=self.position.stage.value, **trip.to_dict())
        if trip.log_value is not None and trip.guard in self._lowest:
            began, now = self._lowest[trip.guard][1], self.keeper.moment
            gone = self.keeper.distrust(began - max(self.plan.commit_every, now - began))
            if gone:
                self.keeper.note("snapshots distrusted", numbers=list(gone), guard=trip.guard)
        self.failure = f"{trip.guard}: {trip.reason}"
        self.move(Cause.TRIPPED, reason=self.failure)

    def finish(self, count: int) -> None:
        """A request of so many items was answered: commit, promote and save where it is time to."""
        self._since_save += count
        if not self.promote_if_passed():
            self._prove()
        if self._since_save >= self.plan.save_every:
            self.save()
        self.keeper.flush()

    def promote_if_passed(self) -> bool:
        """Let the next stage begin if this one has passed; whether it did."""
        if self.items < self.rule.items or self.time.counted < self.rule.bake:
            return False  # most requests end here; the verdict would say the same in words
        return self.verdict().outcome is Outcome.PASS and self.move(Cause.PASSED)

    def remember(
        self, ids: Sequence[Id], adapted: Sequence[int], source: Sequence[int], classes: int | None = None
    ) -> None:
        """Keep the classes that both models gave to some items, for labels that may come.

        Args:
            ids: Of the items.
            adapted: Classes that the adapted model gave them.
            source: Classes that the source gave them.
            classes: How many the model knows, where that is known.
        """
        self.labels.classes = classes or self.labels.classes
        self.labels.remember(ids, adapted, source, self.era, self.visit, self.keeper.moment)

    def label(self, answered: Answered, label: int) -> Trip | None:
        """A label has come for an item that both models answered."""
        if answered.era != self.era or self.position.stage is Stage.OFF:
            self.labels.outdated += 1  # says nothing of the model that is in use now
            return None
        wrong = answered.adapted != label, answered.source != label
        if answered.visit == self.visit:
            self.labels.weigh(*wrong)
        rows = labelled_signals(self.plan.guards, [wrong[0]], [wrong[1]])
        if self.position.stage is not Stage.SHADOW:
            return self._update(rows, answered.moment)
        self.watch.learn(rows)
        return None

    def roll_back(self, to: int | None, by: str, reason: str, *, head: bool = True) -> None:
        """An operator's roll back: to a snapshot, or the last good one.

        Raises:
            ValueError, StoreError, SnapshotError: If there is no such snapshot; nothing has changed then.
        """
        if to is not None:
            self.keeper.adopt(to)
        self.failure = f"rolled back by {by}" + (f": {reason}" if reason else "")
        if self.move(Cause.ROLLED_BACK, by, reason, head=head):
            return
        self._go_back(by, reason, head=head)  # it was off or waits already: another snapshot, the same stage
        self.keeper.note("rolled back", to=self.keeper.number, by=by, reason=reason)
        self.save(whole=True)

    def follow_head(self, seq: int, facts: Mapping[str, Any]) -> None:
        """Go where somebody has moved the store's head; to the source where that snapshot cannot be used.

        Args:
            seq: The roll back's place in the log.
            facts: Its particulars, as `Store.rollback` wrote them.
        """
        by, reason = str(facts.get("by") or "another process"), str(facts.get("reason", ""))
        self.keeper.followed(seq)
        try:
            self.roll_back(facts["to"], by, reason, head=False)
        except (ValueError, NormadaptError) as error:  # who rolls back wants the adapted model to answer no more
            self.keeper.note("roll back refused", to=facts["to"], reason=str(error).splitlines()[0])
            self.roll_back(0, by, reason)

    def missing(self) -> tuple[str, ...]:
        """What speaks against an operator's word to go on, unless it is a forced one."""
        if self.position.stage in (Stage.OFF, Stage.ROLLED_BACK):
            return ()
        findings = self.findings()
        return incomplete(findings, self.rule, self.plan) + warnings(findings, self.plan)

    # -- moving --------------------------------------------------------------------------------------------------

    def move(self, cause: Cause, by: str = "", reason: str = "", *, head: bool = True) -> bool:
        """Follow a cause, with all that it brings; whether it led anywhere."""
        before = self.position
        after = advance(before, cause, shares=self.plan.shares, good=self.keeper.number != 0)
        if after == before:
            return False
        if cause in (Cause.PASSED, Cause.PROMOTED) and before.stage in (Stage.SHADOW, Stage.CANARY, Stage.FULL):
            self._commit(f"{before.stage.value} {cause.value}")
        self.position = after
        if after.stage is Stage.ROLLED_BACK and cause in (Cause.TRIPPED, Cause.ROLLED_BACK):
            self._go_back(by or "the pilot", reason, head=head)
        elif not same_place(before, after):
            self._enter()
        move = Transition(self.keeper.now, cause, before, after, self.serving, by, reason)
        self.transitions.append(move)
        self.keeper.note("transition", **move.to_dict())
        self.save(whole=True)
        return True

    def _go_back(self, by: str, reason: str, *, head: bool) -> None:
        """The last good snapshot is behind the arm: what was seen of another model says nothing of it."""
        self.era += 1
        self.keeper.back(by, reason, head=head)
        self._enter()

    def _enter(self) -> None:
        """Another stage, or another model behind the arm: counts begin anew."""
        learned = self.items
        self.visit += 1
        self.items = self.since_commit = 0
        self._lowest = {}
        self.keeper.candidate = None
        self.time.restart()
        self.labels.restart()
        if self.position.stage is not Stage.ROLLED_BACK:
            self.failure = ""
        if self.position.stage is Stage.SHADOW:
            self.watch = Watch(self.plan.guards, self.plan.alpha)
        elif not self.watch.frozen and self.position.learned:
            self.watch.freeze_baselines()
            self._warn(learned)
        self.watch.restart(cusum=self.plan.cusum and self.position.stage is Stage.FULL)
        self._ceiling.set(self.rule)

    def _warn(self, items: int) -> None:
        """Say what a shadow stage of so many items could not teach the guards."""
        if self.watch.blind:
            self.keeper.note("blind guards", guards=list(self.watch.blind))
        if self.watch.states and items < BURSTS_SHOW:
            self.keeper.note(
                "short shadow",
                items=items,
                advised=BURSTS_SHOW,
                reason="harmless bursts may not have shown yet, and may be taken for harm",
            )

    def _commit(self, note: str, *, candidate: bool = False) -> None:
        if self.watch.level <= QUIET:
            self.keeper.commit(note, candidate=candidate, stage=self.position.stage.value, items=self.items)

    def _prove(self) -> None:
        """A state is good when no guard was loud for `commit_every` items after it.

        Harm takes some items to be seen; what is committed as it is found may already hold it, and going back to that
        would not help.
        """
        if self.watch.level > QUIET or not self.adapting or self.position.share == 0:
            self.keeper.candidate, self.since_commit = None, 0
        elif self.since_commit >= self.plan.commit_every:
            if self.keeper.candidate is not None:
                self._commit(f"{self.position.stage.value}, {self.items} items", candidate=True)
            self.keeper.consider()
            self.since_commit = 0

    # -- state ---------------------------------------------------------------------------------------------------

    def resumed(self) -> None:
        """The state is another process's, which has ended."""
        self._ceiling.set(self.rule)
        self.keeper.note("resumed", stage=self.position.stage.value, items=self.items)

    def forget(self) -> None:
        """Stand where a new trial does."""
        self.position = Position()
        self.watch = Watch(self.plan.guards, self.plan.alpha)
        self.labels = LateLabels(self.plan.remember, self.plan.label_margin, self.plan.label_alpha)

    def save(self, *, whole: bool = False) -> None:
        """Hand the state to the keeper; the whole of it includes what late labels need, which may be long."""
        self._since_save = 0
        if whole or self.labels.long:  # first: the state below says which labels came since
            self.keeper.save(ANSWERED, self.labels.to_dict(answered=True))
        self.keeper.save(STATE, document(self))
        self.keeper.save(STATUS, {**status(self, self.keeper), "saved": time.time()})
