"""Reads a model at work every few seconds: little is done while a request waits, the sums are made in a thread."""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from normadapt.adapted._adapt import AdaptedModel
from normadapt.adapted.observation import Observation, Seen
from normadapt.layers.hooks import outside_autograd
from normadapt.monitor.reduction import Layers, Reducer, answers_of
from normadapt.pilot import Pilot
from normadapt.pilot.answering import Compared
from normadapt.reports.domain_report import DomainReport
from normadapt.reports.history import Numbers

_STREAMS = 64  # looked at between two readings; of more, those seen last
_PASSES = 64  # whose answers the entropy is taken over, at most
_ROWS = 256  # answers of a pass, at most; a segmentation has one for each pixel


class Reading(NamedTuple):
    """What there is to tell; NaN for what is not known.

    Args:
        updates: Adapting passes so far that succeeded.
        last_update: When the last one that followed data ended, unix seconds; None before the first.
        streams: Seen since the last reading that had any.
        layers: Numbers of all layers: the largest shift of any of those streams, the smallest tail, mean weights.
        domains: That a stream has met, most of any of those streams; 0 where the policy knows none.
        domain_shift: Of the domain that a stream is in, the largest of any of those streams.
        skipped: Layers whose last batch was not used, in the stream where they are most.
        entropy: Of the answers of the last passes, mean over items, in nats.
        compared, agreeing: Items that both models have answered so far, and those of the same class.
        agreement: Share of the latter among the items compared since the last reading that had any.
        status: What `Pilot.status()` gave; None without a pilot.
        rollbacks: By cause ("guard", "operator"), so far.
        trips: By guard, so far.
    """

    updates: int
    last_update: float | None
    streams: int
    layers: Layers | None
    domains: int
    domain_shift: float
    skipped: int
    entropy: float
    compared: int
    agreeing: int
    agreement: float
    status: Mapping[str, Any] | None
    rollbacks: Mapping[str, int]
    trips: Mapping[str, int]


class Meter:
    """Looks on at a model or a pilot, and sums it up when asked.

    Args:
        watched: The model, or the pilot whose model it is.
        passed: Called after every pass with its seconds, while the request waits.

    Raises:
        TypeError: If it is neither.
    """

    def __init__(self, watched: AdaptedModel | Pilot, passed: Callable[[float], object] | None = None) -> None:
        if not isinstance(watched, (AdaptedModel, Pilot)):
            raise TypeError(f"expected what adapt() returned, or a Pilot; got {type(watched).__name__}")
        self.pilot = watched if isinstance(watched, Pilot) else None
        self.adapted = watched.adapted if isinstance(watched, Pilot) else watched
        self.layers = tuple(site.name or type(site.module).__name__ for site in self.adapted.sites)
        self._passed = passed
        self._reducer = Reducer(self.adapted.sources)
        self._lock = threading.Lock()
        self.turn = threading.RLock()
        self._latest: dict[str, Seen] = {}
        self._answers: deque[Tensor | None] = deque(maxlen=_PASSES)
        self._recent = [0, 0]
        self._last_event: object = None
        self._told = Reading(0, None, 0, None, 0, math.nan, 0, math.nan, 0, 0, math.nan, None, Counter(), Counter())
        self._updates = self._compared = self._agreeing = 0
        self._last_update: float | None = None
        if self.pilot is not None:
            self._last_event = next(reversed(list(self.pilot.events)), None)  # what was before us is not ours to count
        self._observations: list[Observation] = [self.adapted.observe(self._see)]
        if self.pilot is not None:
            self._observations.append(self.pilot.observe(self._compare))
        self._thread: _Thread | None = None

    # -- while a request waits -----------------------------------------------------------------------------------

    def _see(self, stream: str, seen: Seen) -> None:
        if self._thread is not None and self._thread.process != os.getpid():
            self._begin_in_fork()
        answers = seen.probabilities
        if answers is not None and answers.shape[0] > _ROWS:
            answers = answers[:: answers.shape[0] // _ROWS + 1].clone()  # a view would keep all of them
        with self._lock:
            self._updates += 1
            if any(not record.status.startswith("skipped") for record in seen.records):  # mostly the first tells
                self._last_update = time.time()
            self._latest.pop(stream, None)
            self._latest[stream] = seen._replace(output=None, moments=(), probabilities=None)
            if len(self._latest) > _STREAMS:
                del self._latest[next(iter(self._latest))]
            self._answers.append(answers)
        if self._passed is not None:
            self._passed(seen.seconds)

    def _compare(self, _stream: str, compared: Compared) -> None:
        self.compare(compared.items, compared.agreeing)

    def compare(self, items: int, agreeing: int) -> None:
        """So many items were answered by both models, so many of them alike."""
        with self._lock:
            self._compared += items
            self._agreeing += agreeing
            self._recent[0] += items
            self._recent[1] += agreeing

    def _begin_in_fork(self) -> None:
        """After a fork the thread is gone, and its locks may be held by nobody who could let go of them."""
        self._lock, self.turn = threading.Lock(), threading.RLock()
        if self._thread is not None:
            self._thread = self._thread.again()

    # -- in the thread -------------------------------------------------------------------------------------------

    def read(self) -> Reading:
        """What there is to tell now; from any thread, also while requests are answered."""
        with self.turn, outside_autograd():
            with self._lock:
                latest, self._latest = self._latest, {}
                answers = list(self._answers)
                self._answers.clear()
                (items, agreeing), self._recent = self._recent, [0, 0]
                updates, last_update = self._updates, self._last_update
                compared, agreed = self._compared, self._agreeing
            told = self._told._replace(updates=updates, last_update=last_update, compared=compared, agreeing=agreed)
            if latest:
                glimpses = [self._reducer.glimpse(seen.records) for seen in latest.values()]
                skipped = max(sum(r.status.startswith("skipped") for r in seen.records) for seen in latest.values())
                met = [self._domains(stream) for stream in latest]
                present = [domain.shift for domains in met for domain in domains if domain.is_present]
                told = told._replace(
                    streams=len(latest),
                    layers=_worst(self._reducer.reduce(glimpses)),
                    domains=max(sum(domain.seen > 0 for domain in domains) for domains in met),
                    domain_shift=max(present, default=math.nan),
                    skipped=skipped,
                )
            if any(answer is not None for answer in answers):
                told = told._replace(entropy=_entropy(answers))
            if items:
                told = told._replace(agreement=agreeing / items)
            if self.pilot is not None:
                self._count(self.pilot, told)
                told = told._replace(status=self.pilot.status())
            self._told = told
            return told

    def _domains(self, stream: str) -> tuple[DomainReport, ...]:
        with self.adapted.stream(stream):
            return self.adapted.domains

    def _count(self, pilot: Pilot, told: Reading) -> None:
        """Count what happened since the last reading, of the last thousand events."""
        events = list(pilot.events)
        new = []
        for event in reversed(events):
            if event is self._last_event:
                break
            new.append(event)
        self._last_event = events[-1] if events else None
        for event in new:
            cause = event.facts.get("cause")
            if event.kind == "trip":
                told.trips[str(event.facts.get("guard"))] += 1  # type: ignore[index]
            elif event.kind == "rolled back" or (event.kind == "transition" and cause in ("tripped", "rolled back")):
                told.rollbacks["guard" if cause == "tripped" else "operator"] += 1  # type: ignore[index]

    # -- every few seconds ---------------------------------------------------------------------------------------

    def every(self, seconds: float, work: Callable[[], object]) -> None:
        """Call a bound method every so many seconds, in a thread that ends with its object or with `close`."""
        self._thread = _Thread(weakref.WeakMethod(work), float(seconds))

    def close(self) -> None:
        """Look on no more."""
        for observation in self._observations:
            observation.remove()
        if self._thread is not None:
            self._thread.stop.set()

    @property
    def failures(self) -> int:
        """How often looking on has failed; the model's answers are not touched by it."""
        return sum(observation.failures for observation in self._observations)


class _Thread:
    """Calls something every few seconds while it lives."""

    def __init__(self, work: weakref.WeakMethod[Callable[[], object]], seconds: float) -> None:
        self.process = os.getpid()
        self.stop = threading.Event()
        self._work, self._seconds = work, seconds
        arguments = (work, seconds, self.stop)
        threading.Thread(target=_repeat, args=arguments, name="normadapt-meter", daemon=True).start()

    def again(self) -> _Thread:
        return _Thread(self._work, self._seconds)


def _repeat(work: weakref.WeakMethod[Callable[[], object]], seconds: float, stop: threading.Event) -> None:
    while not stop.wait(seconds):
        call = work()
        if call is None:
            return
        call()
        del call  # while waiting, nobody is kept alive


def check_settings(top: int, seconds: float) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError: If `top` is no number of layers, or `seconds` is not a positive number.
    """
    if isinstance(top, bool) or not isinstance(top, int) or top < 0:
        raise ValueError(f"top must be a number of layers from 0; got {top!r}")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < 1e6:
        raise ValueError(f"seconds must be a positive number; got {seconds!r}")


def leading_layers(shift: Numbers, top: int) -> list[int]:
    """Places of the layers with the largest known shift (L,), the largest first."""
    return [int(place) for place in np.argsort(-shift, kind="stable")[:top] if math.isfinite(shift[place])]


def _worst(streams: Iterable[Layers]) -> Layers:
    """Of each layer, over the streams."""
    table = np.stack([np.stack(layers) for layers in streams])  # (S, 4, L)
    known = np.isfinite(table)
    some: npt.NDArray[np.bool_] = np.asarray(known.any(0))
    shift = np.where(known[:, 0], table[:, 0], -np.inf).max(0)
    tail = np.where(known[:, 1], table[:, 1], np.inf).min(0)
    mean, variance = np.where(known, table, 0.0).sum(0)[2:] / np.maximum(known.sum(0)[2:], 1)
    rows = (np.where(some[place], row, np.nan) for place, row in enumerate((shift, tail, mean, variance)))
    return Layers(*rows)


def _entropy(answers: list[Tensor | None]) -> float:
    """Mean over items of the last passes."""
    told = answers_of(answers)
    pairs = [(e, len(a)) for (e, _), a in zip(told, answers, strict=True) if a is not None and math.isfinite(e)]
    return math.nan if not pairs else sum(e * n for e, n in pairs) / sum(n for _, n in pairs)


def mean_weights(layers: Layers) -> dict[str, float]:
    """Mean over the layers of the weight on each statistic; NaN where none is known."""
    pairs = (("mean", layers.mean_weight), ("variance", layers.variance_weight))
    known = {statistic: weights[np.isfinite(weights)] for statistic, weights in pairs}
    return {statistic: float(weights.mean()) if len(weights) else math.nan for statistic, weights in known.items()}


def whole_model_tail(tail: Numbers) -> float:
    """Probability of at least such a shift at any layer if there were none, bounded by the layers' sum (Bonferroni).

    Args:
        tail: log10 of each layer's (L,).
    """
    known = tail[np.isfinite(tail)]
    return math.nan if not len(known) else float(min(1.0, len(known) * 10 ** known.min()))
