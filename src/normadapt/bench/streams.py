"""The streams of the benchmark: in which order a task's instances arrive.

A stream is drawn from a task by a seed, and every method answers the same one. Instances of a domain come without
replacement until all have been seen, then they are shuffled anew.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normadapt.bench.suites.base import Split, Task

Indices: TypeAlias = NDArray[np.int64]

BATCH_SIZES = (1, 4, 16, 64, 200)
PER_SHIFT = 320
"""Instances of each shift in each stream, at scale 1 and for large batches."""
MIXED, CLEAN = 3000, 3000
"""Instances of the mixed and of the clean stream, likewise."""
LONG = 2000
"""Instances of each of the three shifts of the long stream, likewise: rules that are slow are not to be misjudged."""
MAJORITY = 0.9
"""Share of the most frequent class in an imbalanced stream."""
RUN_LENGTHS = (10, 40)
CONCENTRATION = 0.1  # of the Dirichlet law: the smaller, the fewer classes share a time slot
SLOTS = 10
_VISITS = 8  # domains a continual stream should visit: a task with few shifts goes round several times
_SHARES = ((16, 0.25), (64, 0.6))  # below these batch sizes streams are shorter: an instance costs more there


_LONG_SHIFTS, _IMBALANCED_CLEAN = 3, 4
_NEGATIVE = 0.3  # negative controls are shorter: their models are twenty times slower, and there is nothing to gain


def scale_at(batch_size: int, scale: float) -> float:
    """The scale in effect at a batch size: what small batches take longer, their streams are shorter."""
    return scale * next((share for below, share in _SHARES if batch_size < below), 1.0)


@dataclass(frozen=True)
class Segment:
    """A part of a stream that a method meets with a fresh model.

    Args:
        domains: Names of the domains it draws from.
        domain: Position in `domains` of each instance (L,).
        index: Position within its domain of each instance (L,).
        visits: What arrives one after another: (domain, instances), in order; one entry where domains are mingled.
    """

    domains: tuple[str, ...]
    domain: Indices
    index: Indices
    visits: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Stream:
    """Segments in order; the accuracy on a stream is the mean over all its instances."""

    name: str
    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)


class _Deck:
    """Positions dealt without replacement until none is left, then shuffled again."""

    def __init__(self, positions: Indices, rng: np.random.Generator) -> None:
        self._positions, self._rng = positions, rng
        self._left = positions[:0]

    def deal(self, count: int) -> Indices:
        while len(self._left) < count:
            self._left = np.concatenate((self._left, self._rng.permutation(self._positions)))
        dealt, self._left = self._left[:count], self._left[count:]
        return dealt


class _Dealer:
    """The decks of a task: one per domain, and one per domain and group of labels."""

    def __init__(self, task: Task, rng: np.random.Generator) -> None:
        self.task, self.rng = task, rng
        self._decks: dict[tuple[str, int | None], _Deck] = {}
        self._groups: dict[str, Indices] = {}

    def groups(self, domain: str) -> Indices:
        """Group of each instance of the domain (M,)."""
        if domain not in self._groups:
            labels = self.task.domain(domain).labels
            self._groups[domain] = np.asarray(self.task.groups(labels).cpu().numpy(), dtype=np.int64)
        return self._groups[domain]

    def deal(self, domain: str, count: int, group: int | None = None) -> Indices:
        key = (domain, group)
        if key not in self._decks:
            if group is None:
                positions = np.arange(len(self.task.domain(domain).labels))
            else:
                positions = np.flatnonzero(self.groups(domain) == group)
            self._decks[key] = _Deck(positions, self.rng)
        return self._decks[key].deal(count)

    def runs(self, domain: str, count: int) -> Indices:
        """Runs of one class, each of 10 to 40 instances and of another class than the run before; the last is cut."""
        present = np.unique(self.groups(domain))
        parts: list[Indices] = []
        left, before = count, -1
        while left > 0:
            choice = present[present != before] if len(present) > 1 else present
            before = int(self.rng.choice(choice))
            length = min(int(self.rng.integers(RUN_LENGTHS[0], RUN_LENGTHS[1] + 1)), left)
            parts.append(self.deal(domain, length, before))
            left -= length
        return np.concatenate(parts)

    def imbalanced(self, domain: str, count: int, majority: int) -> Indices:
        """One class most of the time, and each of the others as often as another; in random order."""
        present = np.unique(self.groups(domain))
        major = present[majority % len(present)]
        others = present[present != major] if len(present) > 1 else present
        drawn = np.where(self.rng.random(count) < MAJORITY, major, self.rng.choice(others, count))
        index = np.empty(count, dtype=np.int64)
        for group in np.unique(drawn):
            index[drawn == group] = self.deal(domain, int((drawn == group).sum()), int(group))
        return index

    def slots(self, domain: str, count: int) -> Indices:
        """Each class spreads over the time slots by a Dirichlet law of its own; within a slot the order is random."""
        dealt = self.deal(domain, count)
        groups = self.groups(domain)[dealt]
        slot = np.empty(count, dtype=np.int64)
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            share = self.rng.dirichlet(np.full(SLOTS, CONCENTRATION))
            ends = np.rint(np.cumsum(share) * len(members)).astype(np.int64)
            slot[members] = np.searchsorted(ends, np.arange(len(members)), side="right").clip(max=SLOTS - 1)
        order = np.lexsort((self.rng.random(count), slot))
        return dealt[order]


def _sequence(visits: Sequence[tuple[str, Indices]]) -> Segment:
    """One domain after another."""
    domains = tuple(dict.fromkeys(name for name, _ in visits))
    place = {name: i for i, name in enumerate(domains)}
    domain = np.concatenate([np.full(len(index), place[name]) for name, index in visits])
    index = np.concatenate([index for _, index in visits])
    return Segment(domains, domain, index, tuple((name, len(index)) for name, index in visits))


def _scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale))


def _tour(task: Task) -> list[str]:
    """The shifts in order, again and again where they are few."""
    return list(task.shifts) * max(1, min(4, round(_VISITS / max(len(task.shifts), 1))))


def _iid(dealer: _Dealer, scale: float) -> list[Segment]:
    count = _scaled(PER_SHIFT, scale)
    return [_sequence([(name, dealer.deal(name, count))]) for name in dealer.task.shifts]


def _continual(dealer: _Dealer, scale: float) -> list[Segment]:
    count = _scaled(PER_SHIFT, scale)
    return [_sequence([(name, dealer.deal(name, count)) for name in _tour(dealer.task)])]


def _gradual(dealer: _Dealer, scale: float) -> list[Segment]:
    ramps, count = dealer.task.ramps, _scaled(PER_SHIFT, scale)
    if not all(name in ramps for name in dealer.task.shifts):
        return [_cross_fade(dealer, count)]
    visits: list[tuple[str, Indices]] = []
    for name in _tour(dealer.task):
        steps = [*ramps[name], *reversed(ramps[name][:-1])]
        ends = np.rint(np.linspace(0, count, len(steps) + 1)).astype(int)
        visits += [(step, dealer.deal(step, n)) for step, n in zip(steps, np.diff(ends), strict=True) if n > 0]
    return [_sequence(visits)]


def _cross_fade(dealer: _Dealer, count: int) -> Segment:
    """From each shift to the next one with a probability that rises linearly from 0 to 1."""
    tour = _tour(dealer.task)
    domains = tuple(dealer.task.shifts)
    names = np.array([domains.index(name) for name in tour])
    rising = (np.arange(count) + 0.5) / count
    parts = [np.where(dealer.rng.random(count) < rising, names[i + 1], names[i]) for i in range(len(tour) - 1)]
    domain = np.concatenate(parts) if parts else np.zeros(count, dtype=np.int64)
    return _mingled(dealer, domains, domain)


def _mingled(dealer: _Dealer, domains: tuple[str, ...], domain: Indices) -> Segment:
    index = np.empty(len(domain), dtype=np.int64)
    for i, name in enumerate(domains):
        here = domain == i
        index[here] = dealer.deal(name, int(here.sum()))
    return Segment(domains, domain.astype(np.int64), index, (("+".join(domains), len(domain)),))


def _mixed(dealer: _Dealer, scale: float) -> list[Segment]:
    domains = tuple(dealer.task.shifts)
    return [_mingled(dealer, domains, dealer.rng.integers(len(domains), size=_scaled(MIXED, scale)))]


def _places(task: Task) -> list[str]:
    return [*([] if task.clean is None else [task.clean]), *task.shifts]


def _runs(dealer: _Dealer, scale: float) -> list[Segment]:
    count = _scaled(PER_SHIFT, scale)
    return [_sequence([(name, dealer.runs(name, count))]) for name in _places(dealer.task)]


def _dirichlet(dealer: _Dealer, scale: float) -> list[Segment]:
    count = _scaled(PER_SHIFT, scale)
    return [_sequence([(name, dealer.slots(name, count))]) for name in _places(dealer.task)]


def _continual_runs(dealer: _Dealer, scale: float) -> list[Segment]:
    count = _scaled(PER_SHIFT, scale)
    return [_sequence([(name, dealer.runs(name, count)) for name in _tour(dealer.task)])]


def _clean(dealer: _Dealer, scale: float) -> list[Segment]:
    clean = dealer.task.clean
    return [] if clean is None else [_sequence([(clean, dealer.deal(clean, _scaled(CLEAN, scale)))])]


def _long(dealer: _Dealer, scale: float) -> list[Segment]:
    shifts = dealer.task.shifts
    chosen = shifts[:: max(1, len(shifts) // _LONG_SHIFTS)][:_LONG_SHIFTS]
    return [_sequence([(name, dealer.deal(name, _scaled(LONG, scale))) for name in chosen])]


def _imbalanced(dealer: _Dealer, scale: float) -> list[Segment]:
    count = _scaled(PER_SHIFT, scale)
    return [_sequence([(name, dealer.imbalanced(name, count, i))]) for i, name in enumerate(dealer.task.shifts)]


def _imbalanced_clean(dealer: _Dealer, scale: float) -> list[Segment]:
    clean, count = dealer.task.clean, _scaled(PER_SHIFT, scale)
    if clean is None:
        return []
    return [_sequence([(clean, dealer.imbalanced(clean, count, i))]) for i in range(_IMBALANCED_CLEAN)]


_BUILDERS: Mapping[str, tuple[Callable[[_Dealer, float], list[Segment]], str]] = {
    "iid": (_iid, "one shift at a time, instances in random order; a fresh model for each shift"),
    "continual": (_continual, "one shift after another, one model"),
    "gradual": (_gradual, "shifts that rise and fall in severity, or fade into the next; one model"),
    "mixed": (_mixed, "every instance its own shift, one model"),
    "runs": (_runs, "runs of one class, of 10 to 40 instances; a fresh model for each shift and for clean data"),
    "dirichlet": (_dirichlet, "classes over ten time slots by Dirichlet(0.1); fresh models as in runs"),
    "continual-runs": (_continual_runs, "one shift after another, in runs of one class; one model"),
    "clean": (_clean, "source-like data only, in random order"),
    "long": (
        _long,
        f"three shifts, one after another, each {LONG / PER_SHIFT:g} times as long as elsewhere; one model",
    ),
    "imbalanced": (_imbalanced, "90 % one class, for each shift another one; a fresh model for each shift"),
    "imbalanced-clean": (_imbalanced_clean, "the same of source-like data, four times; fresh models"),
}

STREAMS: Mapping[str, str] = {name: text for name, (_, text) in _BUILDERS.items()}
"""The streams by name, each with what it is."""

_SEVERAL = {"continual", "gradual", "mixed", "continual-runs"}  # streams that are nothing new with a single shift


def build_stream(name: str, task: Task, split: Split, seed: int, scale: float) -> Stream | None:
    """The stream `name` of a task: a pure function of its arguments.

    Args:
        name: From `STREAMS`.
        task: Where instances come from.
        split: `report` and `dev` are drawn independently of one another.
        seed: Of all draws.
        scale: Relative length; 1 gives `PER_SHIFT` instances per shift.

    Returns:
        The stream, or None where the task cannot have it: no clean domain, or a single shift where several must mix.
    """
    if not task.shifts and name not in ("clean", "imbalanced-clean"):
        return None
    if name in _SEVERAL and len(task.shifts) < 2:
        return None
    words = [split, task.name, name]
    rng = np.random.default_rng([seed, *(zlib.crc32(word.encode()) for word in words)])
    if task.negative:
        scale *= _NEGATIVE
    segments = _BUILDERS[name][0](_Dealer(task, rng), scale)
    return Stream(name, tuple(segments)) if segments else None


def materialize(task: Task, segment: Segment) -> tuple[Tensor, Tensor]:
    """The inputs (L, ...) and labels (L,) of a segment, gathered once for all methods."""
    first = task.domain(segment.domains[0])
    inputs = first.inputs.new_empty((len(segment), *first.inputs.shape[1:]))
    labels = first.labels.new_empty((len(segment), *first.labels.shape[1:]))
    for i, name in enumerate(segment.domains):
        here = np.flatnonzero(segment.domain == i)
        if len(here):
            domain, place, index = task.domain(name), torch.from_numpy(here), torch.from_numpy(segment.index[here])
            inputs[place] = domain.inputs[index]
            labels[place] = domain.labels[index]
    return inputs, labels
