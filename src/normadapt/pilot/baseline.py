r"""From the shadow phase to the hypothesis of a guard: how often is normal, how sure is that, and how bursty is it.

Harmless trouble comes in bursts: a glare, a passing lorry, fifty frames of one hard object. Within a burst the
conditional mean of the signal is far above its long-run mean, and an e-process with that mean as m0 would call a burst
harm. So the shadow phase's items are looked at in blocks, and the scatter of the block means beyond that of independent
items says how bursty the signal is. Two hypotheses come of it, each with an argument of its own:

- **item**: m0 = mean + margin + allowance, where the allowance covers what the mean within a burst may be. Finds grave
  harm within a few items.
- **block**: m0 = mean + margin, for means of whole blocks, in two processes that take turns. Two blocks of one process
  are a block apart, so bursts of up to one block's length cannot reach from one to the next, whatever happens within.
  Finds moderate harm that lasts, where the allowance hides it from the items.

Without over-dispersion there is no allowance and the items say it all. What a short shadow phase happens not to show,
no margin can know: sixty blocks cover bursts with a correlation of 0.1 within, twenty hardly any
(`benchmarks/guards.py`). Bursts that are longer than a block are covered only as far as the allowance goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

BLOCK = 50
"""Items of a block: bursts up to this long are allowed for."""

BLOCK_MEMORY = 20
"""Memory of the e-processes on blocks, in blocks of one process."""

ITEM_SHARE = 0.1
"""Wealth of the items beside the blocks, where there are bursts: small, because bursts may exceed the allowance."""

BURSTS_SHOW = 3000
"""Items of a shadow phase from which bursts are known well enough; below it a moderate burst may look like harm."""

_REMEMBER = 400  # blocks
_SURE = 1.0  # standard errors by which blocks must scatter too much before it counts: one phase in six without bursts
_ALLOWANCE = 6.0  # standard deviations of the rates of blocks; measured in benchmarks/guards.py
_CEILING = 0.999  # the largest m0 of a guard that can still trip


class Hypothesis(NamedTuple):
    """What a guard takes for normal.

    Args:
        item: m0 for items.
        block: m0 for means of blocks; None where the shadow phase shows hardly any bursts.
        rate: The shadow phase's mean; NaN where it had no items.
        items: How many items it rests on.
        dispersion: Variance of block means over that of independent items.
    """

    item: float
    block: float | None
    rate: float
    items: int
    dispersion: float

    @property
    def blind(self) -> bool:
        """Whether so little is known that nothing could trip the guard."""
        return min(self.item, 1.0 if self.block is None else self.block) > _CEILING - 0.05


class Baseline:
    """Collects the signal of the shadow phase, by blocks.

    Attributes:
        count: Items learned from.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum = 0.0
        self._squares = 0.0
        self._open: list[float] = []
        self._means: list[float] = []

    def learn(self, signal: Iterable[float]) -> None:
        """Take in more items, in their order."""
        for x in signal:
            self.count += 1
            self._sum += x
            self._squares += x * x
            self._open.append(x)
            if len(self._open) == BLOCK:
                self._means.append(math.fsum(self._open) / BLOCK)
                self._open.clear()
                del self._means[:-_REMEMBER]

    def hypothesis(self, margin: float, delta: float, fixed: float | None = None) -> Hypothesis:
        r"""What may count as normal from now on.

        The block and item rates are at least mean + margin, and at least an upper confidence bound for the mean,
        $\max\{m : n_{\text{eff}}\,\mathrm{kl}(\bar x, m) \le \log(1/\delta)\}$, where n_eff is the number of items over
        the dispersion. With no items at all the bound is 1: a guard that has learned nothing judges nothing.

        Args:
            margin: What is tolerated above the mean, in units of the signal.
            delta: Probability with which the bound may be wrong.
            fixed: A mean + margin that needs no learning; then only bursts are learned.
        """
        rate = self._sum / self.count if self.count else math.nan
        dispersion, scatter = self._over_dispersion(rate)
        if fixed is None:
            effective = self.count / (dispersion * (1 + _SURE * _relative_error(len(self._means))))
            block = max(rate + margin, upper_bound(rate, effective, delta)) if self.count else 1.0
        else:
            block = fixed
        allowance = 0.0
        if scatter > 0:
            noise = scatter * scatter / (dispersion - 1)  # variance of a block's mean about its own rate
            worst = (max(self._means) - rate) * scatter * scatter / (scatter * scatter + noise)
            allowance = max(_ALLOWANCE * scatter, worst)
        block = min(block, 1.0)
        item = block if block >= _CEILING else min(block + allowance, _CEILING)
        split = item - block > margin / 2  # below that the items alone are sharper
        return Hypothesis(item, block if split else None, rate, self.count, dispersion)

    def _over_dispersion(self, rate: float) -> tuple[float, float]:
        """Dispersion of the block means, and the standard deviation of the blocks' own rates; 0 if it may be chance."""
        blocks = len(self._means)
        within = self._squares / self.count - rate * rate if self.count else 0.0
        if blocks < 2 or within <= 0:
            return 1.0, 0.0
        mean = math.fsum(self._means) / blocks
        between = math.fsum((m - mean) ** 2 for m in self._means) / (blocks - 1)
        dispersion = between * BLOCK / within
        excess = dispersion - 1 - _SURE * _relative_error(blocks)  # without bursts, five phases in six show none
        return max(dispersion, 1.0), math.sqrt(max(excess, 0.0) * within / BLOCK)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "count": self.count,
            "sum": self._sum,
            "squares": self._squares,
            "open": list(self._open),
            "means": list(self._means),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Baseline:
        """What `to_dict` described."""
        made = cls()
        made.count, made._sum, made._squares = int(state["count"]), float(state["sum"]), float(state["squares"])
        made._open, made._means = _floats(state["open"]), _floats(state["means"])
        return made


def upper_bound(rate: float, count: float, delta: float) -> float:
    r"""Upper confidence bound for a mean in [0, 1] from `count` independent items, right with probability 1 - delta.

    $$ \max\{m \ge \bar x : n\,\mathrm{kl}(\bar x, m) \le \log(1/\delta)\} $$

    Args:
        rate: Observed mean.
        count: Number of independent items, need not be whole.
        delta: Probability of the mean lying above.

    Example:
        >>> round(upper_bound(0.05, 1000, 1e-3), 4)
        0.0798

    References:
        Chernoff's bound; for bounded variables Hoeffding (1963), JASA 58, 13-30.
    """
    budget = math.log(1 / delta)
    low, high = rate, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if count * divergence(rate, middle) <= budget:
            low = middle
        else:
            high = middle
    return high


def divergence(p: float, q: float) -> float:
    """Kullback-Leibler divergence in nats of a coin with probability q from one with p."""
    if q <= 0 or q >= 1:
        return 0.0 if p == q else math.inf
    first = p * math.log(p / q) if p > 0 else 0.0
    return first + ((1 - p) * math.log((1 - p) / (1 - q)) if p < 1 else 0.0)


def _relative_error(blocks: int) -> float:
    """Relative standard error of a variance from so many blocks."""
    return math.sqrt(2 / (blocks - 1)) if blocks > 1 else 0.0


def _floats(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]
