"""The connections to the store's SQLite file: opened, looked after, closed for a fork.

Nothing here opens the file but SQLite. POSIX takes all of a process's locks on a file away as soon as the process
closes any descriptor of it, and the locks are what keeps other processes from taking the WAL away.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import ref

from normadapt.store import forks
from normadapt.store.failures import NAME, Failures
from normadapt.store.schema import into_wal, is_ours, make_tables
from normadapt.store.transactions import Transaction

_SMALLEST = 512  # bytes of a page
LONGEST = 2_147_483.0
"""Seconds to wait: SQLite counts milliseconds in 31 bits, and takes what is beyond for 0."""


class Connections:
    """One connection to read and one to write, opened when first needed and again after a fork.

    Args:
        folder: The store's folder, which exists.
        timeout: Seconds to wait for another writer; 24 days at most.
        first: Called inside the transaction that makes the tables.
        create: Whether to make them.
        content: Whether there is content already, for which a new database would have no entry.

    Raises:
        StoreError: If the file cannot be used, is none of ours, or is gone while its content is there.
    """

    def __init__(
        self,
        folder: Path,
        timeout: float,
        first: Callable[[sqlite3.Connection], None],
        *,
        create: bool = True,
        content: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder = folder
        self.path = folder / NAME
        self.timeout = min(timeout, LONGEST)
        self.failures = Failures(folder, self.timeout)
        self._closed = False
        self._pid = os.getpid()
        self._reading = threading.RLock()
        self.writing = threading.RLock()
        self._reader: sqlite3.Connection | None = None
        self.writer: sqlite3.Connection | None = None
        self._apart: set[sqlite3.Connection] = set()
        self.owner: int | None = None  # the thread inside a transaction
        self.levels: list[ref[Transaction[Any]]] = []  # the transaction, and the savepoints inside it
        self._reads = 0
        self._parked = False  # between the two hooks of a fork
        self._stale = False  # whether a fork closed the connections
        self._file: tuple[int, int] | None = None
        self._identity: tuple[int, ...] = ()
        forks.watch(self)
        with self.failures.explained("open"), self.writing:
            self._check_file(create, content)
            self._open(first, create, content)
            self._file, self._identity = _device_and_inode(self.path), self._inodes()

    def _check_file(self, create: bool, content: Callable[[], bool]) -> None:
        """Refuse what SQLite would take for a new database."""
        wal = self.path.with_name(NAME + "-wal").exists()
        there = wal or content()  # asked before the size: another process makes the database before any content
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            size = 0
        if size == 0 and there:  # before SQLite, which deletes a WAL that has no database
            raise self.failures.without_tables()
        if size == 0 and not create:
            raise self.failures.none()
        if 0 < size < _SMALLEST:  # SQLite takes a byte of anything for nothing
            raise self.failures.damaged("open", f"it has {size} bytes")

    def _open(self, first: Callable[[sqlite3.Connection], None], create: bool, content: Callable[[], bool]) -> None:
        self.writer = connection = self._connect(create)
        try:
            ours = is_ours(connection, self.path)
            if not ours and not create:
                raise self.failures.without_tables() if content() else self.failures.none()
            into_wal(connection, self.path, self.timeout)
            if not ours:
                connection.execute("BEGIN IMMEDIATE")
                if not is_ours(connection, self.path):  # another process may have been quicker
                    if content():
                        raise self.failures.without_tables()
                    make_tables(connection)
                    first(connection)
                connection.execute("COMMIT")
            _open_files(connection)
        except BaseException:
            self._close_connections()
            raise

    def _connect(self, create: bool = False) -> sqlite3.Connection:
        with suppress(FileNotFoundError):
            if _device_and_inode(self.path) in forks.REFUSED:
                raise self.failures.forked()
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode={'rwc' if create else 'rw'}",
            uri=True,
            timeout=self.timeout,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = OFF")
        except BaseException:
            connection.close()
            raise
        return connection

    # -- is it still there? --------------------------------------------------------------------------------------

    def _inodes(self) -> tuple[int, ...]:
        wal = self.path.with_name(NAME + "-wal")
        return tuple(os.stat(path).st_ino for path in (self.path, wal))  # noqa: PTH116 (twice as quick, at every call)

    def check_ready(self) -> None:
        """Refuse to go on with files that are no longer there: SQLite would write into what nobody can see."""
        if self._closed:
            raise self.failures.closed()
        if self._pid != os.getpid():
            raise self.failures.forked()
        try:
            same = self._reopen() and self._inodes() == self._identity
        except FileNotFoundError:
            same = False
        if not same:
            raise self.failures.gone()

    def _reopen(self) -> bool:
        """After a fork: a connection, and with it a WAL, which may be another one; False for another database."""
        if self._stale:
            with self._reading:
                if not self._stale:  # another thread was quicker
                    return True
                if self.path.stat().st_ino != self._identity[0]:
                    return False
                if self._reader is None:
                    self._reader = self._connect()
                _open_files(self._reader)
                self._identity = self._inodes()
                self._stale = False
        return True

    # -- forks ---------------------------------------------------------------------------------------------------

    def before_fork(self, deadline: float) -> None:
        """See `forks.Forkable`."""
        self._parked = False
        if self._pid != os.getpid() or self.in_transaction:
            return
        while self._apart and time.monotonic() < deadline:  # before the locks, for which a long look may ask too
            time.sleep(0.001)
        if not self.writing.acquire(timeout=max(deadline - time.monotonic(), 0.0)):
            return
        try:
            self._parked = self._reading.acquire(timeout=max(deadline - time.monotonic(), 0.0)) and self._park()
        finally:
            if not self._parked:
                self.writing.release()

    def _park(self) -> bool:
        """Close the connections, under both locks; False if it cannot be, and the lock on reading is free again."""
        parked = False
        try:
            if not (self._apart or self._reads or self.levels):  # the latter two, if a signal's handler forks
                with suppress(sqlite3.Error):
                    self._close_connections()
                parked = self._reader is self.writer is None
        finally:
            if not parked:
                self._reading.release()
        return parked

    def after_fork(self, in_child: bool) -> None:
        """See `forks.Forkable`."""
        if self._parked:
            self._parked, self._stale = False, True
            if in_child:
                self._pid = os.getpid()
                self._reading, self.writing = threading.RLock(), threading.RLock()  # nobody waits for them here
            else:
                self._reading.release()
                self.writing.release()
        elif in_child:  # `_pid` stays the parent's: see `check_ready`
            inherited = [one for one in (self._reader, self.writer, *self._apart) if one is not None]
            for connection in inherited:
                forks.keep_for_ever(connection)
            if inherited:
                with suppress(FileNotFoundError):
                    forks.REFUSED.add(self._file or _device_and_inode(self.path))

    @property
    def in_transaction(self) -> bool:
        """Whether this thread is inside a transaction."""
        if self.owner != threading.get_ident() or self._pid != os.getpid() or not self.levels:
            return False
        outermost = self.levels[0]()
        return outermost is not None and not outermost.abandoned

    def close(self) -> None:
        """Close the connections. Nothing waits in them: every transaction was on the disk when it ended."""
        self._closed = True
        if self._pid != os.getpid():
            return
        with self.writing, self._reading:
            self._close_connections()

    def _close_connections(self) -> None:
        for connection in (self._reader, self.writer):
            if connection is not None:
                connection.close()
        self._reader = self.writer = None


def _open_files(connection: sqlite3.Connection) -> None:
    """Begin and end a read transaction, which opens the WAL, whose inode is looked at next."""
    connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()


def _device_and_inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
