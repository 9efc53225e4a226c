"""Which process runs the pilot of a store: a lock of the operating system's, on a file beside the store.

The system gives the lock back when the process ends, however it ends. It is on a file of its own, because SQLite locks
`store.db` for itself, and nobody but another pilot asks for it: readers and operators' commands never wait.
"""

from __future__ import annotations

import os
import sys
import time
import weakref
from pathlib import Path

from normadapt.errors import StoreError, StoreLockedError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = "pilot.lock"
_TRIES, _PAUSE = 5, 0.02  # somebody who only asks whether a pilot runs holds the lock for a moment
_FAR = 1 << 20  # Windows keeps others from reading what is locked: a byte behind the text


class Lease:
    """Held by the pilot that runs on a store, until `release`, its end, or the end of its process.

    A fork does not inherit it.

    Args:
        folder: The store's folder, which exists.

    Raises:
        StoreLockedError: If another pilot holds it, in this process or another.
        StoreError: If the file cannot be made or locked.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lease = Lease(Path(folder))
        ...     running = runs_on(Path(folder))
        ...     lease.release()
        ...     running, runs_on(Path(folder))
        (True, False)
    """

    def __init__(self, folder: Path) -> None:
        path = folder / NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(f"cannot make {path}: {error} -> give write access to the store's folder") from error
        try:
            for left in reversed(range(_TRIES)):
                if _take(descriptor, alone=True):
                    break
                if not left:
                    raise StoreLockedError(
                        f"another pilot runs on the store {folder} ({_holder(descriptor)}): two would write one trial "
                        "-> close() it or end its process, or give this one a store of its own"
                    )
                time.sleep(_PAUSE)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()}".encode())
        except OSError as error:
            os.close(descriptor)
            raise StoreError(f"cannot lock {path}: {error} -> put the store on a local disk") from error
        except BaseException:
            os.close(descriptor)
            raise
        self._process = os.getpid()
        self._close = weakref.finalize(self, os.close, descriptor)
        _HELD.add(self)

    @property
    def held(self) -> bool:
        """Whether this process may write the trial."""
        return self._close.alive and self._process == os.getpid()

    def release(self) -> None:
        """Let another pilot have it; a second call does nothing."""
        self._close()


def runs_on(folder: Path) -> bool:
    """Whether a pilot runs on the store in this folder now."""
    try:
        descriptor = os.open(folder / NAME, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _take(descriptor, alone=False)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _take(descriptor: int, *, alone: bool) -> bool:
    """Lock the file, for oneself or beside others who only look; whether that could be done at once."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _FAR, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _holder(descriptor: int) -> str:
    told = os.pread(descriptor, 100, 0).decode(errors="replace") if hasattr(os, "pread") else ""
    return "this process" if told == f"process {os.getpid()}" else told or "another process"


_HELD: weakref.WeakSet[Lease] = weakref.WeakSet()


def _forget() -> None:
    """In a fork: the lock is the parent's alone, and must end with it, not with its children."""
    for lease in list(_HELD):
        lease.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
