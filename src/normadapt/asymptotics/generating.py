r"""Cumulant generating functions: what a saddlepoint approximation needs to know of a law.

All are centred: with $K(t) = \mu t + K_0(t)$ a class computes $K_0$ and its derivatives, because $t x - K(t)$ is
formed as $t (x - \mu) - K_0(t)$ and loses no digit near the mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from normadapt.asymptotics.arguments import Real, as_doubles, require_count

Range: TypeAlias = tuple[Tensor, Tensor]
"""Lower and upper end, open, possibly infinite."""

_NEWTON_STEPS = 50  # the edge of a sample, approached exponentially, takes 45 at most, the rest below 20
_ROUNDING = 4 * torch.finfo(torch.float64).eps


class CGF(ABC):
    """A cumulant generating function, one law per channel.

    A law of your own needs `cumulants` and `centred`, and `domain` if its generating function ends somewhere.
    """

    is_truncated = False
    """Whether the domain ends where an approximation stops being convex, not at a pole."""

    @abstractmethod
    def cumulants(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first five cumulants, each (...,) float64: the derivatives at 0."""

    @abstractmethod
    def centred(self, t: Tensor, order: int) -> tuple[Tensor, ...]:
        """K(t) - mean t and its derivatives up to `order` (at most 4), at t (...,) inside the domain."""

    @property
    def domain(self) -> Range:
        """The t for which K is finite and convex."""
        mean = self.mean.detach()
        return torch.full_like(mean, -torch.inf), torch.full_like(mean, torch.inf)

    @property
    def support(self) -> Range:
        """Where the law lives: a point outside is an error of the caller."""
        mean = self.mean.detach()
        return torch.full_like(mean, -torch.inf), torch.full_like(mean, torch.inf)

    @property
    def reach(self) -> Range:
        """The values that K' takes: a point outside has no saddlepoint and is clamped and flagged."""
        return self.support

    @property
    def mean(self) -> Tensor:
        """First cumulant (...,)."""
        return self.cumulants()[0]

    @property
    def variance(self) -> Tensor:
        """Second cumulant (...,)."""
        return self.cumulants()[1]

    def __call__(self, t: Real) -> Tensor:
        """K(t) itself, (...,) float64; t has to lie inside `domain`."""
        (point,) = as_doubles(t=t)
        return self.mean * point + self.centred(point, 0)[0]

    def legendre(self, t: Tensor) -> Tensor:
        """The difference t K'(t) - K(t) (...,), half the square of w; override it where it cancels."""
        k0, k1 = self.centred(t, 1)
        return t * k1 - k0

    def root(self, deviation: Tensor) -> Tensor:
        """The t with K'(t) = mean + deviation, for a deviation strictly within reach; differentiable.

        A Newton iteration held in a bracket, of fixed length under `torch.compile`.
        """
        with torch.no_grad():
            t = self._bracketed_newton(deviation.detach())
        return self.polish(t, deviation)

    def polish(self, t: Tensor, deviation: Tensor) -> Tensor:
        """Two Newton steps from a root that is known by value: they carry its gradients, the second ones too."""
        t = t.detach()
        for _ in range(2):
            _, slope, curvature = self.centred(t, 2)
            usable = curvature > 0
            t = t - torch.where(usable, slope - deviation, 0.0) / torch.where(usable, curvature, 1.0)
        return t

    def _bracketed_newton(self, deviation: Tensor) -> Tensor:
        lowest, highest = self.domain
        variance = self.variance.detach()
        variance = torch.where(variance > 0, variance, 1.0)
        stride = variance.rsqrt()
        zero = torch.zeros_like(deviation)
        low = torch.where(deviation > 0, zero, lowest)
        high = torch.where(deviation > 0, highest, zero)
        t = starting_point(deviation / variance, low, high)
        for _ in range(_NEWTON_STEPS):
            _, slope, curvature = self.centred(t, 2)
            excess = slope - deviation
            low = torch.where(excess < 0, t, low)
            high = torch.where(excess > 0, t, high)
            step = t - excess / curvature
            # a short step alone says little: next to a pole all are short
            still = ((step - t).abs() <= _ROUNDING * t.abs()) & (excess.abs() <= 1e-6 * deviation.abs())
            settled = still | (excess.abs() <= _ROUNDING * deviation.abs())
            t = torch.where(settled, t, within(step, low, high, stride))
            if not torch.compiler.is_compiling() and bool(settled.all()):
                break
        return t


def starting_point(t: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A first guess that is right for a normal law, shortened to what is right for a gamma law where t has a bound."""
    nearest = torch.where(t > 0, high, -low)
    return torch.where(t == 0, t, t / (1 + t.abs() / torch.where(t == 0, 1.0, nearest)))


def within(step: Tensor, low: Tensor, high: Tensor, stride: Tensor) -> Tensor:
    """The step if it stays within the bracket; else its middle, or on towards the side where it has no end."""
    up, down = low + low.abs() + stride, high - high.abs() - stride
    middle = torch.where(high.isinf(), up, torch.where(low.isinf(), down, 0.5 * (low + high)))
    return torch.where((step > low) & (step < high), step, middle)


class WeightedMeans(CGF):
    r"""A weighted sum of means of independent groups, $S = \sum_i w_i \bar X_i$.

    $$ K(t) = \sum_i n_i K_i(w_i t/n_i) $$

    The adapted statistic is (1 - lambda) times the training mean plus lambda times the test mean; the bootstrap of
    a mean is one group of weight 1 with an `EmpiricalCGF`.

    Args:
        groups: (weight, count, cgf) per group: weights and counts (...,) that broadcast with the channels of the
            cgf, any sign of the weight, counts of at least 1; the cgf is the law of one draw.

    Raises:
        ValueError: If there is no group, a count is below 1, or something is NaN.

    Example:
        >>> from normadapt.asymptotics.saddlepoint import GammaCGF, tail
        >>> train, test = GammaCGF(1, 1), GammaCGF(1, 1 / 1.5)
        >>> tail(WeightedMeans([(0.7, 40, train), (0.3, 8, test)]), 1.6345261860828600).item()
        0.013514354853...

    References:
        Kimura (2025), arXiv 2505.16257, claims 2 and 4; Daniels (1954), Ann. Math. Statist. 25(4), 631-650.
    """

    def __init__(self, groups: Sequence[tuple[Real, Real, CGF]]) -> None:
        if not groups:
            raise ValueError("WeightedMeans needs at least one group (weight, count, cgf); got none")
        self.groups: list[tuple[Tensor, Tensor, CGF]] = []
        for weight, count, cgf in groups:
            w, n, _ = as_doubles(weight=weight, count=count, mean=cgf.mean)
            require_count(count=n)
            self.groups.append((w, n, cgf))
        as_doubles(**{f"group_{i}": cgf.mean for i, (_, _, cgf) in enumerate(self.groups)})  # shapes that broadcast
        self.is_truncated = any(cgf.is_truncated for _, _, cgf in self.groups)

    def cumulants(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first five cumulants of the sum."""
        first, *rest = (
            [n * (w / n) ** (r + 1) * k for r, k in enumerate(cgf.cumulants())] for w, n, cgf in self.groups
        )
        k1, k2, k3, k4, k5 = [sum((other[r] for other in rest), first[r]) for r in range(5)]
        return k1, k2, k3, k4, k5

    def centred(self, t: Tensor, order: int) -> tuple[Tensor, ...]:
        """K(t) - mean t and its derivatives."""
        first, *rest = (
            [n * (w / n) ** r * k for r, k in enumerate(cgf.centred(t * (w / n), order))] for w, n, cgf in self.groups
        )
        return tuple(sum((other[r] for other in rest), first[r]) for r in range(order + 1))

    def legendre(self, t: Tensor) -> Tensor:
        """The difference t K'(t) - K(t): the groups' own, summed."""
        first, *rest = (n * cgf.legendre(t * (w / n)) for w, n, cgf in self.groups)
        return sum(rest, first)

    @property
    def domain(self) -> Range:
        """Intersection of the groups' domains, each in the units of the sum."""
        low = torch.full_like(self.mean.detach(), -torch.inf)
        high = -low
        for w, n, cgf in self.groups:
            group_low, group_high = _scaled(cgf.domain, (n / w).detach())
            low, high = torch.maximum(low, group_low), torch.minimum(high, group_high)
        return low, high

    @property
    def support(self) -> Range:
        """Sum of the groups' supports."""
        return _summed([_scaled(cgf.support, w.detach()) for w, _, cgf in self.groups])

    @property
    def reach(self) -> Range:
        """Sum of the groups' reaches; with a truncated group, K' at the ends of the common domain."""
        if not self.is_truncated:
            return _summed([_scaled(cgf.reach, w.detach()) for w, _, cgf in self.groups])
        everything = _summed([_scaled(cgf.reach, w.detach()) for w, _, cgf in self.groups])
        ends = []
        for end, whole in zip(self.domain, everything, strict=True):
            # short of the end: where another group's pole binds, K' is huge there but has the right sign
            inner = torch.where(end.isinf(), 0.0, end * (1 - 1e-9))
            ends.append(torch.where(end.isinf(), whole, (self.mean + self.centred(inner, 1)[1]).detach()))
        return ends[0], ends[1]


def _scaled(ends: Range, factor: Tensor) -> Range:
    """A range times a factor of any sign; 0 times infinity is 0 for x, and 1/0 leaves an infinite domain infinite."""
    low, high = (torch.where((factor == 0) & end.isinf(), 0.0, end * factor) for end in ends)
    return torch.where(factor < 0, high, low), torch.where(factor < 0, low, high)


def _summed(ranges: list[Range]) -> Range:
    low, high = ranges[0]
    for other_low, other_high in ranges[1:]:
        low, high = low + other_low, high + other_high
    return low, high
