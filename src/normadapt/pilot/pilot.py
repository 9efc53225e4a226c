"""`Pilot`: a model on trial that answers requests; it is let in step by step, and taken back at once on harm."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from normadapt.adapted._adapt import AdaptedModel, adapt
from normadapt.adapted.observation import Observation, Observers
from normadapt.errors import PlanError
from normadapt.layers.policy import Policy
from normadapt.layers.predictions import Predictions
from normadapt.pilot.answering import Compared, Desk
from normadapt.pilot.arms import Arms, Request, read_request
from normadapt.pilot.keeper import Keeper, Occurrence
from normadapt.pilot.late_labels import as_class
from normadapt.pilot.operators import carry_out, follow
from normadapt.pilot.plan import Plan
from normadapt.pilot.routing import Id, IdsError, read_ids
from normadapt.pilot.stages import Position, Stage, Transition
from normadapt.pilot.status import status
from normadapt.pilot.trial import Trial
from normadapt.pilot.verdict import Verdict
from normadapt.pilot.watch import Watch
from normadapt.profiles.source_profile import SourceProfile
from normadapt.store import Store


class Pilot(nn.Module):
    """A model that answers requests while its adapted self is tried: in shadow, on a share of them, on all.

    Call it as the model. Whatever goes wrong with adapting (harm that a guard sees, an exception, a store that is gone,
    a clock that runs backwards, a strange id) is an event, and the source's answer is there; only what the model itself
    raises for a request is raised. It computes as in eval mode always, its state_dict has the model's keys, and one
    lock serializes its requests. It cannot be copied or pickled, because two pilots must not write one trial.

    Args:
        model: As for `adapt`; never changed.
        profile: As for `adapt`.
        store: A `Store` or its folder. Without one nothing outlives the process.
        plan: Stages, guards and limits.
        policy: As for `adapt`.
        predictions: As for `adapt`; guards and labels need class probabilities, too.
        clock: Gives seconds.
        on_transition: Called with each `Transition`, outside the lock; what it raises becomes an event.

    Raises:
        PlanError: If there is no plan, or it does not fit the policy.
        StoreLockedError: If another pilot runs on the store, in this process or another.
        StoreError, SnapshotError: If the store cannot be used, or is another model's.
        UnsupportedLayerError, ProfileMismatchError: As `adapt`.

    Example:
        >>> import torch
        >>> from normadapt.pilot import Disagreement, NonFinite
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()
        >>> pilot = Pilot(model, plan=Plan(guards=(Disagreement(), NonFinite())))
        >>> pilot(torch.randn(2, 1, 8, 8), ids=["a", "b"]).shape, pilot.stage.value, pilot.serving
        (torch.Size([2, 3]), 'shadow', 'source')
    """

    def __init__(
        self,
        model: nn.Module,
        profile: SourceProfile | None = None,
        store: Store | Path | str | None = None,
        plan: Plan | None = None,
        *,
        policy: Policy | None = None,
        predictions: Predictions | None = None,
        clock: Callable[[], float] = time.time,
        on_transition: Callable[[Transition], None] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(plan, Plan):
            raise PlanError(
                f"a pilot needs a plan with at least one guard; got {plan!r} -> plan=Plan(guards=(Disagreement(), "
                "NonFinite())) or plan=Plan.from_toml(path)"
            )
        self.training = False
        self.adapted: AdaptedModel = adapt(model, profile, policy, predictions=predictions)
        self._opened_here = isinstance(store, (str, Path))
        self.store = Store(store) if isinstance(store, (str, Path)) else store
        self.on_transition = on_transition
        self.before_closing: list[Callable[[], object]] = []
        self._lock = threading.RLock()
        self._keeper = Keeper(self.adapted, self.store)
        try:
            self._trial = Trial(plan, self.adapted, self._keeper, clock)
        except BaseException:
            self._keeper.abandon()
            raise
        self._desk = Desk(self._trial, Arms(self.adapted), predictions, Observers(self._lock))
        self.register_load_state_dict_pre_hook(_refuse_load)  # type: ignore[no-untyped-call]
        self._keeper.flush()

    # -- what stands ---------------------------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """What is wanted of the trial."""
        return self._trial.plan

    @property
    def position(self) -> Position:
        """Where the pilot stands, in full."""
        return self._trial.position

    @property
    def stage(self) -> Stage:
        """How far the adapted model is let in."""
        return self._trial.position.stage

    @property
    def share(self) -> float:
        """Of the items, answered by the adapted model, or after a roll back by the last good snapshot."""
        return self._trial.position.share

    @property
    def serving(self) -> str:
        """Who answers that share: "source", "adapted" or "snapshot N"."""
        return self._trial.serving

    @property
    def watch(self) -> Watch:
        """The guards."""
        return self._trial.watch

    @property
    def events(self) -> tuple[Occurrence, ...]:
        """The last thousand events, the newest last; the store has them all."""
        return self._keeper.occurrences()

    def verdict(self) -> Verdict:
        """On the present stage: pass, fail or inconclusive, and why."""
        with self._lock:
            return self._trial.verdict()

    def status(self) -> dict[str, Any]:
        """Everything that an operator may want to see, as plain data for JSON."""
        with self._lock:
            return status(self._trial, self._keeper)

    def keep(self, name: str, document: Mapping[str, Any]) -> None:
        """Have a document of plain JSON values written to the store with what the pilot writes next.

        It waits for nobody: an observer may call it within a pass of `pilot.adapted` while another thread answers.
        """
        self._keeper.offer(name, document)

    def now(self) -> float:
        """What the pilot's clock said at the last request, in seconds."""
        return self._keeper.now

    def observe(self, observer: Callable[[str, Compared], object]) -> Observation:
        """Show to `observer(stream, compared)`, from now on, how answers that both models gave agree.

        The passes of the adapted model are shown by `pilot.adapted.observe`. What an observer raises is counted in the
        handle that is returned; its `remove()` ends it.
        """
        return self._desk.observers.add(observer)

    # -- answering -----------------------------------------------------------------------------------------------

    def forward(self, *args: Any, ids: Sequence[Id] | None = None, stream: str | None = None, **kwargs: Any) -> Any:
        """Answer a request.

        Args:
            *args: The model's own. Items are the rows of the first tensor; of a batch that mixes arms every tensor (and
                list) of that length is cut alike, and the answers are put back in order.
            ids: A name for each item, which decides its arm and by which a label may come. Without ids, items are
                counted off, and labels cannot find them.
            stream: Name of the stream (camera, line, tenant) that the items belong to.
            **kwargs: The model's own.

        Returns:
            What the model returns; rows of items that the arm answers come from it, all others from the source.
        """
        try:
            with self._lock:
                return self._answer(read_request(args, kwargs, ids, stream))
        finally:
            self._call_back()

    def _answer(self, request: Request) -> Any:
        for complaint in request.complaints:
            self._keeper.tally(complaint)
        self._obey()
        self._trial.begin()
        output = self._desk.answer(request)
        self._trial.finish(request.count)
        return output

    def label(self, id: Id, y: Any) -> bool:  # noqa: A002 (the word that a caller would write)
        """The true class of an item, whenever it becomes known; the adapted model never sees it.

        Args:
            id: As it was given with the request; 1 and "1" are the same id. An id that was given again before its label
                came stands for its last item.
            y: The class, a whole number from 0, below the model's number of classes.

        Returns:
            Whether it could be used: False for an id that is unknown, forgotten, was labelled before or was answered by
            one model alone, and for what is no class. That is counted as an event.
        """
        try:
            with self._lock:
                trial = self._trial
                label = as_class(y)
                try:
                    named = read_ids([id], 1)[0]
                except IdsError as error:
                    self._keeper.tally("strange label", reason=str(error))
                    return False
                if label is None:
                    self._keeper.tally("strange label", reason="the label is no class")
                    return False
                if not trial.labels.is_class(label):
                    known = "" if trial.labels.classes is None else f" to {trial.labels.classes - 1}"
                    self._keeper.tally("strange label", reason=f"expected a class from 0{known}; got {label}")
                    return False
                answered = trial.labels.match(named)
                if answered is None:
                    self._keeper.tally("label for nothing")
                    return False
                trip = trial.label(answered, label)
                if trip is not None:
                    trial.trip(trip)
                trial.finish(1)
                return True
        finally:
            self._call_back()

    # -- operators -----------------------------------------------------------------------------------------------

    def promote(self, by: str, *, force: bool = False) -> None:
        """An operator's word instead of labels: let the next stage begin, or start again after a roll back.

        Args:
            by: Who says so.
            force: Even though the stage has not had its items and its time, a guard is loud or labels say that it is
                worse.

        Raises:
            ValueError: If the stage is not complete, or is the last one.
        """
        self._operate("promote", {"by": by, "force": force})

    def pause(self, by: str) -> None:
        """Hold everything: the statistics in use and the stage. Guards go on."""
        self._operate("pause", {"by": by})

    def resume(self, by: str) -> None:
        """End a pause; or start again what is off or rolled back."""
        self._operate("resume", {"by": by})

    def rollback(self, by: str, to: int | None = None, reason: str = "") -> None:
        """Go back to a snapshot, which answers the share until an operator says more.

        By default to the last good one, which `status` names; where that is in use already it stays. `to` leads further
        back, and forward again.

        Raises:
            ValueError, StoreError, SnapshotError: If there is no such snapshot.
        """
        self._operate("rollback", {"by": by, "to": to, "reason": reason})

    def stop(self, by: str) -> None:
        """Stage off: the source answers, nothing else runs, until `resume` or `promote` begins a new shadow stage."""
        self._operate("stop", {"by": by})

    def poll(self) -> None:
        """Look at once for commands in the store; else a request looks once a second."""
        try:
            with self._lock:
                self._obey(now=True)
                self._keeper.flush()
        finally:
            self._call_back()

    def _operate(self, command: str, facts: Mapping[str, Any]) -> None:
        try:
            with self._lock:
                carry_out(self._trial, command, facts)
                self._keeper.flush()
        finally:
            self._call_back()

    def _obey(self, *, now: bool = False) -> None:
        """Follow what operators sent by way of the store."""
        for word in self._keeper.poll(now=now):
            try:
                follow(self._trial, word)
            except ValueError as error:
                self._keeper.note("command refused", command=word.command, number=word.number, reason=str(error))

    def _call_back(self) -> None:
        """Tell of transitions, outside the lock."""
        while True:
            with self._lock:
                if not self._trial.transitions:
                    return
                transition = self._trial.transitions.pop(0)
            if self.on_transition is None:
                continue
            try:
                self.on_transition(transition)
            except Exception as error:
                with self._lock:
                    self._keeper.tally("callback trouble", reason=repr(error))

    # -- torch's own protocols, and the end ------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Pilot:
        """Set `training` and nothing else."""
        self.training = mode
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own keys, with the adapted model's statistics in use."""
        return self.adapted.state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled."""
        raise TypeError(
            "a Pilot cannot be copied or pickled: two must not write one trial -> copy pilot.adapted instead"
        )

    def close(self) -> int:
        """Save the state for the next process and let go of the store; a request after it is answered from memory.

        It raises nothing. What could not be written is lost with the process, and the logger "normadapt" warns of it.

        Returns:
            How many writes the store did not take: 0 if all is on the disk.
        """
        with self._lock:
            for last in self.before_closing:
                try:
                    last()
                except Exception as error:
                    self._keeper.tally("callback trouble", reason=repr(error))
            self._trial.save(whole=True)
            lost = self._keeper.close()
            if self._opened_here and self.store is not None:
                self.store.close()
            return lost

    def __enter__(self) -> Pilot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_load(*_: Any) -> None:
    raise TypeError(
        "a Pilot's model cannot be changed under the trial -> load into the model and make a new Pilot of it"
    )
