"""How sure a site is of its weights, and what their error is made of: computed when a report is asked for."""

from __future__ import annotations

import math

import torch

from normadapt.asymptotics import edgeworth
from normadapt.asymptotics.cumulants import KStatistics, Moments
from normadapt.layers.policy import Diagnostics, Source
from normadapt.reports.report import Interval, RiskParts

_LEVEL = 0.95
_LEAST_INSTANCES = 8  # below, third and fourth cumulants are noise


def weight_interval(told: Diagnostics, row: int, source: Source) -> Interval | None:
    r"""Interval of a site's weight on the test mean (row 0) or variance (row 1), coverage 0.95 to second order.

    The weight is a function of the length D of the shift, $\lambda = A/(A + \bar R)$ with
    $A = (D^2 - k_1)_+/\sum_c w_c$. Along the direction of the shift the instances are a sample of numbers, so D is a
    studentized mean: its interval comes from the Cornish-Fisher quantiles with their skewness and kurtosis, and the
    weight's from the ends of that.

    Args:
        told: What the policy said at its last step.
        row: 0 for locations, 1 for half-log-variances.
        source: The site's source, for the weights w = gamma^2.

    Returns:
        (low, high), or None where fewer than eight instances or less than two effective ones are behind it. A gate, a
        criterion or a pooling that holds the weight in use elsewhere widens the interval to it.

    References:
        Studentized expansion: Hall (1992), The Bootstrap and Edgeworth Expansion, 2.6; its use here is this project's.
    """
    along = _along(told, row)
    if along is None:
        return None
    count, k = told.effective_count, along
    group = edgeworth.Group(1.0, count, k.k2, k.k3, k.k4)
    probabilities = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
    low_quantile, high_quantile = edgeworth.quantile(
        probabilities, edgeworth.studentized(group, finite_sample=True)
    ).tolist()
    error = math.sqrt(float(k.k2) / count)
    length = math.sqrt(max(told.squared[row], 0.0))
    ends = sorted((length - high_quantile * error, length - low_quantile * error))
    noise, total = told.cumulants[row][0], source.sum_weight[0]

    def weight(end: float) -> float:
        prior = max(max(end, 0.0) ** 2 - noise, 0.0) / total
        return prior / (prior + noise / total) if noise > 0 else float(prior > 0)

    low, middle, high = weight(ends[0]), weight(length), weight(ends[1])
    if isinstance(told.weight, tuple):
        used = told.weight[row]
    else:
        used = float(told.weight[row] @ source.channel_weight) / total
    return Interval(min(low, middle, used), max(high, middle, used))


def risk_parts(told: Diagnostics, source: Source) -> RiskParts:
    r"""Estimated squared error of the statistics in use, in squared units of the output, averaged over channels.

    $$ \underbrace{\sum_c w_c (1-\lambda_c)^2 A_c}_{\text{bias}^2}
       + \underbrace{\sum_c w_c \lambda_c^2 R_c}_{\text{variance}}
       - \underbrace{2 \lambda^2 \kappa_3 / (D N^2)}_{\text{skewness}} $$

    locations and half-log-variances together; A_c is the squared shift without its noise, shared evenly by the
    channels, kappa_3 the third cumulant of the instances along the shift, D its length and N the effective count.

    Args:
        told: What the policy said at its last step.
        source: The site's source.

    References:
        Bias, variance and skewness: Kimura (2025), arXiv 2505.16257, claim 5; the third term's form is this project's.
    """
    w, total = source.channel_weight, source.sum_weight[0]
    bias = variance = skewness = 0.0
    for row in (0, 1):
        shared = told.shift[row] / total
        if isinstance(told.weight, tuple):
            bias += (1 - told.weight[row]) ** 2 * told.shift[row]
            continue
        weight = told.weight[row]
        bias += float(((1 - weight).square() * shared) @ w)
        if told.noise is None:
            continue
        variance += float((weight.square() * told.noise[row]) @ w)
        along = _along(told, row)
        if along is not None and told.shift[row] > 0:
            share = float(weight @ w) / total
            skewness -= 2 * share**2 * float(along.k3) / (math.sqrt(told.shift[row]) * told.effective_count**2)
    channels = w.numel()
    return RiskParts(bias / channels, variance / channels, skewness / channels)


def _along(told: Diagnostics, row: int) -> KStatistics | None:
    """Cumulants of the recent instances along the direction of the shift; None when too few are known."""
    if told.projections is None or told.projections.shape[1] < _LEAST_INSTANCES or told.effective_count < 2:
        return None
    k = Moments.from_sample(told.projections[row]).k_statistics()
    return k if math.isfinite(float(k.k2)) and float(k.k2) > 0 else None
