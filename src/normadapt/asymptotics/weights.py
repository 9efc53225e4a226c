r"""The weight on the test statistic: oracle, plug-in, pooled, for the layer's output, for its tail.

Everywhere the adapted statistic is $(1-\lambda)$ source + $\lambda$ test, d = test - source the observed difference,
$\delta$ the true one, R the sampling variance tau2/n of the test statistic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normadapt.asymptotics.arguments import Real, as_doubles, require, require_count, require_non_negative
from normadapt.asymptotics.cumulants import effective_count, ema_effective_count
from normadapt.asymptotics.pooling import (
    LogVarianceMoments,
    Shrinkage,
    Squeezed,
    log_variance_moments,
    pooled,
    shrink,
    squeeze,
)
from normadapt.asymptotics.safety import tail_safe

__all__ = [
    "LogVarianceMoments",
    "Shrinkage",
    "Squeezed",
    "effective_count",
    "ema_effective_count",
    "log_variance_moments",
    "oracle",
    "output_optimal",
    "plug_in",
    "plug_in_risk",
    "pooled",
    "shared",
    "shrink",
    "squeeze",
    "tail_safe",
    "unbiased_risk",
    "variance_weight",
]


def oracle(shift: Real, sampling_variance: Real, source_sampling_variance: Real = 0.0) -> Tensor:
    r"""The fixed weight of least mean squared error, for a known shift.

    $$ \lambda^* = \frac{\delta^2 + R_s}{\delta^2 + R_s + R} $$

    Args:
        shift: True shift delta (...,), in any unit.
        sampling_variance: R = tau2/n of the test statistic (...,), in the unit squared.
        source_sampling_variance: R_s = tau2_s/n_s of the source statistic (...,), where its own sampling counts.

    Returns:
        Weights on the test statistic (...,), in [0, 1]; exact. 0 where there is neither shift nor variance.

    Raises:
        ValueError: If a variance is negative, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> oracle(0.5, 1 / 16).item()
        0.8

    References:
        Kimura (2025), arXiv 2505.16257, claim 2.
    """
    delta, r, r_source = as_doubles(
        shift=shift, sampling_variance=sampling_variance, source_sampling_variance=source_sampling_variance
    )
    require_non_negative(sampling_variance=r, source_sampling_variance=r_source)
    signal = delta * delta + r_source
    return _share(signal, signal + r)


def plug_in(difference: Real, sampling_variance: Real) -> Tensor:
    r"""The oracle's weight with the unbiased estimate of the squared shift, positive part.

    $$ \lambda = \Big(1 - \frac{R}{d^2}\Big)_+, \qquad E[d^2 - R] = \delta^2 $$

    Per channel alone it can cost 1.45 times the risk of the test statistic (at a shift of two standard errors): pool.

    Args:
        difference: Observed difference d (...,), in any unit.
        sampling_variance: R = s^2/n (...,), in the unit squared.

    Returns:
        Weights on the test statistic (...,), in [0, 1]; 0 where d is 0. Excess risk over the oracle O(n^-2): see
        `plug_in_risk`.

    Raises:
        ValueError: If a variance is negative, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> plug_in(2.0, 1.0).item(), plug_in(0.5, 1.0).item()
        (0.75, 0.0)

    References:
        Kimura (2025), arXiv 2505.16257, claim 2; unbiased: this project's THEORY, section 6 (i).
    """
    d, r = as_doubles(difference=difference, sampling_variance=sampling_variance)
    require_non_negative(sampling_variance=r)
    square = d * d
    return _share((square - r).clamp_min(0), square)


def plug_in_risk(shift: Real, variance: Real, third_cumulant: Real, count: Real, factor: Real = 1.0) -> Tensor:
    r"""Mean squared error of the statistic adapted with an estimated weight, to second order.

    $$ \frac{\tau^2}{n} + \frac1{n^2} \Big[ (c^2 + 2c) \frac{\sigma^4}{\delta^2} - 2c \frac{k_3}{\delta} \Big],
       \qquad \lambda = 1 - c \frac{s^2}{n d^2} $$

    The skewness enters through Cov(mean, s^2): its sign against the shift's decides whether adapting pays.

    Args:
        shift: True shift delta (...,), units of the statistic; the expansion needs it large against sigma/sqrt(n).
        variance: Variance sigma^2 of one draw (...,).
        third_cumulant: Third cumulant k3 of one draw (...,).
        count: Number of draws n (...,).
        factor: c (...,): 1 for `plug_in`, and for the oracle's formula at d.

    Returns:
        Risks (...,), squared units. Error O(n^-3). Infinite where the shift is 0 (outside the expansion's reach).

    Raises:
        ValueError: If a variance is negative, a count below 1, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> (plug_in_risk(1.0, 1.0, 2.0, 50) - 1 / 50).item()  # simulation: -0.00036
        -0.000400000000...

    References:
        Kimura (2025), arXiv 2505.16257, claim 5; formula: this project's THEORY, section 6 (i).
    """
    delta, v, k3, n, c = as_doubles(
        shift=shift, variance=variance, third_cumulant=third_cumulant, count=count, factor=factor
    )
    require_non_negative(variance=v)
    require_count(count=n)
    known = delta != 0
    safe = torch.where(known, delta, 1.0)
    second = (c * c + 2 * c) * (v / safe) ** 2 - 2 * c * k3 / safe
    return torch.where(known, v / n + second / (n * n), torch.inf)


def unbiased_risk(weight: Real, difference: Real, sampling_variance: Real) -> Tensor:
    r"""Unbiased estimate of the mean squared error of a statistic adapted with a fixed weight.

    $$ (1-\lambda)^2 d^2 + (2\lambda - 1) R, \qquad E = (1-\lambda)^2 \delta^2 + \lambda^2 \tau^2/n $$

    At weight 0 it is d^2 - R, the unbiased estimate of the squared shift, whose variance is
    $4\delta^2\sigma^2/n + 2\sigma^4/(n(n-1))$ for every law.

    Args:
        weight: Weight on the test statistic (...,), fixed beforehand.
        difference: Observed difference d (...,), in any unit.
        sampling_variance: Unbiased estimate R = s^2/n (...,), in the unit squared.

    Returns:
        Estimated risks (...,), squared units; can be negative. Exactly unbiased for every law with a variance.

    Raises:
        ValueError: If a variance is negative, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> unbiased_risk(0.5, 2.0, 1.0).item()
        1.0

    References:
        Stein (1981), Ann. Statist. 9(6), 1135-1151; for linear rules Mallows (1973), Technometrics 15(4), 661-675.
    """
    weight_, d, r = as_doubles(weight=weight, difference=difference, sampling_variance=sampling_variance)
    require_non_negative(sampling_variance=r)
    return ((1 - weight_) * d) ** 2 + (2 * weight_ - 1) * r


def variance_weight(source_variance: Real, variance: Real, count: Real, fourth_cumulant: Real = 0.0) -> Tensor:
    r"""The fixed weight on the test variance of least mean squared error: kurtosis at first order.

    $$ \rho^* = \frac{(v_s - v)^2}{(v_s - v)^2 + k_4/n + 2 v^2/(n-1)} $$

    Args:
        source_variance: v_s of the source (...,).
        variance: v of the target (...,).
        count: Number of draws n (...,), above 1; unbiased variance.
        fourth_cumulant: Fourth cumulant k4 of one draw (...,): excess kurtosis * v^2.

    Returns:
        Weights (...,), in [0, 1]; exact. 0 where n is 1, and where there is neither shift nor variance.

    Raises:
        ValueError: If a variance is negative, a count below 1, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> variance_weight(1.3, 1.0, 16).item()
        0.402985074626...

    References:
        Kimura (2025), arXiv 2505.16257, claim 2, for the variance; formula: this project's THEORY, section 6 (ii).
    """
    v_source, v, n, k4 = as_doubles(
        source_variance=source_variance, variance=variance, count=count, fourth_cumulant=fourth_cumulant
    )
    require_non_negative(source_variance=v_source, variance=v)
    require_count(count=n)
    enough = n > 1
    noise = (k4 / n + 2 * v * v / torch.where(enough, n - 1, 1.0)).clamp_min(0)
    shift = (v_source - v) ** 2
    return torch.where(enough, _share(shift, shift + noise), 0.0)


def shared(location_shift: Real, scale_shift: Real, count: Real, excess_kurtosis: Real = 0.0) -> Tensor:
    r"""One weight for mean and variance together: the least leading-order loss of the layer's output.

    $$ \lambda = \frac{a^2 + u^2/4}{a^2 + u^2/4 + \frac1n + \frac14 \big(\frac{\kappa}{n} + \frac2{n-1}\big)} $$

    Args:
        location_shift: a = (m_s - m*)/sqrt(v*) (...,).
        scale_shift: u = (v_s - v*)/v* (...,).
        count: Number of draws n (...,), above 1; unbiased variance.
        excess_kurtosis: Excess kurtosis of one draw (...,).

    Returns:
        Weights (...,), in [0, 1]. Exact for the quadratic loss; O(shift + n^(-1/2)) for the output's. 0 where n is 1.

    Raises:
        ValueError: If a count is below 1, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> shared(0.5, 0.3, 16).item()
        0.739819004524...

    References:
        This project's own: THEORY, section 6 (iii).
    """
    a, u, n, kurtosis = as_doubles(
        location_shift=location_shift, scale_shift=scale_shift, count=count, excess_kurtosis=excess_kurtosis
    )
    require_count(count=n)
    enough = n > 1
    signal = a * a + u * u / 4
    noise = 1 / n + (kurtosis / n + 2 / torch.where(enough, n - 1, 1.0)).clamp_min(0) / 4
    return torch.where(enough, _share(signal, signal + noise), 0.0)


def output_optimal(
    location_shift: Real,
    scale_shift: Real,
    skewness: Real,
    count: Real,
    variance_weight: Real,
    clip: bool = True,
) -> Tensor:
    r"""The weight on the test mean that serves the layer's output, with the coupling to the variance through skewness.

    $$ \lambda^* = \frac{a^2 + a \rho W_0 g/n}{a^2 + (1 + 2 a \rho W_0 g)/n}, \qquad W_0 = \frac1{1 + (1-\rho) u} $$

    It minimizes $(1-\lambda)^2 a^2 + \lambda^2/n - 2 a \rho W_0 (g/n) \lambda (1-\lambda)$, the leading loss of
    normalizing with the adapted mean and variance.

    Args:
        location_shift: a = (m_s - m*)/sqrt(v*) (...,): source minus target.
        scale_shift: u = (v_s - v*)/v* (...,), at least -1.
        skewness: Skewness g of one draw (...,).
        count: Number of draws n (...,).
        variance_weight: rho, the weight on the test variance (...,), in [0, 1].
        clip: Whether to clip to [0, 1]; unclipped, the optimum exceeds 1 for a skewness against the shift.

    Returns:
        Weights on the test mean (...,). Error O(1/n) beside the true optimum, about 0.005 at n = 16 for exponential
        data. Where the loss has no minimum (few draws, skewness strongly against the shift) it is 0 or 1, whichever
        loses less. 0 where the source is at the target.

    Raises:
        ValueError: If `scale_shift` is below -1, a count below 1, rho outside [0, 1], NaN, or shapes do not broadcast.

    Example:
        >>> output_optimal(1.0, 0.0, 2.0, 64, 1.0).item()  # simulated optimum: 0.9560
        0.95652173913043...

    References:
        Kimura (2025), arXiv 2505.16257, claims 2 and 5; formula: this project's THEORY, section 6 (iii).
    """
    a, u, g, n, rho = as_doubles(
        location_shift=location_shift,
        scale_shift=scale_shift,
        skewness=skewness,
        count=count,
        variance_weight=variance_weight,
    )
    require("scale_shift", u, u >= -1, "must be at least -1 (no variance is negative)")
    require_count(count=n)
    require("variance_weight", rho, (rho >= 0) & (rho <= 1), "must be in [0, 1]")
    mixed = 1 + (1 - rho) * u  # 0 only where rho is: no coupling then
    coupling = torch.where(mixed > 0, a * rho * g, 0.0) / torch.where(mixed > 0, mixed, 1.0) / n
    gain = a * a + coupling
    curvature = a * a + 1 / n + 2 * coupling
    convex = curvature > 0
    optimum = gain / torch.where(convex, curvature, 1.0)
    optimum = torch.where(convex, optimum, torch.where(2 * gain > curvature, 1.0, 0.0))
    return optimum.clamp(0, 1) if clip else optimum


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """The quotient, and 0 where the whole is 0."""
    some = whole > 0
    return torch.where(some, part, 0.0) / torch.where(some, whole, 1.0)
