"""The saddlepoint itself: its root, its signed roots w and u, and their difference near the mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.asymptotics.arguments import Real, as_doubles, require
from normadapt.asymptotics.generating import CGF

_NEAR = 1e-3  # in standard deviations of t: there 1/u - 1/w loses as many digits as its series has in error
_MARGIN = 1e-13  # relative distance from the end of reach at which a clamped point is put


class Saddlepoint(NamedTuple):
    """The saddlepoint of one x per channel, all (...,) float64 but the flag."""

    t: Tensor
    """Root of K'(t) = x."""
    x: Tensor
    """The point itself, or the end of reach that it was clamped to."""
    k: Tensor
    """K(t)."""
    k2: Tensor
    """K''(t)."""
    k3: Tensor
    """K'''(t)."""
    k4: Tensor
    """K''''(t)."""
    w: Tensor
    """Signed root of the likelihood ratio, sgn(t) sqrt(2 (t x - K))."""
    u: Tensor
    """t sqrt(K''(t))."""
    clamped: Tensor
    """bool: x was out of reach or the law is a constant; what follows from this point is a bound at best."""
    cumulants: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    """The first five cumulants of the law."""


def solve(cgf: CGF, x: Real) -> Saddlepoint:
    r"""Saddlepoint of x: the root of $K'(t) = x$ and what the approximations need there.

    In closed form for `NormalCGF`, `GammaCGF` and `BinomialCGF`, else by a Newton iteration held in a bracket.

    Args:
        cgf: The law, one per channel (...,).
        x: Observed values (...,), broadcastable with the channels.

    Returns:
        `Saddlepoint`, with `clamped` where x is not strictly within reach (the ends of a sample or of a lattice, the
        reach of a truncated generating function) or the variance is 0. w and u are exact to rounding near the mean too.

    Raises:
        ValueError: If x is NaN, infinite or outside the law's support, or the shapes do not broadcast.

    Example:
        >>> from normadapt.asymptotics.saddlepoint import GammaCGF
        >>> point = solve(GammaCGF(5, 5), 1.89442719099992)
        >>> point.t.item(), point.w.item(), point.u.item()
        (2.36067977..., 1.59847011..., 2.0...)

    References:
        Daniels (1954), Ann. Math. Statist. 25(4), 631-650.
    """
    value = observed(cgf, x)
    return solved(cgf, value)


def observed(cgf: CGF, x: Real) -> Tensor:
    """The points as float64, checked against the law's support and shape."""
    value, _ = as_doubles(x=x, cgf=cgf.mean)
    low, high = cgf.support
    require("x", value, value.isfinite(), "must be finite")
    require("x", value, (value >= low) & (value <= high), "must lie in the support of the law")
    return value


def solved(cgf: CGF, x: Tensor) -> Saddlepoint:
    """`solve` for points that were checked."""
    cumulants = cgf.cumulants()
    low, high = (end - cumulants[0].detach() for end in cgf.reach)
    deviation = x - cumulants[0]
    constant = cumulants[1] <= 0
    # not quite the end itself: K'' is 0 or infinite there
    low, high = low * (1 - _MARGIN), high * (1 - _MARGIN)
    clamped = (deviation <= low) | (deviation >= high) | constant
    deviation = torch.where(constant, 0.0, torch.minimum(torch.maximum(deviation, low), high))
    return at_root(cgf, cgf.root(deviation), deviation, cumulants, clamped)


def at_root(
    cgf: CGF, t: Tensor, deviation: Tensor, cumulants: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], clamped: Tensor
) -> Saddlepoint:
    """What the approximations need at a t that is the root of K'(t) = mean + deviation."""
    mean, v, c3, c4, c5 = cumulants
    k0, _, k2, k3, k4 = cgf.centred(t, 4)
    constant = v <= 0
    v, k2 = torch.where(constant, 1.0, v), torch.where(constant, 1.0, k2)
    near = t * t * v < _NEAR * _NEAR
    series = _squared_ratio(t, near, (mean, v, c3, c4, c5))
    exponent = cgf.legendre(t)
    positive = ~near & (exponent > 0)  # rounding can bring it below 0
    far = t.sign() * torch.where(positive, 2 * exponent, 1.0).sqrt() * positive
    w = torch.where(near, t * series.sqrt(), far)
    u = t * torch.where(k2 > 0, k2, 1.0).sqrt() * (k2 > 0)
    return Saddlepoint(t, mean + deviation, mean * t + k0, k2, k3, k4, w, u, clamped, cumulants)


def _squared_ratio(t: Tensor, near: Tensor, cumulants: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """(w/t)^2 = k2 + 2 k3 t/3 + k4 t^2/4 + k5 t^3/15 + ... near the mean, 1 elsewhere."""
    _, v, c3, c4, c5 = cumulants
    return torch.where(near, v + t * (2 / 3 * c3 + t * (c4 / 4 + t * c5 / 15)), 1.0)


def t_over_w(point: Saddlepoint) -> Tensor:
    """t/w (...,), which is 1/sqrt(K''(0)) at the mean; 1 for a constant."""
    near = near_mean(point)
    series = _squared_ratio(point.t, near & (point.cumulants[1] > 0), point.cumulants)
    return torch.where(near, torch.where(series > 0, series, 1.0).rsqrt(), point.t / torch.where(near, 1.0, point.w))


def standardized(point: Saddlepoint) -> tuple[Tensor, Tensor, Tensor]:
    """Third to fifth standardized cumulants of the law, rho_r."""
    _, v, c3, c4, c5 = point.cumulants
    v = torch.where(v > 0, v, 1.0)
    root = v.sqrt()  # one factor at a time: powers of a tiny variance underflow before the quotient does
    return c3 / v / root, c4 / v / v, c5 / v / v / root


def near_mean(point: Saddlepoint) -> Tensor:
    """Where t is so near 0 that the brackets are 0/0."""
    near: Tensor = (point.t * point.t * point.cumulants[1] < _NEAR * _NEAR) | (point.w == 0) | (point.u == 0)
    return near


def inverse_difference(point: Saddlepoint) -> Tensor:
    """1/u - 1/w (...,), by its series near the mean."""
    near, w = near_mean(point), point.w
    r3, r4, r5 = standardized(point)
    u_far, w_far = torch.where(near, 1.0, point.u), torch.where(near, 1.0, w)
    second = (625 * r3**3 - 630 * r3 * r4 + 108 * r5) / 2160
    w_near = torch.where(near, w, 0.0)
    series = -r3 / 6 + w_near * ((5 * r3 * r3 - 3 * r4) / 24 - w_near * second)
    return torch.where(near, series, 1 / u_far - 1 / w_far)
