"""The noise of a window's observed shift at one site, as sums that a report needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.types import LocationScale, PerChannel
from normadapt.weights.matrix import SitePrior


class Noise(NamedTuple):
    """Covariance R = W/N + B f of an observed shift d, under channel weights w.

    Sums are (..., 3): of location, of scale, and of both together, which are correlated.

    Args:
        variance: Diagonal of R (2, C).
        trace: tr(wR), mean of the noise's own squared length.
        squares: tr((wR)^2), half its variance.
        direction: u'wRwu / u'wu, the noise along the shift u itself.
    """

    variance: LocationScale
    trace: Tensor
    squares: Tensor
    direction: Tensor


def noise_of(prior: SitePrior, count: float, draws: float, weight: PerChannel, shift: Tensor) -> Noise:
    r"""The noise of a window of `count` instances, worth 1/`draws` draws of a class.

    R is of low rank and a diagonal: O(C r^2). The direction is taken along the observed shift, less what the noise adds
    on average to both sides of the ratio,

    $$ \hat\rho = \frac{d'wRwd - \mathrm{tr}((wR)^2) (1 - h)}{d'wd - \mathrm{tr}(wR) (1 - h)},
       \qquad h = \min(1, \mathrm{tr}(wR)/d'wd), $$

    which goes over to the uncorrected ratio where the shift is lost in the noise, and where it matters least.

    Args:
        prior: What the profile knows of the site.
        count: N.
        draws: f.
        weight: Channel weights (C,).
        shift: d (..., 2C).

    Returns:
        Sums (..., 3); exact but for the direction, which is consistent as the shift grows.
    """
    inner = prior.within / count + prior.between * draws
    rest = (prior.within_rest / count + prior.between_rest * draws) * prior.freedom * prior.unit.square()
    basis = prior.basis * prior.unit.unsqueeze(1)
    leading = ((basis @ inner) * basis).sum(1)
    weight = torch.cat((weight, weight))
    weighted = weight * shift
    halves = slice(0, shift.shape[-1] // 2), slice(shift.shape[-1] // 2, None)
    rows = []
    for part in (*halves, slice(None)):
        low, w, own, moved = basis[part], weight[part], rest[part], weighted[..., part]
        mapped = (low.T * w) @ low @ inner
        trace = (w * (leading[part] + own)).sum()
        squares = (mapped * mapped.T).sum() + (w * w * own * (2 * leading[part] + own)).sum()
        turned = moved @ low
        along = ((turned @ inner) * turned).sum(-1) + moved.square() @ own
        length = (moved * shift[..., part]).sum(-1)
        kept = (1 - trace / torch.where(length > 0, length, 1.0)).clamp_min(0)
        bottom = length - trace * kept
        direction = (along - squares * kept).clamp_min(0) / torch.where(bottom > 0, bottom, 1.0)
        rows.append((trace, squares, torch.where(length > 0, direction, 0.0)))
    trace, squares, direction = (torch.stack(column, -1) for column in zip(*rows, strict=True))
    return Noise((leading + rest).view(2, -1), trace, squares, direction)
