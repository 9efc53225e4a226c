"""What operators may want of a trial: they call a method, send a command through the store, or roll back there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normadapt.pilot.inbox import Word
from normadapt.pilot.stages import Cause, Stage
from normadapt.pilot.trial import Trial

COMMANDS = ("promote", "pause", "resume", "rollback", "stop")
"""What `carry_out` knows, as `Store.send` takes it."""

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


def _promote(trial: Trial, by: str, force: bool) -> None:
    stage = trial.position.stage
    if stage is Stage.SHADOW and trial.items == 0:
        raise ValueError("promote: nothing was learned in shadow yet -> send it some requests first")
    missing = trial.missing()
    if missing and not force:
        raise ValueError(f"promote: {stage.value} is not complete: {'; '.join(missing)} -> wait, or force=True")
    if not trial.move(Cause.PROMOTED, by):
        raise ValueError(f"promote: {stage.value} is the last stage, and nothing holds it -> nothing to be done")
