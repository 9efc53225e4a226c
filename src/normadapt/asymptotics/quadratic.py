"""Tail of a weighted sum of chi-squares: the law of a layer's shift statistic.

A layer's statistic Q = sum_c w_c e_c^2 of a correlated Gaussian vector e is distributed as a weighted
sum of chi-squares whose weights are the eigenvalues of the weighted covariance S. Its cumulants are
k_r = 2^(r-1) (r-1)! tr(S^r): traces that a source profile holds, so no eigenvalue is needed at run time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tail_from_cumulants(q: Tensor, cumulants: Tensor) -> Tensor:
    r"""Upper tail of a weighted sum of chi-squares from its first two cumulants.

    $$ P(Q \ge q) \approx P\Big(\chi^2_\nu \ge \frac{2 k_1}{k_2} q\Big), \qquad \nu = \frac{2 k_1^2}{k_2} $$

    Exact when all eigenvalues are equal; elsewhere the error is that of matching two cumulants
    (a tail of 1e-6 of one dominating eigenvalue is met within a factor of ten).

    Args:
        q: Observed statistics (...,), float64.
        cumulants: First and second cumulant in the last dimension, (..., 2), float64.

    Returns:
        Upper-tail probabilities (...,). 1 where the first cumulant is 0 and q is 0; 0 where only q is positive.

    Example:
        >>> q = torch.tensor([5.991464547107979], dtype=torch.float64)
        >>> tail_from_cumulants(q, torch.tensor([[2.0, 4.0]], dtype=torch.float64)).item()  # chi-square(2)
        0.05...

    References:
        Satterthwaite (1946), Biometrics Bulletin 2(6), 110-114; Box (1954), Ann. Math. Statist. 25(2), 290-302.
    """
    k1, k2 = cumulants.unbind(-1)
    degenerate = (k1 <= 0) | (k2 <= 0)
    k1 = torch.where(degenerate, torch.ones_like(k1), k1)
    k2 = torch.where(degenerate, torch.full_like(k2, 2.0), k2)
    tail = torch.special.gammaincc(k1 * k1 / k2, (k1 / k2 * q).clamp_min(0))
    return torch.where(degenerate, (q <= 0).to(tail.dtype), tail)


def tail_is_below(q: float, k1: float, k2: float, probability: float) -> bool:
    r"""Whether `tail_from_cumulants(q, (k1, k2))` lies below `probability`: a gate's question, answered at its price.

    With shape a and x = k1 q/k2, bounds on the upper incomplete gamma function decide almost every call:

    $$ \frac{x^{a-1} e^{-x}}{\Gamma(a)} \min\Big(1, \frac{x}{x + 1 - a}\Big) \le Q(a, x)
       \le \Big(\frac{x}{a}\Big)^a e^{a - x} \quad (x > a) $$

    and only what falls between them is computed.

    Args:
        q: Observed statistic.
        k1: Its first cumulant under "nothing new".
        k2: Its second.
        probability: The level, in (0, 1); small enough that a statistic below its mean never passes (below 0.3).

    Example:
        >>> tail_is_below(6.0, 2.0, 4.0, 0.05), tail_is_below(5.9, 2.0, 4.0, 0.05)  # chi-square(2): 5.9915
        (True, False)

    References:
        Chernoff's bound above; Gautschi (1959), J. Math. Phys. 38, 77-81, below.
    """
    if k1 <= 0 or k2 <= 0:
        return q > 0
    if q <= k1 and probability < 0.3:
        return False
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
