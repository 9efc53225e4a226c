"""One level of writing: a transaction, or a savepoint inside one. All of it happens, or on an exception nothing.

A class of its own, and not a generator under `contextmanager`, because of Ctrl-C: between the layers of the latter an
interrupt leaves the transaction open for as long as somebody keeps its traceback, and what is written meanwhile, though
it returns, is undone with it. Here two places are left, at the first instruction of `__exit__` and of what it calls to
undo. `Transaction.abandoned` knows those.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import ref

if TYPE_CHECKING:
    from normadapt.store.database import Database

T = TypeVar("T")


class Transaction(AbstractContextManager[T], Generic[T]):
    """Context in which everything is written together; see `Database.write`, which makes it.

    Args:
        database: Whose connection to write with.
        verb: What is done, for messages.
        wait: Seconds to wait for another writer.
        give: What to enter the context with, from the connection.
        explain: Whether errors of SQLite and of the file system in the context are the store's own.
        tidy: Called with `left` when the outermost transaction is over, however it ended.

    Attributes:
        put: Digests of files that were written, for rows of this transaction.
        left: Digests of files that nothing may need once it is over.
    """

    def __init__(
        self,
        database: Database,
        verb: str,
        wait: float,
        give: Callable[[sqlite3.Connection], T],
        explain: bool,
        tidy: Callable[[set[str]], None] | None,
    ) -> None:
        self._database = database
        self._verb, self._wait, self._give, self._explain, self._tidy = verb, wait, give, explain, tidy
        self._parent: Transaction[object] | None = None
        self._nested = self._taken = False  # whether it made a savepoint, or asked for the lock
        self._pid = 0
        self.put: set[str] = set()
        self.left: set[str] = set()

    def __enter__(self) -> T:
        try:  # around BEGIN and all: an interrupt may come as soon as it has returned
            with self._database.failures.explained(self._verb):
                return self._give(self._begin())
        except BaseException:
            self._undo()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with self._database.failures.explained(self._verb):
                    self._finish()
        except BaseException as failure:
            self._undo()
            self._clear_up(failure)
            raise
        if error is not None:
            self._undo()
        self._clear_up(error)
        if self._explain and isinstance(error, (sqlite3.Error, OSError)):
            with self._database.failures.explained(self._verb):
                raise error

    def _begin(self) -> sqlite3.Connection:
        database = self._database
        database.check_ready()
        self._pid = os.getpid()
        if database.in_transaction and database.writer is not None:
            if not database.writer.in_transaction:  # a savepoint would begin another one: it must be all or nothing
                raise database.failures.given_up(self._verb)
            while len(database.levels) > 1 and ((top := database.levels[-1]()) is None or top.abandoned):
                database.drop_level()
            self._parent, self._nested = database.levels[-1](), True
            database.levels.append(self._weakly())
            database.writer.execute(f"SAVEPOINT level_{len(database.levels) - 1}")
            return database.writer
        self._taken = True
        if not database.writing.acquire(timeout=max(self._wait, 0.0)):
            raise database.failures.locked(self._verb)
        for level in database.levels:
            if (abandoned := level()) is not None:
                abandoned.forget()
        database.levels = [self._weakly()]
        database.owner = threading.get_ident()
        connection = database.connect_writer()
        if connection.in_transaction:  # the abandoned one's
            connection.execute("ROLLBACK")
        connection.execute(f"PRAGMA busy_timeout = {int(1000 * self._wait)}")
        connection.execute("BEGIN IMMEDIATE")
        return connection

    def _weakly(self) -> ref[Transaction[Any]]:
        """For the list of levels, which alone holds it: what nobody is inside of any more is abandoned, and ends.

        Not by `__del__`, which would come after every transaction: Python throws away an interrupt that comes in it.
        """
        return ref(self, self._database.abandon)

    def _place(self) -> int | None:
        return next((place for place, level in enumerate(self._database.levels) if level() is self), None)

    def _finish(self) -> None:
        database = self._database
        if self._pid != os.getpid():
            raise database.failures.forked()
        if database.writer is None or not database.writer.in_transaction:  # a full disk ends it at once
            raise database.failures.given_up(self._verb)
        while database.levels[-1]() is not self:  # abandoned ones
            database.drop_level()
        if self._nested:
            database.writer.execute(f"RELEASE level_{len(database.levels) - 1}")
        else:
            database.writer.execute("COMMIT")
        if self._parent is not None:
            self._parent.put |= self.put
            self._parent.left |= self.left
        self.put = set()
        self._leave()

    def _undo(self) -> None:
        """End it if it is not over yet; in a child it is the parent's to end."""
        database = self._database
        try:
            if self._pid == os.getpid() and self._place() is not None and database.writer is not None:
                with suppress(sqlite3.Error):
                    if self._nested:
                        while self._place() is not None:
                            database.drop_level()
                    elif database.writer.in_transaction:
                        database.writer.execute("ROLLBACK")
        finally:
            self.left |= self.put
            if self._parent is not None:
                self._parent.left |= self.left
            self._leave()

    def _leave(self) -> None:
        database = self._database
        if self._pid == os.getpid():
            if (place := self._place()) is not None:
                del database.levels[place:]
                if not database.levels:
                    database.owner = None
            if self._taken:
                database.release()
        self.forget()

    def forget(self) -> None:
        """There is nothing left to end."""
        self._taken = self._nested = False

    def _clear_up(self, error: BaseException | None) -> None:
        """See to the files; not after an interrupt, for which nobody should wait: the next opening sweeps."""
        if self._parent is None and self.left and self._tidy and (error is None or isinstance(error, Exception)):
            self._tidy(self.left)

    @property
    def abandoned(self) -> bool:
        """Whether an interrupt that is being handled cut its end off."""
        error = sys.exc_info()[1] or getattr(sys, "last_value", None)
        seen: set[int] = set()
        while error is not None and id(error) not in seen:
            seen.add(id(error))
            trace = error.__traceback__
            while trace is not None:
                frame = trace.tb_frame
                if frame.f_code is _END and frame.f_locals.get("self") is self:
                    return True
                trace = trace.tb_next
            error = error.__context__
        return False


_END = Transaction.__exit__.__code__
