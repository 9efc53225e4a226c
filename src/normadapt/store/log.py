"""The audit log: events appended to a chain, and read back without going through all of it."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Iterable, Mapping
from typing import Any

from normadapt.errors import StoreError
from normadapt.store.records import GENESIS, Event, canonical, event_digest, plain

OWN_KINDS = frozenset({"created", "commit", "rollback", "pruned", "swept", "command"})
"""Kinds of events that only the store itself writes: `verify` replays them."""

_LARGEST = 2**63 - 1  # that SQLite counts to
_COLUMNS = "seq, time, kind, facts, digest, previous"


def append(connection: sqlite3.Connection, kind: str, facts: Mapping[str, Any]) -> Event:
    """Write the next event, inside the caller's transaction.

    Args:
        connection: In a transaction that excludes other writers.
        kind: What happened.
        facts: Anything that `plain` takes.

    Raises:
        ValueError: If it does not.
    """
    last = connection.execute("SELECT seq, digest FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    seq, previous = (1, GENESIS) if last is None else (last[0] + 1, last[1])
    try:
        now, kept = clock(), plain(facts)
    except RecursionError as error:
        raise ValueError("facts are nested too deeply, or hold themselves -> flatten them") from error
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
    number = -1 if limit is None else min(limit, _LARGEST)
    after = max(min(after, _LARGEST), -_LARGEST)
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
    """A row of the table as an event.

    Raises:
        StoreError: If it is not what was written.
    """
    seq, moment, kind, text, digest, previous = row
    return Event(seq, moment, kind, document(text, f"the facts of event {seq}"), digest, previous)


def document(text: Any, what: str) -> dict[str, Any]:
    """A JSON object that a table holds.

    Raises:
        StoreError: If it is none.
    """
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise TypeError(f"expected an object, got a {type(found).__name__}")
    except (ValueError, TypeError, RecursionError) as error:
        raise nonsense(what, error) from error
    return found


def nonsense(what: str, why: object) -> StoreError:
    """Something in a table that the store never wrote."""
    return StoreError(
        f"{what} is not what the store wrote ({why}) -> verify() says what else was changed; bring back a copy"
    )
