"""What operators may want of a trial: they call a method, send a command through the store, or roll back there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normadapt.pilot.inbox import Word, unfollowed
from normadapt.pilot.stages import Cause, Stage
from normadapt.pilot.status import STATUS
from normadapt.pilot.trial import Trial
from normadapt.store import Snapshot, Store

COMMANDS = ("promote", "pause", "resume", "rollback", "stop")
"""What `carry_out` knows, as `Store.send` takes it."""

_ADAPTING = ("shadow", "canary", "full")  # stages in which the model has moved on from the head, the last good one
_CAUSES = {"pause": Cause.PAUSED, "resume": Cause.RESUMED, "stop": Cause.STOPPED}


def carry_out(trial: Trial, command: str, facts: Mapping[str, Any]) -> None:
    """Do what an operator wants.

    Args:
        trial: The trial.
        command: One of `COMMANDS`.
        facts: `by`, who wants it, always; `force` of promote; `to` and `reason` of rollback.

    Raises:
        ValueError: If it is unknown or not possible now; nothing has changed then. Errors of the store are ValueErrors,
            too.
    """
    by = facts.get("by")
    if not isinstance(by, str) or not by:
        raise ValueError(f"{command} needs the name of who wants it; got by={by!r}")
    match command:
        case "promote":
            _promote(trial, by, bool(facts.get("force")))
        case "pause" | "resume" | "stop":
            trial.move(_CAUSES[command], by)
        case "rollback":
            to = facts.get("to")
            if to is not None and (isinstance(to, bool) or not isinstance(to, int)):
                raise ValueError(f"rollback(to=...) needs the number of a snapshot; got {to!r}")
            trial.roll_back(to, by, str(facts.get("reason") or ""))
        case _:
            raise ValueError(f"unknown command {command!r} -> {', '.join(COMMANDS)}")


def follow(trial: Trial, word: Word) -> None:
    """Do what an operator has said by way of the store.

    Raises:
        ValueError: As `carry_out`; also if the word is void.
    """
    if word.number is None:
        trial.follow_head(word.seq, word.facts)
    elif word.void:
        raise ValueError(f"{word.command}: a roll back came after it -> send it again if it is still wanted")
    else:
        carry_out(trial, word.command, word.facts)


def roll_back_in(store: Store, to: int | None, by: str, reason: str) -> tuple[Snapshot, Snapshot]:
    """Roll back in a store; a pilot that runs on it follows.

    Args:
        store: The trial's.
        to: A snapshot's number. None: the last good one, as the trial's status names it; once that is in use, the good
            one before it.
        by: Who wants it.
        reason: Why.

    Returns:
        The snapshots at the head before and after.

    Raises:
        StoreError: If there is no such snapshot, or the store cannot be written.
    """
    with store.transaction():
        before = store.head()
        stage = (store.read_state(STATUS) or {}).get("stage")
        if to is None and stage in _ADAPTING and before.good and unfollowed(store) is None:
            to = before.number  # what adapts has moved on from it
        return before, store.rollback(to, by=by, reason=reason)


def _promote(trial: Trial, by: str, force: bool) -> None:
    stage = trial.position.stage
    if stage is Stage.SHADOW and trial.items == 0:
        raise ValueError("promote: nothing was learned in shadow yet -> send it some requests first")
    missing = trial.missing()
    if missing and not force:
        raise ValueError(f"promote: {stage.value} is not complete: {'; '.join(missing)} -> wait, or force=True")
    if not trial.move(Cause.PROMOTED, by):
        raise ValueError(f"promote: {stage.value} is the last stage, and nothing holds it -> nothing to be done")
