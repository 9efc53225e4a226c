"""The audit log: events appended to a chain, and read back without going through all of it."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterable, Mapping
from typing import Any

from normadapt.store.records import GENESIS, Event, canonical, event_digest, plain

_COLUMNS = "seq, time, kind, facts, digest, previous"


def append(connection: sqlite3.Connection, kind: str, facts: Mapping[str, Any]) -> Event:
    """Write the next event, inside the caller's transaction.

    Args:
        connection: In a transaction that excludes other writers.
        kind: What happened.
        facts: Anything that `plain` takes.
    """
    last = connection.execute("SELECT seq, digest FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    seq, previous = (1, GENESIS) if last is None else (last[0] + 1, last[1])
    now, kept = clock(), plain(facts)
    event = Event(seq, now, kind, kept, event_digest(previous, seq, now, kind, kept), previous)
    row = (seq, now, kind, canonical(kept), event.digest, previous)
    connection.execute(f"INSERT INTO events ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", row)
    return event


def clock() -> float:
    """Unix seconds; 0 from a clock that says nothing sensible, because an event is worth more than its time."""
    now = float(time.time())
    return now if math.isfinite(now) else 0.0


def read_events(
    connection: sqlite3.Connection, limit: int | None, after: int, kinds: Iterable[str] | None
) -> tuple[Event, ...]:
    """Events behind `after`, oldest first; with a limit the newest so many.

    Each kind is asked for by itself: its index gives the newest ones at once, however rare they are among the others.
    """
    number = -1 if limit is None else limit
    order = f"seq > ? ORDER BY seq DESC LIMIT {number}"
    if kinds is None:
        rows = connection.execute(f"SELECT {_COLUMNS} FROM events WHERE {order}", (after,)).fetchall()
    else:
        rows = []
        for kind in sorted(set(kinds)):
            query = f"SELECT {_COLUMNS} FROM events WHERE kind = ? AND {order}"
            rows += connection.execute(query, (kind, after)).fetchall()
        rows = sorted(rows, key=lambda row: int(row[0]), reverse=True)[: None if limit is None else limit]
    return tuple(event(row) for row in reversed(rows))


def event(row: tuple[Any, ...]) -> Event:
    """A row of the table as an event."""
    seq, moment, kind, facts, digest, previous = row
    return Event(seq, moment, kind, json.loads(facts), digest, previous)
