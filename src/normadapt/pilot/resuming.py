"""A trial as a document in its store, and how another process goes on from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from normadapt.pilot.keeper import ANSWERED, STATE
from normadapt.pilot.stages import Cause, Position, Stage
from normadapt.pilot.watch import Watch

if TYPE_CHECKING:
    from normadapt.pilot.trial import Trial

_FORMAT = 2


def document(trial: Trial) -> dict[str, Any]:
    """Everything as plain data, for another process to go on from."""
    return {
        "format": _FORMAT,
        "plan": trial.plan.digest,
        "policy": trial.policy,
        "position": {**asdict(trial.position), "stage": trial.position.stage.value},
        "era": trial.era,
        "visit": trial.visit,
        "items": trial.items,
        "moment": trial.keeper.moment,
        "since_commit": trial.since_commit,
        "answered": dict(trial.answered),
        "failure": trial.failure,
        "time": trial.time.to_dict(),
        "watch": trial.watch.to_dict(),
        "labels": trial.labels.to_dict(answered=False),
        "counts": dict(trial.keeper.counts),
    }


def resume(trial: Trial) -> None:
    """Go on from what the store has, if it has something; a roll back that was done there meanwhile is followed."""
    moved = trial.keeper.moved()
    state = trial.keeper.read(STATE)
    if state is None or not _is_same_trial(trial, state) or not _is_loaded(trial, state):
        if moved is not None:  # the adapted model begins at that head, and answers nobody yet
            trial.keeper.followed(moved.seq)
        return
    trial.resumed()
    if moved is not None:
        trial.follow_head(moved.seq, moved.facts)


def _is_same_trial(trial: Trial, state: Mapping[str, Any]) -> bool:
    if state.get("plan") != trial.plan.digest:
        trial.move(Cause.REPLANNED, reason="baselines belong to a plan: its own are learned in shadow")
        return False
    policy = state.get("policy", trial.policy)  # an earlier version did not say
    if policy != trial.policy:
        what = f"baselines belong to a policy: they were learned with {policy}, now it is {trial.policy}"
        trial.move(Cause.REPLANNED, reason=what)
        return False
    return True


def _is_loaded(trial: Trial, state: Mapping[str, Any]) -> bool:
    try:
        _load(trial, state, trial.keeper.read(ANSWERED) or {})
    except (KeyError, TypeError, ValueError) as error:
        trial.keeper.note("state refused", reason=repr(error))
        trial.forget()
        return False
    return True


def _load(trial: Trial, state: Mapping[str, Any], answered: Mapping[str, Any]) -> None:
    if state["format"] != _FORMAT:
        raise ValueError(f"format {state['format']!r}; this version reads {_FORMAT}")
    watch = Watch.from_dict(state["watch"], guards=trial.plan.guards)
    position = Position(**{**state["position"], "stage": Stage(state["position"]["stage"])})
    trial.labels.from_dict({**state["labels"], "answered": answered.get("answered", [])})
    trial.time.from_dict(state["time"])
    trial.era, trial.visit = int(state["era"]), int(state["visit"])
    trial.items, trial.since_commit = int(state["items"]), int(state["since_commit"])
    trial.keeper.moment = int(state["moment"])
    trial.answered = Counter(state["answered"])
    trial.failure = str(state["failure"])
    trial.keeper.counts.update(state["counts"])
    trial.watch, trial.position = watch, position
