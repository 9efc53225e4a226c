"""How large is a site's shift? Interval of a squared length that is observed with noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.asymptotics.arguments import Real, as_doubles, require_non_negative

_BISECTIONS = 60  # of a bracket that ends at a Chernoff bound: to 1e-18 of it, beyond rounding


class SquaredShiftInterval(NamedTuple):
    """Ends of the interval of the squared shift, each (...,), float64, in units of q; never negative."""

    low: Tensor
    high: Tensor


def squared_shift_interval(
    q: Real, noise_trace: Real, noise_square_trace: Real, direction_noise: Real, level: float = 0.95
) -> SquaredShiftInterval:
    r"""Interval of the squared length s of a shift u, from the squared length q of an observation d = u + e.

    With weights w and noise e of mean 0 and covariance R, correlated across channels,

    $$ s = \sum_c w_c u_c^2, \quad q = \sum_c w_c d_c^2, \qquad
       E q = s + \mathrm{tr}(wR), \quad \mathrm{Var}\, q = 2\, \mathrm{tr}((wR)^2) + 4 s \rho, \quad
       \rho = \frac{u'wRwu}{u'wu} $$

    q is given the gamma law of this mean and variance: exact for no shift and equal eigenvalues of wR, and normal for a
    large shift. The ends are the s that leave (1 - level)/2 on either side of the q observed.

    Args:
        q: Observed squared lengths (...,), not negative.
        noise_trace: tr(wR) (...,), in units of q.
        noise_square_trace: tr((wR)^2) (...,), in units of q squared.
        direction_noise: rho (...,), in units of q; between the eigenvalues of wR. The direction of d may stand for that
            of u, see `normadapt.weights.noise`.
        level: Coverage wanted, in (0, 1).

    Returns:
        Both ends (...,). low is 0 where no shift explains q; both are 0 where q is too small even for none. Without
        noise both are q.

    Raises:
        ValueError: If an argument is negative or NaN, `level` is outside (0, 1), or the shapes do not broadcast.

    Example:
        >>> low, high = squared_shift_interval(5.0, 1.0, 0.25, 0.1)  # a shift of about 4
        >>> round(low.item(), 3), round(high.item(), 3)
        (1.547, 7.198)
        >>> squared_shift_interval(1.2, 1.0, 0.25, 0.1).low.item()  # none, perhaps
        0.0

    References:
        Two moments: Satterthwaite (1946), Biometrics Bulletin 2(6), 110-114; for a shifted form Patnaik (1949),
        Biometrika 36, 202-232; inverted for an interval of the shift: this project's own.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1); got {level!r}")
    given = as_doubles(
        q=q, noise_trace=noise_trace, noise_square_trace=noise_square_trace, direction_noise=direction_noise
    )
    value, trace, square, along = torch.broadcast_tensors(*given)
    require_non_negative(q=value, noise_trace=trace, noise_square_trace=square, direction_noise=along)
    outside = (1 - level) / 2
    # a gamma law lies z standard deviations below its mean with probability exp(-z^2/2) at most
    z2 = -2 * math.log(outside)
    excess, reach = value - trace, 2 * z2 * along
    top = excess + reach + (2 * excess * reach + reach * reach + 2 * z2 * square).clamp_min(0).sqrt()
    top = torch.maximum(top, excess).clamp_min(0)

    def lower_tail(s: Tensor) -> Tensor:
        mean, variance = s + trace, 2 * square + 4 * s * along
        random = variance > 0
        safe = torch.where(random, variance, 1.0)
        shape = torch.where(random, mean * mean / safe, 1.0)
        x = torch.where(random, mean * value / safe, 1.0)
        return torch.where(random, torch.special.gammainc(shape, x), (value >= mean).double())

    def end(probability: float) -> Tensor:
        low, high = torch.zeros_like(top), top
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            more = lower_tail(middle) > probability  # a larger shift makes q less of an excess
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        return torch.where(lower_tail(torch.zeros_like(top)) > probability, 0.5 * (low + high), 0.0)

    return SquaredShiftInterval(end(1 - outside), end(outside))
