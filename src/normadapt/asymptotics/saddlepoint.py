"""Saddlepoint approximations: tails, densities and quantiles from a cumulant generating function.

Unlike an Edgeworth expansion their error is relative: it stays small where the tail is 1e-30.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from normadapt.asymptotics import normal
from normadapt.asymptotics.arguments import Real, as_doubles, require
from normadapt.asymptotics.estimated_laws import CumulantCGF, EmpiricalCGF
from normadapt.asymptotics.generating import CGF, WeightedMeans, starting_point, within
from normadapt.asymptotics.laws import BinomialCGF, ChiSquareMixtureCGF, GammaCGF, NormalCGF
from normadapt.asymptotics.saddlepoint_density import density
from normadapt.asymptotics.saddlepoint_solution import (
    Saddlepoint,
    at_root,
    inverse_difference,
    near_mean,
    observed,
    solve,
    solved,
    standardized,
    t_over_w,
)

__all__ = [
    "CGF",
    "BinomialCGF",
    "ChiSquareMixtureCGF",
    "CumulantCGF",
    "EmpiricalCGF",
    "GammaCGF",
    "NormalCGF",
    "Saddlepoint",
    "WeightedMeans",
    "density",
    "quantile",
    "solve",
    "tail",
]

_QUANTILE_STEPS = 40  # a level beyond reach takes all, the rest below 20
_SETTLED = 4 * torch.finfo(torch.float64).eps


def _root_shift(point: Saddlepoint) -> Tensor:
    """r* - w = log(u/w)/w (...,), by its series near the mean."""
    near, w = near_mean(point), point.w
    r3, r4, r5 = standardized(point)
    u_far, w_far = torch.where(near, 1.0, point.u), torch.where(near, 1.0, w)
    second = (1660 * r3**3 - 1755 * r3 * r4 + 324 * r5) / 6480
    w_near = torch.where(near, w, 0.0)
    series = r3 / 6 - w_near * ((14 * r3 * r3 - 9 * r4) / 72 - w_near * second)
    return torch.where(near, series, torch.log(u_far / w_far) / w_far)


Method = Literal["lugannani-rice", "barndorff-nielsen"]
Lattice = Literal["first", "second"]


def tail(cgf: CGF, x: Real, method: Method = "lugannani-rice", lattice: Lattice | None = None) -> Tensor:
    r"""Upper tail P(S >= x).

    $$ Q(w) + \varphi(w)\Big(\frac1u - \frac1w\Big) \quad\text{or}\quad Q(r^*),\; r^* = w + \frac1w \log\frac uw $$

    At the mean both brackets are 0/0; a series in w replaces them there. For a variable on the integers u becomes
    $(1 - e^{-t})\sqrt{K''}$ ("first"), or the saddlepoint is that of x - 1/2 and u becomes $2\sinh(t/2)\sqrt{K''}$
    ("second"). The value is held within Chernoff's bounds, $P(S \ge x) \le e^{-w^2/2}$ above the mean and likewise for
    the lower tail below: near the end of reach the formulas leave them.

    Args:
        cgf: The law, one per channel (...,).
        x: Points (...,), broadcastable with the channels; whole numbers with a lattice correction.
        method: "lugannani-rice" or "barndorff-nielsen".
        lattice: None, or "first" or "second" for a variable on the integers.

    Returns:
        Upper tails (...,), with a relative error of O(1/n) for a mean of n draws, O(n^-1.5) at a fixed distance in
        standard deviations. Where `solve(cgf, x).clamped`: 1 at the lower end of reach and Chernoff's bound at the
        upper one (which is the atom's probability at the end of a sample or of a lattice); a constant's own tail, 1
        or 0.

    Raises:
        ValueError: If x is NaN, infinite or outside the support, the shapes do not broadcast, or a name is unknown.

    Example:
        >>> tail(GammaCGF(5, 5), 1.89442719099992).item()  # exact: 0.0409762
        0.041003613055...
        >>> tail(NormalCGF(0, 1), 12.0).item()
        1.776482112077...e-33

    References:
        Kimura (2025), arXiv 2505.16257, claim 4; Lugannani and Rice (1980), Adv. Appl. Probab. 12(2), 475-490;
        Barndorff-Nielsen (1986), Biometrika 73(2), 307-322; Daniels (1987), Int. Statist. Rev. 55(1), 37-48 (lattice).
    """
    if method not in ("lugannani-rice", "barndorff-nielsen"):
        raise ValueError(f'method must be "lugannani-rice" or "barndorff-nielsen"; got {method!r}')
    if lattice not in (None, "first", "second"):
        raise ValueError(f'lattice must be None, "first" or "second"; got {lattice!r}')
    value = observed(cgf, x)
    point = solved(cgf, value - 0.5 if lattice == "second" else value)
    return _tail(point, value, method, lattice)


def _tail(point: Saddlepoint, x: Tensor, method: Method = "lugannani-rice", lattice: Lattice | None = None) -> Tensor:
    t, w = point.t, point.w
    if method == "lugannani-rice":
        bracket = inverse_difference(point)
        if lattice is not None:
            curvature = torch.where(point.k2 > 0, point.k2, 1.0)
            bracket = bracket + _lattice_gap(t, lattice) * curvature.rsqrt()
        value = normal.tail(w) + normal.density(w) * bracket
    else:
        root = w + _root_shift(point)
        if lattice is not None:
            root = root + _lattice_log(t, lattice) * t_over_w(point)
        value = normal.tail(root)
    bound = torch.exp(-0.5 * w * w)
    value = torch.minimum(value, torch.where(w > 0, bound, 1.0))
    value = torch.maximum(value, torch.where(w < 0, 1 - bound, 0.0))
    mean, variance = point.cumulants[:2]
    value = torch.where(point.clamped, torch.where(w > 0, bound, 1.0), value)
    return torch.where(variance > 0, value, (x <= mean).to(value.dtype))


def _lattice_gap(t: Tensor, lattice: Lattice) -> Tensor:
    """sqrt(K'') (1/u_lattice - 1/u): 1/(1 - e^-t) - 1/t or 1/(2 sinh(t/2)) - 1/t."""
    small = t.abs() < 0.1
    inner, outer = torch.where(small, t, 0.0), torch.where(small, 1.0, t)
    square = inner * inner
    if lattice == "first":
        series = 0.5 + inner / 12 * (1 - square / 60 * (1 - square / 42 * (1 - square / 40)))
        return torch.where(small, series, -1 / torch.expm1(-outer) - 1 / outer)
    series = -inner / 24 * (1 - square * 7 / 240 * (1 - square * 31 / 1176))
    series = series + inner * square**3 * 127 / 154828800
    outer = outer.clamp(-1400, 1400)
    return torch.where(small, series, 0.5 / torch.sinh(outer / 2) - 1 / outer)


def _lattice_log(t: Tensor, lattice: Lattice) -> Tensor:
    """log(u_lattice/u)/t: log((1 - e^-t)/t)/t or log(2 sinh(t/2)/t)/t."""
    small = t.abs() < 0.1
    inner, outer = torch.where(small, t, 0.0), torch.where(small, 1.0, t)
    square = inner * inner
    series = inner / 24 * (1 - square / 120 * (1 - square * 2 / 63 * (1 - square * 3 / 80)))
    # log(2 sinh(|t|/2)/|t|), without overflow
    size = outer.abs()
    far = (size / 2 + torch.log(-torch.expm1(-size) / size)) / outer
    second = torch.where(small, series, far)
    return second - 0.5 if lattice == "first" else second


def quantile(cgf: CGF, tail_probability: Real) -> Tensor:
    r"""The x whose Lugannani-Rice tail is `tail_probability`.

    The equation is solved in t, by Newton steps held in a bracket, with $x = K'(t)$ at the end.

    Args:
        cgf: The law, one per channel (...,).
        tail_probability: Upper tails (...,), strictly between 0 and 1, broadcastable with the channels.

    Returns:
        Quantiles (...,): the exact inverse of `tail`, and its error is the tail's over the density. An end of reach
        where even the tail there is larger; the constant for a constant.

    Raises:
        ValueError: If a probability is NaN or outside (0, 1), or the shapes do not broadcast.

    Example:
        >>> x = quantile(GammaCGF(5, 5), 1e-3)
        >>> tail(GammaCGF(5, 5), x).item()
        0.001...

    References:
        Kimura (2025), arXiv 2505.16257, claim 4; Lugannani and Rice (1980), Adv. Appl. Probab. 12(2), 475-490.
    """
    level, _ = as_doubles(tail_probability=tail_probability, cgf=cgf.mean)
    require("tail_probability", level, (level > 0) & (level < 1), "must lie strictly between 0 and 1")
    with torch.no_grad():
        x = _quantile(cgf, level)
    if not torch.is_grad_enabled():
        return x
    # one Newton step in x: it carries the gradients of the level and of the law
    point = solved(cgf, x)
    slope = _tail_slope(point).detach()
    usable = ~point.clamped & (slope > 0)
    step = (_tail(point, x) - level) / torch.where(usable, slope, 1.0)
    return x + torch.where(usable, step, 0.0)


def _tail_slope(point: Saddlepoint) -> Tensor:
    """-d/dx of the Lugannani-Rice tail: phi(w) (1/sqrt(K'') - d/dx (1/u - 1/w))."""
    near, t, w = near_mean(point), point.t, point.w
    k2 = torch.where(point.k2 > 0, point.k2, 1.0)
    root = k2.rsqrt()
    u_far, w_far = torch.where(near, 1.0, point.u), torch.where(near, 1.0, w)
    r3, r4, r5 = standardized(point)
    w_slope = t_over_w(point)
    series = (5 * r3 * r3 - 3 * r4) / 24 - w * (625 * r3**3 - 630 * r3 * r4 + 108 * r5) / 1080
    far = w_slope / (w_far * w_far) - (1 + t * point.k3 / (2 * k2)) * root / (u_far * u_far)
    return normal.density(w) * (root - torch.where(near, series * root, far))


def _quantile(cgf: CGF, level: Tensor) -> Tensor:
    cumulants = cgf.cumulants()
    mean, variance = cumulants[:2]
    v = torch.where(variance > 0, variance, 1.0)
    low, high = (end + torch.zeros_like(level + mean) for end in cgf.domain)
    stride = v.rsqrt() + torch.zeros_like(low)
    clear = torch.zeros_like(low, dtype=torch.bool)
    target = -normal.quantile(level)
    t = starting_point(target * stride, low, high)
    for _ in range(_QUANTILE_STEPS):
        point = at_root(cgf, t, cgf.centred(t, 1)[1], cumulants, clear)
        value = _tail(point, point.x)
        low = torch.where(value > level, t, low)
        high = torch.where(value < level, t, high)
        # in normal deviates the tail is almost linear in t
        deviate = -normal.quantile(value)
        slope = _tail_slope(point) * point.k2 / normal.density(deviate)
        step = t + (target - deviate) / slope
        still = ((step - t).abs() <= _SETTLED * (t.abs() + 0.1 * stride)) & ((value - level).abs() <= 1e-6 * level)
        settled = still | (value == level)
        t = torch.where(settled, t, within(step, low, high, stride))
        if not torch.compiler.is_compiling() and bool(settled.all()):
            break
    return mean + torch.where(variance > 0, cgf.centred(t, 1)[1], 0.0)
