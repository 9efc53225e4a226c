"""The table of snapshots and the head, in the caller's transaction: entries, pruning, and where a rollback goes."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from normadapt.errors import StoreError
from normadapt.store.log import append, clock, nonsense
from normadapt.store.records import Snapshot, canonical

COLUMNS = tuple(field.name for field in fields(Snapshot))
_AS_JSON = ("note", "model_name", "streams")  # the words of others: SQLite's text refuses what is no proper Unicode
_KINDS: dict[str, type | tuple[type, ...]] = {
    "digest": str,
    "created": (int, float),
    "note": str,
    "good": int,
    "model_name": str,
    "fingerprint": str,
    "streams": list,
    "bytes": int,
    "version": str,
    "parent": (int, type(None)),
}
_SELECT = f"SELECT {', '.join(COLUMNS)} FROM snapshots "


def snapshot_from(row: tuple[Any, ...]) -> Snapshot:
    """A row of the table (`COLUMNS`) as a snapshot.

    Raises:
        StoreError: If it is not what was written.
    """
    values = dict(zip(COLUMNS, row, strict=True))
    try:
        values |= {name: json.loads(values[name]) for name in _AS_JSON}
        for name, kinds in _KINDS.items():
            if not isinstance(values[name], kinds):
                raise TypeError(f"{name} is {values[name]!r}")
        values["streams"] = tuple(values["streams"])
        values["good"] = bool(values["good"])
    except (ValueError, TypeError) as error:
        raise nonsense(f"the entry of snapshot {values['number']}", error) from error
    return Snapshot(**values)


def all_rows(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """All entries, by number, for `snapshot_from`; the number comes first."""
    return connection.execute(_SELECT + "ORDER BY number").fetchall()


def all_snapshots(connection: sqlite3.Connection) -> tuple[Snapshot, ...]:
    """All that are kept, by number."""
    return tuple(snapshot_from(row) for row in all_rows(connection))


def find(connection: sqlite3.Connection, number: int) -> Snapshot:
    """The snapshot of a number.

    Raises:
        StoreError: If there is none.
    """
    if isinstance(number, bool) or not isinstance(number, int):
        raise ValueError(f"a snapshot's number must be a whole number; got {number!r}")
    row = connection.execute(_SELECT + "WHERE number = ?", (number,)).fetchone() if 0 <= number < 2**63 else None
    if row is None:
        count, last = connection.execute("SELECT COUNT(*), MAX(number) FROM snapshots").fetchone()
        there = f"{count} are kept, the last one is {last}" if count else "nothing was committed yet"
        raise StoreError(f"there is no snapshot {number} in the store, or no more; {there} -> see snapshots()")
    return snapshot_from(row)


def pointer(connection: sqlite3.Connection) -> tuple[int | None, int]:
    """The head's number, None before the first commit, and the generation.

    Raises:
        StoreError: If they are not there any more.
    """
    row = connection.execute("SELECT head, generation FROM pointer").fetchone()
    if row is None or not isinstance(row[0], (int, type(None))) or not isinstance(row[1], int):
        raise nonsense("the pointer to the head", "it is gone" if row is None else repr(row))
    return row[0], row[1]


def head_of(connection: sqlite3.Connection) -> Snapshot:
    """The snapshot in use.

    Raises:
        StoreError: If there is none yet.
    """
    number = pointer(connection)[0]
    if number is None:
        raise StoreError("nothing was committed to the store yet -> commit(adapted, note) first")
    return find(connection, number)


def move_head(connection: sqlite3.Connection, number: int) -> None:
    """Put another snapshot in use."""
    connection.execute("UPDATE pointer SET head = ?, generation = generation + 1", (number,))


def enter(
    connection: sqlite3.Connection,
    header: Mapping[str, Any],
    digest: str,
    size: int,
    note: str,
    good: bool,
    facts: Mapping[str, Any],
) -> Snapshot:
    """Give content the next number, write it in table and log, and move the head to it.

    Raises:
        ValueError: If a fact has the name of one that is written anyway, or has no counterpart in JSON.
    """
    last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'snapshots'").fetchone()
    snapshot = Snapshot(
        number=0 if last is None else last[0] + 1,
        digest=digest,
        created=clock(),
        note=str(note),
        good=bool(good),
        model_name=header["model_name"],
        fingerprint=header["fingerprint"],
        streams=tuple(header["streams"]),
        bytes=size,
        version=header["version"],
        parent=pointer(connection)[0],
    )
    own = asdict(snapshot)
    if clash := sorted(own.keys() & facts.keys()):
        raise ValueError(f"commit() itself writes {', '.join(clash)} into the log -> give your facts other names")
    append(connection, "commit", {**facts, **own})
    own |= {name: canonical(own[name]) for name in _AS_JSON}
    marks = ", ".join(f":{name}" for name in COLUMNS)
    connection.execute(f"INSERT INTO snapshots ({', '.join(COLUMNS)}) VALUES ({marks})", own)
    move_head(connection, snapshot.number)
    return snapshot


def rollback_target(connection: sqlite3.Connection, head: int) -> int:
    """The last good snapshot that the head came from; the source if there is none.

    Ancestors, not numbers: after a rollback from 7 to 5 the next commit is 8, and behind 8 stands 5. Whatever was wrong
    with 7, going back from 8 must not bring it back.
    """
    query = (
        "SELECT parent.number, parent.good FROM snapshots JOIN snapshots AS parent ON parent.number = snapshots.parent "
    )
    behind = connection.execute(query + "WHERE snapshots.number = ?", (head,)).fetchone()
    while behind is not None:
        if behind[1]:
            return int(behind[0])
        behind = connection.execute(query + "WHERE snapshots.number = ?", (behind[0],)).fetchone()
    return 0


def prune(connection: sqlite3.Connection, retain: int) -> set[str]:
    """Take the oldest entries that are too many out of the table; returns digests whose files may not be needed now.

    Never the source, the head, the last good one, and the one that a rollback would go to.
    """
    count = connection.execute("SELECT COUNT(*) FROM snapshots").fetchone()[0]
    if count <= retain:
        return set()
    head = pointer(connection)[0]
    last_good = connection.execute("SELECT MAX(number) FROM snapshots WHERE good").fetchone()[0]
    rows = connection.execute(
        "SELECT number, digest FROM snapshots WHERE number NOT IN (0, ?, ?, ?) ORDER BY number LIMIT ?",
        (head, last_good, 0 if head is None else rollback_target(connection, head), count - retain),
    ).fetchall()
    for number, digest in rows:
        parent = connection.execute("SELECT parent FROM snapshots WHERE number = ?", (number,)).fetchone()[0]
        connection.execute("UPDATE snapshots SET parent = ? WHERE parent = ?", (parent, number))
        connection.execute("DELETE FROM snapshots WHERE number = ?", (number,))
        append(connection, "pruned", {"number": number, "digest": digest, "retain": retain})
    return {digest for _, digest in rows}


def needed(connection: sqlite3.Connection) -> set[str]:
    """Digests of all content that a snapshot refers to."""
    return {row[0] for row in connection.execute("SELECT DISTINCT digest FROM snapshots")}


def entries(connection: sqlite3.Connection) -> set[tuple[int, str]]:
    """Number and digest of all snapshots."""
    return {(number, digest) for number, digest in connection.execute("SELECT number, digest FROM snapshots")}
