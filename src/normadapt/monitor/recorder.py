"""`Recorder`: looks on while a model adapts, and keeps what it sees in a bounded number of columns."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from normadapt.adapted._adapt import AdaptedModel
from normadapt.adapted.observation import Observation, Seen
from normadapt.adapted.settings import current
from normadapt.errors import StoreError
from normadapt.layers.predictions import class_probabilities
from normadapt.monitor.footage import Footage
from normadapt.monitor.marks import marks_of
from normadapt.pilot import Pilot
from normadapt.pilot.answering import Compared
from normadapt.reports.history import Channel, History, Mark
from normadapt.reports.report import Report

HISTORY = "pilot-history"
"""Under this name a store has the histories of a pilot's streams, and its report: see `Recorder.document`."""

_STREAMS = 64  # remembered at a time; of more, those seen last
_SAVED = 8  # streams in the store
_SAVE_EVERY = 10.0  # seconds, at least, between two savings
_SAVE_SHARE = 0.005  # of the time, at most, that goes into saving


class Recorder:
    """Keeps a bounded history of each stream of a model while it adapts.

    With a pilot, its stage changes and roll backs are marked, the answers that both models gave are compared, and the
    history is saved with the pilot's store, from where the next process goes on. It begins at once; `detach` ends it.

    Args:
        watched: The model, or the pilot whose model it is.
        every: Look at every so many passes of a stream only.
        columns: Columns kept of each stream, even and at least 8; neighbours merge when there are more.
        clock: Gives unix seconds. Default: the pilot's clock, or the real one.

    Raises:
        TypeError, ValueError: If an argument is not what it should be.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import normadapt as na
        >>> adapted = na.adapt(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)))
        >>> with Recorder(adapted) as recorder:
        ...     for _ in range(20):
        ...         _ = adapted(torch.randn(8, 1, 8, 8) + 2)
        >>> history = recorder.history()
        >>> history.sites, history.shift.shape, int(history.items.sum())
        (('1',), (1, 20), 160)
    """

    def __init__(
        self,
        watched: AdaptedModel | Pilot,
        *,
        every: int = 1,
        columns: int = 512,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if not isinstance(watched, (AdaptedModel, Pilot)):
            raise TypeError(f"Recorder() needs what adapt() returned, or a Pilot; got {type(watched).__name__}")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of passes from 1; got {every!r}")
        if isinstance(columns, bool) or not isinstance(columns, int) or columns < 8 or columns % 2:
            raise ValueError(f"columns must be an even number from 8; got {columns!r}")
        self.pilot = watched if isinstance(watched, Pilot) else None
        self.adapted = watched.adapted if isinstance(watched, Pilot) else watched
        self.every = every
        self.columns = columns
        self._clock = clock or (time.time if self.pilot is None else self.pilot.now)
        self._footage: dict[str, Footage] = {}
        self._marks: list[Mark] = []
        self._lock = threading.RLock()
        self._observations: list[Observation] = []
        self._next_save = time.monotonic() + _SAVE_EVERY
        self._resume()
        self.attach()

    # -- looking on ----------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Look on from now on; if it does already, nothing changes."""
        if self._observations:
            return
        self._observations = [self.adapted.observe(self._see)]
        if self.pilot is not None:
            self._observations.append(self.pilot.observe(self._compare))
            self.pilot.before_closing.append(self.save)

    def detach(self) -> None:
        """Look on no more; what was seen stays, and is saved with a pilot's store."""
        if not self._observations:
            return
        for observation in self._observations:
            observation.remove()
        self._observations = []
        if self.pilot is not None:
            self.pilot.before_closing.remove(self.save)
            self.save()

    def __enter__(self) -> Recorder:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def failures(self) -> int:
        """How often looking on has failed; the model's answers are not touched by it."""
        return sum(observation.failures for observation in self._observations)

    def _see(self, stream: str, seen: Seen) -> None:
        with self._lock:
            self._of(stream).see(seen, self._clock())
        if self.pilot is not None and time.monotonic() >= self._next_save:
            self.save()

    def _compare(self, stream: str, compared: Compared) -> None:
        with self._lock:
            self._of(stream).compare(compared.items, compared.agreeing)

    def _of(self, stream: str) -> Footage:
        """A stream's own, moved to the end: those that were not seen for longest go first."""
        footage = self._footage.pop(stream, None)
        if footage is None:
            footage = Footage(stream, self.adapted.sites, self.adapted.sources, self.every, self.columns)
            if len(self._footage) >= _STREAMS:
                del self._footage[next(iter(self._footage))]
        self._footage[stream] = footage
        return footage

    def compare(self, source_output: Any, output: Any, stream: str | None = None) -> None:
        """Tell what the source answered to the last batch, and what the adapted model did, where no pilot does.

        Args:
            source_output: The source's output, or its classes (n,).
            output: The adapted model's, likewise.
            stream: Which stream; by default the one that this thread uses.
        """
        theirs, ours = _classes(source_output), _classes(output)
        if theirs is None or ours is None or theirs.shape != ours.shape:
            raise ValueError("compare() needs two outputs of logits (n, K) for the same items, or their classes (n,)")
        with self._lock:
            self._of(current(self.adapted).stream if stream is None else stream).compare(
                ours.numel(), int((ours == theirs).sum())
            )

    def mark(self, text: str, kind: str = "note") -> None:
        """Note that something happened, for the page: "the lamp was replaced"."""
        with self._lock:
            self._marks.append(Mark(self._clock(), kind, text))

    # -- what was seen -------------------------------------------------------------------------------------------

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams that were seen, the one seen last at the end."""
        with self._lock:
            return tuple(self._footage)

    def history(self, stream: str | None = None, *, channels: tuple[tuple[Channel, ...], ...] | None = None) -> History:
        """What was seen of a stream so far; by default of the one seen last.

        Args:
            stream: Its name.
            channels: Take these in place of the present distributions, which are most of the work.

        Raises:
            KeyError: If nothing was seen of a stream of that name.
        """
        with self._lock:
            name = stream if stream is not None else next(reversed(self._footage), None)
            if name is None:
                return Footage("", self.adapted.sites, self.adapted.sources, self.every, self.columns).history(())
            if name not in self._footage:
                known = ", ".join(map(repr, self._footage)) or "none"
                raise KeyError(f"nothing was seen of a stream {name!r}; there are {known}")
            history, reduce = self._footage[name].history(self._all_marks()), self._footage[name].distributions()
        return replace(history, channels=reduce() if channels is None else channels)  # a pass need not wait for it

    def report(self, stream: str | None = None) -> Report:
        """The model's report on a stream, with its history."""
        history = self.history(stream)
        name = history.stream or current(self.adapted).stream
        with self.adapted.stream(name):
            return self.adapted.report().with_history(history)

    def _all_marks(self) -> tuple[Mark, ...]:
        if self.pilot is not None:
            known = {(mark.time, mark.text) for mark in self._marks}
            new = marks_of((event.time, event.kind, event.facts) for event in tuple(self.pilot.events))
            self._marks += [mark for mark in new if (mark.time, mark.text) not in known]
            self._marks.sort(key=lambda mark: mark.time)
        self._marks = self._marks[-500:]
        return tuple(self._marks)

    # -- the store -----------------------------------------------------------------------------------------------

    def document(self) -> dict[str, Any]:
        """Everything as plain data: the streams seen last with their domains, and the last one's report."""
        with self._lock:
            names = list(self._footage)[-_SAVED:]
        streams = {name: self.history(name).to_dict() for name in names}
        report = self.adapted.report() if not names else self.report(names[-1]).with_history(None)
        domains = {}
        for name in names[:-1]:
            with self.adapted.stream(name):
                domains[name] = [domain.to_dict() for domain in self.adapted.domains]
        return {"report": report.to_dict(), "streams": streams, "domains": domains}

    def save(self) -> None:
        """Hand the history to the pilot's store, which writes it with what the pilot writes next."""
        if self.pilot is None or self.pilot.store is None:
            return
        started = time.monotonic()
        self.pilot.keep(HISTORY, self.document())
        done = time.monotonic()
        self._next_save = done + max(_SAVE_EVERY, (done - started) / _SAVE_SHARE)

    def _resume(self) -> None:
        """Go on from what the store has of the model's former processes."""
        if self.pilot is None or self.pilot.store is None:
            return
        try:
            kept = self.pilot.store.read_state(HISTORY)
            histories = [History.from_dict(values) for values in ((kept or {}).get("streams") or {}).values()]
        except (StoreError, ValueError, AttributeError):
            return  # a history that cannot be read is begun anew
        names = tuple(site.name for site in self.adapted.sites)
        for history in histories:
            if history.sites == names:
                self._of(history.stream).resume(history)
                self._marks = list(history.marks)


def _classes(output: Any) -> Tensor | None:
    if isinstance(output, Tensor) and output.dim() == 1:
        return output.detach().cpu()
    probabilities = class_probabilities(output, None)
    return None if probabilities is None else probabilities.argmax(1).cpu()
