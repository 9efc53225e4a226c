"""Saddlepoint densities, and the integral that normalizes them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from normadapt.asymptotics import normal
from normadapt.asymptotics.arguments import Real
from normadapt.asymptotics.generating import CGF
from normadapt.asymptotics.saddlepoint_solution import observed, solved

_MASS_STEP, _MASS_NODES = 0.1, 129  # trapezoids: exact to 1e-12 for the laws here


def density(cgf: CGF, x: Real, order: Literal[1, 2] = 1, normalized: bool = False) -> Tensor:
    r"""Saddlepoint density at x, in units of 1/x.

    $$ f(x) = \frac{e^{K - t x}}{\sqrt{2\pi K''}}\Big[1 + \frac{l_4}{8} - \frac{5 l_3^2}{24}\Big],
       \qquad l_r = K^{(r)}/K''^{r/2} $$

    with the bracket for `order=2` only, held in [0, 2]: beyond, the expansion has nothing to say.

    Args:
        cgf: The law, one per channel (...,).
        x: Points (...,), broadcastable with the channels.
        order: 1 or 2.
        normalized: Divide by the integral over the whole reach, by quadrature; exact for normal and gamma laws.

    Returns:
        Densities (...,), relative error O(1/n), O(n^-2) with `order=2`, for a mean of n draws; normalized
        O(n^-1.5). At a clamped point the density of the end of reach, which may be of any size; 0 for a constant.

    Raises:
        ValueError: If x is NaN, infinite or outside the support, the shapes do not broadcast, or `order` is another.

    Example:
        >>> from normadapt.asymptotics.saddlepoint import GammaCGF
        >>> density(GammaCGF(5, 5), 1.89442719099992, normalized=True).item()  # the exact one
        0.12907854972...

    References:
        Kimura (2025), arXiv 2505.16257, claim 4; Daniels (1954), Ann. Math. Statist. 25(4), 631-650.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2; got {order!r}")
    point = solved(cgf, observed(cgf, x))
    k2 = torch.where(point.k2 > 0, point.k2, 1.0)
    value = normal.density(point.w) * k2.rsqrt()
    if order == 2:
        value = value * _second_order(k2, point.k3, point.k4)
    if normalized:
        value = value / _mass(cgf, order)
    return torch.where(point.cumulants[1] > 0, value, 0.0)


def _second_order(k2: Tensor, k3: Tensor, k4: Tensor) -> Tensor:
    """1 + l4/8 - 5 l3^2/24, within [0, 2]."""
    ratio = k3 / k2  # one division at a time: squares of k2 underflow far from the mean
    correction = (k4 / k2 / 8 - ratio * ratio * (5 / 24)) / k2
    return 1 + correction.clamp(-1, 1)


def _mass(cgf: CGF, order: int) -> Tensor:
    """Integral of the unnormalized density over the reach (...,): in t, where dx = K'' dt.

    Trapezoids after a substitution that maps the domain to the line and slows down doubly exponentially at its ends.
    """
    variance = cgf.variance
    v = torch.where(variance > 0, variance, 1.0).detach()
    low, high = (end.broadcast_to(v.shape) for end in cgf.domain)
    grid = (torch.arange(_MASS_NODES, dtype=v.dtype, device=v.device) - _MASS_NODES // 2) * _MASS_STEP
    grid = grid.reshape(-1, *(1 for _ in range(v.ndim)))
    t, speed = _stretched(grid, v.rsqrt(), low, high)
    inside = (t > low) & (t < high) & (speed > 0)
    t = torch.where(inside, t, 0.0)
    _, _, k2, k3, k4 = cgf.centred(t, 4)
    usable = inside & (k2 > 0) & k2.isfinite()
    curvature = torch.where(usable, k2, 1.0)
    exponent = torch.where(usable, cgf.legendre(t).clamp_min(0), torch.inf)
    value = torch.exp(0.5 * torch.log(curvature) + torch.log(torch.where(usable, speed, 1.0)) - exponent)
    if order == 2:
        value = value * torch.where(usable, _second_order(curvature, k3, k4), 0.0)
    mass = value.sum(0) * (_MASS_STEP / math.sqrt(2 * math.pi))
    return torch.where((variance > 0) & (mass > 0), mass, 1.0)


def _stretched(grid: Tensor, stride: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes t inside (low, high), of spacing about `stride` around 0, and dt/dgrid."""
    lower, upper = low.isfinite(), high.isfinite()
    a, b = torch.where(lower, -low, 1.0), torch.where(upper, high, 1.0)
    both = lower & upper
    scale = torch.where(both, a * b / (a + b), torch.where(upper, b, torch.where(lower, a, stride)))
    sigma = torch.where(lower | upper, stride / scale, 1.0)
    s = sigma * torch.sinh(grid)
    ds = torch.where(s.abs() < 300, sigma * torch.cosh(grid), 0.0)  # beyond, exp(s) soon overflows
    s = s.clamp(-300, 300)
    one_sided = torch.where(upper, -1.0, 1.0)
    decay = torch.exp(one_sided * s)
    odds = torch.exp(-s)
    logistic = 1 / (1 + (b / a) * odds)
    t_both = torch.where(s > 0, b - (a + b) * (b / a) * odds * logistic, -a + (a + b) * logistic)
    t_one = scale * one_sided * torch.expm1(one_sided * s)
    t = torch.where(both, t_both, torch.where(lower | upper, t_one, stride * s))
    d_both = (a + b) * (b / a) * odds * logistic * logistic
    speed = torch.where(both, d_both, torch.where(lower | upper, scale * decay, stride + 0 * s))
    return t, speed * ds
