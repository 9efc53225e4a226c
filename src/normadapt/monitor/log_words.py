"""Events of the audit log in words, for the pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from normadapt.pilot.outbox import AT

_QUIET = frozenset({"digest", "fingerprint", "file", "bytes", "log_value", "threshold", AT})


class Happening(NamedTuple):
    """An event: when, what, and the particulars."""

    time: float
    kind: str
    facts: Mapping[str, Any]


def happening(event: Any) -> Happening:
    """An event of a store or a pilot, or the same as a plain dict."""
    if isinstance(event, Mapping):
        return Happening(float(event["time"]), str(event["kind"]), dict(event.get("facts") or {}))
    return Happening(float(event.time), str(event.kind), event.facts)


def happenings(events: Iterable[Any]) -> list[Happening]:
    """Events, oldest first, with the times of one clock: the pilot's, as in the figures.

    An event that waited for the store, or of a pilot whose clock is another, says itself when it was. What the store
    wrote of its own accord (a commit, a command) is as far off as the event that was written nearest to it.
    """
    told = [happening(event) for event in events]
    known = [event.facts.get(AT) for event in told]
    places = [i for i, at in enumerate(known) if isinstance(at, (int, float)) and math.isfinite(at)]
    if not places:
        return told
    logged = np.array([event.time for event in told])
    off = np.array([known[place] for place in places], dtype=float) - logged[places]
    # of those before and behind each event, the one whose writing was nearer
    behind = np.searchsorted(places, np.arange(len(told))).clip(max=len(places) - 1)
    before = (behind - 1).clip(min=0)
    gaps = [np.abs(logged[np.array(places)[side]] - logged) for side in (before, behind)]
    moved = logged + np.where(gaps[0] < gaps[1], off[before], off[behind])
    return [event._replace(time=float(time)) for event, time in zip(told, moved, strict=True)]


def in_words(event: Happening) -> str:
    """The particulars, short."""
    facts = event.facts
    match event.kind:
        case "transition":
            return _moved(facts)
        case "trip":
            return f"{facts.get('guard')}: {facts.get('reason')}"
        case "rollback":
            by = f" by {facts['by']}" if facts.get("by") else ""
            reason = f": {facts['reason']}" if facts.get("reason") else ""
            return f"head from snapshot {facts.get('from')} to {facts.get('to')}{by}{reason}"
        case "commit":
            return f"snapshot {facts.get('number')}: {facts.get('note')}"
        case "command":
            more = ", ".join(f"{key} {_short(value)}" for key, value in (facts.get("facts") or {}).items())
            return f"{facts.get('command')}{', ' if more else ''}{more}"
    told = ", ".join(f"{key} {_short(value)}" for key, value in facts.items() if key not in _QUIET)
    return told or "–"


def _moved(facts: Mapping[str, Any]) -> str:
    before, after = (str(facts.get(key, "?")).replace("_", " ") for key in ("from", "to"))
    share = facts.get("share")
    told = f"{before} to {after}" if before != after else f"{after}, {facts.get('cause')}"
    if isinstance(share, (int, float)) and share:
        told += f", {share:.0%} to {facts.get('serving')}"
    by = f", by {facts['by']}" if facts.get("by") else ""
    return told + by + (f": {facts['reason']}" if facts.get("reason") else "")


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_short, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(entry)}" for key, entry in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
