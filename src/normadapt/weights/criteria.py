"""What a blended weight is to be best for: corrections of the mean-squared-error weights for other criteria."""

from __future__ import annotations

import torch
from torch import Tensor

from normadapt.asymptotics import weights as optimal
from normadapt.asymptotics.cumulants import Moments
from normadapt.asymptotics.safety import tail_safe
from normadapt.layers.moments import Evidence
from normadapt.layers.policy import Units, standardize
from normadapt.types import LocationScale

_LEAST_INSTANCES = 8  # below, a batch's skewness is noise and counts as none


def for_output(
    weights: LocationScale, shift: LocationScale, noise: LocationScale, evidence: Evidence, units: Units
) -> LocationScale:
    r"""Weights (2, C) with the smallest loss of the layer's output, where mean and variance are coupled by skewness.

    The pooled weight on the mean gets what skewness changes at each channel,
    $\lambda^*(g) - \lambda^*(0)$ of `asymptotics.weights.output_optimal`, in units of the test variance. The draws are
    the instances: 1/n there is R, and g/n the covariance of the batch's mean and variance.

    Args:
        weights: MSE-optimal weights (2, C).
        shift: Observed shift d (2, C).
        noise: Its sampling variance R (2, C).
        evidence: The batch; with fewer than eight instances nothing is corrected.
        units: Units of the shift.
    """
    if evidence.count < _LEAST_INSTANCES:
        return weights
    shrinkage = (-shift[1]).exp()  # from source to test standard deviations
    # The length of the shift without its noise: summed over channels, lambda d^2 is sum d^2 - sum R.
    a = -(weights[0].sqrt() * shift[0] * shrinkage)
    count = 1 / (noise[0] * shrinkage.square()).clamp(1e-12, 1.0)
    skewness = _covariance_of_mean_and_variance(evidence, shift, units) * count
    scale_shift = shrinkage.square() - 1
    corrected, plain = (
        optimal.output_optimal(a, scale_shift, g, count, weights[1]) for g in (skewness, torch.zeros_like(skewness))
    )
    return torch.stack(((weights[0] + corrected - plain).clamp(0, 1), weights[1]))


def _covariance_of_mean_and_variance(evidence: Evidence, shift: LocationScale, units: Units) -> Tensor:
    """Cov(m, v)/v^1.5 of the batch (C,), from Cov(x_b, psi_b)/n with the instance as the unit (THEORY section 2)."""
    locations, ratios = standardize(evidence.instances.values, units).unbind()
    shrinkage = (-shift[1]).exp()
    centred = (locations - locations.mean(0)) * shrinkage
    influence = ratios * shrinkage.square() + centred.square()
    n = evidence.count
    return (centred * (influence - influence.mean(0))).sum(0) / ((n - 1) * n)


def for_tail(
    weights: LocationScale,
    shift: LocationScale,
    noise: LocationScale,
    evidence: Evidence,
    units: Units,
    tolerance: float,
    probability: float,
) -> LocationScale:
    """The weights (2, C), lowered where they could do harm: see `asymptotics.safety.tail_safe`.

    Args:
        weights: MSE-optimal weights (2, C).
        shift: Observed shift d (2, C).
        noise: Its sampling variance R (2, C).
        evidence: The batch, for the skewness of its instance means.
        units: Units of the shift.
        tolerance: Accepted additional error of a channel's location, in standard deviations, or half-log-variance.
        probability: Accepted probability of more than that.
    """
    skewness = torch.zeros_like(shift)
    if evidence.count >= _LEAST_INSTANCES:
        k = Moments.from_sample(standardize(evidence.instances.values, units)[0]).k_statistics()
        skewness[0] = torch.where(k.k2 > 0, k.k3 / k.k2.clamp_min(1e-30) ** 1.5, torch.zeros_like(k.k3))
    length = weights.sqrt() * shift.abs()
    safe = tail_safe(length, noise, tolerance, probability, skewness, count=float(evidence.count))
    return torch.minimum(weights, safe)
