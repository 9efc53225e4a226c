"""The noise of a window's observed shift at one site, as sums that a report needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.types import LocationScale, PerChannel
from normadapt.weights.matrix import SitePrior


class Noise(NamedTuple):
    """Covariance R = W/N + B f of an observed shift, under channel weights w; location and scale apart, (2,) each.

    Args:
        variance: Its diagonal (2, C).
        trace: tr(wR).
        squares: tr(wR wR).
        along: d' w R w d for the shift d.
    """

    variance: LocationScale
    trace: Tensor
    squares: Tensor
    along: Tensor


def noise_of(prior: SitePrior, count: float, draws: float, weight: PerChannel, shift: Tensor) -> Noise:
    """The noise of a window of `count` instances, worth 1/`draws` draws of a class.

    Args:
        prior: What the profile knows of the site.
        count: N.
        draws: f.
        weight: Channel weights (C,).
        shift: d (2C,), for `along`.
    """
    channels = weight.numel()
    inner = prior.within / count + prior.between * draws
    rest = (prior.within_rest / count + prior.between_rest * draws) * prior.freedom * prior.unit.square()
    basis = prior.basis * prior.unit.unsqueeze(1)
    rows = []
    for part in (slice(0, channels), slice(channels, 2 * channels)):
        low = basis[part]
        leading = ((low @ inner) * low).sum(1)
        weighted = low * weight.sqrt().unsqueeze(1)
        gram = weighted.T @ weighted
        own = weight * rest[part]
        squares = ((gram @ inner) @ (gram @ inner)).diagonal().sum()
        squares = squares + 2 * (own * weight * leading).sum() + own.square().sum()
        moved = weight * shift[part]
        turned = low.T @ moved
        along = turned @ inner @ turned + (moved.square() * rest[part]).sum()
        rows.append((leading + rest[part], (weight * (leading + rest[part])).sum(), squares, along))
    variance, trace, squares, along = (torch.stack(column) for column in zip(*rows, strict=True))
    return Noise(variance, trace, squares, along)
