"""From a pilot's events to marks on a time line: what changed who answers, in a few words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from normadapt.reports.history import Mark


def marks_of(events: Iterable[tuple[float, str, Mapping[str, Any]]]) -> list[Mark]:
    """Marks for the events (time, kind, facts) that changed who answers, or tried to."""
    found = []
    for time, kind, facts in events:
        if kind == "transition":
            found.append(Mark(time, *_of_transition(facts)))
        elif kind == "rolled back":
            found.append(Mark(time, "rollback", f"back to snapshot {facts.get('to')}"))
        elif kind == "resumed":
            found.append(Mark(time, "restart", "process restarted"))
    return found


def _of_transition(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and words of a move, from what `Transition.to_dict` gives."""
    stage, cause, reason = str(facts.get("to", "?")), str(facts.get("cause", "")), str(facts.get("reason") or "")
    if cause in ("paused", "resumed") and stage == facts.get("from"):
        return "stage", cause
    if stage == "rolled_back":
        return "rollback", "rolled back" + (f": {reason}" if reason else "")
    share = facts.get("share")
    if stage == "canary" and isinstance(share, (int, float)):
        return "stage", f"canary {share:.0%}"
    return "stage", stage
