"""What a pilot has for its store: written together, kept while the store is in trouble, and tried again.

Nothing here raises because of the store. Whoever looks is told: an event, and a warning of the logger "normadapt".
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from normadapt.adapted._adapt import AdaptedModel, Held
from normadapt.errors import SnapshotError, StoreError
from normadapt.pilot.inbox import FOLLOWED, Inbox
from normadapt.pilot.lease import Lease
from normadapt.store import Store

AT = "at"
"""Among an event's facts: when it happened by the pilot's clock, where that is not when the store wrote it."""

_LOG = logging.getLogger("normadapt")
_LATE = 2.0  # seconds between the two that do not matter
_RETRY = (1.0, 60.0)  # seconds until a store in trouble is tried again, at first and at most
_PENDING = 1000  # events kept for a store in trouble; the oldest go first


class Back(NamedTuple):
    """A roll back for which the store's head has to follow.

    Args:
        number: Of the snapshot; None where the store has none of this state.
        held: The state.
        by: Who wanted it.
        reason: Why.
    """

    number: int | None
    held: Held
    by: str
    reason: str


class Written(NamedTuple):
    """What a transaction did.

    Args:
        back: The roll back that waited, if one did, with its snapshot's number now.
        seq: The place in the log up to which roll backs were followed.
        moved: Whether somebody else has moved the head: it is theirs until that is followed.
    """

    back: Back | None
    seq: int
    moved: bool


class Outbox:
    """Writes that the store has not taken yet.

    Args:
        store: The pilot's handle.
        adapted: The model on trial.
        inbox: Knows whether somebody else has moved the head.
        lease: Without which nothing is written.
        note: Called with the kind and the facts of an event.
    """

    def __init__(
        self, store: Store, adapted: AdaptedModel, inbox: Inbox, lease: Lease, note: Callable[..., None]
    ) -> None:
        self.store = store
        self.back: Back | None = None
        self.trouble: str | None = None
        self._adapted = adapted
        self._inbox = inbox
        self._lease = lease
        self._note = note
        self._events: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=_PENDING)
        self._states: dict[str, dict[str, Any]] = {}
        self._lost = 0
        if inbox.is_new:
            self.followed(inbox.seq)
        self._delay = 0.0
        self._next_try = -float("inf")

    def __len__(self) -> int:
        return len(self._events) + len(self._states.keys() - {FOLLOWED}) + (self.back is not None)

    def add(self, moment: float, kind: str, facts: dict[str, Any]) -> None:
        """An event at a moment of the pilot's clock, for the log."""
        if len(self._events) == _PENDING:
            self._lost += 1
        self._events.append((moment, kind, facts))

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """A document; the newest of a name is written."""
        self._states[name] = dict(state)

    def followed(self, seq: int) -> None:
        """Everything up to this place in the log is followed, and what was to be gone back to before is of the past."""
        self._inbox.seq, self.back = seq, None
        self.save(FOLLOWED, {"seq": seq})

    # -- writing -------------------------------------------------------------------------------------------------

    @property
    def may_try(self) -> bool:
        """Whether the store is worth trying."""
        if not self._lease.held and self.trouble is None:
            self.ill(StoreError("the store is the pilot's of another process, or was closed; this one does not write"))
        return time.monotonic() >= self._next_try and self._lease.held

    def hurry(self) -> None:
        """Try at once, whatever was before."""
        self._next_try = -float("inf")

    def flush(self) -> Written | None:
        """Write all that waits, in one transaction; on trouble it goes on waiting."""
        if not (self._events or self._states or self.back) or not self.may_try:
            return None
        try:
            with self.store.transaction():
                written = self._write()
        except Exception as error:
            self.ill(error)
            return None
        self._take_note(written)
        return written

    def commit(self, note: str, state: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[int | None, Written]:
        """Write all that waits, then commit a state; its number, or None where somebody else has moved the head.

        Raises:
            Exception: Whatever went wrong; nothing was written then.
        """
        with self.store.transaction() as store:
            written = self._write()  # in the order of happening: a roll back that waits comes first
            number = None if written.moved else store.commit(self._adapted, note, state=state, **facts).number
        self._take_note(written)
        return number, written

    def _write(self) -> Written:
        store, back, seq = self.store, None, self._inbox.seq
        if self._lost:
            store.record("events lost", count=self._lost)
        moved = self._inbox.moved() is not None
        if self.back is not None and not moved:
            back = self.back._replace(number=self._go_back(self.back))
            seq = store.history(limit=1)[0].seq
        for moment, kind, facts in self._events:
            waited = abs(moment - time.time()) > _LATE  # or the pilot's clock is another
            store.record(kind, **{**facts, **({AT: moment} if waited else {})})
        for name, state in self._states.items():
            store.write_state(name, state)
        if back is not None:
            store.write_state(FOLLOWED, {"seq": seq})
        return Written(back, seq, moved)

    def _go_back(self, back: Back) -> int | None:
        """Move the head; where the snapshot is gone, damaged or was never taken, commit its state once more."""
        store, why = self.store, "the store had not taken it yet"
        if back.number is not None:
            try:
                return store.rollback(back.number, by=back.by, reason=back.reason).number
            except StoreError as error:
                if self._is_sound(back.number):
                    raise
                why = _first_line(error)
        try:
            state, note = self._state_of(back.held), "kept again, to go back to"
            number = store.commit(self._adapted, note, state=state, by=back.by, reason=back.reason).number
            store.record("snapshot kept again", number=number, was=back.number, reason=why)
            return number
        except (StoreError, SnapshotError) as error:  # then no other process may begin with what is distrusted
            store.rollback(0, by=back.by, reason=back.reason)
            store.record("roll back refused", to=back.number, reason=_first_line(error))
            return back.number

    def _is_sound(self, number: int) -> bool:
        with suppress(StoreError, SnapshotError):
            self.store.load(number)
            return True
        return False

    def _state_of(self, held: Held) -> dict[str, Any]:
        now = self._adapted.hold()
        self._adapted.rewind(held)
        try:
            return self._adapted.snapshot()
        finally:
            self._adapted.rewind(now)

    def _take_note(self, written: Written) -> None:
        self._inbox.seq = written.seq
        self._events.clear()
        self._states, self._lost = {}, 0
        self.back = self.back if written.moved else None
        if self.trouble is not None:
            self.trouble = None
            _LOG.info("the store of the pilot is back: %s", self.store.path)
            self._note("store back")

    def ill(self, error: Exception) -> None:
        """The store could not be used: it is tried again later."""
        if self.trouble is None:
            self._delay = _RETRY[0]
            _LOG.warning("the pilot goes on in memory, its store is in trouble: %s", error)
            self._note("store trouble", reason=_first_line(error))
        else:
            self._delay = min(2 * self._delay, _RETRY[1])
        self.trouble = str(error)
        self._next_try = time.monotonic() + self._delay

    def close(self) -> int:
        """Write what waits, close the handle and let another pilot have the store; how many writes are lost."""
        self.hurry()
        self.flush()
        self.flush()  # the first one may have had news of the store itself
        lost = len(self)
        if lost:
            _LOG.warning("the pilot was closed with %d writes that its store did not take: %s", lost, self.trouble)
        self.abandon()
        return lost

    def abandon(self) -> None:
        """Let go of the store and write nothing more."""
        if self._lease.held:  # else the handle's connections are another process's
            self.store.close()
        self._lease.release()


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
