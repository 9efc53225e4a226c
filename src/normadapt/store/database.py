"""Reading and writing the store's SQLite file: transactions whose every failure says what to do.

WAL mode, so that readers never wait, and synchronous=FULL, so that what was committed outlives a power cut. Threads of
a process share a connection to read and one to write under two locks, processes are kept apart by SQLite. The file must
be on a local disk: WAL does not work over a network.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from weakref import ref

from normadapt.store.connections import LONGEST, Connections
from normadapt.store.transactions import Transaction

T = TypeVar("T")


class Database(Connections):
    """Transactions on the connections; see there for the arguments."""

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with; inside a transaction its own, which sees what was written."""
        with self.failures.explained("read"):
            self.check_ready()
            if self.in_transaction and self.writer is not None:
                yield self.writer
                return
            with self._reading:
                if self._reader is None:
                    self._reader = self._connect()
                before = self._reads
                try:
                    self._reads = before + 1
                    yield self._reader
                finally:
                    self._reads = before

    @contextmanager
    def read_apart(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own in one read transaction: a long look at one moment, for which nobody waits."""
        with self.failures.explained("read"):
            self.check_ready()
            with self._reading:  # so that no fork comes between the next two lines
                connection = self._connect()
                self._apart.add(connection)
            try:
                connection.execute("BEGIN")
                yield connection
            finally:
                if self._pid == os.getpid():
                    connection.close()
                    self._apart.discard(connection)

    def write(
        self, verb: str, timeout: float | None = None, *, tidy: Callable[[set[str]], None] | None = None
    ) -> Transaction[sqlite3.Connection]:
        """A transaction: all that is written inside happens, or on an exception nothing does. They nest.

        Args:
            verb: What is done, for messages.
            timeout: Seconds to wait for another writer, if not the usual.
            tidy: See `Transaction`.

        Raises:
            StoreLockedError: If another writer holds the store for longer than the timeout.
            StoreError: If it cannot be written.
        """
        wait = self.timeout if timeout is None else min(timeout, LONGEST)
        return Transaction(self, verb, wait, lambda connection: connection, True, tidy)

    def write_for(self, given: T, verb: str, *, tidy: Callable[[set[str]], None]) -> Transaction[T]:
        """A transaction of a caller, whose own errors come through as they are, and who is `given` something."""
        return Transaction(self, verb, self.timeout, lambda _: given, False, tidy)

    @property
    def level(self) -> Transaction[object]:
        """The innermost transaction of this thread, which is inside one."""
        level = self.levels[-1]()
        if level is None:
            raise RuntimeError("no transaction is open")
        return level

    def connect_writer(self) -> sqlite3.Connection:
        """The connection to write with; to be called under the lock."""
        if self.writer is None:
            self.writer = self._connect()
        return self.writer

    def drop_level(self) -> None:
        """Undo the innermost savepoint."""
        if self.writer is not None and self.writer.in_transaction:
            name = f"level_{len(self.levels) - 1}"
            with suppress(sqlite3.Error):  # an interrupt may have come before it was made
                self.writer.execute(f"ROLLBACK TO {name}")
                self.writer.execute(f"RELEASE {name}")
        self.levels.pop()

    def abandon(self, level: ref[Transaction[Any]]) -> None:
        """End what was left open, now that the last traceback through it is gone."""
        if level not in self.levels or self._pid != os.getpid():
            return
        while len(self.levels) > 1 and level in self.levels:
            self.drop_level()
        if level not in self.levels:
            return
        with suppress(sqlite3.Error):
            if self.writer is not None and self.writer.in_transaction:
                self.writer.execute("ROLLBACK")
        self.levels.clear()
        self.owner = None
        self.release()

    def release(self) -> None:
        """Release the lock, as often as it is held: an interrupt may have come when an earlier call just had it."""
        with suppress(RuntimeError):  # another thread holds it, or nobody any more
            while True:
                self.writing.release()
