r"""What wrong statistics cost: the layer's output, in expectation, and the model's risk.

Throughout, a = (m - m*)/sqrt(v*) and u = (v - v*)/v* are the errors of a mean and a variance in units of the target's
true ones (m*, v*); the loss is the mean squared error of the layer's output against the output with the true ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.asymptotics import edgeworth, normal
from normadapt.asymptotics.arguments import Real, as_doubles, require, require_count, require_non_negative

# log Gamma(z + 1/2) - log Gamma(z) - log(z)/2 = sum of c_j z^(1 - 2j)
_GAMMA_RATIO = (-1 / 8, 1 / 192, -1 / 640, 17 / 14336, -31 / 18432, 691 / 180224)
_NORMAL_SQUARE_SKEWNESS = math.sqrt(8.0)


def output_loss(
    mean: Real, variance: Real, true_mean: Real, true_variance: Real, scale: Real = 1.0, eps: Real = 0.0
) -> Tensor:
    r"""Mean squared error of a normalized output against the one with the true statistics.

    With $y = \gamma (x - m)/\sqrt{v + \epsilon}$ and x of mean m* and variance v*, whatever its law,

    $$ E (y - y^*)^2 = \gamma^2 \Big[ v^* \Big( \frac1{\sqrt{v + \epsilon}} - \frac1{\sqrt{v^* + \epsilon}} \Big)^2
       + \frac{(m - m^*)^2}{v + \epsilon} \Big] $$

    without eps: $(\sqrt{v^*/v} - 1)^2 + (m - m^*)^2/v$.

    Args:
        mean: Mean in use m (...,).
        variance: Variance in use v (...,), biased as the layer divides by it.
        true_mean: m* of the target (...,).
        true_variance: v* of the target (...,).
        scale: The layer's affine factor gamma (...,), of any sign.
        eps: The layer's eps (...,).

    Returns:
        Losses (...,), in squared units of the output. Exact. Infinite where v + eps is 0.

    Raises:
        ValueError: If a variance or `eps` is negative, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> output_loss(0.1, 1.2, 0.0, 1.0).item()
        0.01592480831611...

    References:
        This project's own: THEORY, section 6 (iii).
    """
    m, v, m_true, v_true, gamma, e = as_doubles(
        mean=mean, variance=variance, true_mean=true_mean, true_variance=true_variance, scale=scale, eps=eps
    )
    require_non_negative(variance=v, true_variance=v_true, eps=e)
    used = v + e
    some = used > 0
    used = torch.where(some, used, 1.0)
    # v* (1/sqrt(v + e) - 1/sqrt(v* + e))^2 from v* - v: no cancellation where the two are close
    root, true_root = _sqrt(used), _sqrt(v_true + e)
    together = torch.where(true_root > 0, true_root, 1.0) * (true_root + root)
    scale_part = v_true / used * ((v_true - v) / together) ** 2
    loss = gamma * gamma * (scale_part + (m - m_true) ** 2 / used)
    return torch.where(some, loss, torch.inf)


def expected_output_loss(count: Real, scale: Real = 1.0, unbiased: bool = True) -> Tensor:
    r"""Expected output loss of normalizing by a batch's own mean and variance, for normal data.

    $$ \gamma^2 \Big[ \Big(1 + \frac1n\Big) E\frac{v^*}{v} - 2 E\sqrt{\frac{v^*}{v}} + 1 \Big]
       = \gamma^2 \Big[ \frac3{2n} + O(n^{-2}) \Big] $$

    with the expectations of the inverse chi-square, $E (s^2)^{-1} = (n-1)/(n-3)$ and
    $E (s^2)^{-1/2} = \sqrt{(n-1)/2}\, \Gamma(\frac n2 - 1)/\Gamma(\frac{n-1}2)$. For other laws and mixed
    statistics: `output_risk`, to leading order.

    Args:
        count: Number of independent draws n (...,); need not be whole.
        scale: The layer's affine factor gamma (...,).
        unbiased: Whether v divides by n - 1; a training-mode layer divides by n (False).

    Returns:
        Expected losses (...,), in squared units of the output. Exact, to 1e-12 for any n. Infinite for n <= 3.

    Raises:
        ValueError: If a count is below 1, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> expected_output_loss(16).item(), expected_output_loss(16, unbiased=False).item()
        (0.118496827856..., 0.131112113853...)

    References:
        This project's own: THEORY, section 6 (iii); the moments: Johnson, Kotz and Balakrishnan (1994), chapter 18.
    """
    n, gamma = as_doubles(count=count, scale=scale)
    require_count(count=n)
    finite = n > 3
    n = torch.where(finite, n, 4.0)
    log_root = _log_mean_inverse_root(n) + (0.0 if unbiased else -torch.log1p(-1 / n) / 2)
    # E 1/v - 1 and E v^(-1/2) - 1, each without cancellation
    inverse = 2 / (n - 3) if unbiased else 3 / (n - 3)
    root = torch.expm1(log_root)
    loss = inverse - 2 * root + (1 + inverse) / n
    return torch.where(finite, gamma * gamma * loss, torch.inf)


class OutputRisk(NamedTuple):
    """Parts of the expected output loss of mixed statistics, each (...,): they add up to `total`."""

    bias: Tensor
    variance: Tensor
    skewness: Tensor

    @property
    def total(self) -> Tensor:
        """The expected loss itself; not below 0."""
        return (self.bias + self.variance + self.skewness).clamp_min(0)


def output_risk(
    location_shift: Real,
    scale_shift: Real,
    count: Real,
    weight: Real = 1.0,
    variance_weight: Real = 1.0,
    skewness: Real = 0.0,
    excess_kurtosis: Real = 0.0,
    scale: Real = 1.0,
) -> OutputRisk:
    r"""Expected output loss of mixed statistics, to order 1/n: bias, variance and skewness parts.

    With $\bar a = (1-\lambda) a$, $\bar u = (1-\rho) u$, $W = 1/(1 + \bar u)$ it expands about $(\bar a, \bar u)$:

    $$ (\sqrt W - 1)^2 + W \bar a^2 \;+\; W \frac{\lambda^2}n
       + \rho^2 \Big( W^3 (1 + \bar a^2) - \tfrac34 W^{5/2} \Big) \Big( \frac\kappa n + \frac2{n-1} \Big)
       \;-\; 2 W^2 \bar a \lambda\rho \frac gn $$

    From the source alone (weights 0) it is the loss itself; from the batch alone (weights 1) 1/n + (kappa + 2)/(4n).

    Args:
        location_shift: a = (m_s - m*)/sqrt(v*) (...,) of the source statistic.
        scale_shift: u = (v_s - v*)/v* (...,), above -1.
        count: Number of draws n (...,), above 1; unbiased variance.
        weight: lambda on the test mean (...,).
        variance_weight: rho on the test variance (...,), in [0, 1].
        skewness: Skewness g of one draw (...,).
        excess_kurtosis: Excess kurtosis kappa of one draw (...,).
        scale: The layer's affine factor gamma (...,).

    Returns:
        The three parts (...,), in squared units of the output. Error O(n^-2).

    Raises:
        ValueError: If `scale_shift` is not above -1, a count not above 1, rho outside [0, 1], NaN, or shapes conflict.

    Example:
        >>> parts = output_risk(0.5, 0.0, 64, weight=0.9, skewness=2.0, excess_kurtosis=6.0)
        >>> [round(part.item(), 6) for part in parts], round(parts.total.item(), 6)
        ([0.0025, 0.044344, -0.002812], 0.044031)

    References:
        Kimura (2025), arXiv 2505.16257, claim 5; formula: this project's own, THEORY section 6 (iii).
    """
    a, u, n, lam, rho, g, kurtosis, gamma = as_doubles(
        location_shift=location_shift,
        scale_shift=scale_shift,
        count=count,
        weight=weight,
        variance_weight=variance_weight,
        skewness=skewness,
        excess_kurtosis=excess_kurtosis,
        scale=scale,
    )
    require("scale_shift", u, u > -1, "must be above -1 (the source variance must be positive)")
    require("count", n, n > 1, "must be above 1")
    require("variance_weight", rho, (rho >= 0) & (rho <= 1), "must be in [0, 1]")
    square = gamma * gamma
    shift, scale_error = (1 - lam) * a, (1 - rho) * u
    w = 1 / (1 + scale_error)
    root = torch.sqrt(w)
    bias = (scale_error * w / (1 + root)) ** 2 + w * shift * shift  # sqrt(W) - 1 = -W u/(1 + sqrt W)
    spread = (kurtosis / n + 2 / (n - 1)).clamp_min(0)
    variance = w * lam * lam / n + rho * rho * w * w * (w * (1 + shift * shift) - 0.75 * root) * spread
    mixed = -2 * w * w * shift * lam * rho * g / n
    return OutputRisk(*torch.broadcast_tensors(square * bias, square * variance, square * mixed))


def mean_output_change(location_shift: Real, scale_shift: Real, scale: Real = 1.0) -> Tensor:
    r"""Expected absolute change of the output of normal data under wrong statistics: what `risk_bound` majorizes.

    With a = (m - m*)/sqrt(v*), u = v/v* - 1 the change is normal, of mean $-a/\sqrt{1+u}$ and standard deviation
    $s = |1/\sqrt{1+u} - 1|$, and

    $$ E|y - y^*| = |\gamma| \Big[ s \sqrt{2/\pi}\, e^{-\mu^2/2s^2} + |\mu| (1 - 2 Q(|\mu|/s)) \Big] $$

    Args:
        location_shift: Error a of the mean in units of sqrt(v*) (...,).
        scale_shift: Relative error u of the variance (...,), above -1.
        scale: The layer's affine factor gamma (...,).

    Returns:
        Expected absolute changes (...,), units of the output. Exact for normal data.

    Raises:
        ValueError: If `scale_shift` is not above -1, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> mean_output_change(0.1, 0.2, 2.0).item()
        0.20906671774301...

    References:
        Leone, Nelson and Nottingham (1961), Technometrics 3(4), 543-550 (the folded normal).
    """
    a, u, gamma = as_doubles(location_shift=location_shift, scale_shift=scale_shift, scale=scale)
    require("scale_shift", u, u > -1, "must be above -1 (a variance must be positive)")
    root = torch.sqrt(1 + u)
    mu, s = (a / root).abs(), (u / (root * (1 + root))).abs()
    spread = s > 0
    z = mu / torch.where(spread, s, 1.0)
    folded = s * (2 * normal.density(z)) + mu * (1 - 2 * normal.tail(z))
    return gamma.abs() * torch.where(spread, folded, mu)


def risk_bound(
    lipschitz: Real,
    scale: Real,
    location_shift: Real,
    scale_shift: Real,
    count: Real | None = None,
    weight: Real = 1.0,
    variance_weight: Real = 1.0,
    skewness: Real = 0.0,
    excess_kurtosis: Real = 0.0,
    square_skewness: Real = _NORMAL_SQUARE_SKEWNESS,
    confidence: Real | None = None,
) -> Tensor:
    r"""How far the model's risk can be from its risk with the true statistics, for a Lipschitz loss.

    If the loss is L-Lipschitz in a channel's output,

    $$ |R(m, v) - R^*| \le L |\gamma| \sqrt{(\sqrt{v^*/v} - 1)^2 + (m - m^*)^2/v} $$

    Three readings, by what is given. Without `count` the statistics in use are given, with errors (a, u): the bound
    itself. With `count`, (a, u) are the source's and the statistics in use are mixed with a batch's: the expected
    difference is at most L |gamma| times the root of `output_risk` (Jensen). With `confidence` besides, a bound that
    holds with that probability: the worst case over the box of Cornish-Fisher intervals of mean and variance, each
    with half of the remaining probability.

    Args:
        lipschitz: L (...,), loss per unit of the output; non-negative.
        scale: The layer's affine factor gamma (...,).
        location_shift: a = (m - m*)/sqrt(v*) (...,).
        scale_shift: u = (v - v*)/v* (...,), above -1.
        count: Number of draws n of the batch (...,), above 1; None: nothing is drawn, the weights do not matter.
        weight: lambda on the test mean (...,).
        variance_weight: rho on the test variance (...,), in [0, 1].
        skewness: Skewness of one draw x (...,).
        excess_kurtosis: Excess kurtosis of one draw (...,): it sets the variance's variance.
        square_skewness: Skewness of one draw's (x - m*)^2 (...,), sqrt(8) for normal data: it sets the variance's.
        confidence: Probability in (0, 1) with which the bound shall hold (...,); None for the expectation.

    Returns:
        Bounds (...,), in units of the loss; for several channels, the root of the sum of their squares. The bound
        itself is exact, the expectation's error O(n^-2) under the root; the confidence is met to O(1/n). Infinite
        where the interval of the variance reaches 0.

    Raises:
        ValueError: If `lipschitz` is negative, `scale_shift` not above -1, `count` not above 1, rho outside [0, 1],
            `confidence` outside (0, 1) or without `count`, an argument NaN, or the shapes do not broadcast.

    Example:
        >>> risk_bound(2.0, 1.0, 0.1, 0.2).item()
        0.252387070319...
        >>> risk_bound(2.0, 1.0, 0.1, 0.2, count=64).item()
        0.30699...
        >>> risk_bound(2.0, 1.0, 0.1, 0.2, count=64, confidence=0.9).item()
        0.72539...

    References:
        Kimura (2025), arXiv 2505.16257, claim 6; this explicit form: this project's THEORY, section 6.
    """
    if count is None:
        if confidence is not None:
            raise ValueError(f"confidence={confidence} needs count: without a batch nothing is random")
        count, weight, variance_weight = 2.0, 0.0, 0.0
    arguments = as_doubles(
        lipschitz=lipschitz,
        scale=scale,
        location_shift=location_shift,
        scale_shift=scale_shift,
        count=count,
        weight=weight,
        variance_weight=variance_weight,
        skewness=skewness,
        excess_kurtosis=excess_kurtosis,
        square_skewness=square_skewness,
        confidence=0.5 if confidence is None else confidence,
    )
    slope, gamma, a, u, n, lam, rho, g, kurtosis, g_square, level = arguments
    require_non_negative(lipschitz=slope)
    # checks its arguments for both readings
    total = output_risk(a, u, n, lam, rho, g, kurtosis).total
    if confidence is not None:
        require("confidence", level, (level > 0) & (level < 1), "must be in (0, 1)")
        side = (1 - level) / 4
        one, none = torch.ones(()).to(n), torch.zeros(()).to(n)
        mean_law = edgeworth.StatisticCumulants(none, one, g / n.sqrt(), kurtosis / n)
        variance_law = edgeworth.StatisticCumulants(none, one, g_square / n.sqrt(), none)
        sd = (kurtosis / n + 2 / (n - 1)).clamp_min(0).sqrt()
        ends = []
        for law, centre, spread in (
            (mean_law, (1 - lam) * a, lam / n.sqrt()),
            (variance_law, (1 - rho) * u, rho * sd),
        ):
            mirrored = law._replace(k3=-law.k3)
            ends.append(centre + spread * edgeworth.quantile(side, law))
            ends.append(centre - spread * edgeworth.quantile(side, mirrored))
        furthest = torch.maximum(ends[0].abs(), ends[1].abs())
        # for a fixed mean the loss is convex in 1/sqrt(v): largest at an end
        low, high = torch.minimum(ends[2], ends[3]), torch.maximum(ends[2], ends[3])
        none = torch.zeros_like(low)
        total = torch.maximum(
            output_loss(furthest, (1 + low).clamp_min(0), none, 1.0), output_loss(furthest, 1 + high, none, 1.0)
        )
    return slope * gamma.abs() * _sqrt(total)


def _log_mean_inverse_root(n: Tensor) -> Tensor:
    """Log of E (s^2/sigma^2)^(-1/2) for n > 3 normal draws; absolute error near 1e-17 for large n."""
    x = (n - 1) / 2
    large = x > 16.5
    near, far = torch.where(large, 16.5, x), torch.where(large, x, 16.5)
    exact = torch.lgamma(near - 0.5) - torch.lgamma(near) + torch.log(near) / 2
    z = far - 0.5
    series = torch.zeros_like(z)
    for coefficient in reversed(_GAMMA_RATIO):
        series = series / (z * z) + coefficient
    return torch.where(large, -series / z - torch.log1p(-0.5 / far) / 2, exact)


def _sqrt(value: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0 (a subgradient), not infinite: it would turn into NaN upstream."""
    some = value > 0
    return torch.where(some, torch.where(some, value, 1.0).sqrt(), torch.zeros_like(value))
