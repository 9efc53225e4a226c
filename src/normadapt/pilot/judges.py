"""From measured rows to bounded signals: the memory that some guards need, one small class for each way of doing it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from normadapt.pilot.baseline import BLOCK
from normadapt.pilot.guards import ClassConcentration, ConfidenceCollapse, Guard
from normadapt.pilot.signals import source_key

Rows = Mapping[str, Sequence[float]]

_RECENT = 4000  # confidences of the shadow phase that quantiles and rates are taken from
_LARGE = 1e100


class Judge:
    """Signals that are bounded as they come; NaN counts as the worst, and so does what lies above 1."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def learn(self, rows: Rows) -> list[float]:
        """Signals in [0, 1] of the shadow phase's next items; [] if they are only known when it ends."""
        return self.judge(rows)

    def freeze(self) -> list[float]:
        """The shadow phase ends; signals that `learn` has kept back."""
        return []

    def judge(self, rows: Rows) -> list[float]:
        """Signals in [0, 1] of the next items."""
        return [x if 0 <= x <= 1 else float(not x < 0) for x in rows.get(self.guard.name, ())]

    def restart(self) -> None:
        """Forget recent items, not what the shadow phase taught."""

    def to_dict(self) -> dict[str, Any]:
        """Memory as plain data."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `to_dict` gave."""


class _Frequencies:
    """Decaying class frequencies: weights grow instead of all others shrinking, so an item costs the same for any K."""

    def __init__(self) -> None:
        self.weights: dict[int, float] = {}
        self.unit = 1.0

    def see(self, label: int, growth: float) -> float:
        """The class's frequency before this item, which is then counted. Begins at 0 and fills up."""
        before = self.weights.get(label, 0.0)
        frequency = before / self.unit * (1 - 1 / growth)
        self.unit *= growth
        self.weights[label] = before + self.unit
        if self.unit > _LARGE:
            self.weights = {key: w / self.unit for key, w in self.weights.items()}
            self.unit = 1.0
        return min(frequency, 1.0)


class Crowding(Judge):
    """Of `ClassConcentration`: how much more frequent the adapted model's answer is among its own than the source's."""

    def __init__(self, guard: ClassConcentration) -> None:
        super().__init__(guard)
        self._growth = 1 / (1 - 1 / (guard.memory + 1))
        self.restart()

    def restart(self) -> None:
        """As `Judge.restart`."""
        self._ours, self._theirs = _Frequencies(), _Frequencies()

    def judge(self, rows: Rows) -> list[float]:
        """As `Judge.judge`."""
        name = self.guard.name
        return [
            (1 + self._ours.see(int(a), self._growth) - self._theirs.see(int(s), self._growth)) / 2
            for a, s in zip(rows.get(name, ()), rows.get(source_key(name), ()), strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """As `Judge.to_dict`."""
        return {
            side: {"unit": f.unit, "weights": [[label, w] for label, w in f.weights.items()]}
            for side, f in (("ours", self._ours), ("theirs", self._theirs))
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """As `Judge.load`."""
        for side, frequencies in (("ours", self._ours), ("theirs", self._theirs)):
            frequencies.unit = float(state[side]["unit"])
            frequencies.weights = {int(label): float(w) for label, w in state[side]["weights"]}


class Tails(Judge):
    """Of `ConfidenceCollapse`: beyond the shadow phase's quantiles, and further out than the source on this item.

    Quantiles come from every other block of the shadow phase and the rate beyond them from the rest: on the items that
    set a quantile the rate beyond it is right by construction and says nothing about the next ones.
    """

    def __init__(self, guard: ConfidenceCollapse) -> None:
        super().__init__(guard)
        self._tail = guard.tail
        self._seen: list[tuple[float, float]] = []
        self._low, self._high = -math.inf, math.inf

    def learn(self, rows: Rows) -> list[float]:
        """As `Judge.learn`."""
        self._seen.extend(self._pairs(rows))
        if len(self._seen) > 2 * _RECENT:
            del self._seen[:-_RECENT]
        return []

    def freeze(self) -> list[float]:
        """As `Judge.freeze`."""
        seen, self._seen = self._seen[-_RECENT:], []
        block = max(1, min(BLOCK, len(seen) // 8))  # several blocks of each kind even in a short phase
        first = sorted(a for i, (a, _) in enumerate(seen) if i // block % 2 == 0 and a == a)
        if not first:
            return []
        last = len(first) - 1
        self._low, self._high = first[int(self._tail * last)], first[math.ceil((1 - self._tail) * last)]
        return [self._is_far(*pair) for i, pair in enumerate(seen) if i // block % 2 == 1]

    def judge(self, rows: Rows) -> list[float]:
        """As `Judge.judge`."""
        return [self._is_far(a, s) for a, s in self._pairs(rows)]

    def _pairs(self, rows: Rows) -> list[tuple[float, float]]:
        name = self.guard.name
        return list(zip(map(float, rows.get(name, ())), map(float, rows.get(source_key(name), ())), strict=True))

    def _is_far(self, a: float, s: float) -> float:
        return float(a != a or (a < self._low and a < s) or (a > self._high and a > s))

    def to_dict(self) -> dict[str, Any]:
        """As `Judge.to_dict`; NaN and infinity as null, for strict JSON."""
        ends = [end if math.isfinite(end) else None for end in (self._low, self._high)]
        return {"ends": ends, "seen": [[None if x != x else x for x in pair] for pair in self._seen]}

    def load(self, state: Mapping[str, Any]) -> None:
        """As `Judge.load`."""
        low, high = state["ends"]
        self._low = -math.inf if low is None else float(low)
        self._high = math.inf if high is None else float(high)
        self._seen = [(_or_nan(a), _or_nan(s)) for a, s in state["seen"]]


def _or_nan(x: float | None) -> float:
    return math.nan if x is None else float(x)


def judge_of(guard: Guard) -> Judge:
    """The judge of a statistical guard."""
    if isinstance(guard, ClassConcentration):
        return Crowding(guard)
    if isinstance(guard, ConfidenceCollapse):
        return Tails(guard)
    return Judge(guard)
