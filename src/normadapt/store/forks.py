"""Forks while stores are open: SQLite must not see them.

A connection that goes through a fork takes SQLite's table of locks along, and with it the belief that the child holds
locks that only the parent has: also for connections that the child opens later, because the table belongs to the file.
So a fork finds every connection closed, and both sides open new ones when they next need them.

A connection that is in use cannot be closed. Other threads are given a second to come to an end; not longer, because
the thread that forks may hold what they wait for, and because most children never touch the store. After it the fork
goes on, the parent notices nothing, and the child is refused this file for good. So it is at once, if the thread that
forks is inside a transaction itself.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import Protocol
from weakref import WeakSet

_WAIT = 1.0  # seconds


class Forkable(Protocol):
    """What has connections."""

    def before_fork(self, deadline: float) -> None:
        """Take the locks and close the connections; what is in use at the deadline (monotonic seconds) stays."""

    def after_fork(self, in_child: bool) -> None:
        """Give the locks back."""


REFUSED: set[tuple[int, int]] = set()
"""Device and inode of files that this process must not open any more."""

_all: WeakSet[Forkable] = WeakSet()
_held: list[Forkable] = []  # between the hooks, so that none of them ends there
_lock = threading.RLock()  # held through the fork


def watch(one: Forkable) -> None:
    """See to it from now on."""
    with _lock:
        _all.add(one)


def keep_for_ever(connection: object) -> None:
    """Never end an object, not even at the interpreter's end.

    For a connection that a child inherited while it was in use: closing it would roll back in memory that it shares
    with the parent.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _before() -> None:
    _lock.acquire()
    _held[:] = list(_all)
    deadline = time.monotonic() + _WAIT  # for all of them together
    for one in _held:
        one.before_fork(deadline)


def _in_parent() -> None:
    _after(in_child=False)


def _in_child() -> None:
    _after(in_child=True)


def _after(in_child: bool) -> None:
    for one in _held:
        one.after_fork(in_child)
    _held.clear()
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
