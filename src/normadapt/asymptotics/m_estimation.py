"""M-estimators of a channel's location and scale: one step, the solution, and the second-order bias.

The paper's view of BN adaptation: the adapted statistic is a one-step M-estimate started at the training statistic.
For the mean that step is exact from any start. A robust psi has no such luck (a start at distance d leaves an error
of order d^2, far starts diverge), so `solve` starts at the median.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor

from normadapt.asymptotics import normal
from normadapt.asymptotics.arguments import Real, as_doubles, require_count, require_non_negative, require_positive

_ITERATIONS = 40  # Newton from the median needs 3 to 6; the bisections among them bound the rest


@dataclass(frozen=True)
class Mean:
    r"""The mean: $\psi(x; \theta) = x - \theta$."""


@dataclass(frozen=True)
class MeanVariance:
    r"""Mean and (biased, 1/n) variance: $\psi(x; \mu, v) = (x - \mu, (x - \mu)^2 - v)$, the mean first."""


@dataclass(frozen=True)
class Huber:
    r"""Huber's location: $\psi(x; \theta) = \max(-c, \min(c, x - \theta))$ with c = threshold * scale.

    Args:
        threshold: In units of `scale`, positive. At 1.345 normal data keep 95 % of the mean's efficiency.
        scale: Standard deviation of one draw, or a robust substitute, in units of x; one number or one per channel.
    """

    threshold: float = 1.345
    scale: Real = 1.0


class MeanVarianceEstimate(NamedTuple):
    """A mean and a variance, each (...,), float64; or their biases."""

    mean: Tensor
    variance: Tensor


Location: TypeAlias = Mean | Huber


@overload
def one_step(psi: Location, sample: Tensor, start: Real) -> Tensor: ...
@overload
def one_step(psi: MeanVariance, sample: Tensor, start: tuple[Real, Real] | Tensor) -> MeanVarianceEstimate: ...
def one_step(
    psi: Location | MeanVariance, sample: Tensor, start: Real | tuple[Real, Real]
) -> Tensor | MeanVarianceEstimate:
    r"""One Newton step of an M-estimator from a given start.

    $$ \theta_1 = \theta_0 - \Big[\sum_i \psi'(x_i; \theta_0)\Big]^{-1} \sum_i \psi(x_i; \theta_0) $$

    `MeanVariance` updates the mean first and then the variance about the new mean. The joint step would give
    s^2 - (mean - start)^2, which can be negative; this one never is, and is exact from any start.

    Args:
        psi: `Mean()`, `MeanVariance()` or `Huber(threshold, scale)`.
        sample: Draws along the first dimension, channels behind (n, ...).
        start: Where the step begins (...,), in units of x; for `MeanVariance` a pair (mean, variance).

    Returns:
        The estimate (...,), float64; a `MeanVarianceEstimate` for `MeanVariance`. The mean and the variance are exact,
        a Huber step has an error of order (start - solution)^2. NaN in a channel none of whose draws lies within
        threshold * scale of the start: Newton's step is infinite there.

    Raises:
        ValueError: If there is no draw, the threshold, scale or starting variance is out of range, something is NaN,
            or the shapes do not broadcast.

    Example:
        >>> x = torch.tensor([2.0, 3.0, 5.0, 7.0, 8.0])
        >>> [v.item() for v in one_step(MeanVariance(), x, (1, 4))]  # the joint step: a variance of -10.8
        [5.0, 5.2]
        >>> one_step(Huber(1.345), x, 5.0).item()
        5.0

    References:
        Kimura (2025), arXiv 2505.16257, claim 3; van der Vaart (1998), Asymptotic Statistics, section 5.7.
    """
    x = _draws(sample)
    if isinstance(psi, MeanVariance):
        mean0, variance0 = start  # type: ignore[misc]  # both drop out of the result, and must make sense
        mean0, variance0, _ = as_doubles(start_mean=mean0, start_variance=variance0, sample=x[0])
        require_non_negative(start_variance=variance0)
        return solve(psi, _widened(x, mean0, variance0))
    theta, _ = as_doubles(start=start, sample=x[0])  # type: ignore[arg-type]
    if isinstance(psi, Mean):
        x = _widened(x, theta)
        return theta + (x - theta).mean(0)
    x, cut = _widened(x, theta), _cut(psi, x)
    x = _widened(x, cut)
    value, slope = _huber_means(x, theta, cut)
    known = slope > 0
    return torch.where(known, theta + value / torch.where(known, slope, 1.0), torch.nan)


@overload
def solve(psi: Location, sample: Tensor) -> Tensor: ...
@overload
def solve(psi: MeanVariance, sample: Tensor) -> MeanVarianceEstimate: ...
def solve(psi: Location | MeanVariance, sample: Tensor) -> Tensor | MeanVarianceEstimate:
    r"""The M-estimate: the root of $\sum_i \psi(x_i; \theta) = 0$.

    Huber's root lies within threshold * scale of the median: Newton's iteration from there, kept inside that shrinking
    bracket, 40 steps always.

    Args:
        psi: `Mean()`, `MeanVariance()` or `Huber(threshold, scale)`.
        sample: Draws along the first dimension, channels behind (n, ...). Infinite draws do not disturb `Huber`.

    Returns:
        The estimate (...,), float64; a `MeanVarianceEstimate` for `MeanVariance`. To rounding. Gradients are those of
        the implicit function.

    Raises:
        ValueError: If there is no draw, the threshold or scale is not positive, or something is NaN.

    Example:
        >>> solve(Huber(1.0), torch.tensor([0.0, 1.0, 2.0, 100.0])).item()
        1.5

    References:
        Huber (1964), Ann. Math. Statist. 35(1), 73-101.
    """
    x = _draws(sample)
    if not isinstance(psi, Huber):
        mean = x.mean(0)
        centred = x - mean
        mean = mean + centred.mean(0)  # a second pass: |mean| may be thousands of standard deviations
        return mean if isinstance(psi, Mean) else MeanVarianceEstimate(mean, ((x - mean) ** 2).mean(0))
    cut = _cut(psi, x)
    x = _widened(x, cut)
    with torch.no_grad():
        theta = x.median(0).values
        low, high = theta - cut, theta + cut
        for step in range(_ITERATIONS):
            inside, slope = _huber_means(x, theta, cut)
            low = torch.where(inside >= 0, theta, low)
            high = torch.where(inside <= 0, theta, high)
            newton = theta + inside / slope
            middle = (low + high) / 2
            stay = (newton >= low) & (newton <= high)
            if step % 3 == 2:
                stay = stay & (inside.abs() <= 1e-9 * cut)
            theta = torch.where(stay, newton, middle)
    psi_mean, slope = _huber_means(x, theta, cut)
    known = slope > 0  # between two halves of the draws, each further than the cut, every point is a root
    return theta + torch.where(known, psi_mean / torch.where(known, slope, 1.0), 0.0)


@overload
def bias(psi: Location, sample: Tensor) -> Tensor: ...
@overload
def bias(psi: MeanVariance, sample: Tensor) -> MeanVarianceEstimate: ...
def bias(psi: Location | MeanVariance, sample: Tensor) -> Tensor | MeanVarianceEstimate:
    r"""Second-order bias of the M-estimate times n, estimated from the sample.

    $$ n\,\mathrm{bias} = \frac{\mathrm{Cov}(\psi, \psi')}{a^2} + \frac{E\psi''\,\mathrm{Var}\,\psi}{2 a^3},
       \qquad a = -E\psi' $$

    with derivatives in theta, at the solution. Skewness is what makes it non-zero for `Huber`, whose
    $E\psi'' = f(\theta - c) - f(\theta + c)$ takes the density f from a Gaussian kernel of Silverman's bandwidth.
    `solve(...) - bias(...)/n` has a bias of order n^-2 (for the variance: none, it is the 1/(n-1) estimate).

    Args:
        psi: `Mean()` (bias 0), `MeanVariance()` (0 and minus the variance) or `Huber(threshold, scale)`.
        sample: Draws along the first dimension, channels behind (n, ...); at least two for `MeanVariance`.

    Returns:
        n times the bias (...,), in units of x; a `MeanVarianceEstimate` for `MeanVariance`. Sampling error
        O(n^(-2/5)) from the density, O(n^(-1/2)) from the rest. NaN in a channel without a draw within
        threshold * scale of the solution.

    Raises:
        ValueError: If there are too few draws, the threshold or scale is not positive, or something is NaN.

    Example:
        >>> p = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        >>> round(bias(Huber(1.345), -torch.log(p)).item(), 3)  # an exponential law: 0.14147
        0.141

    References:
        Kimura (2025), arXiv 2505.16257, claim 3; Cox and Snell (1968), J. R. Statist. Soc. B 30(2), 248-275.
    """
    x = _draws(sample)
    n = x.shape[0]
    if isinstance(psi, Mean):
        return torch.zeros_like(x[0])
    if isinstance(psi, MeanVariance):
        if n < 2:
            raise ValueError(f"sample needs at least two draws for the bias of a variance; got shape {tuple(x.shape)}")
        return MeanVarianceEstimate(torch.zeros_like(x[0]), -solve(psi, x).variance * (n / (n - 1)))
    cut = _cut(psi, x)
    x = _widened(x, cut)
    rest = x - solve(psi, x)
    value = _clip(rest, cut)
    within = (rest.abs() < cut).double()
    a = within.mean(0)
    centred = value - value.mean(0)
    covariance = -(centred * within).mean(0)
    ordered = rest.sort(0).values
    quartiles = ordered[(3 * n) // 4 if n > 1 else 0] - ordered[n // 4]
    spread = torch.minimum((centred**2).mean(0).sqrt() / a, quartiles / 1.349)
    width = 0.9 * spread * n**-0.2
    width = torch.where(width > 0, width, cut)
    density = normal.density((rest + cut) / width).mean(0) - normal.density((rest - cut) / width).mean(0)
    return covariance / a**2 + density / width * (centred**2).mean(0) / (2 * a**3)


def log_likelihood_ratio(
    h: Real, z: Real, skewness: Real, excess_kurtosis: Real, count: Real, terms: Literal[1, 2, 3] = 3
) -> Tensor:
    r"""Expansion of the log-likelihood ratio of an exponential tilt by h/sqrt(n) standard deviations.

    $$ \Lambda = h Z - \frac{h^2}{2} - \frac{h^3 g}{6\sqrt n} - \frac{h^4 \kappa}{24 n} $$

    Args:
        h: Local parameter: the tilt times sqrt(n) times the standard deviation of one draw (...,).
        z: Standardized mean sqrt(n) (xbar - mu)/sigma (...,).
        skewness: Skewness g of one draw (...,).
        excess_kurtosis: Excess kurtosis kappa of one draw (...,).
        count: Number of independent draws n (...,).
        terms: 1 is local asymptotic normality, 2 adds the skewness, 3 the kurtosis.

    Returns:
        Log-likelihood ratios (...,). Absolute error O(n^(-terms/2)).

    Raises:
        ValueError: If `count` is below 1, `terms` is not 1, 2 or 3, something is NaN, or the shapes do not broadcast.

    Example:
        >>> log_likelihood_ratio(1.0, 0.7, 2.0, 6.0, 100).item()  # exponential draws; exact: 0.163948
        0.164166...

    References:
        Kimura (2025), arXiv 2505.16257, claim 3; the terms of a tilt: this project's THEORY, section 7.
    """
    if terms not in (1, 2, 3):
        raise ValueError(f"terms must be 1, 2 or 3; got {terms!r}")
    h, z, g, kappa, n = as_doubles(h=h, z=z, skewness=skewness, excess_kurtosis=excess_kurtosis, count=count)
    require_count(count=n)
    ratio = h * z - h * h / 2
    if terms >= 2:
        ratio = ratio - h**3 * g / (6 * torch.sqrt(n))
    if terms >= 3:
        ratio = ratio - h**4 * kappa / (24 * n)
    return ratio.expand(torch.broadcast_shapes(h.shape, z.shape, g.shape, kappa.shape, n.shape))


def _draws(sample: Tensor) -> Tensor:
    if sample.dim() == 0 or sample.shape[0] == 0:
        raise ValueError(f"sample needs draws along its first dimension; got shape {tuple(sample.shape)}")
    (x,) = as_doubles(sample=sample)
    return x


def _cut(psi: Huber, x: Tensor) -> Tensor:
    """Where psi is cut, in units of x."""
    threshold, scale, _ = as_doubles(threshold=psi.threshold, scale=psi.scale, sample=x[0])
    require_positive(threshold=threshold, scale=scale)
    return threshold * scale


def _widened(x: Tensor, *others: Tensor) -> Tensor:
    """The draws with the channels of what they are compared with, which may be more than their own."""
    shape = torch.broadcast_shapes(x.shape[1:], *(other.shape for other in others))
    return x.reshape(x.shape[0], *(1,) * (len(shape) - x.dim() + 1), *x.shape[1:]).expand(x.shape[0], *shape)


def _clip(rest: Tensor, cut: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(rest, -cut), cut)


def _huber_means(x: Tensor, theta: Tensor, cut: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the draws of psi and of minus its derivative."""
    rest = x - theta
    return _clip(rest, cut).mean(0), (rest.abs() < cut).double().mean(0)
