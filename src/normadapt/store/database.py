"""Reading and writing the store's SQLite file: transactions whose every failure says what to do.

WAL mode, so that readers never wait, and synchronous=FULL, so that what was committed outlives a power cut. Threads of
a process share a connection to read and one to write under two locks, processes are kept apart by SQLite. The file must
be on a local disk: WAL does not work over a network.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from normadapt.store.connections import LONGEST, Connections


class Database(Connections):
    """Transactions on the connections; see there for the arguments."""

    @contextmanager
    def read(self) -> Iterator[sqlite3.Connection]:
        """A connection to read with; inside a transaction its own, which sees what was written."""
        with self.failures.explained("read"):
            self._ready()
            if self.in_transaction and self._writer is not None:
                yield self._writer
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
            self._ready()
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
        with self.failures.explained(verb):
            self._ready()
            if self.in_transaction and self._writer is not None:
                with self._nested(self._writer, verb):
                    yield self._writer
                return
            wait = self.timeout if timeout is None else min(timeout, LONGEST)
            try:
                if not self._writing.acquire(timeout=max(wait, 0.0)):
                    raise self.failures.locked(verb)
                if self._writer is None:
                    self._writer = self._connect()
                with self._outermost(self._writer, verb, wait):
                    yield self._writer
            finally:
                if self._pid == os.getpid():
                    self._let_go()

    def _let_go(self) -> None:
        """Release the lock; also what an interrupt left held, that came as soon as an earlier call had it."""
        with suppress(RuntimeError):  # it is not held, or no more
            while True:
                self._writing.release()

    @contextmanager
    def _outermost(self, connection: sqlite3.Connection, verb: str, wait: float) -> Iterator[None]:
        try:  # around BEGIN too: an interrupt may come as soon as it has returned
            self._owner, self._depth = threading.get_ident(), 1
            if connection.in_transaction:  # not even the end of an earlier one was let through
                connection.execute("ROLLBACK")
            connection.execute(f"PRAGMA busy_timeout = {int(1000 * wait)}")
            connection.execute("BEGIN IMMEDIATE")
            yield
            if self._pid != os.getpid():
                raise self.failures.forked()
            if not connection.in_transaction:
                raise self.failures.given_up(verb)
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                # in a child the transaction is the parent's to end; and a full disk may have ended it already
                if self._pid == os.getpid() and connection.in_transaction:
                    connection.execute("ROLLBACK")
            raise
        finally:
            self._owner, self._depth = None, 0

    @contextmanager
    def _nested(self, connection: sqlite3.Connection, verb: str) -> Iterator[None]:
        if not connection.in_transaction:  # a savepoint would begin another one, and commit what is all or nothing
            raise self.failures.given_up(verb)
        before = self._depth
        name = f"level_{before}"
        try:
            self._depth = before + 1
            connection.execute(f"SAVEPOINT {name}")
            yield
            if self._pid != os.getpid():
                raise self.failures.forked()
            connection.execute(f"RELEASE {name}")
        except BaseException:
            with suppress(sqlite3.Error):
                if self._pid == os.getpid() and connection.in_transaction:
                    connection.execute(f"ROLLBACK TO {name}")
                    connection.execute(f"RELEASE {name}")
            raise
        finally:
            self._depth = before
