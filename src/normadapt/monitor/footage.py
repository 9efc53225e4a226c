"""What a recorder keeps of one stream: rows on their way into columns, and the last instances of every layer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from normadapt.adapted.observation import Seen
from normadapt.layers.policy import Source
from normadapt.layers.sites import Site
from normadapt.monitor.columns import Columns
from normadapt.monitor.reduction import Glimpse, Reducer, answers_of
from normadapt.reports.history import Channel, History, Mark, Numbers

_BATCH = 32  # passes that wait until their numbers are put together
_WAITING = 2**20  # probabilities that may wait with them
_ITEMS = 256  # recent instances kept, for the distributions
_CLASSES = 1000  # beyond, no histogram of classes is kept
_SHOWN_CLASSES = 12
_CHANNELS = 6
_BINS = 24


class _Row(NamedTuple):
    time: float
    items: int
    glimpse: Glimpse
    probabilities: Tensor | None


class Footage:
    """One stream.

    Args:
        stream: Its name.
        sites: The model's layers.
        sources: What is known of them before any test data.
        every: Look at every so many passes only.
        columns: How many to keep.
    """

    def __init__(self, stream: str, sites: Sequence[Site], sources: Sequence[Source], every: int, columns: int) -> None:
        self.stream = stream
        self._names = tuple(site.name for site in sites)
        self._sources = tuple(sources)
        self._every = every
        self._most = columns
        self._reducer = Reducer(sources)
        self._rows: list[_Row] = []
        self._agreements: list[float] = []
        self._waiting = 0  # probabilities in these rows
        self._passes = 0
        self._skipped = 0  # instances of passes that were not looked at
        self._columns: Columns | None = None
        self._classes = 0
        self._names_of_classes: tuple[str, ...] = ()
        self._instances: deque[list[Tensor | None]] = deque()
        self._held = 0
        self._in_use: list[tuple[Tensor, Tensor]] = []
        self._before: tuple[tuple[Channel, ...], ...] = ()

    # -- looking on ----------------------------------------------------------------------------------------------

    def see(self, seen: Seen, time: float) -> None:
        """One pass."""
        place, self._passes = self._passes, self._passes + 1
        items = max((moments.values.shape[1] for moments in seen.moments if moments is not None), default=0)
        if place % self._every:
            self._skipped += items
            return
        if len(self._rows) >= _BATCH or self._waiting > _WAITING:
            self.flush()
        stride = 1 if self._columns is None else self._columns.stride
        # what a policy says takes time to make: it is asked once for each column
        glimpse = self._reducer.glimpse(seen.records, exact=place // self._every % stride == 0)
        probabilities = seen.probabilities
        self._rows.append(_Row(time, items + self._skipped, glimpse, probabilities))
        self._waiting += 0 if probabilities is None else probabilities.numel()
        self._agreements.append(float("nan"))
        self._skipped = 0
        self._in_use = [record.buffers for record in seen.records]
        self._hold(seen)

    def _hold(self, seen: Seen) -> None:
        means = [None if moments is None else moments.mean[:_ITEMS].float() for moments in seen.moments]
        self._instances.append(means)
        self._held += _length(means)
        while len(self._instances) > 1 and self._held - _length(self._instances[0]) >= _ITEMS:
            self._held -= _length(self._instances.popleft())

    def compare(self, items: int, agreeing: int) -> None:
        """How the answers to the last pass agree with the source's; a second word on the same pass does not count."""
        if self._agreements and np.isnan(self._agreements[-1]) and items:
            self._agreements[-1] = agreeing / items

    def flush(self) -> None:
        """Put the rows that wait into the columns."""
        if not self._rows:
            return
        layers = self._reducer.reduce([row.glimpse for row in self._rows])
        answers = answers_of([row.probabilities for row in self._rows])
        for row, layer, answer, agreement in zip(self._rows, layers, answers, self._agreements, strict=True):
            entropy, shares = answer
            if self._columns is None:
                self._classes = 0 if shares is None or len(shares) > _CLASSES else len(shares)
                self._names_of_classes = tuple(map(str, range(self._classes)))
                self._columns = Columns(4 * len(self._names) + 2 + self._classes, self._most)
            if shares is None or len(shares) != self._classes:
                shares = np.full(self._classes, float("nan"))
            self._columns.add(np.concatenate((*layer, [entropy, agreement], shares)), row.time, row.items)
        self._rows, self._agreements, self._waiting = [], [], 0

    # -- what was seen -------------------------------------------------------------------------------------------

    def history(self, marks: Sequence[Mark]) -> History:
        """So far, but for the distributions: see `distributions`."""
        self.flush()
        columns = self._columns or Columns(4 * len(self._names) + 2, self._most)
        count, values = columns.count, columns.means()
        layers = values[: 4 * len(self._names)].reshape(4, len(self._names), -1)
        entropy, agreement = values[4 * len(self._names) : 4 * len(self._names) + 2]
        shares = values[4 * len(self._names) + 2 :]
        classes, names = self._shown(shares) if self._classes else (None, ())
        times, items = columns.times[:count].copy(), columns.items[:count].copy()
        seen = np.cumsum(items) - items
        return History(
            self.stream,
            self._names,
            times,
            columns.rows[:count].copy(),
            items,
            layers[0],
            layers[1],
            layers[2],
            layers[3],
            entropy,
            agreement if np.isfinite(agreement).any() else None,
            classes,
            names,
            tuple(mark._replace(items=_seen_at(mark.time, times, seen, items)) for mark in marks),
        )

    def _shown(self, shares: Numbers) -> tuple[Numbers, tuple[str, ...]]:
        """The most frequent classes and the rest."""
        if len(shares) <= _SHOWN_CLASSES:
            return shares, self._names_of_classes
        average = np.nan_to_num(shares).sum(1)
        chosen = np.sort(np.argsort(-average, kind="stable")[: _SHOWN_CLASSES - 1])
        rest = np.setdiff1d(np.arange(len(shares)), chosen)
        names = (*(self._names_of_classes[place] for place in chosen), f"{len(rest)} others")
        return np.vstack((shares[chosen], shares[rest].sum(0))), names

    def distributions(self) -> Callable[[], tuple[tuple[Channel, ...], ...]]:
        """What gives the channels of the recent instances; it may be called later, when nobody waits for it."""
        instances, in_use, before = list(self._instances), list(self._in_use), self._before

        def reduce() -> tuple[tuple[Channel, ...], ...]:
            found = []
            for place, source in enumerate(self._sources):
                kept = [means[place] for means in instances]
                values = [tensor for tensor in kept if tensor is not None]
                found.append(_channels(torch.cat(values), source, in_use[place]) if values else ())
            return tuple(found) if any(found) else before

        return reduce

    def resume(self, history: History) -> None:
        """Go on from what another process has seen."""
        if not len(history):
            return
        known = history.classes is not None and all(name.isdigit() for name in history.class_names)
        self._classes = len(history.class_names) if known else 0
        self._names_of_classes = history.class_names if known else ()
        layers, extra = len(self._names), 2 + self._classes
        self._columns = Columns(4 * layers + extra, self._most)
        blank = np.full(len(history), float("nan"))
        rows = [history.shift, history.tail, history.mean_weight, history.variance_weight, history.entropy[None]]
        rows.append((blank if history.agreement is None else history.agreement)[None])
        if known and history.classes is not None:
            rows.append(history.classes)
        table = np.vstack(rows)
        for place, time in enumerate(history.times.tolist()):
            self._columns.append(table[:, place], time, float(history.items[place]), float(history.batches[place]))
        self._before = history.channels


def _length(means: Sequence[Tensor | None]) -> int:
    return max((len(tensor) for tensor in means if tensor is not None), default=0)


def _seen_at(time: float, times: Numbers, seen: Numbers, items: Numbers) -> float:
    if not len(times) or time <= times[0]:
        return 0.0
    return float(np.interp(time, np.append(times, max(times[-1], time)), np.append(seen, seen[-1] + items[-1])))


def _channels(values: Tensor, source: Source, in_use: tuple[Tensor, Tensor]) -> tuple[Channel, ...]:
    """The channels with the largest shift as the layer's output feels it, of instance means (n, C)."""
    values = values.double()
    root = (source.variance + source.eps).sqrt()
    gamma = source.channel_weight.double().sqrt()
    shift = ((values.mean(0) - source.mean) / root * gamma).abs()
    chosen = torch.argsort(shift.nan_to_num(0.0), descending=True)[:_CHANNELS]
    some = values[:, chosen].cpu()
    mean = some.mean(0)
    deviation = some - mean
    sd = deviation.square().mean(0).sqrt().clamp_min(1e-12)
    z = deviation / sd
    cumulants = torch.stack((mean, sd, z.pow(3).mean(0), z.pow(4).mean(0) - 3), 1).tolist()
    scatter = None
    if source.spread is not None:
        scatter = (source.spread.location.sqrt() * root)[chosen].tolist()
    used = in_use[0].double()[chosen].tolist(), (in_use[1].double() + source.eps).sqrt()[chosen].tolist()
    told = []
    for place, index in enumerate(chosen.tolist()):
        column = some[:, place].numpy()
        counts, edges = np.histogram(column[np.isfinite(column)], _BINS)
        told.append(
            Channel(
                index,
                float(gamma[index]),
                (float(source.mean[index]), float(root[index])),
                None if scatter is None else scatter[place],
                (used[0][place], used[1][place]),
                (float(edges[0]), float(edges[-1])),
                tuple(counts.tolist()),
                (cumulants[place][0], cumulants[place][1], cumulants[place][2], cumulants[place][3]),
            )
        )
    return tuple(told)
