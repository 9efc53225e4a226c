"""What the live page reads and whom it asks to act: a pilot in this process, or a store beside one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from normadapt.errors import SpecError, StoreError
from normadapt.monitor.kept import Kept, read_store
from normadapt.monitor.recorder import Recorder
from normadapt.monitor.words import who
from normadapt.pilot import Pilot
from normadapt.pilot.operators import roll_back_in
from normadapt.reports.report import Report
from normadapt.store import Snapshot, Store

ROWS = 200
"""Events of the audit log that the page is sent, the newest."""

ACTIONS = ("pause", "resume", "promote", "rollback")
"""What can be asked for on the page."""

_SLOW_SHARE = 0.1  # of the time, at most, that goes into intervals and distributions
_REPORTS = 64  # kept for that
_WAIT = 2.0  # seconds that a page waits for another writer of the store


class Order(NamedTuple):
    """What somebody wants done.

    Args:
        action: One of `ACTIONS`.
        by: Who wants it, for the audit log.
        to: Of a roll back: the snapshot's number; None for the last good one.
        reason: Of a roll back: why.
        force: Of a promotion: even though the stage is not complete.
    """

    action: str
    by: str
    to: int | None = None
    reason: str = ""
    force: bool = False


class Look(NamedTuple):
    """What there is to show at one moment.

    Args:
        kept: Report with history, status, the newest events, names of the streams.
        events: How many events the audit log has in all.
        snapshots: Those that can be gone back to, the source first.
        head: Number of the one in use; None if there is none.
        saved: When the status was written, unix seconds; None if it is of this moment.
        note: What is wrong, in words; empty if nothing is.
        apart: Seconds of computing that have a limit of their own.
    """

    kept: Kept
    events: int
    snapshots: tuple[Snapshot, ...]
    head: int | None
    saved: float | None
    note: str
    apart: float = 0.0


class Subject(Protocol):
    """What a live page is about. Everything but `stamp` may take its time, and is called in a thread."""

    @property
    def obeys(self) -> bool:
        """Whether there is a trial that can be asked to do something."""

    def stamp(self) -> object:
        """Something that differs from what it was as soon as there may be something new to see; cheap."""

    def listen(self, wake: Callable[[], object]) -> Callable[[], None]:
        """Call `wake`, in any thread, when there is something new; returns what ends it."""

    def look(self, stream: str | None) -> Look:
        """What there is to show of a stream, by default of the one seen last.

        Raises:
            SpecError: If nothing was seen of a stream of that name.
            StoreError: If the store cannot be read now.
        """

    def act(self, order: Order) -> str:
        """Do what somebody wants; returns what became of it, in words.

        Raises:
            ValueError: If it cannot be done now, or the store cannot be used: a `StoreError`.
        """

    def close(self) -> None:
        """Let go of what was opened here."""


class _Slow(NamedTuple):
    """A report in full, what it followed from, and when there may be another one."""

    report: Report
    state: object
    due: float


class PilotSubject:
    """A pilot of this process, or a model without one, by way of its recorder.

    Args:
        recorder: Looks on.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._pilot = recorder.pilot
        self._passes = 0
        self._slow: dict[str, _Slow] = {}

    @property
    def obeys(self) -> bool:
        """Whether it is a pilot."""
        return self._pilot is not None

    def stamp(self) -> object:
        """Waits for no lock: the pilot's clock, where it stands, its last event, and passes while somebody listens."""
        state, moment = self._state(), time.monotonic()
        due = any(slow.state != state and slow.due <= moment for slow in tuple(self._slow.values()))
        return None if self._pilot is None else self._pilot.now(), state, due

    def _state(self) -> object:
        """What a report follows from."""
        if self._pilot is None:
            return self._passes
        events = self._pilot.events
        return self._passes, self._pilot.position, events[-1] if events else None

    def listen(self, wake: Callable[[], object]) -> Callable[[], None]:
        """By the observers of the model: `wake` is called while its lock is held, and must be quick."""

        def seen(*_: object) -> None:
            self._passes += 1
            wake()

        observations = [self._recorder.adapted.observe(seen)]
        if self._pilot is not None:
            observations.append(self._pilot.observe(seen))

        def stop() -> None:
            for observation in observations:
                observation.remove()

        return stop

    def look(self, stream: str | None) -> Look:
        """The report, with what the recorder has seen; the status waits for a request that is being answered."""
        pilot, names = self._pilot, self._recorder.streams
        if stream is not None and stream not in names:
            raise _unseen(stream, names)
        status = None if pilot is None else pilot.status()
        report, apart = self._report(stream if stream is not None or not names else names[-1])
        if pilot is None:
            return Look(Kept(report, None, None, names), 0, (), None, None, "", apart)
        all_events = tuple(pilot.events)
        events: tuple[Any, ...] = all_events[-ROWS:]
        count, note = len(all_events), ""
        snapshots: tuple[Snapshot, ...] = ()
        head: int | None = None
        if pilot.store is not None:
            try:
                events = pilot.store.history(ROWS)
                count, snapshots, head = _count(events), pilot.store.snapshots(), pilot.store.head().number
            except StoreError as error:
                note = f"The store cannot be read: {error}"
            trouble = (status or {}).get("store", {}).get("trouble")
            if trouble:
                note = f"The store takes nothing; the pilot goes on in memory and tries again: {trouble}"
        return Look(Kept(report, status, events, names), count, snapshots, head, None, note, apart)

    def _report(self, stream: str | None) -> tuple[Report, float]:
        """With its intervals and distributions, or while these are too dear the former ones; and what they took."""
        if stream is None:
            return self._recorder.report(), 0.0
        state, slow = self._state(), self._slow.get(stream)
        if slow is not None and (slow.state == state or time.monotonic() < slow.due):
            former = slow.report.history
            channels = None if former is None else former.channels
            return slow.report.with_history(self._recorder.history(stream, channels=channels)), 0.0
        start = time.thread_time()
        report = self._recorder.report(stream)
        took = time.thread_time() - start
        due = time.monotonic() + took / _SLOW_SHARE
        if len(self._slow) >= _REPORTS:
            self._slow.clear()
        self._slow[stream] = _Slow(report, state, due)
        return report, took

    def act(self, order: Order) -> str:
        """By the pilot's own methods."""
        pilot = self._pilot
        if pilot is None:
            raise ValueError("this page shows a model without a trial: there is nothing to ask for")
        if pilot.store is not None:
            _check(order, pilot.store)
        match order.action:
            case "pause":
                pilot.pause(order.by)
            case "resume":
                pilot.resume(order.by)
            case "promote":
                pilot.promote(order.by, force=order.force)
            case "rollback":
                pilot.rollback(order.by, order.to, order.reason)
        return f"{_DONE[order.action]}: now at “{pilot.stage.value.replace('_', ' ')}”, {_answering(pilot.serving)}."

    def close(self) -> None:
        """Nothing was opened here."""


class StoreSubject:
    """A store beside a pilot that runs elsewhere, or ran once. A store that goes and comes back is opened again.

    Args:
        path: Its folder.

    Raises:
        StoreError: If it cannot be opened.
    """

    obeys = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._open: Store | None = None
        self._times = 0  # that it was opened
        self._store()

    def _store(self) -> Store:
        with self._lock:
            if self._open is None:
                self._open = Store(self.path, timeout=_WAIT, create=False)
                self._times += 1
            return self._open

    def _drop(self) -> None:
        """It is damaged or gone: the next look opens what is there then."""
        with self._lock, suppress(StoreError):
            store, self._open = self._open, None
            if store is not None:
                store.close()

    def stamp(self) -> object:
        """Whether the file was written to."""
        try:
            store = self._store()
            return self._times, store.generation(), store.changes()
        except StoreError as error:
            self._drop()
            return str(error)

    def listen(self, wake: Callable[[], object]) -> Callable[[], None]:
        """Another process cannot be listened to; whoever wants news asks for `stamp`."""
        return lambda: None

    def look(self, stream: str | None) -> Look:
        """What the pilot saved last."""
        store = self._store()
        try:
            kept = read_store(store, stream, events=ROWS)
            snapshots = store.snapshots()
            head = store.head().number if snapshots else None
        except StoreError:
            self._drop()
            raise
        except SpecError:
            raise _unseen(stream, read_store(store, events=0).streams) from None
        saved = kept.status.get("saved") if kept.status is not None else None
        return Look(kept, _count(kept.events or ()), snapshots, head, saved, "")

    def act(self, order: Order) -> str:
        """Roll the head back, or leave a command for the pilot, which takes it with a request."""
        store = self._store()
        _check(order, store)
        if order.action == "rollback":
            _, snapshot = roll_back_in(store, order.to, order.by, order.reason)
            return f"Back at snapshot {snapshot.number} ({snapshot.note}); a running pilot follows within a second."
        facts: dict[str, Any] = {"by": order.by}
        if order.action == "promote":
            facts["force"] = order.force
        number = store.send(order.action, **facts)
        return (
            f"Command {number} ({order.action}) is left for the pilot, which takes it with its next request, at "
            "the latest a second after it."
        )

    def close(self) -> None:
        """Close the store."""
        self._drop()


_DONE: Mapping[str, str] = {
    "pause": "Paused",
    "resume": "Resumed",
    "promote": "Promoted",
    "rollback": "Rolled back",
}


def subject_of(watched: Pilot | Recorder | Store | Path | str) -> Subject:
    """What a page on this shows.

    Raises:
        TypeError: If it is nothing of the kind.
        StoreError: If the store cannot be opened.
    """
    match watched:
        case Recorder():
            watched.attach()
            return PilotSubject(watched)
        case Pilot():
            return PilotSubject(Recorder(watched))
        case Store():
            return StoreSubject(watched.path)
        case Path() | str():
            return StoreSubject(Path(watched))
    raise TypeError(f"app() needs a Pilot, a Recorder, a Store or a store's folder; got {type(watched).__name__}")


def _check(order: Order, store: Store) -> None:
    """Refuse a snapshot that is not there; that is no trouble of the store's."""
    if order.action == "rollback" and order.to is not None:
        numbers = [snapshot.number for snapshot in store.snapshots()]
        if order.to not in numbers:
            known = ", ".join(map(str, numbers[-20:])) or "none"
            raise ValueError(f"there is no snapshot {order.to}, or no more; there are {known}")


def _count(events: tuple[Any, ...]) -> int:
    """Events have numbers without gaps."""
    return int(events[-1].seq) if events else 0


def _answering(serving: str) -> str:
    return f"{who(serving)} answers{'' if serving == 'source' else ' its share'}"


def _unseen(stream: str | None, names: tuple[str, ...]) -> SpecError:
    known = ", ".join(map(repr, names[:20])) or "none"
    return SpecError(f"nothing was seen of a stream {stream!r}; there are {known}")
