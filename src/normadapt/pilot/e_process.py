r"""Evidence against "no worse than m0" that may be looked at after every item: a betting e-process.

A gambler who starts with 1 bets against the hypothesis that a bounded signal has a conditional mean of at most m0.
While it holds, no strategy makes the wealth grow in expectation, so wealth of 1000 is as rare as one in a thousand,
whenever and however often one looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import add
from typing import Any

FRACTIONS = (0.01, 0.025, 0.055, 0.12, 0.25, 0.5, 0.85)
"""Bets as fractions of the largest, 1/m0. The best one for a true rate p is (p - m0)/(1 - m0), whatever m0 is."""

WEIGHTS = (0.05, 0.10, 0.30, 0.17, 0.16, 0.16, 0.06)
"""Starting wealth on each: most where an item tells little, because there a lost factor costs the most items."""

CASH = 0.2
"""Share of the wealth that is kept back at the start, for bets that begin later."""

_LARGEST = 0.99  # of 1/m0: one good item may not ruin a gambler for ever
_LEAST_RATE = 1e-6  # m0 = 0 would allow bets without limit, and one bad item would be proof


class EProcess:
    r"""Betting e-process for signals X in [0, 1] under H0: E[X_t | the past] <= m0.

    $$ E_t = c_t + \sum_g w_g \sum_{r \le t} (c_{r-1} - c_r) \prod_{r \le s \le t} \bigl(1 + \lambda_g (X_s -
       m_0)\bigr), \qquad P_{H_0}(\exists t: E_t \ge 1/\alpha) \le \alpha $$

    with c_{-1} = 1 and a cash reserve c_t = 0.2 T/(t + T), T = `memory`, by Ville's inequality, with bets lambda_g =
    f_g / m0 that are never negative, so that a mean below m0 is in H0 too. It holds for dependent items as long as the
    conditional mean is at most m0; within a burst of bad items it is not, and no choice of bets repairs that
    (`Baseline` puts bursts into m0).

    The reserve keeps a long quiet past, in which every bet loses nearly all it had, from hiding harm that begins later:
    it costs 0.2 nats at the start and about 2 log(t) afterwards, instead of an amount that grows with t.

    With `reset_at_one` every bet starts anew when its wealth has fallen below what it began with. Then the wealth is
    an e-detector (e-CUSUM): it pays nothing for the past, it will pass every bound some day, and the mean
    number of items until it passes c under H0 is at least c.

    Args:
        m0: Largest mean of the hypothesis, in [0, 1]. At 1 nothing can speak against it and the value stays at or
            below 1; at 0 it counts as 1e-6, a slightly larger hypothesis.
        grid: Bets as fractions of 1/m0, in (0, 1); above 0.99 they count as 0.99.
        weights: Starting wealth on each, positive; scaled to sum to 1. Default: equal, or `WEIGHTS` with the default
            grid.
        reset_at_one: e-CUSUM for the long run.
        memory: Items over which half of the cash reserve is put into bets.

    Attributes:
        peak: Largest log e-value since the start: what Ville's inequality speaks about.
        count: Items seen.

    Example:
        >>> process = EProcess(0.05)
        >>> process.update([0, 0, 1, 1, 1, 0, 1, 1]) > math.log(1000)
        True

    References:
        Waudby-Smith and Ramdas (2024), JRSS B 86(1), 1-27. e-detectors: Shin, Ramdas and Rinaldo (2024), New England J.
        Stat. Data Sci. 2(2).
    """

    def __init__(
        self,
        m0: float,
        *,
        grid: Sequence[float] | None = None,
        weights: Sequence[float] | None = None,
        reset_at_one: bool = False,
        memory: int = 1000,
    ) -> None:
        if not 0 <= m0 <= 1:
            raise ValueError(f"m0 must be a rate in [0, 1], the largest mean under the hypothesis; got {m0!r}")
        fractions = FRACTIONS if grid is None else tuple(float(fraction) for fraction in grid)
        if not fractions or not all(0 < fraction < 1 for fraction in fractions):
            raise ValueError(f"grid must hold bets as fractions of 1/m0, each in (0, 1); got {grid!r}")
        if weights is None:
            weights = WEIGHTS if grid is None else [1.0] * len(fractions)
        if len(weights) != len(fractions) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights must be positive, one for each of the {len(fractions)} bets; got {weights!r}")
        if memory < 1:
            raise ValueError(f"memory must be a number of items, at least 1; got {memory!r}")
        total = sum(weights)
        self.m0 = float(m0)
        self.reset_at_one = bool(reset_at_one)
        self._grid = tuple(fractions)
        self._weights = tuple(float(weight) for weight in weights)
        self._rate = max(self.m0, _LEAST_RATE)
        self._bets = [min(fraction, _LARGEST) / self._rate for fraction in fractions]
        self.memory = int(memory)
        self._pace = max(1, self.memory // 125)  # items from one transfer to the next: each costs as much as an item
        self._weights_log = [math.log(weight / total) for weight in weights]
        kept = 0.0 if self.reset_at_one else math.log(1 - CASH)
        self._start = [weight + kept for weight in self._weights_log]
        self._room = math.log(len(fractions) / (1 - CASH))  # at most this much lies above the largest
        self._steps = {x: self._step(x) for x in (0.0, 0.5, 1.0)}  # most signals take few values
        self.restart()

    def restart(self) -> None:
        """Wealth back to 1, nothing seen."""
        self._wealth = list(self._start)
        self.peak = 0.0
        self.count = 0
        self._sum = 0.0

    @property
    def log_value(self) -> float:
        """Log of the e-value now; 0 at the start."""
        return self._value(self._wealth, max(self.count - 1, 0))

    def _value(self, wealth: list[float], last: int) -> float:
        """Log of everything together after the item with number `last`, from 0."""
        return _log_sum(wealth if self.reset_at_one else [*wealth, math.log(self._cash(last // self._pace))])

    def _cash(self, transfers: int) -> float:
        return CASH / (1 + transfers * self._pace / self.memory)

    def _begin_bets(self, wealth: list[float], transfers: int) -> list[float]:
        """Some cash goes into bets that begin now."""
        moved = math.log(self._cash(transfers - 1) - self._cash(transfers))
        fresh = (moved + weight for weight in self._weights_log)
        return [max(w, f) + math.log1p(math.exp(-abs(w - f))) for w, f in zip(wealth, fresh, strict=True)]

    @property
    def mean(self) -> float:
        """Mean of the items seen; NaN before the first."""
        return self._sum / self.count if self.count else math.nan

    def _step(self, x: float) -> list[float]:
        return [math.log1p(bet * (x - self._rate)) for bet in self._bets]

    def update(self, x: float | Sequence[float]) -> float:
        """Take in one item, or several in their order; how they are split over calls changes nothing, to the bit.

        Args:
            x: Signals in [0, 1].

        Returns:
            The log e-value after them. `peak` has the largest on the way.

        Raises:
            ValueError: If a signal is NaN or outside [0, 1]; nothing is taken in then.
        """
        items = [float(x)] if isinstance(x, (int, float)) else [float(value) for value in x]
        for value in items:
            if not 0 <= value <= 1:
                raise ValueError(
                    f"an e-process needs signals in [0, 1]; got {value!r} -> scale the signal, count NaN as 1"
                )
        self.take(items)
        return self.log_value

    def take(self, items: Sequence[float]) -> None:
        """As `update` for floats that are known to be in [0, 1], where the value is not asked for."""
        wealth, start, room, peak, count = self._wealth, self._start, self._room, self.peak, self.count
        for value in items:
            steps = self._steps.get(value)
            if steps is None:
                steps = self._step(value)
            if self.reset_at_one:
                wealth = list(map(add, map(max, wealth, start), steps))
            else:
                if count % self._pace == 0 and count:
                    wealth = self._begin_bets(wealth, count // self._pace)
                wealth = list(map(add, wealth, steps))
            if max(wealth) + room > peak:  # most of the time it cannot be a new peak
                peak = max(peak, self._value(wealth, count))
            count += 1
            self._sum += value
        self._wealth, self.peak, self.count = wealth, peak, count

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data; `from_dict` gives a process that goes on the same to the bit."""
        return {
            "m0": self.m0,
            "grid": list(self._grid),
            "weights": list(self._weights),
            "reset_at_one": self.reset_at_one,
            "memory": self.memory,
            "wealth": list(self._wealth),
            "peak": self.peak,
            "count": self.count,
            "sum": self._sum,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> EProcess:
        """The process that `to_dict` described.

        Raises:
            ValueError: If it describes none.
        """
        try:
            process = cls(
                state["m0"],
                grid=state["grid"],
                weights=state["weights"],
                reset_at_one=bool(state["reset_at_one"]),
                memory=state["memory"],
            )
            wealth = [float(w) for w in state["wealth"]]
            process.peak = float(state["peak"])
            process.count, process._sum = int(state["count"]), float(state["sum"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"this is not the state of an e-process ({error!r}) -> pass what to_dict() gave"
            ) from error
        if len(wealth) != len(process._wealth) or not all(map(math.isfinite, wealth)):
            raise ValueError("the state of an e-process holds a wealth that fits no bet -> pass what to_dict() gave")
        process._wealth = wealth
        return process


def _log_sum(logs: list[float]) -> float:
    top = max(logs)
    return top + math.log(sum([math.exp(value - top) for value in logs]))
