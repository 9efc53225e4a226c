"""What a pilot keeps: the last good snapshot in memory, and in the store everything that must outlive the process.

Nothing here raises because of the store. What could not be written waits and is tried again; the model goes on in
memory.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from normadapt.adapt import AdaptedModel, Held
from normadapt.errors import SnapshotError
from normadapt.store import Command, Store

STATE = "pilot"
ANSWERED = "pilot-answered"
FOLLOWED = ("transition", "resumed", "rolled back")
"""Kinds of events by which a pilot shows that it knows where the head is."""

AT = "at"
"""Among an event's facts: when it happened by the pilot's clock, where that is not when the store wrote it."""

_LATE = 2.0  # seconds between the two that do not matter
_WAIT = 0.2  # seconds that a request may wait for another writer of the store
_POLL = 1.0  # seconds between two looks for commands
_RETRY = (1.0, 60.0)  # seconds until a store in trouble is tried again, at first and at most
_IN_MEMORY = 20  # good states
_PENDING = 1000  # events kept for a store in trouble; the oldest go first


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


@dataclass
class _Pending:
    """Writes that the store has not taken yet."""

    events: deque[Occurrence] = field(default_factory=lambda: deque(maxlen=_PENDING))
    head: tuple[int, str, str] | None = None
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: int = 0

    def __bool__(self) -> bool:
        return bool(self.events or self.head or self.states)


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
        self.trouble: str | None = None
        self._pending = _Pending()
        self._offered: deque[tuple[str, Mapping[str, Any]]] = deque()
        self._delay = 0.0
        self._next_try = self._next_poll = -float("inf")
        self._generation = -1
        self._store: Store | None = None
        self.moment = 0  # items that the arm has answered
        number = 0
        self.candidate: _Kept | None = None
        self._last_number = 0
        if store is not None:
            store.commit_source(adapted)
            number = store.restore(adapted).number
            # A handle of its own, with which a request waits for nobody; whoever gave `store` may be more patient.
            self._store = Store(store.path, retain=store.retain, timeout=_WAIT)
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
        if self._store is not None:
            self._pending.lost += len(self._pending.events) == _PENDING
            self._pending.events.append(event)

    def tally(self, kind: str, **facts: Any) -> None:
        """An event that may happen again and again: counted, and noted the 1st, 10th, 100th, ... time."""
        count = self.counts[kind] + 1
        if str(count).strip("0") == "1":
            self.note(kind, count=count, **facts)
        else:
            self.counts[kind] = count

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
        if self._store is None:
            if any(value.is_floating_point() and not bool(value.isfinite().all()) for value in state.values()):
                self.tally("snapshot refused", reason="non-finite numbers")
                return False
            number = self._last_number = self._last_number + 1
        elif self._may_try():
            try:
                with self._store.transaction():
                    self._write(self._store)  # in the order of happening: a roll back that waits comes first
                    number = self._store.commit(self._adapted, note, state=state, **facts).number
                self._written()
            except SnapshotError as error:
                self.tally("snapshot refused", reason=str(error).splitlines()[0])
                return False
            except Exception as error:  # nothing that a store does may stop the answers
                self._ill(error)
        self._good.append(_Good(number, held, taken))
        return True

    def back(self, by: str, reason: str, *, head: bool = True) -> None:
        """Put the last good snapshot in use; the store's head follows, unless it is there already."""
        self._adapted.rewind(self._good[-1].held)  # not `restore`, which reads the state anew: a request waits for this
        if head and self._store is not None and self.number is not None:
            self._pending.head = (self.number, by, reason)

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
        elif self._store is not None:
            self._store.restore(self._adapted, number)
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
        if self._store is not None:
            self._pending.states[name] = dict(state)

    def offer(self, name: str, state: Mapping[str, Any]) -> None:
        """As `save`, for those who do not hold the pilot's lock and must not wait for it; for the next flush."""
        if self._store is not None:
            self._offered.append((name, state))

    def read(self, name: str) -> dict[str, Any] | None:
        """A document; None if there is none."""
        return None if self._store is None else self._store.read_state(name)

    def flush(self) -> None:
        """Write all that waits, in one transaction; on trouble it goes on waiting."""
        while self._offered:
            self.save(*self._offered.popleft())
        if self._store is None or not self._pending or not self._may_try():
            return
        try:
            with self._store.transaction():
                self._write(self._store)
        except Exception as error:
            self._ill(error)
        else:
            self._written()

    def _write(self, store: Store) -> None:
        waiting = self._pending
        if waiting.lost:
            store.record("events lost", count=waiting.lost)
        if waiting.head is not None:
            number, by, reason = waiting.head
            store.rollback(number, by=by, reason=reason)
        for event in waiting.events:  # after the roll back: see `moved_by_others`
            store.record(event.kind, **{**event.facts, **self._when(event)})
        for name, state in waiting.states.items():
            store.write_state(name, state)

    @staticmethod
    def _when(event: Occurrence) -> dict[str, float]:
        """When it happened, where the log's own time would not say it: it waited, or the pilot's clock is another."""
        return {AT: event.time} if not abs(event.time - time.time()) <= _LATE else {}

    def _written(self) -> None:
        self._pending = _Pending()
        if self.trouble is not None:
            self.trouble = None
            self.note("store back")

    def poll(self, *, now: bool = False) -> tuple[tuple[Command, ...], int | None]:
        """Commands that operators have sent, and the head's number if somebody else moved it; looks once a second."""
        moment = time.monotonic()
        if self._store is None or (moment < self._next_poll and not now) or not self._may_try():
            return (), None
        self._next_poll = moment + _POLL
        try:
            generation = self._store.generation()
            if generation == self._generation:
                return (), None
            commands = self._store.take_commands()
            head = self._store.head().number
            self._generation = generation
        except Exception as error:
            self._ill(error)
            return (), None
        is_ours = self._pending.head is not None or self.number is None or head == self.number
        return commands, None if is_ours else head

    def moved_by_others(self) -> dict[str, Any] | None:
        """Facts of a roll back that nobody followed yet: one that no event of a pilot comes after."""
        if self._store is None:
            return None
        moves = self._store.history(limit=1, kinds=["rollback"])
        ours = self._store.history(limit=1, kinds=FOLLOWED)
        return moves[0].facts if moves and (not ours or ours[0].seq < moves[0].seq) else None

    @property
    def path(self) -> str | None:
        """The store's folder."""
        return None if self._store is None else str(self._store.path)

    @property
    def waiting(self) -> int:
        """Writes that the store has not taken yet."""
        return len(self._pending.events) + len(self._pending.states) + (self._pending.head is not None)

    def close(self) -> None:
        """Write what waits, and close the handle."""
        self._next_try = -float("inf")
        self.flush()
        if self._store is not None:
            self._store.close()

    def _may_try(self) -> bool:
        return time.monotonic() >= self._next_try

    def _ill(self, error: Exception) -> None:
        if self.trouble is None:
            self._delay = _RETRY[0]
            self.note("store trouble", reason=str(error).splitlines()[0])
        else:
            self._delay = min(2 * self._delay, _RETRY[1])
        self.trouble = str(error)
        self._next_try = time.monotonic() + self._delay
