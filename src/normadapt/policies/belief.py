"""How large a site's shift is believed to be, given what the sites before it showed of the stream.

The squared distance Q of a window from the source is noise, with a shift or without one. Where classes lie far apart,
one class looks like a shift, and the positive part of Q less its noise follows it. Two things are known beside Q:
shifts that matter are of a certain size, and a domain that shifts one site shifts those behind it, too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from normadapt.spread import Pair

# Squared shifts in units of v_s, per unit of weight. The people of `activity` differ by less than the first limit, in
# layers where classes differ by ten times that, and nothing is gained by following them; corruptions lie above it.
_TRIVIAL, _SMALLEST, _LARGEST = 0.03, 0.002, 3.0
_POINTS = 7  # of each of the two ranges, at which the integrals are taken
UNTOLD = 0.5
"""Log-odds of a shift that matters at the first site."""
_DEPENDENT = 0.5  # power with which a site's evidence counts: the same instances speak at the next
_MOST_TOLD, _SUREST = 4.0, 6.0  # what one site can add to the log-odds, and where they end
_CERTAIN = 1e9  # times the noise: no weight is nearer to 1


class Belief(NamedTuple):
    """What is believed after a look at a site.

    Args:
        shift: Squared shift per unit of weight, A, as (location, scale): the one whose weight A/(A + R) is expected.
        odds: Log-odds that the stream has a shift that matters, with what this site told.
    """

    shift: Pair
    odds: float


def believe(squared: Pair, cumulants: tuple[Pair, Pair], sum_weight: float, odds: float) -> Belief:
    r"""The expected weight of a window, over all the shifts that its distance from the source may come from.

    Under the hypothesis that the stream has not shifted, locations and scales have each a shift as small as none, A
    log-uniform on [0.002, 0.03] (in units of v_s). Where it has, each of the two has such a one or one that matters, A
    log-uniform on [0.03, 3] (up to Q itself where that is more), with equal probability. Given A, Q is taken to follow
    a gamma law with the moments of a squared length with a shift,

    $$ E\,Q = k_1 + A \sum_c w_c, \qquad \mathrm{Var}\,Q = k_2 \Big(1 + \frac{2 A \sum_c w_c}{k_1}\Big) $$

    The ratio of the likelihoods of the two hypotheses, to the power 1/2, is what the site adds to the odds.

    Args:
        squared: Q, as (location, scale).
        cumulants: First two cumulants (k1, k2) of Q without a shift.
        sum_weight: sum_c w_c.
        odds: Log-odds that the sites before this one came to.
    """
    looks = [_look(q, k1, k2, sum_weight) for q, (k1, k2) in zip(squared, cumulants, strict=True)]
    told = _DEPENDENT * sum(_log_mean_with_one(look.real - look.trivial) for look in looks)
    odds += max(-_MOST_TOLD, min(_MOST_TOLD, told))
    odds = max(-_SUREST, min(_SUREST, odds))
    probability = 1 / (1 + math.exp(-odds))
    shifts = []
    for look, q, (k1, _) in zip(looks, squared, cumulants, strict=True):
        if k1 <= 0:
            shifts.append(q / sum_weight)
            continue
        matters = probability / (1 + math.exp(min(look.trivial - look.real, 700.0)))
        weight = matters * look.real_weight + (1 - matters) * look.trivial_weight
        shifts.append(k1 / sum_weight * min(weight / max(1 - weight, 1e-300), _CERTAIN))
    return Belief((shifts[0], shifts[1]), odds)


def _log_mean_with_one(log_ratio: float) -> float:
    """log((1 + e^x)/2) of the logarithm x of a ratio."""
    return max(log_ratio, 0.0) + math.log1p(math.exp(-abs(log_ratio))) - math.log(2)


class _Look(NamedTuple):
    """Expected weights and log-likelihoods of Q under the two hypotheses."""

    trivial_weight: float = 0.0
    real_weight: float = 0.0
    trivial: float = 0.0
    real: float = 0.0


def _look(q: float, k1: float, k2: float, sum_weight: float) -> _Look:
    if k1 <= 0 or q <= 0:
        return _Look()
    k2 = max(k2, 1e-9 * k1 * k1)
    largest = max(_LARGEST, q / sum_weight)
    log_q = math.log(q)
    parts = []
    for low, high in ((_SMALLEST, _TRIVIAL), (_TRIVIAL, largest)):
        ratio = (high / low) ** (1 / _POINTS)
        shift = low * math.sqrt(ratio) * sum_weight
        weights, logs = [], []
        for _ in range(_POINTS):
            mean = k1 + shift
            scale = k2 * (1 + 2 * shift / k1) / mean
            shape = mean / scale
            logs.append((shape - 1) * log_q - q / scale - shape * math.log(scale) - math.lgamma(shape))
            weights.append(shift / mean)
            shift *= ratio
        top = max(logs)
        likelihoods = [math.exp(log - top) for log in logs]
        total = sum(likelihoods)
        parts.append((sum(map(float.__mul__, likelihoods, weights)) / total, top + math.log(total / _POINTS)))
    (trivial_weight, trivial), (real_weight, real) = parts
    return _Look(trivial_weight, real_weight, trivial, real)
