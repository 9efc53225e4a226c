"""Cumulant generating functions of named laws."""

from __future__ import annotations

import torch
from torch import Tensor

from normadapt.asymptotics.arguments import Real, as_doubles, require, require_non_negative, require_positive
from normadapt.asymptotics.cancellation import expm1_minus, log1p_minus
from normadapt.asymptotics.generating import CGF, Range

_NEWTON_STEPS = 12  # on a concave function, from its convex side: quadratic from the start, 8 suffice


def _gamma_exponent(s: Tensor) -> Tensor:
    """log(1 + s) - s/(1 + s) for s > -1."""
    small = s.abs() < 1
    inner, outer = torch.where(small, s, 0.0), torch.where(small, 1.0, s)
    return torch.where(
        small, log1p_minus(inner) + inner * inner / (1 + inner), torch.log1p(outer) - outer / (1 + outer)
    )


class NormalCGF(CGF):
    r"""Normal law, $K(t) = \mu t + \sigma^2 t^2/2$; every saddlepoint formula is exact for it.

    Args:
        mean: Mean (...,).
        variance: Variance (...,), not negative; 0 is a constant, whose points are flagged.

    Raises:
        ValueError: If the variance is negative, something is NaN, or the shapes do not broadcast.

    Example:
        >>> NormalCGF(1.0, 4.0)(0.5).item()
        1.0
    """

    def __init__(self, mean: Real, variance: Real) -> None:
        self._mean, self._variance = torch.broadcast_tensors(*as_doubles(mean=mean, variance=variance))
        require_non_negative(variance=self._variance)

    def cumulants(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first five cumulants."""
        zero = torch.zeros_like(self._mean)
        return self._mean, self._variance, zero, zero, zero

    def centred(self, t: Tensor, order: int) -> tuple[Tensor, ...]:
        """K(t) - mean t and its derivatives."""
        zero = torch.zeros_like(t * self._variance)
        values = (0.5 * self._variance * t * t, self._variance * t, self._variance + zero, zero, zero)
        return values[: order + 1]

    def root(self, deviation: Tensor) -> Tensor:
        """The t with K'(t) = mean + deviation, in closed form."""
        return deviation / torch.where(self._variance > 0, self._variance, 1.0)


class GammaCGF(CGF):
    r"""Gamma law, $K(t) = -a \log(1 - t/b)$: an exponential mean of n draws with mean m has a = n, b = n/m.

    The normalized saddlepoint density is exact for it.

    Args:
        shape: Shape a (...,), positive.
        rate: Rate b (...,), positive, in units of 1/x.

    Raises:
        ValueError: If one is not positive, something is NaN, or the shapes do not broadcast.

    Example:
        >>> GammaCGF(5, 5).mean.item()
        1.0
    """

    def __init__(self, shape: Real, rate: Real) -> None:
        self.shape, self.rate = torch.broadcast_tensors(*as_doubles(shape=shape, rate=rate))
        require_positive(shape=self.shape, rate=self.rate)

    def cumulants(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first five cumulants."""
        a, scale = self.shape, 1 / self.rate
        square = scale * scale
        return a * scale, a * square, 2 * a * square * scale, 6 * a * square * square, 24 * a * square * square * scale

    def centred(self, t: Tensor, order: int) -> tuple[Tensor, ...]:
        """K(t) - mean t and its derivatives."""
        a, scale = self.shape, 1 / (self.rate - t)
        values = [-a * log1p_minus(-t / self.rate)]
        if order >= 1:
            values.append(a * t / self.rate * scale)
        factor = a
        for r in range(2, order + 1):
            factor = factor * (r - 1)
            values.append(factor * scale**r)
        return tuple(values)

    def legendre(self, t: Tensor) -> Tensor:
        """The difference t K'(t) - K(t), which keeps its digits far below zero too."""
        exponent: Tensor = self.shape * _gamma_exponent(-t / self.rate)
        return exponent

    @property
    def mean(self) -> Tensor:
        """First cumulant, asked for more often than the others."""
        mean: Tensor = self.shape / self.rate
        return mean

    def root(self, deviation: Tensor) -> Tensor:
        """The t with K'(t) = mean + deviation, in closed form."""
        t: Tensor = self.rate * deviation / (self.shape / self.rate + deviation)
        return t

    @property
    def domain(self) -> Range:
        """Below the rate."""
        rate = self.rate.detach()
        return torch.full_like(rate, -torch.inf), rate

    @property
    def support(self) -> Range:
        """The positive numbers."""
        rate = self.rate.detach()
        return torch.zeros_like(rate), torch.full_like(rate, torch.inf)


class BinomialCGF(CGF):
    r"""Number of successes, $K(t) = n \log(1 - p + p e^t)$: the law of the sum, whose tail is P(S >= k).

    Args:
        trials: Number of trials n (...,), at least 1.
        probability: Probability of a success p (...,), in [0, 1]; at 0 and 1 its points are flagged.

    Raises:
        ValueError: If an argument is out of range or NaN, or the shapes do not broadcast.

    Example:
        >>> from normadapt.asymptotics.saddlepoint import tail
        >>> tail(BinomialCGF(10, 0.3), 5, lattice="second").item()  # exact: 0.15027
        0.15043451120...
    """

    def __init__(self, trials: Real, probability: Real) -> None:
        self.trials, self.probability = torch.broadcast_tensors(*as_doubles(trials=trials, probability=probability))
        require("trials", self.trials, self.trials >= 1, "must be at least 1")
        p = self.probability
        require("probability", p, (p >= 0) & (p <= 1), "must lie in [0, 1]")

    def cumulants(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first five cumulants."""
        n, p = self.trials, self.probability
        v = p * (1 - p)
        k2 = n * v
        return n * p, k2, k2 * (1 - 2 * p), k2 * (1 - 6 * v), k2 * (1 - 2 * p) * (1 - 12 * v)

    def centred(self, t: Tensor, order: int) -> tuple[Tensor, ...]:
        """K(t) - mean t and its derivatives."""
        n, p = self.trials, self.probability
        # from the rarer side of t, so that nothing overflows: K(t) - n p t is even under (t, p) -> (-t, 1 - p)
        flip = t > 0
        p = torch.where(flip, 1 - p, p)
        t = torch.where(flip, -t, t)
        growth = torch.expm1(t)
        values = [n * (log1p_minus(p * growth) + p * expm1_minus(t))]
        if order >= 1:
            below = 1 + p * growth
            share = p * growth * (1 - p) / below  # tilted probability minus p
            tilted = p * (1 + growth) / below
            v = tilted * (1 - p) / below
            sign = torch.where(flip, -1.0, 1.0)
            moments = (share * sign, v, v * (1 - 2 * tilted) * sign, v * (1 - 6 * v))
            values.extend(n * moment for moment in moments[:order])
        return tuple(values)

    def root(self, deviation: Tensor) -> Tensor:
        """The t with K'(t) = mean + deviation, in closed form: the difference of two log-odds."""
        n, p = self.trials, self.probability
        above, below = deviation / n, n * p + deviation
        odds = torch.where((p > 0) & (p < 1), p * (n - below) / n, 1.0)
        lower = torch.where((p > 0) & (p < 1), (1 - p) * below / n, 1.0)
        # log1p of the side that is not near -1: either form is exact near the mean
        up = deviation > 0
        rise = torch.log1p(torch.where(up, above / odds, 0.0))
        return torch.where(up, rise, -torch.log1p(torch.where(up, 0.0, -above / lower)))

    @property
    def support(self) -> Range:
        """From 0 to the number of trials."""
        trials = self.trials.detach()
        return torch.zeros_like(trials), trials


class ChiSquareMixtureCGF(CGF):
    r"""Weighted sum of independent chi-squares, $K(t) = -\tfrac12 \sum_j \nu_j \log(1 - 2 t \lambda_j)$.

    Args:
        eigenvalues: Weights (..., k) in the last dimension, not negative; zeros count for nothing.
        degrees: Degrees of freedom of each, positive, broadcastable with `eigenvalues`.

    Raises:
        ValueError: If an eigenvalue is negative, a degree is not positive, or something is NaN.

    Example:
        >>> ChiSquareMixtureCGF(torch.tensor([1.0, 0.5])).mean.item()
        1.5

    References:
        Kuonen (1999), Biometrika 86(4), 929-935.
    """

    def __init__(self, eigenvalues: Real, degrees: Real = 1.0) -> None:
        values, freedom = torch.broadcast_tensors(*as_doubles(eigenvalues=eigenvalues, degrees=degrees))
        require_non_negative(eigenvalues=values)
        require_positive(degrees=freedom)
        if values.ndim == 0:
            values, freedom = values.unsqueeze(0), freedom.unsqueeze(0)
        self.eigenvalues, self.degrees = values, freedom

    def cumulants(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first five cumulants."""
        power, factor, sums = self.degrees, 1.0, []
        for r in range(1, 6):
            power = power * self.eigenvalues
            sums.append(factor * power.sum(-1))
            factor *= 2.0 * r
        return sums[0], sums[1], sums[2], sums[3], sums[4]

    def centred(self, t: Tensor, order: int) -> tuple[Tensor, ...]:
        """K(t) - mean t and its derivatives."""
        scaled = 2 * t.unsqueeze(-1) * self.eigenvalues
        tilted = self.eigenvalues / (1 - scaled)
        values = [-0.5 * (self.degrees * log1p_minus(-scaled)).sum(-1)]
        if order >= 1:
            values.append((self.degrees * scaled * tilted).sum(-1))
        power, factor = self.degrees * tilted, 1.0
        for r in range(2, order + 1):
            power, factor = power * tilted, factor * 2 * (r - 1)
            values.append(factor * power.sum(-1))
        return tuple(values)

    def legendre(self, t: Tensor) -> Tensor:
        """The difference t K'(t) - K(t), which keeps its digits far below zero too."""
        exponent: Tensor = 0.5 * (self.degrees * _gamma_exponent(-2 * t.unsqueeze(-1) * self.eigenvalues)).sum(-1)
        return exponent

    def root(self, deviation: Tensor) -> Tensor:
        """The t with K'(t) = mean + deviation.

        Newton on 1/K', which is concave (and linear if all eigenvalues are equal), from a bound on its right:
        it converges from one side, without a bracket.
        """
        with torch.no_grad():
            x = self.mean.detach() + deviation.detach()
            largest, index = self.eigenvalues.detach().max(-1)
            degrees = self.degrees.detach().gather(-1, index.unsqueeze(-1)).squeeze(-1)
            safe = torch.where(largest > 0, largest, 1.0)
            x = torch.where((x > 0) & (largest > 0), x, 1.0)
            t = torch.where(deviation > 0, ((1 - degrees * safe / x) / (2 * safe)).clamp_min(0), 0.0)
            for _ in range(_NEWTON_STEPS):
                tilted = self.eigenvalues / (1 - 2 * t.unsqueeze(-1) * self.eigenvalues)
                weighted = self.degrees * tilted
                slope, curvature = weighted.sum(-1), 2 * (weighted * tilted).sum(-1)
                step = torch.where(curvature > 0, slope * (1 - slope / x) / curvature, 0.0)
                t = t + step
                if not torch.compiler.is_compiling() and bool((step.abs() <= 1e-9 * t.abs()).all()):
                    break  # it converges quadratically, so this step was the last that mattered
        return self.polish(t, deviation)

    @property
    def mean(self) -> Tensor:
        """First cumulant, asked for more often than the others."""
        mean: Tensor = (self.degrees * self.eigenvalues).sum(-1)
        return mean

    @property
    def domain(self) -> Range:
        """Below the pole of the largest eigenvalue."""
        largest = self.eigenvalues.detach().amax(-1)
        return torch.full_like(largest, -torch.inf), 0.5 / largest

    @property
    def support(self) -> Range:
        """The positive numbers."""
        mean = self.mean.detach()
        return torch.zeros_like(mean), torch.full_like(mean, torch.inf)
