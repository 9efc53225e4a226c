"""Where a pilot stands, and which cause leads from where to where: a pure function of small plain values.

    off -> shadow -> canary, step after step -> full
    shadow, canary or full -> rolled_back -> canary, its first step again

Nothing here knows a model, a guard or a clock; `advance` is the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any


class Stage(StrEnum):
    """How far the adapted model is let in."""

    OFF = "off"
    SHADOW = "shadow"
    CANARY = "canary"
    FULL = "full"
    ROLLED_BACK = "rolled_back"


class Cause(StrEnum):
    """Why a pilot moves."""

    STARTED = "started"
    PASSED = "passed"
    PROMOTED = "promoted"
    TRIPPED = "tripped"
    ROLLED_BACK = "rolled back"
    COOLED = "cooled down"
    PAUSED = "paused"
    RESUMED = "resumed"
    STOPPED = "stopped"
    REPLANNED = "plan changed"


@dataclass(frozen=True)
class Position:
    """Where a pilot stands.

    Args:
        stage: How far the adapted model is let in.
        step: Of the canary, from 0.
        share: Of the items, answered by the adapted model, or after a roll back by the last good snapshot. A pilot
            that is rolled back with share 0 lets the source answer everything.
        rollbacks: Since the pilot was started, or last passed `full`, or was started again by an operator.
        learned: Whether a shadow stage has measured the guards' baselines.
        waits: Whether only an operator's word starts it again.
        paused: Whether an operator holds it: no adaptation, no promotion, guards go on.
    """

    stage: Stage = Stage.OFF
    step: int = 0
    share: float = 0.0
    rollbacks: int = 0
    learned: bool = False
    waits: bool = False
    paused: bool = False


@dataclass(frozen=True)
class Transition:
    """A move of the pilot.

    Args:
        time: By the pilot's clock, seconds.
        cause: Why.
        before: Where it stood.
        after: Where it stands now.
        serving: Who answers the share now: "source", "adapted" or "snapshot N".
        by: Who wanted it, if somebody did.
        reason: In words.
    """

    time: float
    cause: Cause
    before: Position
    after: Position
    serving: str
    by: str = ""
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the audit log."""
        return {
            "cause": self.cause.value,
            "from": self.before.stage.value,
            "to": self.after.stage.value,
            "step": self.after.step,
            "share": self.after.share,
            "serving": self.serving,
            "by": self.by,
            "reason": self.reason,
        }


def advance(position: Position, cause: Cause, *, shares: Sequence[float], good: bool) -> Position:
    """Where `cause` leads from `position`; the same position where it leads nowhere.

    The first roll back leaves the arm its share, for the last good snapshot; the second gives everything to the
    source, and from there only an operator starts again. So does a roll back by an operator.

    Args:
        position: Where the pilot stands.
        cause: What happened.
        shares: Of the canary's steps, rising.
        good: Whether there is a good snapshot other than the source.

    Example:
        >>> advance(Position(Stage.CANARY, 1, 0.05), Cause.PASSED, shares=(0.01, 0.05), good=True).stage.value
        'full'
    """
    match cause:
        case Cause.STARTED:
            return Position(Stage.SHADOW) if position.stage is Stage.OFF and not position.waits else position
        case Cause.REPLANNED:
            return Position(Stage.SHADOW)
        case Cause.STOPPED:
            return Position(waits=True)
        case Cause.PASSED:
            return position if position.paused else _next(position, shares)
        case Cause.PROMOTED:
            return _begin_again(position, shares) or replace(_next(position, shares), paused=False)
        case Cause.RESUMED:
            if position.paused:
                return replace(position, paused=False)
            return _begin_again(position, shares) or position
        case Cause.PAUSED:
            return position if position.stage is Stage.OFF else replace(position, paused=True)
        case Cause.TRIPPED:
            return _back(position, good)
        case Cause.ROLLED_BACK:
            return _called_back(position, good)
        case Cause.COOLED:
            if position.stage is not Stage.ROLLED_BACK or position.waits or position.paused:
                return position
            return _entrance(position, shares)
    raise ValueError(f"unknown cause {cause!r}")


def _next(position: Position, shares: Sequence[float]) -> Position:
    """One stage on; passing `full` forgets earlier roll backs."""
    match position.stage:
        case Stage.SHADOW:
            return _entrance(replace(position, learned=True), shares)
        case Stage.CANARY if position.step + 1 < len(shares):
            return replace(position, step=position.step + 1, share=shares[position.step + 1])
        case Stage.CANARY:
            return replace(position, stage=Stage.FULL, step=0, share=1.0)
        case Stage.FULL:
            return replace(position, rollbacks=0)
        case _:
            return position


def _entrance(position: Position, shares: Sequence[float]) -> Position:
    """The canary's first step, or shadow while no baselines are known."""
    if not position.learned:
        return replace(position, stage=Stage.SHADOW, step=0, share=0.0, waits=False)
    if not shares:
        return replace(position, stage=Stage.FULL, step=0, share=1.0, waits=False)
    return replace(position, stage=Stage.CANARY, step=0, share=shares[0], waits=False)


def _begin_again(position: Position, shares: Sequence[float]) -> Position | None:
    """What an operator's word does to a pilot that is off or rolled back; None elsewhere."""
    if position.stage is Stage.OFF:
        return Position(Stage.SHADOW)
    if position.stage is Stage.ROLLED_BACK:
        return replace(_entrance(position, shares), rollbacks=0, paused=False)
    return None


def same_place(one: Position, other: Position) -> bool:
    """Whether both are in one stage, at one step, with one share: a pause alone is no other place."""
    return (one.stage, one.step, one.share) == (other.stage, other.step, other.share)


def _called_back(position: Position, good: bool) -> Position:
    """An operator's roll back: to the snapshot that the operator means, however often, and until a word from one."""
    if position.stage is Stage.OFF:
        return position
    rollbacks = position.rollbacks + (position.stage is not Stage.ROLLED_BACK)
    share = position.share if good else 0.0
    return replace(position, stage=Stage.ROLLED_BACK, step=0, share=share, rollbacks=rollbacks, waits=True)


def _back(position: Position, good: bool) -> Position:
    if position.stage is Stage.OFF or (position.stage is Stage.ROLLED_BACK and position.share == 0):
        return position
    again = position.stage is Stage.ROLLED_BACK
    rollbacks = position.rollbacks + 1
    share = position.share if good and not again and rollbacks == 1 else 0.0
    return replace(
        position,
        stage=Stage.ROLLED_BACK,
        step=0,
        share=share,
        rollbacks=rollbacks,
        waits=position.waits or rollbacks > 1,
    )
