"""Tail of a weighted sum of chi-squares: the law of a layer's shift statistic.

A layer's statistic Q = sum_c w_c e_c^2 of a correlated Gaussian vector e is distributed as a weighted
sum of chi-squares whose weights are the eigenvalues of the weighted covariance S. Its cumulants are
k_r = 2^(r-1) (r-1)! tr(S^r): traces that a source profile holds, so no eigenvalue is needed at run time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normadapt.asymptotics.arguments import Real, as_doubles, require, require_non_negative
from normadapt.asymptotics.laws import ChiSquareMixtureCGF

_STEP, _NODES = 0.075, 80  # along the contour, whose nodes spread doubly exponentially
_BENDS = 8  # the steepest one, and each a quarter of the last
_SMALLEST_NODE = 1e-9  # relative to the largest: below it, a chi-square of that weight is a constant
_LOOSE = 2.0  # a saddlepoint tail is within this factor of the exact one


def tail(q: Real, eigenvalues: Real) -> Tensor:
    r"""Upper tail P(Q >= q) of a weighted sum of independent chi-squares, $Q = \sum_j \lambda_j \chi^2_{1,j}$.

    $$ P(Q \ge q) = \frac{1}{2 \pi i} \int e^{K(s) - s q} \frac{ds}{s}, \qquad
       K(s) = -\tfrac12 \sum_j \log(1 - 2 s \lambda_j) $$

    over a parabola through a point near the saddlepoint of q, along which the integrand neither oscillates nor
    cancels: Imhof's integral, at the same relative precision in every tail. (A saddlepoint approximation alone would
    be 5 to 7 % off for a single eigenvalue, and up to 9 % for two unequal ones on a gamma base.)

    Args:
        q: Observed statistics (...,), any sign.
        eigenvalues: Weights (..., k) in the last dimension, not negative, in units of q; (...,) broadcasts with q.
            A number is one eigenvalue.

    Returns:
        Upper tails (...,); 1 where q <= 0; where all eigenvalues are 0, 0 for a positive q. Relative error below
        1e-8 (mostly 1e-13) from 1 down to 1e-300, for equal eigenvalues, one dominating and all between.

    Raises:
        ValueError: If an eigenvalue is negative, something is NaN or infinite, or the shapes do not broadcast.

    Example:
        >>> tail(5.991464547107979, torch.tensor([1.0, 1.0])).item()  # chi-square(2)
        0.0500000000...
        >>> tail(torch.tensor([5.0, 50.0]), torch.tensor([1.0, 0.0])).tolist()  # chi-square(1)
        [0.02534731867..., 1.53745979...e-12]

    References:
        Imhof (1961), Biometrika 48(3-4), 419-426; Rice (1980), SIAM J. Sci. Stat. Comput. 1(4), 438-448 (the contour).
    """
    value, spectrum = as_doubles(q=q)[0], as_doubles(eigenvalues=eigenvalues)[0]
    require_non_negative(eigenvalues=spectrum)
    require("eigenvalues", spectrum, spectrum.isfinite(), "must be finite")
    return _mixture_tail(value, ChiSquareMixtureCGF(spectrum))


def _mixture_tail(q: Tensor, law: ChiSquareMixtureCGF) -> Tensor:
    """`tail` for eigenvalues with any degrees of freedom."""
    q, mean = torch.broadcast_tensors(*as_doubles(q=q, eigenvalues=law.mean))
    require("q", q, q.isfinite(), "must be finite")
    usable = (q > 0) & (mean > 0)
    largest = law.eigenvalues.amax(-1)
    scale = torch.where(largest > 0, largest, 1.0)
    # in units of the largest eigenvalue, with a harmless law in place of an empty one
    spectrum = torch.where((largest > 0).unsqueeze(-1), law.eigenvalues / scale.unsqueeze(-1), 1.0)
    unit = ChiSquareMixtureCGF(spectrum, law.degrees)
    point = torch.where(usable, q / scale, unit.mean.detach())
    start, width, bend = _contour(point.detach(), unit)
    grid = _STEP * torch.arange(_NODES, dtype=q.dtype, device=q.device)
    y = width.unsqueeze(-1) * torch.sinh(grid)
    speed = width.unsqueeze(-1) * torch.cosh(grid)
    bend = bend.unsqueeze(-1)
    x = start.unsqueeze(-1) + bend * y * y
    twice, degrees = 2 * unit.eigenvalues.unsqueeze(-2), unit.degrees.unsqueeze(-2)
    across, along = 1 - twice * x.unsqueeze(-1), twice * y.unsqueeze(-1)
    size = -0.25 * (degrees * torch.log(across * across + along * along)).sum(-1) - x * point.unsqueeze(-1)
    angle = 0.5 * (degrees * torch.atan2(along, across)).sum(-1) - y * point.unsqueeze(-1)
    # the real part of e^(size + i angle) ds/(i s) on s = x + i y, where ds = (2 bend y + i) dy
    turn = (x - 2 * bend * y * y) * torch.cos(angle) + y * (1 + 2 * bend * x) * torch.sin(angle)
    integrand = torch.exp(size) * speed * turn / (x * x + y * y)
    integral = (integrand.sum(-1) - 0.5 * integrand[..., 0]) * (_STEP / torch.pi)
    # left of the pole at 0 the integral is minus the lower tail
    value = torch.where(start < 0, 1 + integral, integral).clamp(0, 1)
    return torch.where(usable, value, (q <= 0).to(value.dtype))


def _contour(q: Tensor, law: ChiSquareMixtureCGF) -> tuple[Tensor, Tensor, Tensor]:
    """Where the contour crosses the real axis, how wide its Gaussian part is, and how fast it bends away from it.

    The crossing keeps clear of the pole at 0, on the side of the saddlepoint; it need not be exact. The bend is the
    steepest descent's there, or as much less as it takes for the integrand not to grow further out, where other
    eigenvalues matter than at the crossing.
    """
    with torch.no_grad():
        t = law.root(q - law.mean)
        curvature = law.centred(t, 2)[2]
        clear = 0.5 * (t.abs() + (t * t + 4 / curvature).sqrt())
        highest = law.domain[1]
        start = torch.where(t < 0, -clear, torch.minimum(clear, 0.5 * (t + highest)))
        _, _, k2, k3 = law.centred(start, 3)
        width = (k2 + 1 / (start * start)).rsqrt()
        bends = (k3 / (6 * k2)).unsqueeze(-1) * 4.0 ** -torch.arange(_BENDS, dtype=q.dtype, device=q.device)
        y = width.unsqueeze(-1) * torch.sinh(2 * _STEP * torch.arange(_NODES // 2, dtype=q.dtype, device=q.device))
        y = y.unsqueeze(-2)
        x = start[..., None, None] + bends.unsqueeze(-1) * y * y
        twice = 2 * law.eigenvalues[..., None, None, :]
        squared = (1 - twice * x.unsqueeze(-1)).square() + (twice * y.unsqueeze(-1)).square()
        size = -0.25 * (law.degrees[..., None, None, :] * squared.log()).sum(-1) - x * q[..., None, None]
        grows = (size.diff(dim=-1) > 0.1).any(-1)
        grows = (grows & (torch.arange(_BENDS, device=q.device) < _BENDS - 1)).to(torch.int64)
        # one more quarter than monotone decay asks for: the integrand still is not quite smooth at its limit
        return start, width, 0.25 * bends.gather(-1, grows.argmin(-1, keepdim=True)).squeeze(-1)


def tail_from_cumulants(q: Real, cumulants: Real) -> Tensor:
    r"""Upper tail of a weighted sum of chi-squares from its first two, three or four cumulants.

    The power sums $p_r = k_r/(2^{r-1}(r-1)!)$ of the eigenvalues are moments of a positive measure, and its Gauss
    quadrature is a smaller sum with the same cumulants:

    - two: one eigenvalue, $\lambda \chi^2_\nu$ with $\nu = 2 k_1^2/k_2$ (Satterthwaite);
    - three: one eigenvalue and a constant, $c + \lambda \chi^2_\nu$ with $\nu = 8 k_2^3/k_3^2$ (Pearson's third type);
    - four: two eigenvalues, $\lambda_1 \chi^2_{\nu_1} + \lambda_2 \chi^2_{\nu_2}$, with the tail of `tail`.

    Args:
        q: Observed statistics (...,), any sign.
        cumulants: The first 2, 3 or 4 cumulants in the last dimension, (..., 2 to 4); (...,) broadcasts with q.

    Returns:
        Upper tails (...,), exact when all eigenvalues are equal, and with four cumulants when there are only two
        different ones. Elsewhere the tail is light, the more so the further out, since the largest eigenvalue is
        estimated from below. Measured for harmonic eigenvalues 1, 1/2, ..., 1/30 and (in brackets) for 1 with twenty
        of 0.1, at tails of 0.1, 1e-4 and 1e-10: two cumulants +9, -99, -100 % (+18, -99, -100); three +6, -54, -99 %
        (+8, -41, -92); four -1, -8, -53 % (0, 0, 0). Where eigenvalues are at hand, use `tail`.
        1 where q <= 0; where the first cumulant is 0, 0 for a positive q. Where the third or fourth cumulant cannot be
        a weighted sum's, those below it are used.

    Raises:
        ValueError: If there are not 2, 3 or 4 cumulants, the first or second is negative, something is NaN, or the
            shapes do not broadcast.

    Example:
        >>> q = torch.tensor([5.991464547107979], dtype=torch.float64)
        >>> tail_from_cumulants(q, torch.tensor([[2.0, 4.0]], dtype=torch.float64)).item()  # chi-square(2)
        0.05...

    References:
        Satterthwaite (1946), Biometrics Bulletin 2(6), 110-114; Box (1954), Ann. Math. Statist. 25(2), 290-302;
        Buckley and Eagleson (1988), Austral. J. Statist. 30(A), 150-159; the two-eigenvalue fit is this project's own.
    """
    value, given = as_doubles(q=q)[0], as_doubles(cumulants=cumulants)[0]
    orders = given.shape[-1] if given.ndim else 0
    if orders not in (2, 3, 4):
        raise ValueError(f"cumulants must be 2, 3 or 4 in the last dimension; got shape {tuple(given.shape)}")
    value, _ = as_doubles(q=value, cumulants=given[..., 0])
    require_non_negative(cumulants=given[..., :2])
    k1, k2 = given[..., 0], given[..., 1]
    degenerate = (k1 <= 0) | (k2 <= 0)
    k1, k2 = torch.where(degenerate, 1.0, k1), torch.where(degenerate, 2.0, k2)
    shape, scale, start = k1 * k1 / k2, k2 / k1, torch.zeros_like(k1)
    if orders >= 3:
        k3 = given[..., 2]
        # p2^2 <= p1 p3 for a positive measure
        skewed = ~degenerate & (k1 * k3 >= 2 * k2 * k2 * (1 - 1e-12))
        k3 = torch.where(skewed, k3, 1.0)
        shape = torch.where(skewed, 4 * k2 * (k2 / k3) ** 2, shape)
        scale = torch.where(skewed, k3 / (2 * k2), scale)
        start = torch.where(skewed, (k1 - 2 * k2 * k2 / k3).clamp_min(0), start)
    above = ((value - start) / scale).clamp_min(0)
    tail_value: Tensor = torch.special.gammaincc(shape.detach(), above)
    if orders == 4:
        two, eigenvalues, degrees = _two_eigenvalues(k1, k2 / 2, torch.where(skewed, k3, 0.0) / 8, given[..., 3] / 48)
        two = two & skewed
        eigenvalues = torch.where(two.unsqueeze(-1), eigenvalues, 1.0)
        degrees = torch.where(two.unsqueeze(-1), degrees, 1.0)
        tail_value = torch.where(two, _mixture_tail(value, ChiSquareMixtureCGF(eigenvalues, degrees)), tail_value)
    exact = torch.where(degenerate & (value > given[..., 0]), 0.0, 1.0)
    return torch.where(degenerate | (value <= 0), exact, tail_value)


def _two_eigenvalues(p1: Tensor, p2: Tensor, p3: Tensor, p4: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two eigenvalues and their degrees of freedom (..., 2) with these power sums; and where there are such."""
    spread = p1 * p3 - p2 * p2
    spread_safe = torch.where(spread > 1e-10 * p2 * p2, spread, 1.0)
    total = (p1 * p4 - p2 * p3) / spread_safe
    product = (p2 * p4 - p3 * p3) / spread_safe
    gap = total * total - 4 * product
    valid = (spread > 1e-10 * p2 * p2) & (product >= 0) & (total > 0) & (gap > 0)
    total, product = torch.where(valid, total, 3.0), torch.where(valid, product, 2.0)
    root = torch.where(valid, gap, 1.0).sqrt()
    large = 0.5 * (total + root)
    small = torch.maximum(product / large, _SMALLEST_NODE * large)
    mass = (p2 - small * p1) / (large - small)
    rest = p1 - mass
    valid = valid & (mass > 0) & (rest > 0)
    degrees = torch.stack((mass / large, rest / small), -1)
    return valid, torch.stack((large, small), -1), torch.where(valid.unsqueeze(-1), degrees, 1.0)


def tail_is_below(
    q: float, k1: float, k2: float, probability: float, k3: float | None = None, k4: float | None = None
) -> bool:
    r"""Whether `tail_from_cumulants` of these cumulants lies below `probability`: a gate's question, at its price.

    With two cumulants, shape a and x = k1 q/k2, bounds on the upper incomplete gamma function decide almost every call:

    $$ \frac{x^{a-1} e^{-x}}{\Gamma(a)} \min\Big(1, \frac{x}{x + 1 - a}\Big) \le Q(a, x)
       \le \Big(\frac{x}{a}\Big)^a e^{a - x} \quad (x > a) $$

    with four, the Lugannani-Rice tail of the two eigenvalues decides where it is off by a factor of two or more. Only
    what falls between is computed.

    Args:
        q: Observed statistic.
        k1: Its first cumulant under "nothing new".
        k2: Its second.
        probability: The level, in (0, 1); small enough that a statistic below its mean never passes (below 0.3).
        k3: Its third, together with `k4`.
        k4: Its fourth.

    Example:
        >>> tail_is_below(6.0, 2.0, 4.0, 0.05), tail_is_below(5.9, 2.0, 4.0, 0.05)  # chi-square(2): 5.9915
        (True, False)
        >>> tail_is_below(26.0, 2.0, 3.0, 5e-7), tail_is_below(26.0, 2.0, 3.0, 5e-7, 11.0, 70.0)  # a heavier tail
        (True, False)

    References:
        Chernoff's bound above; Gautschi (1959), J. Math. Phys. 38, 77-81, below; Lugannani and Rice (1980).
    """
    if k1 <= 0 or k2 <= 0:
        return q > 0
    if q <= k1 and probability < 0.3:
        return False
    if k3 is not None and k4 is not None:
        fit = _fit(k1, k2 / 2, k3 / 8, k4 / 48)
        if fit is not None:
            rough = _rough_tail(q, *fit)
            if rough is None or probability / _LOOSE <= rough <= probability * _LOOSE:
                return float(tail_from_cumulants(q, torch.tensor((k1, k2, k3, k4), dtype=torch.float64))) < probability
            return rough < probability
        if k1 * k3 > 2 * k2 * k2:
            return float(tail_from_cumulants(q, torch.tensor((k1, k2, k3, k4), dtype=torch.float64))) < probability
    shape, x = k1 * k1 / k2, k1 * q / k2
    if x > shape:
        level = math.log(probability)
        if shape * math.log(x / shape) + shape - x < level:
            return True
        lower = (shape - 1) * math.log(x) - x - math.lgamma(shape)
        if shape < 1:
            lower += math.log(x / (x + 1 - shape))
        if lower >= level:
            return False
    pair = torch.tensor((shape, x), dtype=torch.float64)
    return float(torch.special.gammaincc(pair[0], pair[1])) < probability


def _fit(p1: float, p2: float, p3: float, p4: float) -> tuple[float, float, float, float] | None:
    """`_two_eigenvalues` of one site: large, small, and their degrees of freedom; None where there are none."""
    spread = p1 * p3 - p2 * p2
    if spread <= 1e-10 * p2 * p2:
        return None
    total, product = (p1 * p4 - p2 * p3) / spread, (p2 * p4 - p3 * p3) / spread
    gap = total * total - 4 * product
    if product < 0 or total <= 0 or gap <= 0:
        return None
    large = 0.5 * (total + math.sqrt(gap))
    small = max(product / large, _SMALLEST_NODE * large)
    mass = (p2 - small * p1) / (large - small)
    return (large, small, mass / large, (p1 - mass) / small) if 0 < mass < p1 else None


def _rough_tail(q: float, large: float, small: float, degrees: float, rest: float) -> float | None:
    """Lugannani-Rice tail above the mean of two eigenvalues; None near the mean."""
    t = (1 - degrees * large / q) / (2 * large)
    for _ in range(6):  # as ChiSquareMixtureCGF.root
        a, b = large / (1 - 2 * t * large), small / (1 - 2 * t * small)
        slope, curvature = degrees * a + rest * b, 2 * (degrees * a * a + rest * b * b)
        step = slope * (1 - slope / q) / curvature
        t += step
        if abs(step) < 1e-4 * t:
            break
    else:
        return None
    if t <= 0:
        return None
    exponent = -0.5 * (degrees * math.log1p(-2 * t * large) + rest * math.log1p(-2 * t * small))
    a, b = large / (1 - 2 * t * large), small / (1 - 2 * t * small)
    squared = 2 * (t * q - exponent)
    if squared < 0.01:
        return None
    w, u = math.sqrt(squared), t * math.sqrt(2 * (degrees * a * a + rest * b * b))
    return 0.5 * math.erfc(w / math.sqrt(2)) + math.exp(-0.5 * squared) / math.sqrt(2 * math.pi) * (1 / u - 1 / w)
