"""Moments that merge exactly, the k-statistics (unbiased cumulants) they give, and moments <-> cumulants."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.asymptotics.arguments import Real, as_doubles, require, require_count, require_non_negative


class KStatistics(NamedTuple):
    """Unbiased estimates of the first four cumulants; NaN where the count does not suffice."""

    k1: Tensor
    k2: Tensor
    k3: Tensor
    k4: Tensor


class Moments(NamedTuple):
    r"""Count, mean and sums of central powers, $M_r = \sum_i (x_i - \bar x)^r$, per channel.

    Merging is exact (Pebay 2008; Chan, Golub and LeVeque 1983), so splitting a sample and merging
    its parts in any order gives the moments of the whole up to rounding.

    Args:
        count: Number of draws, scalar float64 or broadcastable with the others.
        mean: Sample mean (...,), float64.
        m2: Sum of squared deviations (...,).
        m3: Sum of cubed deviations (...,).
        m4: Sum of fourth powers of deviations (...,).

    Example:
        >>> x = torch.arange(6, dtype=torch.float64)
        >>> whole = Moments.from_sample(x)
        >>> parts = Moments.from_sample(x[:2]).merge(Moments.from_sample(x[2:]))
        >>> torch.allclose(whole.m4, parts.m4)
        True

    References:
        Pebay (2008), Sandia report SAND2008-6212.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    mean: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor

    @classmethod
    def from_sample(cls, x: Tensor, dim: int = 0) -> Moments:
        """Moments of `x` along `dim`, in float64, about a mean refined by a second pass.

        The refinement matters where |mean| is thousands of standard deviations: rounding of the mean alone would
        then take most digits of the third moment.

        Args:
            x: Sample, any real dtype; `dim` must not be empty.
            dim: The dimension that holds the draws.

        Raises:
            ValueError: If there is no draw along `dim`.
        """
        if x.shape[dim] == 0:
            raise ValueError(f"from_sample() needs at least one draw along dim={dim}; got shape {tuple(x.shape)}")
        x = x.double()
        mean = x.mean(dim)
        centred = x - mean.unsqueeze(dim)
        rest = centred.mean(dim)
        mean, centred = mean + rest, centred - rest.unsqueeze(dim)
        square = centred * centred
        count = torch.tensor(float(x.shape[dim]), dtype=torch.float64, device=x.device)
        return cls(count, mean, square.sum(dim), (square * centred).sum(dim), (square * square).sum(dim))

    def merge(self, other: Moments) -> Moments:
        r"""Moments of the two samples together.

        $$ M_2 = M_2^A + M_2^B + D^2 n_A n_B / n, \quad D = \bar x_B - \bar x_A $$

        and likewise for the third and fourth powers (THEORY section 10). A side with count 0 is neutral.
        """
        na, nb = self.count, other.count
        n = na + nb
        safe = torch.where(n > 0, n, torch.ones_like(n))  # two empty sides merge to an empty one, not to NaN
        d = other.mean - self.mean
        fa, fb = na / safe, nb / safe
        d2 = d * d
        m2 = self.m2 + other.m2 + d2 * na * fb
        m3 = self.m3 + other.m3 + d2 * d * na * fb * (fa - fb) + 3 * d * (fa * other.m2 - fb * self.m2)
        m4 = (
            self.m4
            + other.m4
            + d2 * d2 * na * fb * (fa * fa - fa * fb + fb * fb)
            + 6 * d2 * (fa * fa * other.m2 + fb * fb * self.m2)
            + 4 * d * (fa * other.m3 - fb * self.m3)
        )
        return Moments(n, self.mean + d * fb, m2, m3, m4)

    def k_statistics(self) -> KStatistics:
        r"""Unbiased estimates of the cumulants (Fisher's k-statistics).

        $$ k_3 = \frac{n M_3}{(n-1)(n-2)}, \qquad
           k_4 = \frac{n^2 [(n+1) m_4 - 3 (n-1) m_2^2]}{(n-1)(n-2)(n-3)}, \quad m_r = M_r / n $$

        Returns:
            k1..k4, each with the shape of `mean`; k_r is NaN where the count is below r.
        """
        n = self.count
        nan = torch.full_like(self.mean, torch.nan)

        def needs(order: int, value: Tensor) -> Tensor:
            return torch.where(n >= order, value, nan)

        k2 = self.m2 / (n - 1)
        k3 = n * self.m3 / ((n - 1) * (n - 2))
        k4 = n * ((n + 1) * self.m4 - 3 * (n - 1) / n * self.m2 * self.m2) / ((n - 1) * (n - 2) * (n - 3))
        return KStatistics(needs(1, self.mean), needs(2, k2), needs(3, k3), needs(4, k4))


class Cumulants(NamedTuple):
    """The first four cumulants of a law: mean, variance, third and fourth cumulant, each (...,), float64."""

    k1: Tensor
    k2: Tensor
    k3: Tensor
    k4: Tensor


class RawMoments(NamedTuple):
    """E X, E X^2, E X^3, E X^4 of a law (or, where asked for, the mean and central moments), each (...,), float64."""

    m1: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor


def cumulants_from_moments(m1: Real, m2: Real, m3: Real, m4: Real, central: bool = False) -> Cumulants:
    r"""Cumulants of a law from its moments.

    $$ k_2 = \mu_2, \quad k_3 = \mu_3, \quad k_4 = \mu_4 - 3\mu_2^2, \qquad \mu_r = E (X - E X)^r $$

    From raw moments the central ones are formed first, in steps that cancel least; where the mean exceeds the
    standard deviation a thousandfold, raw moments themselves no longer hold the cumulants: use central ones.

    Args:
        m1: Mean (...,), units of x.
        m2: E X^2, or with `central` the variance (...,).
        m3: E X^3, or the third central moment (...,).
        m4: E X^4, or the fourth central moment (...,).
        central: Whether m2, m3 and m4 are central moments.

    Returns:
        k1..k4 (...,). Exact.

    Raises:
        ValueError: If an argument is NaN or the shapes do not broadcast.

    Example:
        >>> [k.item() for k in cumulants_from_moments(1.0, 2.0, 6.0, 24.0)]  # exponential
        [1.0, 1.0, 2.0, 6.0]

    References:
        Kendall and Stuart, The Advanced Theory of Statistics, vol. 1, section 3.14.
    """
    mean, second, third, fourth = as_doubles(m1=m1, m2=m2, m3=m3, m4=m4)
    if not central:
        raw2, raw3 = second, third
        second = raw2 - mean * mean
        third = (raw3 - mean * raw2) - 2 * mean * second
        fourth = (fourth - mean * raw3) - 3 * mean * third - 3 * mean * mean * second
    mean, second, third, fourth = torch.broadcast_tensors(mean, second, third, fourth)
    return Cumulants(mean, second, third, fourth - 3 * second * second)


def moments_from_cumulants(k1: Real, k2: Real, k3: Real, k4: Real, central: bool = False) -> RawMoments:
    r"""Moments of a law from its cumulants; the inverse of `cumulants_from_moments`.

    $$ E X^2 = k_2 + k_1^2, \quad E X^3 = k_3 + 3 k_1 k_2 + k_1^3, \quad
       E X^4 = k_4 + 4 k_1 k_3 + 3 k_2^2 + 6 k_1^2 k_2 + k_1^4 $$

    Args:
        k1: Mean (...,), units of x.
        k2: Variance (...,).
        k3: Third cumulant (...,).
        k4: Fourth cumulant (...,).
        central: Whether m2, m3 and m4 shall be central moments (m1 is the mean either way).

    Returns:
        m1..m4 (...,). Exact.

    Raises:
        ValueError: If an argument is NaN or the shapes do not broadcast.

    Example:
        >>> [m.item() for m in moments_from_cumulants(1.0, 1.0, 2.0, 6.0)]  # exponential
        [1.0, 2.0, 6.0, 24.0]

    References:
        Kendall and Stuart, The Advanced Theory of Statistics, vol. 1, section 3.14.
    """
    mean, second, third, fourth = torch.broadcast_tensors(*as_doubles(k1=k1, k2=k2, k3=k3, k4=k4))
    fourth = fourth + 3 * second * second
    if central:
        return RawMoments(mean, second, third, fourth)
    square = mean * mean
    raw4 = fourth + 4 * mean * third + 6 * square * second + square * square
    return RawMoments(mean, second + square, third + 3 * mean * second + square * mean, raw4)


class SamplingCovariance(NamedTuple):
    """Var(mean), Cov(mean, variance) and Var(variance) of a sample, each (...,), float64."""

    mean: Tensor
    mixed: Tensor
    variance: Tensor


def sampling_covariance(count: Real, k2: Real, k3: Real, k4: Real) -> SamplingCovariance:
    r"""Covariance matrix of a sample's mean and unbiased variance.

    $$ \mathrm{Var}\,\bar x = \frac{k_2}{n}, \quad \mathrm{Cov}(\bar x, s^2) = \frac{k_3}{n}, \quad
       \mathrm{Var}\,s^2 = \frac{k_4}{n} + \frac{2 k_2^2}{n - 1} $$

    Args:
        count: Number of independent draws (...,), above 1.
        k2: Variance of one draw (...,).
        k3: Third cumulant of one draw (...,): where skewness enters.
        k4: Fourth cumulant of one draw (...,).

    Returns:
        The three entries (...,). Exact.

    Raises:
        ValueError: If `count` is below 1, `k2` negative, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> [round(v.item(), 12) for v in sampling_covariance(3, 2.29, 4.212, -0.8546)]
        [0.763333333333, 1.404, 4.959233333333]

    References:
        Kendall and Stuart, vol. 1, chapter 12; the use here: this project's THEORY, section 2.
    """
    n, variance, third, fourth = torch.broadcast_tensors(*as_doubles(count=count, k2=k2, k3=k3, k4=k4))
    require_count(count=n)
    require_non_negative(k2=variance)
    return SamplingCovariance(variance / n, third / n, fourth / n + 2 * variance * variance / (n - 1))


def cluster_cumulants(
    between: tuple[Real, Real, Real, Real], within: tuple[Real, Real, Real, Real], size: Real
) -> Cumulants:
    r"""Cumulants of an instance's mean: a value shared by its positions plus the mean of their independent parts.

    $$ k_r = k_r^{\text{between}} + k_r^{\text{within}} / h^{r-1} $$

    The instance is the sampling unit: a batch mean of n instances has cumulants k_r / n^(r-1) with these k_r, never
    with those of the positions and an "effective" count, which are right for the variance only.

    Args:
        between: Cumulants of the part shared by an instance's positions (...,).
        within: Cumulants of the part drawn anew at each position (...,).
        size: Number of positions h of an instance (...,).

    Returns:
        k1..k4 of the instance's mean (...,). Exact.

    Raises:
        ValueError: If `size` is below 1 or an argument NaN.

    Example:
        >>> gamma, exponential = (1.0, 0.5, 0.5, 0.75), (0.0, 1.0, 2.0, 6.0)
        >>> [k.item() for k in cluster_cumulants(gamma, exponential, 16)]
        [1.0, 0.5625, 0.5078125, 0.75146484375]

    References:
        This project's THEORY, section 2.
    """
    (h,) = as_doubles(size=size)
    require_count(size=h)
    b = as_doubles(**{f"between.k{r}": value for r, value in enumerate(between, 1)})
    w = as_doubles(**{f"within.k{r}": value for r, value in enumerate(within, 1)})
    return Cumulants(b[0] + w[0], b[1] + w[1] / h, b[2] + w[2] / h**2, b[3] + w[3] / h**3)


def effective_count(weights: Tensor, dim: int = -1) -> Tensor:
    r"""The number of equally weighted independent terms whose mean would vary as much as a weighted one.

    $$ n_\text{eff} = \Big(\sum_i w_i\Big)^2 \Big/ \sum_i w_i^2 $$

    For an exponential moving average of momentum a (weights a (1-a)^i) this is (2 - a)/a batches.

    Args:
        weights: Weights (..., k), non-negative, of any scale.
        dim: The dimension that holds the terms.

    Returns:
        Effective counts (...,), in [1, k]. NaN where all weights are 0.

    Raises:
        ValueError: If a weight is negative or NaN.

    Example:
        >>> round(effective_count(0.1 * 0.9 ** torch.arange(1000, dtype=torch.float64)).item(), 9)
        19.0

    References:
        Kish (1965), Survey Sampling, section 11.7.
    """
    (w,) = as_doubles(weights=weights)
    require_non_negative(weights=w)
    return w.sum(dim) ** 2 / (w * w).sum(dim)


def ema_effective_count(momentum: Real) -> Tensor:
    r"""Effective number of batches behind a running exponential moving average.

    $$ n_\text{eff} = \frac{1}{\sum_i a^2 (1-a)^{2i}} = \frac{2 - a}{a} $$

    Args:
        momentum: Weight of the newest batch a (...,), in (0, 1].

    Returns:
        Effective counts (...,). Exact once the average has run far longer than 1/a batches.

    Raises:
        ValueError: If `momentum` is outside (0, 1] or NaN.

    Example:
        >>> ema_effective_count(0.5).item()
        3.0

    References:
        The sum is elementary; as an effective count: Kish (1965), section 11.7.
    """
    (a,) = as_doubles(momentum=momentum)
    require("momentum", a, (a > 0) & (a <= 1), "must be in (0, 1]")
    return (2 - a) / a
