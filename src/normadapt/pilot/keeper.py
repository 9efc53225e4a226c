"""What a pilot keeps: the last good snapshot in memory, and in the store everything that must outlive the process.

Nothing here raises because of the store. What could not be written waits (`outbox`); the model goes on in memory.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from normadapt.adapted._adapt import AdaptedModel, Held
from normadapt.errors import SnapshotError
from normadapt.pilot.inbox import Inbox, Word
from normadapt.pilot.lease import Lease
from normadapt.pilot.outbox import Back, Outbox, Written
from normadapt.store import Event, Store

STATE = "pilot"
ANSWERED = "pilot-answered"

_WAIT = 0.2  # seconds that a request may wait for another writer of the store
_POLL = 1.0  # seconds between two looks for commands
_IN_MEMORY = 20  # good states


class Occurrence(NamedTuple):
    """Something that happened.

    Args:
        time: By the pilot's clock, seconds.
        kind: What.
        facts: The particulars.
    """

    time: float
    kind: str
    facts: dict[str, Any]


class _Kept(NamedTuple):
    """A state of the model, as what can be put in use at once and as what can be stored."""

    held: Held
    state: dict[str, Tensor]
    taken: int


class _Good(NamedTuple):
    """A state that may be gone back to.

    Args:
        number: Of its snapshot; None where the store would not take it.
        held: To be put in use.
        taken: When the model had it, in items of the arm; -1 for what was there before this process.
    """

    number: int | None
    held: Held
    taken: int


class Keeper:
    """Good snapshots, events and state of one pilot.

    Args:
        adapted: The model on trial; put at the store's head.
        store: Where to keep things; None keeps them in memory only.

    Raises:
        StoreError, SnapshotError: If the store cannot be used, or is another model's.
    """

    def __init__(self, adapted: AdaptedModel, store: Store | None) -> None:
        self._adapted = adapted
        self.events: deque[Occurrence] = deque(maxlen=1000)
        self.counts: Counter[str] = Counter()
        self.now = 0.0
        self._offered: deque[tuple[str, Mapping[str, Any]]] = deque()
        self._next_poll = -float("inf")
        self._generation = -1
        self._outbox: Outbox | None = None
        self._inbox: Inbox | None = None
        self._lost: int | None = None  # writes, at the end
        self.moment = 0  # items that the arm has answered
        number = 0
        self.candidate: _Kept | None = None
        self._last_number = 0
        if store is not None:
            lease = Lease(store.path)
            try:
                store.commit_source(adapted)
                number = store.restore(adapted).number
                # A handle of its own, with which a request waits for nobody; whoever gave `store` may be more patient.
                own = Store(store.path, retain=store.retain, timeout=_WAIT)
                self._inbox = Inbox(own)
            except BaseException:
                lease.release()
                raise
            self._outbox = Outbox(own, adapted, self._inbox, lease, self.note)
        self._good = deque([_Good(number, adapted.hold(), -1)], maxlen=_IN_MEMORY)

    @property
    def number(self) -> int | None:
        """Of the snapshot that a roll back goes to; 0 is the source, None one that the store would not take."""
        return self._good[-1].number

    # -- events --------------------------------------------------------------------------------------------------

    def note(self, kind: str, **facts: Any) -> None:
        """An event, for the log."""
        self.counts[kind] += 1
        event = Occurrence(self.now, kind, facts)
        self.events.append(event)
        if self._outbox is not None:
            self._outbox.add(event.time, kind, facts)

    def tally(self, kind: str, **facts: Any) -> None:
        """An event that may happen again and again: counted, and noted the 1st, 10th, 100th, ... time."""
        count = self.counts[kind] + 1
        if str(count).strip("0") == "1":
            self.note(kind, count=count, **facts)
        else:
            self.counts[kind] = count

    def occurrences(self) -> tuple[Occurrence, ...]:
        """The last events. For anybody: it waits for no lock, and another thread may add one meanwhile."""
        while True:
            try:
                return tuple(self.events)
            except RuntimeError:  # the deque has changed under the iteration
                continue

    # -- good snapshots ------------------------------------------------------------------------------------------

    def consider(self) -> None:
        """What the model has now may turn out to be good."""
        self.candidate = self._now()

    def _now(self) -> _Kept:
        return _Kept(self._adapted.hold(), self._adapted.snapshot(), self.moment)

    def distrust(self, moment: int) -> tuple[int | None, ...]:
        """What was kept after that moment is good no longer: harm that is found now may have begun then.

        Returns:
            The numbers of the snapshots; the oldest in memory stays in any case.
        """
        gone = []
        while len(self._good) > 1 and self._good[-1].taken > moment:
            gone.append(self._good.pop().number)
        return tuple(gone)

    def commit(self, note: str, *, candidate: bool = False, **facts: Any) -> bool:
        """What the model has now (or had when it was considered) is good; False if it must not be used.

        The last good one stays then.
        """
        kept = self.candidate if candidate else None
        held, state, taken = kept or self._now()
        self.candidate = None
        number: int | None = None
        if self._outbox is None:
            if any(value.is_floating_point() and not bool(value.isfinite().all()) for value in state.values()):
                self.tally("snapshot refused", reason="non-finite numbers")
                return False
            number = self._last_number = self._last_number + 1
        elif self._outbox.may_try:
            try:
                number, written = self._outbox.commit(note, state, facts)
            except SnapshotError as error:
                self.tally("snapshot refused", reason=str(error).splitlines()[0])
                return False
            except Exception as error:  # nothing that a store does may stop the answers
                self._outbox.ill(error)
            else:
                self._settle(written)
                if number is None:  # an operator has moved the head: nothing is good before that is followed
                    self._look_soon()
                    return False
        self._good.append(_Good(number, held, taken))
        return True

    def back(self, by: str, reason: str, *, head: bool = True) -> None:
        """Put the last good snapshot in use; the store's head follows, unless it is there already."""
        good = self._good[-1]
        self._adapted.rewind(good.held)  # not `restore`, which reads the state anew: a request waits for this
        if self._outbox is not None:
            self._outbox.back = Back(good.number, good.held, by, reason) if head else None

    def adopt(self, number: int) -> None:
        """Make a stored snapshot the last good one, and put it in use.

        Raises:
            ValueError: If there is none of that number, or without a store.
            StoreError, SnapshotError: If it cannot be read or used.
        """
        if number == self.number:
            return
        if number == 0:
            self._adapted.restore(self._adapted.source_snapshot())
        elif self._outbox is not None:
            self._outbox.store.restore(self._adapted, number)
        else:
            raise ValueError(
                f"rollback(to={number}) needs a store; without one there are the last good state ({self.number}) and "
                "the source (0) -> Pilot(model, profile, store, plan)"
            )
        self._good.clear()
        self._good.append(_Good(number, self._adapted.hold(), -1))

    # -- the store -----------------------------------------------------------------------------------------------

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Keep a document; the newest of a name is written at the next `flush`."""
        if self._outbox is not None:
            self._outbox.save(name, state)

    def offer(self, name: str, state: Mapping[str, Any]) -> None:
        """As `save`, for those who do not hold the pilot's lock and must not wait for it; for the next flush."""
        if self._outbox is not None:
            self._offered.append((name, state))

    def read(self, name: str) -> dict[str, Any] | None:
        """A document; None if there is none."""
        return None if self._outbox is None else self._outbox.store.read_state(name)

    def flush(self) -> None:
        """Write all that waits, in one transaction; on trouble it goes on waiting."""
        while self._offered:
            self.save(*self._offered.popleft())
        if self._outbox is not None:
            self._settle(self._outbox.flush())

    def _settle(self, written: Written | None) -> None:
        """The store has followed a roll back: the state's snapshot may have another number there."""
        if written is not None and written.back is not None:
            held, number = written.back.held, written.back.number
            for place, good in enumerate(self._good):
                if good.held is held:
                    self._good[place] = good._replace(number=number)

    def poll(self, *, now: bool = False) -> list[Word]:
        """What operators have said since the last look, in the order of the log; looks once a second.

        A store that cannot be written may still be read: a roll back is followed then, too. Commands wait.
        """
        moment = time.monotonic()
        if self._outbox is None or self._inbox is None or (moment < self._next_poll and not now):
            return []
        self._next_poll = moment + _POLL
        may_write = self._outbox.may_try
        try:
            generation = self._outbox.store.generation()
            if generation == self._generation:
                return []
            words = self._inbox.words(commands=may_write, tripped=self._outbox.back is not None)
            if may_write:
                self._generation = generation
        except Exception as error:
            if may_write:
                self._outbox.ill(error)
            return []
        return words

    def _look_soon(self) -> None:
        self._generation, self._next_poll = -1, -float("inf")

    def moved(self) -> Event | None:
        """A roll back in the store that nobody followed yet."""
        return None if self._inbox is None else self._inbox.moved()

    def followed(self, seq: int) -> None:
        """What the log has up to this place is followed."""
        if self._outbox is not None:
            self._outbox.followed(seq)

    @property
    def trouble(self) -> str | None:
        """What is wrong with the store, if something is."""
        return None if self._outbox is None else self._outbox.trouble

    @property
    def path(self) -> str | None:
        """The store's folder."""
        return None if self._outbox is None else str(self._outbox.store.path)

    @property
    def waiting(self) -> int:
        """Writes that the store has not taken yet."""
        return 0 if self._outbox is None else len(self._outbox)

    def close(self) -> int:
        """Write what waits, and let go of the store; how many writes it did not take. A second call does nothing."""
        if self._lost is None:
            self.flush()
            self._lost = 0 if self._outbox is None else self._outbox.close()
        return self._lost

    def abandon(self) -> None:
        """Let go of the store and write nothing: the pilot could not be made."""
        if self._outbox is not None:
            self._outbox.abandon()
