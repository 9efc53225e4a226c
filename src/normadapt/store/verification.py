"""The check of a whole store: the chain of events adds up, leads to the tables as they are, and every file is right."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from torch import Tensor

from normadapt.errors import NormadaptError
from normadapt.store.content import check_state, decode, decode_header
from normadapt.store.database import TRIGGERS
from normadapt.store.files import Shelf
from normadapt.store.ledger import all_snapshots
from normadapt.store.records import GENESIS, Snapshot, Verification, event_digest

_BOUND = ("number", "digest", "created", "note", "good", "model_name", "fingerprint", "bytes", "version")


class _Replay:
    """What the tables must hold after the events so far."""

    def __init__(self) -> None:
        self.snapshots: dict[int, dict[str, Any]] = {}
        self.head: int | None = None
        self.generation = 0

    def follow(self, kind: str, facts: dict[str, Any]) -> None:
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
        self.generation += kind in ("commit", "rollback", "command")


def verify(connection: sqlite3.Connection, shelf: Shelf) -> Verification:
    """Check a store as one read transaction shows it.

    Args:
        connection: In a read transaction.
        shelf: Where the content is.
    """
    problems: list[str] = []
    damage = [row[0] for row in connection.execute("PRAGMA integrity_check(5)") if row[0] != "ok"]
    problems += [f"the database is damaged: {text}" for text in damage]
    triggers = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'"))
    problems += [
        f"the trigger {name} is gone or changed" for name, sql in TRIGGERS.items() if triggers.get(name) != sql
    ]
    replay, events, digest = _check_chain(connection, problems)
    snapshots = {snapshot.number: snapshot for snapshot in all_snapshots(connection)}
    head, generation = connection.execute("SELECT head, generation FROM pointer").fetchone()
    _compare(replay, snapshots, head, generation, problems)
    _check_files(snapshots, shelf, problems)
    left = len(shelf.orphans(snapshot.digest for snapshot in snapshots.values())) if shelf.folder.is_dir() else 0
    return Verification(tuple(problems), events, len(snapshots), head, digest, left)


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
            replay.follow(kind, facts)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"event {seq} makes no sense ({type(error).__name__}: {error})")
        expected, previous = seq + 1, digest
        if len(problems) > 100:
            problems.append("... and more: the rest of the log was not read")
            break
    if expected == 1:
        problems.append("the log is empty: it begins with the store's making")
    return replay, expected - 1, previous


def _compare(
    replay: _Replay, snapshots: dict[int, Snapshot], head: int | None, generation: int, problems: list[str]
) -> None:
    for number in sorted(replay.snapshots.keys() | snapshots.keys()):
        said, kept = replay.snapshots.get(number), snapshots.get(number)
        if said is None or kept is None:
            problems.append(
                f"snapshot {number} is " + ("not in the log" if said is None else "gone, and the log does not say so")
            )
            continue
        differing = [key for key in (*_BOUND, "parent") if said.get(key) != getattr(kept, key)]
        if said.get("streams") != list(kept.streams):
            differing.append("streams")
        if differing:
            problems.append(f"snapshot {number} differs from the log in {', '.join(differing)}")
    if head != replay.head:
        problems.append(f"the head is {head}; by the log it is {replay.head}")
    if head is not None and head not in snapshots:
        problems.append(f"the head {head} is not among the snapshots")
    if snapshots and 0 not in snapshots:
        problems.append("snapshot 0, the source, is gone")
    if generation != replay.generation:
        problems.append(f"the generation is {generation}; by the log it is {replay.generation}: events were cut off")


def _check_files(snapshots: dict[int, Snapshot], shelf: Shelf, problems: list[str]) -> None:
    source: dict[str, Tensor] | None = None
    for number, snapshot in sorted(snapshots.items()):
        where = f"snapshot {number}"
        try:
            data = shelf.get(snapshot.digest)
            header, state = decode_header(data, where), decode(data, where)
            own = state if source is None else source
            check_state(header, state, lambda own=own: own)  # type: ignore[misc]
        except (NormadaptError, KeyError, TypeError) as error:
            problems.append(f"{where}: {error}")
            continue
        source = state if number == 0 else source
        for key in ("fingerprint", "model_name", "version"):
            if header.get(key) != getattr(snapshot, key):
                problems.append(f"{where}: its header has another {key} than the table")
