"""The check of a whole store: the chain of events adds up, leads to the tables as they are, and every file is right."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from normadapt.errors import NormadaptError, StoreError
from normadapt.store.content import check_state, decode, decode_header
from normadapt.store.files import Shelf
from normadapt.store.ledger import all_rows, pointer, snapshot_from
from normadapt.store.log import document
from normadapt.store.records import GENESIS, Snapshot, Verification, canonical, event_digest
from normadapt.store.schema import schema_problems

_BOUND = ("number", "digest", "created", "note", "good", "model_name", "fingerprint", "bytes", "version")


class _Replay:
    """What the tables must hold after the events so far."""

    def __init__(self) -> None:
        self.snapshots: dict[int, dict[str, Any]] = {}
        self.head: int | None = None
        self.generation = 0
        self.commands: list[tuple[float, str, str]] = []

    def follow(self, kind: str, facts: dict[str, Any], moment: float) -> None:
        if kind == "commit":
            self.snapshots[facts["number"]] = dict(facts)
            self.head = facts["number"]
        elif kind == "rollback":
            self.head = facts["to"]
        elif kind == "pruned":
            gone = self.snapshots.pop(facts["number"])
            for kept in self.snapshots.values():
                if kept["parent"] == facts["number"]:
                    kept["parent"] = gone["parent"]
        elif kind == "command":  # they are numbered in the order of their events
            self.commands.append((moment, facts["command"], canonical(facts["facts"])))
        self.generation += kind in ("commit", "rollback", "command")


@contextmanager
def _noted(problems: list[str], what: str) -> Iterator[None]:
    """Context in which what cannot be read becomes a problem, and does not stop the rest."""
    try:
        yield
    except (sqlite3.Error, StoreError) as error:
        problems.append(f"{what} cannot be read: {error}")


def verify(connection: sqlite3.Connection, shelf: Shelf, entries: Callable[[], set[tuple[int, str]]]) -> Verification:
    """Check a store as one read transaction shows it.

    Args:
        connection: In a read transaction.
        shelf: Where the content is.
        entries: Number and digest of all snapshots at the moment of the call: one that others prune meanwhile has no
            file any more.
    """
    problems: list[str] = []
    with _noted(problems, "the database"):
        damage = [row[0] for row in connection.execute("PRAGMA integrity_check(5)") if row[0] != "ok"]
        problems += [f"the database is damaged: {text}" for text in damage]
        problems += schema_problems(connection)
    replay, events, digest = _Replay(), 0, GENESIS
    with _noted(problems, "the log"):
        replay, events, digest = _check_chain(connection, problems)
    snapshots: dict[int, Snapshot] = {}
    with _noted(problems, "the table of snapshots"):
        snapshots = _check_snapshots(connection, replay, problems)
    head: int | None = None
    with _noted(problems, "the head"):
        head = _check_pointer(connection, replay, snapshots, problems)
    with _noted(problems, "the table of commands"):
        _check_commands(connection, replay, problems)
    with _noted(problems, "the table of states"):
        _check_states(connection, problems)
    _check_files(snapshots, shelf, entries, problems)
    left = 0
    with _noted(problems, "the table of snapshots"):
        left = _orphans(snapshots, shelf, entries)
    return Verification(tuple(problems), events, len(snapshots), head, digest, left)


def _orphans(snapshots: dict[int, Snapshot], shelf: Shelf, entries: Callable[[], set[tuple[int, str]]]) -> int:
    if not shelf.folder.is_dir() or not shelf.orphans(snapshot.digest for snapshot in snapshots.values()):
        return 0
    return len(shelf.orphans(digest for _, digest in entries()))  # others may have committed meanwhile


def _check_chain(connection: sqlite3.Connection, problems: list[str]) -> tuple[_Replay, int, str]:
    replay, expected, previous = _Replay(), 1, GENESIS
    for seq, moment, kind, text, digest, before in connection.execute(
        "SELECT seq, time, kind, facts, digest, previous FROM events ORDER BY seq"
    ):
        try:
            facts = json.loads(text)
            if seq != expected:
                problems.append(f"event {expected} is missing: the next one is {seq}")
            if before != previous:
                problems.append(f"event {seq} does not follow the one before it")
            if digest != event_digest(before, seq, moment, kind, facts):
                problems.append(f"event {seq} was changed: its digest is wrong")
            elif text != canonical(facts):  # the same key twice, the first of which nobody sees
                problems.append(f"event {seq} was changed: its facts are not written as the store writes them")
            replay.follow(kind, facts, moment)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"event {seq} makes no sense ({type(error).__name__}: {error})")
        expected, previous = seq + 1, digest
        if len(problems) > 100:
            problems.append("... and more: the rest of the log was not read")
            break
    if expected == 1:
        problems.append("the log is empty: it begins with the store's making")
    return replay, expected - 1, previous


def _check_snapshots(connection: sqlite3.Connection, replay: _Replay, problems: list[str]) -> dict[int, Snapshot]:
    """Those that make sense."""
    rows = {row[0]: row for row in all_rows(connection)}
    snapshots = {}
    for number in sorted(replay.snapshots.keys() | rows.keys()):
        said, row = replay.snapshots.get(number), rows.get(number)
        if said is None or row is None:
            problems.append(
                f"snapshot {number} is " + ("not in the log" if said is None else "gone, and the log does not say so")
            )
        if row is None:
            continue
        try:
            kept = snapshots[number] = snapshot_from(row)
        except StoreError as error:
            problems.append(str(error))
            continue
        if said is None:
            continue
        differing = [key for key in (*_BOUND, "parent") if said.get(key) != getattr(kept, key)]
        if said.get("streams") != list(kept.streams):
            differing.append("streams")
        if differing:
            problems.append(f"snapshot {number} differs from the log in {', '.join(differing)}")
    if rows and 0 not in rows:
        problems.append("snapshot 0, the source, is gone")
    return snapshots


def _check_pointer(
    connection: sqlite3.Connection, replay: _Replay, snapshots: dict[int, Snapshot], problems: list[str]
) -> int | None:
    head, generation = pointer(connection)
    if head != replay.head:
        problems.append(f"the head is {head}; by the log it is {replay.head}")
    if head is not None and head not in snapshots:
        problems.append(f"the head {head} is not among the snapshots")
    if generation != replay.generation:
        problems.append(f"the generation is {generation}; by the log it is {replay.generation}: events were cut off")
    return head


def _check_commands(connection: sqlite3.Connection, replay: _Replay, problems: list[str]) -> None:
    kept = {row[0]: row[1:] for row in connection.execute("SELECT number, time, command, facts FROM commands")}
    said = dict(enumerate(replay.commands, start=1))
    for number in sorted(kept.keys() | said.keys()):
        if number not in said:
            problems.append(f"command {number} is not in the log")
        elif number not in kept:
            problems.append(f"command {number} is gone, and the log does not say so")
        elif kept[number] != said[number]:
            problems.append(f"command {number} differs from the log")


def _check_states(connection: sqlite3.Connection, problems: list[str]) -> None:
    for name, text in connection.execute("SELECT name, value FROM states"):
        try:
            document(text, f"the state {name!r}")
        except StoreError as error:
            problems.append(str(error))


def _check_files(
    snapshots: dict[int, Snapshot], shelf: Shelf, entries: Callable[[], set[tuple[int, str]]], problems: list[str]
) -> None:
    source: dict[str, Tensor] | None = None
    for number, snapshot in sorted(snapshots.items()):
        where = f"snapshot {number}"
        try:
            data = shelf.get(snapshot.digest)
            header, state = decode_header(data, where), decode(data, where)
            own = state if source is None else source
            check_state(header, state, lambda own=own: own)  # type: ignore[misc]
        except (NormadaptError, KeyError, TypeError) as error:
            if (number, snapshot.digest) in entries():  # else it was pruned while we were at it
                problems.append(f"{where}: {error}")
            continue
        source = state if number == 0 else source
        for key in ("fingerprint", "model_name", "version"):
            if header.get(key) != getattr(snapshot, key):
                problems.append(f"{where}: its header has another {key} than the table")
