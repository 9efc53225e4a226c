"""The store's SQLite file: its tables, and transactions whose every failure says what to do.

WAL mode, so that readers never wait, and synchronous=FULL, so that what was committed outlives a power cut. Each
`Database` has one connection to read and one to write: threads of a process share them under two locks, processes are
kept apart by SQLite. The file must be on a local disk: WAL does not work over a network.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from normadapt.errors import StoreError, StoreLockedError

NAME = "store.db"
_APPLICATION = 0x6E61_7374  # "nast", in the file's header: tells our files from other programs'
_VERSION = 1

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
_TABLES = (
    "CREATE TABLE events (seq INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, facts TEXT NOT NULL, "
    "digest TEXT NOT NULL, previous TEXT NOT NULL)",
    "CREATE INDEX events_by_kind ON events (kind, seq)",
    # AUTOINCREMENT: the number of a pruned snapshot is not given again
    "CREATE TABLE snapshots (number INTEGER PRIMARY KEY AUTOINCREMENT, digest TEXT NOT NULL, created REAL NOT NULL, "
    "note TEXT NOT NULL, good INTEGER NOT NULL, model_name TEXT NOT NULL, fingerprint TEXT NOT NULL, "
    "streams TEXT NOT NULL, bytes INTEGER NOT NULL, version TEXT NOT NULL, parent INTEGER)",
    "CREATE INDEX snapshots_by_digest ON snapshots (digest)",
    "CREATE TABLE pointer (id INTEGER PRIMARY KEY CHECK (id = 1), head INTEGER, generation INTEGER NOT NULL)",
    "INSERT INTO pointer VALUES (1, NULL, 0)",
    "CREATE TABLE states (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE commands (number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, command TEXT NOT NULL, "
    "facts TEXT NOT NULL, taken REAL)",
    "CREATE INDEX commands_waiting ON commands (number) WHERE taken IS NULL",
    *TRIGGERS.values(),
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)


class Database:
    """Connections to the store's file, opened when first needed and again after a fork.

    Args:
        folder: The store's folder, which exists.
        timeout: Seconds to wait for another writer.
        first: Called inside the transaction that makes the tables.
    """

    def __init__(self, folder: Path, timeout: float, first: Callable[[sqlite3.Connection], None]) -> None:
        self.folder = folder
        self.path = folder / NAME
        self.timeout = timeout
        self._closed = False
        self._begin()
        with self.explained("open"):
            self._make_tables(first)
        self._identity = self._inodes()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._reading = threading.RLock()
        self._writing = threading.RLock()
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._owner: int | None = None  # the thread inside a transaction
        self._depth = 0

    def _make_tables(self, first: Callable[[sqlite3.Connection], None]) -> None:
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            if file.read(16) not in (b"", b"SQLite format 3\0"):  # SQLite takes a few bytes of anything for nothing
                raise self._damaged("open", "it begins otherwise")
        connection = self._connect()
        try:
            if not self._is_ours(connection):
                self._into_wal(connection)
                connection.execute("BEGIN IMMEDIATE")
                if not self._is_ours(connection):  # another process may have been quicker
                    for statement in _TABLES:
                        connection.execute(statement)
                    first(connection)
                connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        self._writer = connection
        connection.execute("SELECT head FROM pointer").fetchone()  # opens the WAL file, whose inode is looked at next

    def _is_ours(self, connection: sqlite3.Connection) -> bool:
        """Whether the tables are there; False for an empty file.

        Raises:
            StoreError: If the file is another program's, or a later version's.
        """
        # in this order: another process may make the tables, and our mark with them, between one line and the next
        tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application == _APPLICATION and version == _VERSION:
            return True
        if application == _APPLICATION:
            raise StoreError(
                f"{self.path} has format {version}; this version reads {_VERSION} -> use the one that wrote it"
            )
        if application or tables:
            raise StoreError(f"{self.path} is another program's database -> name another folder for the store")
        return False

    def _into_wal(self, connection: sqlite3.Connection) -> None:
        """Switch the file to WAL for good. Two processes that do so at once get "busy" without waiting."""
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=self.timeout, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = OFF")
        except BaseException:
            connection.close()
            raise
        return connection

    # -- what failures mean --------------------------------------------------------------------------------------

    def _inodes(self) -> tuple[int, ...]:
        wal = self.path.with_name(NAME + "-wal")
        return tuple(os.stat(path).st_ino for path in (self.path, wal))  # noqa: PTH116 (twice as quick, at every call)

    def _ready(self) -> None:
        """Refuse to go on with files that are no longer there: SQLite would write into what nobody can see."""
        if self._closed:
            raise StoreError(f"the store {self.folder} was closed -> open it again with Store({str(self.folder)!r})")
        if self._pid != os.getpid():
            _INHERITED.append((self._reader, self._writer))  # never closed here: they are the parent's
            self._begin()
            self._writer = self._connect()
            self._writer.execute("SELECT head FROM pointer").fetchone()
            self._identity = self._inodes()
        try:
            same = self._inodes() == self._identity
        except FileNotFoundError:
            same = False
        if not same:
            raise StoreError(
                f"the store {self.folder} was deleted or replaced while it was open -> bring the folder back "
                f"and open it again with Store({str(self.folder)!r})"
            )

    @contextmanager
    def explained(self, verb: str) -> Iterator[None]:
        """Context in which failures of SQLite and of the file system become errors that name a remedy."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._explain(error, verb) from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            read_only = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
            why = "the disk is full" if full else "it may not be written" if read_only else str(error)
            remedy = "make room" if full else "give write access" if read_only else "look at the folder and its disk"
            raise StoreError(
                f"cannot {verb} the store {self.folder}: {why} -> {remedy}; the head is unchanged"
            ) from error

    def _explain(self, error: sqlite3.Error, verb: str) -> StoreError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        start = f"cannot {verb} the store {self.folder}"
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return self._locked(verb)
        if code == sqlite3.SQLITE_FULL:
            return StoreError(f"{start}: the disk is full -> make room; the head is unchanged")
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            return StoreError(f"{start}: {error} -> give write access to the folder and its files, on a local disk")
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return self._damaged(verb, str(error))
        if code == sqlite3.SQLITE_IOERR:
            return StoreError(f"{start}: {error} -> is the disk full or gone? The head is unchanged")
        return StoreError(f"{start}: {error}")

    def _damaged(self, verb: str, why: str) -> StoreError:
        return StoreError(
            f"cannot {verb} the store {self.folder}: {NAME} is damaged or not a database ({why}) -> bring back a copy, "
            "or name another folder"
        )

    def _locked(self, verb: str) -> StoreLockedError:
        return StoreLockedError(
            f"cannot {verb} the store {self.folder}: another writer has held it for {self.timeout:g} s -> end the "
            "other process, or wait longer with Store(..., timeout=...)"
        )

    # -- reading and writing -------------------------------------------------------------------------------------

    @property
    def in_transaction(self) -> bool:
        """Whether this thread is inside a transaction."""
        return self._owner == threading.get_ident() and self._pid == os.getpid()

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with; inside a transaction its own, which sees what was written."""
        with self.explained("read"):
            self._ready()
            if self.in_transaction and self._writer is not None:
                yield self._writer
                return
            with self._reading:
                if self._reader is None:
                    self._reader = self._connect()
                yield self._reader

    @contextmanager
    def read_apart(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own in one read transaction: a long look at one moment, for which nobody waits."""
        with self.explained("read"):
            self._ready()
            connection = self._connect()
            try:
                connection.execute("BEGIN")
                yield connection
            finally:
                connection.close()

    @contextmanager
    def write(self, verb: str, timeout: float | None = None) -> Iterator[sqlite3.Connection]:
        """A transaction: all that is written inside happens, or on an exception nothing does. They nest.

        Args:
            verb: What is done, for messages.
            timeout: Seconds to wait for another writer, if not the usual.

        Raises:
            StoreLockedError: If another writer holds the store for longer than the timeout.
            StoreError: If it cannot be written.
        """
        with self.explained(verb):
            self._ready()
            wait = self.timeout if timeout is None else timeout
            if not self._writing.acquire(timeout=max(wait, 0.0)):
                raise self._locked(verb)
            try:
                if self._writer is None:
                    self._writer = self._connect()
                with self._nested(self._writer) if self._depth else self._outermost(self._writer, wait):
                    yield self._writer
            finally:
                self._writing.release()

    @contextmanager
    def _outermost(self, connection: sqlite3.Connection, wait: float) -> Iterator[None]:
        if wait != self.timeout:
            connection.execute(f"PRAGMA busy_timeout = {int(1000 * wait)}")
        try:
            connection.execute("BEGIN IMMEDIATE")
        finally:
            if wait != self.timeout:
                connection.execute(f"PRAGMA busy_timeout = {int(1000 * self.timeout)}")
        self._owner, self._depth = threading.get_ident(), 1
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                if connection.in_transaction:  # a full disk may have ended it already
                    connection.execute("ROLLBACK")
            raise
        finally:
            self._owner, self._depth = None, 0

    @contextmanager
    def _nested(self, connection: sqlite3.Connection) -> Iterator[None]:
        self._depth += 1
        name = f"level_{self._depth}"
        connection.execute(f"SAVEPOINT {name}")
        try:
            yield
            connection.execute(f"RELEASE {name}")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute(f"ROLLBACK TO {name}")
                connection.execute(f"RELEASE {name}")
            raise
        finally:
            self._depth -= 1

    def close(self) -> None:
        """Close the connections. Nothing waits in them: every transaction was on the disk when it ended."""
        self._closed = True
        if self._pid != os.getpid():
            return
        with self._writing, self._reading:
            for connection in (self._reader, self._writer):
                if connection is not None:
                    connection.close()
            self._reader = self._writer = None


_INHERITED: list[Any] = []
"""Connections of a parent process, kept so that their end in the child cannot disturb the parent's locks."""


def _is_busy(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
