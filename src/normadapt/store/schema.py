"""The tables of the store's SQLite file, its mark in the file's header, and its journal mode."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from normadapt.errors import StoreError

_APPLICATION = 0x6E61_7374  # "nast", in the file's header: tells our files from other programs'
VERSION = 2
"""Of the store and its snapshots. 1 held states of a rule that is gone."""

TRIGGERS = {
    "events_are_not_changed": "CREATE TRIGGER events_are_not_changed BEFORE UPDATE ON events "
    "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END",
    "events_are_not_deleted": "CREATE TRIGGER events_are_not_deleted BEFORE DELETE ON events "
    "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END",
    # INSERT OR REPLACE would delete without asking the trigger above
    "events_come_at_the_end": "CREATE TRIGGER events_come_at_the_end BEFORE INSERT ON events "
    "WHEN NEW.seq IS NOT (SELECT COALESCE(MAX(seq), 0) + 1 FROM events) "
    "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END",
}
_TABLES = {
    "events": "CREATE TABLE events (seq INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, "
    "facts TEXT NOT NULL, digest TEXT NOT NULL, previous TEXT NOT NULL)",
    "events_by_kind": "CREATE INDEX events_by_kind ON events (kind, seq)",
    # AUTOINCREMENT: the number of a pruned snapshot is not given again
    "snapshots": "CREATE TABLE snapshots (number INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL, "
    "created REAL NOT NULL, note TEXT NOT NULL, good INTEGER NOT NULL, model_name TEXT NOT NULL, "
    "fingerprint TEXT NOT NULL, streams TEXT NOT NULL, bytes INTEGER NOT NULL, version TEXT NOT NULL, parent INTEGER)",
    "snapshots_by_digest": "CREATE INDEX snapshots_by_digest ON snapshots (digest)",
    "pointer": "CREATE TABLE pointer (id INTEGER PRIMARY KEY CHECK (id = 1), head INTEGER, "
    "generation INTEGER NOT NULL)",
    "states": "CREATE TABLE states (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "commands": "CREATE TABLE commands (number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, "
    "command TEXT NOT NULL, facts TEXT NOT NULL, taken REAL)",
    "commands_waiting": "CREATE INDEX commands_waiting ON commands (number) WHERE taken IS NULL",
}


def is_ours(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the tables are there; False for an empty file.

    Raises:
        StoreError: If the file is another program's, or of another format.
    """
    # in this order: another process may make the tables, and our mark with them, between one line and the next
    tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application == _APPLICATION and version == VERSION:
        return True
    if application == _APPLICATION:
        older = ", of a rule that is gone" if version < VERSION else ""
        remedy = "name another folder for a new store, or use" if older else "use"
        raise StoreError(
            f"{path} has format {version}{older}; this version reads {VERSION} -> {remedy} the version that wrote it"
        )
    if application or tables:
        raise StoreError(f"{path} is another program's database -> name another folder for the store")
    return False


def make_tables(connection: sqlite3.Connection) -> None:
    """Make the tables, inside the caller's transaction."""
    for statement in (*_TABLES.values(), *TRIGGERS.values()):
        connection.execute(statement)
    connection.execute("INSERT INTO pointer VALUES (1, NULL, 0)")
    connection.execute(f"PRAGMA application_id = {_APPLICATION}")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def into_wal(connection: sqlite3.Connection, path: Path, timeout: float) -> None:
    """Switch the file to WAL, if it is in another mode: it is new, or a copy that `VACUUM INTO` made.

    Raises:
        StoreError: If the disk does not do it.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:  # two processes that do it at once get "busy" without waiting
            if not is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            break
    if mode != "wal":
        raise StoreError(f"{path} stays in journal mode {mode!r}; expected 'wal' -> put the store on a local disk")


def schema_problems(connection: sqlite3.Connection) -> list[str]:
    """What is not as `make_tables` made it, one sentence each."""
    found = {
        name: (kind, sql)
        for name, kind, sql in connection.execute("SELECT name, type, sql FROM sqlite_master WHERE sql IS NOT NULL")
    }
    problems = []
    for name, statement in {**_TABLES, **TRIGGERS}.items():
        if name not in found or found[name][1] != statement:
            problems.append(f"the {statement.split()[1].lower()} {name} is gone or changed")
    foreign = sorted(name for name, (kind, _) in found.items() if kind == "trigger" and name not in TRIGGERS)
    return problems + [f"the trigger {name} is not the store's" for name in foreign]


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another connection is in the way."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
