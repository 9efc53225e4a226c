"""What failures of SQLite and of the file system mean for a store, and what to do about them."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from normadapt.errors import StoreError, StoreLockedError
from normadapt.store.schema import is_busy

NAME = "store.db"


class Failures:
    """Errors of one store.

    Args:
        folder: The store's.
        timeout: Seconds that are waited for another writer.
    """

    def __init__(self, folder: Path, timeout: float) -> None:
        self.folder = folder
        self.timeout = timeout

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
        if is_busy(error):
            return self.locked(verb)
        if code == sqlite3.SQLITE_FULL:
            return StoreError(f"{start}: the disk is full -> make room; the head is unchanged")
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            return StoreError(f"{start}: {error} -> give write access to the folder and its files, on a local disk")
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return self.damaged(verb, str(error))
        if code == sqlite3.SQLITE_IOERR:
            return StoreError(f"{start}: {error} -> is the disk full or gone? The head is unchanged")
        return StoreError(f"{start}: {error}")

    def damaged(self, verb: str, why: str) -> StoreError:
        """The file is not what SQLite wrote."""
        return StoreError(
            f"cannot {verb} the store {self.folder}: {NAME} is damaged or not a database ({why}) -> bring back a copy, "
            "or name another folder"
        )

    def locked(self, verb: str) -> StoreLockedError:
        """Another writer did not end in time."""
        return StoreLockedError(
            f"cannot {verb} the store {self.folder}: another writer has held it for {self.timeout:g} s -> end the "
            "other process, or wait longer with Store(..., timeout=...)"
        )

    def given_up(self, verb: str) -> StoreError:
        """SQLite rolled a transaction back by itself; what it was, its own error said."""
        return StoreError(
            f"cannot {verb} the store {self.folder}: an earlier failure inside the transaction (a full disk?) undid "
            "all of it; the head is unchanged -> leave the transaction, see to that failure, and begin anew"
        )

    def closed(self) -> StoreError:
        """The caller closed it."""
        return StoreError(f"the store {self.folder} was closed -> open it again with Store({str(self.folder)!r})")

    def gone(self) -> StoreError:
        """Its files are no longer there, or are others."""
        return StoreError(
            f"the store {self.folder} was deleted or replaced while it was open -> bring the folder back "
            f"and open it again with Store({str(self.folder)!r})"
        )

    def none(self) -> StoreError:
        """Nothing was ever there."""
        return StoreError(f"there is no store at {self.folder} -> name the folder that a pilot or Store(...) wrote to")

    def without_tables(self) -> StoreError:
        """Snapshots without the database that says whose they are; a new one would sweep them away."""
        return StoreError(
            f"the store {self.folder} has files, but {NAME} is gone or empty -> bring {NAME} back from a copy; to "
            "begin anew, move what is in the folder elsewhere, or name another folder"
        )

    def forked(self) -> StoreError:
        """SQLite's locks cannot be carried into this process."""
        return StoreError(
            f"the store {self.folder} was in use by its process at the moment in which this one was forked from it -> "
            "fork while no transaction or verify() is under way, or start this process with 'spawn' or 'forkserver'"
        )
