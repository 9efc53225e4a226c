"""Streams whose instances come from different domains: each instance gets its own statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.asymptotics.quadratic import tail_is_below
from normadapt.policies.base import Source, standardize, unstandardize
from normadapt.shapes import LocationScale, PerChannel, PerInstance
from normadapt.spread import Pair, Spread
from normadapt.statistics import Evidence

_DEGREES = 64.0  # of the test, at most: a thousand instances would find differences that are of no use
_FEWEST = 3  # instances in a window whose scatter can be tested


class Scatter(NamedTuple):
    """How far the instances of a window lie apart.

    Args:
        squares: Sums over the window of sum_c w_c (x - mean)_c^2, as (location, scale); older ones fade.
        half: Mean of the instances' half-log-variances (C,); empty before the first instance.
        excess: A, the variance between domains per unit of weight, as (location, scale); 0 if one domain explains all.
    """

    squares: Pair
    half: PerChannel
    excess: Pair

    @classmethod
    def empty(cls, source: Source) -> Scatter:
        """Of no instances."""
        return cls((0.0, 0.0), source.mean.new_zeros(0), (0.0, 0.0))


class Window(NamedTuple):
    """Where a window was before a batch.

    Args:
        count: Instances of it that are kept beside the batch; 0 for a new window.
        faded: The same as a share of those that it had.
        mean: Mean location (C,) in output units.
    """

    count: float  # type: ignore[assignment]  # hides tuple.count
    faded: float
    mean: PerChannel


def split_instances(
    scatter: Scatter,
    window: Window,
    evidence: Evidence,
    use: LocationScale,
    spread: Spread,
    source: Source,
    probability: float,
    max_weight: float = 1.0,
) -> tuple[Scatter, tuple[PerInstance, PerInstance] | None]:
    r"""The scatter with a batch in it, and statistics (n, C) for each instance unless one domain explains the window.

    The scatter H of the window's instances is tested against what the source's scatter; the excess over it is the
    variance between domains, and shrinks each instance towards the statistics in use:

    $$ \lambda_c = \frac{A}{A + \tau_c^2}, \qquad A = \frac{(H - \mathrm{tr}\,S)_+}{\sum_c w_c} $$

    and then likewise the half-log-variances about those locations. The window knows its scatter at any batch size.

    Args:
        scatter: That of the window before the batch.
        window: Where that was.
        evidence: The batch.
        use: The statistics in use (2, C), as differences from the source in output units.
        spread: Scatter of one source instance.
        source: The site's source.
        probability: Tail probability of H below which the stream counts as mixed.
        max_weight: The largest lambda.
    """
    weight, sum_weight = source.channel_weight, source.sum_weight[0]
    n, total = evidence.count, window.count + evidence.count

    def squares(values: PerInstance, mean: PerChannel, before: PerChannel, row: int) -> float:
        inner = float((values - mean).square_().sum(0) @ weight) if n > 1 else 0.0
        if window.count > 0:
            apart = n * window.count / total * float((mean - before).square_() @ weight)
            inner += scatter.squares[row] * window.faded + apart
        return inner

    def excess(squares: float, row: int) -> float:
        if total < _FEWEST:
            return 0.0
        expected, square = spread.instance[row]
        found = squares / (total - 1)
        mixed = tail_is_below(found, expected, square / min(total - 1, _DEGREES), probability)
        return (found - expected) / sum_weight if mixed else 0.0

    locations, ratios = standardize(evidence.instances.values, source.aligned or source.units).unbind()
    location_squares = squares(locations, locations.mean(0), window.mean, 0)
    location_excess = excess(location_squares, 0)
    rest = locations - use[0]
    own: Tensor | float = 0.0
    if location_excess > 0:
        own = rest * (location_excess / (location_excess + spread.location)).clamp_max(max_weight)
        rest = rest - own
    half = ratios.addcmul_(rest, rest).clamp_min_(1e-12).log_().mul_(0.5)
    half_mean = half.mean(0)
    scale_squares = squares(half, half_mean, scatter.half, 1)
    scale_excess = excess(scale_squares, 1)
    if window.count > 0:
        half_mean = torch.lerp(scatter.half, half_mean, n / total)
    after = Scatter((location_squares, scale_squares), half_mean, (location_excess, scale_excess))
    if location_excess == scale_excess == 0.0:
        return after, None
    own_scale: Tensor | float = 0.0
    if scale_excess > 0:
        own_scale = (half - use[1]) * (scale_excess / (scale_excess + spread.total[1])).clamp_max(max_weight)
    both = (use[0] + own).expand_as(half), (use[1] + own_scale).expand_as(half)
    return after, unstandardize(*both, source, source.aligned or source.units)
