r"""Edgeworth and Cornish-Fisher expansions of a weighted sum of means, standardized or studentized.

One engine for every statistic of the library: for $D = \sum_i w_i \bar x_i$ over independent groups only four
numbers matter, the cumulants k1..k4 of D after standardizing (known variance) or studentizing (Welch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from normadapt.asymptotics import expansions, normal
from normadapt.asymptotics.arguments import Real, as_doubles, require, require_count, require_non_negative

Terms: TypeAlias = Literal[0, 1, 2]
"""0 is the normal law, 1 adds the order n^(-1/2), 2 the order 1/n."""


class Group(NamedTuple):
    """Independent draws whose mean enters a statistic D = sum of weight * mean.

    Args:
        weight: Factor of the group's mean (...,), of any sign.
        count: Number of draws (...,), at least 1.
        variance: Variance of one draw (...,).
        third_cumulant: Third cumulant of one draw (...,): skewness * variance^1.5.
        fourth_cumulant: Fourth cumulant of one draw (...,): excess kurtosis * variance^2.
    """

    weight: Real
    count: Real  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    variance: Real
    third_cumulant: Real
    fourth_cumulant: Real


class StatisticCumulants(NamedTuple):
    """Cumulants k1..k4 of a standardized or studentized statistic, each (...,), float64, without unit."""

    k1: Tensor
    k2: Tensor
    k3: Tensor
    k4: Tensor


FourCumulants: TypeAlias = StatisticCumulants | tuple[Real, Real, Real, Real]
"""What the expansions accept: k1..k4, tensors that broadcast or numbers."""


def standardized(groups: Group | Sequence[Group]) -> StatisticCumulants:
    r"""Cumulants of $(D - E D)/\sqrt V$ for $D = \sum_i w_i \bar x_i$, variances known.

    $$ V = \sum \frac{w^2 k_2}{n}, \quad k_3 = A = \sum \frac{w^3 k_3}{n^2} \Big/ V^{1.5}, \quad
       k_4 = B = \sum \frac{w^4 k_4}{n^3} \Big/ V^2 $$

    Weights (-1, +1) give the normalized difference of training and test mean of the paper's Lemma 3.1, whose T has
    V_paper = (n s2_Q + m s2_P)/(n + m): P(T <= x) = `lower_tail(x / sqrt(V_paper), ..., terms=1)`.
    Weights (1 - l, l) give the adapted statistic.

    Args:
        groups: One group, or several independent ones; their fields broadcast.

    Returns:
        k1 = 0, k2 = 1, k3, k4, each (...,). Exact. NaN where V is 0 (a channel that does not vary), there only.

    Raises:
        ValueError: If a count is below 1, a variance negative, a number NaN, no group given, or shapes conflict.

    Example:
        >>> difference = standardized([Group(-1, 40, 1.0, 2.0, 6.0), Group(+1, 8, 2.25, 6.75, 30.375)])
        >>> difference.k3.item()
        0.6149385420793...
        >>> lower_tail(-2 / 2.0416666666666665**0.5, difference, terms=1).item()  # P(T <= -2)
        0.06607513261336...

    References:
        Kimura (2025), arXiv 2505.16257, claim 1 (Lemma 3.1); Hall (1992), The Bootstrap and Edgeworth Expansion, 2.
    """
    skewness, kurtosis, _ = _shape(groups, finite_sample=False)
    return StatisticCumulants(torch.zeros_like(skewness), torch.ones_like(skewness), skewness, kurtosis)


def studentized(groups: Group | Sequence[Group], finite_sample: bool = False) -> StatisticCumulants:
    r"""Cumulants of $(D - E D)/\sqrt{\hat V}$, $\hat V = \sum w^2 s^2/n$ with unbiased s^2 (Student, Welch).

    $$ k_1 = -\tfrac A2, \quad k_2 = 1 + 2G + \tfrac74 A^2, \quad k_3 = -2A, \quad k_4 = -2B + 6G + 12A^2 $$

    with A, B of `standardized` and $G = \sum w^4 k_2^2/n^3/V^2$. The polynomials of the standardized
    statistic would be wrong in sign and shape here: a positive skewness makes the lower tail the heavy one.

    Args:
        groups: One group, or several independent ones; their fields broadcast.
        finite_sample: Whether G has n^2 (n-1) in its denominator instead of the textbook's n^3: of the same order, and
            three times nearer at n = 6 for normal data.

    Returns:
        k1..k4, each (...,), of relative error O(1/n). NaN where V is 0 or (with `finite_sample`) a count is 1.

    Raises:
        ValueError: If a count is below 1, a variance negative, a number NaN, no group given, or shapes conflict.

    Example:
        >>> t = studentized(Group(1, 6, 1.0, 0.0, 0.0), finite_sample=True)
        >>> tail(2.0, t).item()  # exact: 0.0509697
        0.04974561520477...

    References:
        Hall (1992), section 2.6; two samples: this project's THEORY, section 3.
    """
    a, b, g = _shape(groups, finite_sample)
    return StatisticCumulants(-a / 2, 1 + 2 * g + 1.75 * a * a, -2 * a, -2 * b + 6 * g + 12 * a * a)


def lower_tail(x: Real, cumulants: FourCumulants, terms: Terms = 2, clamp: bool = False) -> Tensor:
    r"""Edgeworth expansion of P(X <= x).

    $$ F = \Phi - \varphi \Big\{ k_1 + \frac{k_3}6 He_2 \Big\} - \varphi \Big\{ \frac{k_2 - 1 + k_1^2}2 x
       + \frac{k_4 + 4 k_1 k_3}{24} He_3 + \frac{k_3^2}{72} He_5 \Big\} $$

    The raw expansion is returned, which can leave [0, 1]: `validity` tells where, `clamp` cuts it off.

    Args:
        x: Standardized points (...,); infinite ones are allowed.
        cumulants: k1..k4 of the statistic, broadcastable with x.
        terms: 0 the normal law, 1 the first brace, 2 both.
        clamp: Whether to clamp to [0, 1].

    Returns:
        Lower tails (...,). Absolute error O(n^(-(terms+1)/2)). NaN where a cumulant is.

    Raises:
        ValueError: If x is NaN, k2 negative, `terms` unknown, or the shapes do not broadcast.

    Example:
        >>> mean_of_ten_exponentials = standardized(Group(1, 10, 1.0, 2.0, 6.0))
        >>> 1 - lower_tail(2.0, mean_of_ten_exponentials).item()  # exact: 0.0374
        0.03712402634807...

    References:
        Kimura (2025), arXiv 2505.16257, claim 1; Hall (1992), section 2.3.
    """
    point, k = _checked(x, cumulants, terms)
    value = normal.lower_tail(point) - expansions.correction(point, k, terms)
    return value.clamp(0, 1) if clamp else value


def tail(x: Real, cumulants: FourCumulants, terms: Terms = 2, clamp: bool = False) -> Tensor:
    r"""Edgeworth expansion of P(X >= x): one minus `lower_tail`, but with its relative precision kept.

    $$ Q = \tfrac12 \mathrm{erfc}(x/\sqrt2) + \varphi \{\ldots\} + \varphi \{\ldots\} $$

    Args:
        x: Standardized points (...,); infinite ones are allowed.
        cumulants: k1..k4 of the statistic, broadcastable with x.
        terms: 0 the normal law, 1 or 2 terms.
        clamp: Whether to clamp to [0, 1].

    Returns:
        Upper tails (...,). Absolute error O(n^(-(terms+1)/2)): far out, a saddlepoint tail is the better one.

    Raises:
        ValueError: If x is NaN, k2 negative, `terms` unknown, or the shapes do not broadcast.

    Example:
        >>> tail(2.0, standardized(Group(1, 10, 1.0, 2.0, 6.0))).item()
        0.03712402634807...

    References:
        Kimura (2025), arXiv 2505.16257, claim 1; Hall (1992), section 2.3.
    """
    point, k = _checked(x, cumulants, terms)
    value = normal.tail(point) + expansions.correction(point, k, terms)
    return value.clamp(0, 1) if clamp else value


def density(x: Real, cumulants: FourCumulants, terms: Terms = 2, clamp: bool = False) -> Tensor:
    r"""Edgeworth expansion of the density of X.

    $$ f = \varphi \Big[ 1 + k_1 x + \frac{k_3}6 He_3 + \frac{k_2 - 1 + k_1^2}2 He_2
       + \frac{k_4 + 4 k_1 k_3}{24} He_4 + \frac{k_3^2}{72} He_6 \Big] $$

    The derivative of `lower_tail`; integrates to 1 and can be negative.

    Args:
        x: Standardized points (...,).
        cumulants: k1..k4 of the statistic, broadcastable with x.
        terms: 0 the normal law, 1 the terms in k1 and k3, 2 all.
        clamp: Whether to raise negative values to 0.

    Returns:
        Densities (...,) per unit of the standardized statistic. Absolute error O(n^(-(terms+1)/2)).

    Raises:
        ValueError: If x is NaN, k2 negative, `terms` unknown, or the shapes do not broadcast.

    Example:
        >>> density(0.0, standardized(Group(1, 10, 1.0, 2.0, 6.0))).item()  # exact: 0.3956
        0.3956...

    References:
        Kimura (2025), arXiv 2505.16257, claim 1; Hall (1992), section 2.8.
    """
    point, k = _checked(x, cumulants, terms)
    value = normal.density(point) * expansions.density_ratio(point, k, terms)
    return value.clamp_min(0) if clamp else value


def quantile(lower_probability: Real, cumulants: FourCumulants, terms: Terms = 2) -> Tensor:
    r"""Cornish-Fisher expansion of the point below which X falls with a given probability.

    $$ z + k_1 + \frac{k_3}6 (z^2 - 1) + \frac{k_2 - 1}2 z + \frac{k_4}{24} (z^3 - 3z) - \frac{k_3^2}{36} (2z^3 - 5z) $$

    Args:
        lower_probability: Probabilities (...,), in (0, 1); 0 and 1 give the infinities.
        cumulants: k1..k4 of the statistic, broadcastable with the probabilities.
        terms: 0 the normal quantile z, 1 adds k1 and the first power of k3, 2 all.

    Returns:
        Standardized points (...,). Absolute error O(n^(-(terms+1)/2)). Not always increasing: see `validity`.

    Raises:
        ValueError: If a probability is outside [0, 1] or NaN, k2 negative, `terms` unknown, or shapes do not broadcast.

    Example:
        >>> quantile(0.95, standardized(Group(1, 5, 1.0, 2.0, 6.0))).item()  # exact: 1.85751
        1.859857964717...

    References:
        Cornish and Fisher (1938), Revue de l'Institut International de Statistique 5(4), 307-320; Hall (1992), 2.5.
    """
    (p,) = as_doubles(lower_probability=lower_probability)
    require("lower_probability", p, (p >= 0) & (p <= 1), "must be in [0, 1]")
    z, k = _checked(normal.quantile(p), cumulants, terms)
    finite = z.isfinite()
    inner = torch.where(finite, z, torch.zeros_like(z))
    return torch.where(finite, expansions.cornish_fisher(inner, k, terms), z)


def lattice_tail(
    x: Real,
    cumulants: FourCumulants,
    span: Real,
    terms: Terms = 2,
    correction: Literal["none", "half", "sheppard", "esseen"] = "half",
) -> Tensor:
    r"""Edgeworth tail P(X >= x) of a lattice variable at one of its points: with a continuity correction.

    "half" evaluates at $x - h/2$; "sheppard" does so with the cumulants of X plus a uniform variable on the span,
    $k_2 + h^2/12$ and $k_4 - h^4/120$; "esseen" is the one-term expansion with its own lattice term,

    $$ Q_1(x - h) - \tfrac h2 \varphi(x - h), $$

    whatever `terms` is; "none" ignores the lattice, at the price of an error O(h).

    Args:
        x: Standardized lattice points (...,).
        cumulants: k1..k4 of the statistic, broadcastable with x.
        span: Spacing h of the lattice in standardized units (...,): 1/sd for a count.
        terms: Terms of the expansion that is corrected.
        correction: Which correction.

    Returns:
        Upper tails (...,). Absolute error O(1/n) with any correction; "half" and "sheppard" are best in the centre.

    Raises:
        ValueError: If x is NaN, `span` negative, `correction` unknown, or the shapes do not broadcast.

    Example:
        >>> sd = 2.1**0.5  # binomial(10, 0.3): P(S >= 5) = 0.1503
        >>> k = standardized(Group(1, 10, 0.21, 0.084, -0.0546))
        >>> lattice_tail((5 - 3) / sd, k, 1 / sd).item()
        0.1548727706643...

    References:
        Esseen (1945), Acta Math. 77, 1-125; Kolassa and McCullagh (1990), Ann. Statist. 18(2), 981-985.
    """
    point, h = as_doubles(x=x, span=span)
    require_non_negative(span=h)
    if correction == "none":
        return tail(point, cumulants, terms)
    if correction == "half":
        return tail(point - h / 2, cumulants, terms)
    if correction == "esseen":
        return tail(point - h, cumulants, 1) - h / 2 * normal.density(point - h)
    if correction != "sheppard":
        raise ValueError(f'correction must be "none", "half", "sheppard" or "esseen"; got {correction!r}')
    _, (k1, k2, k3, k4) = _checked(point, cumulants, terms)
    s = torch.sqrt(1 + h * h / 12)
    rescaled = StatisticCumulants(k1 / s, (k2 + h * h / 12) / s**2, k3 / s**3, (k4 - h**4 / 120) / s**4)
    return tail((point - h / 2) / s, rescaled, terms)


class Validity(NamedTuple):
    """Where an expansion stops being a law, each (...,): flags, and the nearest offending point to 0 (NaN: none).

    `quantile_point` is in units of the normal quantile z, the other two of the statistic x.
    """

    quantile_increasing: Tensor
    quantile_point: Tensor
    density_positive: Tensor
    density_point: Tensor
    tail_in_range: Tensor
    tail_point: Tensor


def validity(
    cumulants: FourCumulants, terms: Terms = 2, quantile_reach: float = 4.0, density_reach: float = 5.0
) -> Validity:
    r"""Where the Cornish-Fisher quantile stops increasing, the density is negative, the lower tail leaves [0, 1].

    A grid of spacing reach/1000 is scanned outward from 0 on both sides, and the first change of sign bisected.
    A violation narrower than the spacing can be missed; the functions are polynomials of degree 6 at most.

    Args:
        cumulants: k1..k4 of the statistic, (...,).
        terms: Terms of the expansion.
        quantile_reach: Largest |z| that is looked at for the quantile.
        density_reach: Largest |x| that is looked at for the density and the tail.

    Returns:
        Flags and points (...,); points to 1e-12. Where a cumulant is NaN every flag is False.

    Raises:
        ValueError: If k2 is negative, a reach not positive, or `terms` unknown.

    Example:
        >>> verdict = validity(standardized(Group(1, 5, 1.0, 2.0, 6.0)))
        >>> verdict.quantile_increasing.item(), verdict.density_positive.item(), round(verdict.density_point.item(), 4)
        (True, False, -2.1467)

    References:
        This project's own; for the loss of monotonicity: Chernozhukov, Fernandez-Val and Galichon (2010),
        Econometric Theory 26(6), 1649-1665.
    """
    reach_q, reach_d = as_doubles(quantile_reach=quantile_reach, density_reach=density_reach)
    require("quantile_reach", reach_q, reach_q > 0, "must be positive")
    require("density_reach", reach_d, reach_d > 0, "must be positive")
    _, k = _checked(0.0, cumulants, terms)
    k = [value.detach() for value in k]
    shape = torch.broadcast_shapes(*(value.shape for value in k))

    def margin(x: Tensor) -> Tensor:
        correction = expansions.correction(x, k, terms)
        return torch.minimum(normal.lower_tail(x) - correction, normal.tail(x) + correction)

    search = expansions.first_negative
    rising, turn = search(lambda z: expansions.cornish_fisher_slope(z, k, terms), shape, reach_q)
    positive, zero = search(lambda x: expansions.density_ratio(x, k, terms), shape, reach_d)
    inside, exit_point = search(margin, shape, reach_d)
    return Validity(rising, turn, positive, zero, inside, exit_point)


def _shape(groups: Group | Sequence[Group], finite_sample: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and G of the weighted sum of means; NaN where its variance is 0."""
    several = [groups] if isinstance(groups, Group) else list(groups)
    if not several:
        raise ValueError("groups must hold at least one Group; got none")
    fields = as_doubles(
        **{f"groups[{i}].{name}": value for i, g in enumerate(several) for name, value in g._asdict().items()}
    )
    parts = []
    for i in range(len(several)):
        w, n, k2, k3, k4 = fields[5 * i : 5 * i + 5]
        require_count(**{f"groups[{i}].count": n})
        require_non_negative(**{f"groups[{i}].variance": k2})
        r = w / n
        v = w * r * k2
        divisor = n - 1 if finite_sample else n
        # a group that does not vary adds nothing to G, even as a single draw (0/0)
        divisor = torch.where(v > 0, torch.where(divisor > 0, divisor, torch.nan), 1.0)
        parts.append((v, w * r * r * k3, w * r**3 * k4, v * v / divisor))
    v, a, b, g = (sum(column, torch.zeros((), dtype=torch.float64)) for column in zip(*parts, strict=True))
    v = torch.where(v > 0, v, torch.nan)
    a, b, g = torch.broadcast_tensors(a / v**1.5, b / v**2, g / v**2)
    return a, b, g


def _checked(x: Real, cumulants: FourCumulants, terms: int) -> tuple[Tensor, list[Tensor]]:
    """The point and the cumulants as float64 on one device. NaN cumulants pass: they mark a channel without a law."""
    if terms not in (0, 1, 2):
        raise ValueError(f"terms must be 0, 1 or 2; got {terms!r}")
    (point,) = as_doubles(x=x)
    if len(cumulants) != 4:
        raise ValueError(f"cumulants must be k1, k2, k3, k4; got {len(cumulants)} of them")
    k = [
        value.to(point.device, torch.float64)
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.float64, device=point.device)
        for value in cumulants
    ]
    try:
        torch.broadcast_shapes(point.shape, *(value.shape for value in k))
    except RuntimeError:
        shapes = ", ".join(str(tuple(value.shape)) for value in k)
        raise ValueError(f"x {tuple(point.shape)} does not broadcast with the cumulants {shapes}") from None
    require("cumulants.k2", k[1], ~(k[1] < 0), "must not be negative")
    return point, k
