"""Streams whose instances come from different domains: each instance gets its own statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.asymptotics.quadratic import tail_is_below
from normadapt.policies.base import Source, standardize, unstandardize
from normadapt.policies.belief import UNTOLD
from normadapt.policies.spread_learner import Limits
from normadapt.shapes import LocationScale, PerChannel, PerInstance
from normadapt.spread import Pair, Spread
from normadapt.statistics import Evidence

_DEGREES = 64.0  # of the test, at most: a thousand instances would find differences that are of no use
_FEWEST = 3  # instances in a window whose scatter can be tested


class Found(NamedTuple):
    """What a site tells those behind it.

    Args:
        mixed: Whether the stream is mixed.
        apart: The least share of the stream's own variance that lies between instances, here and before.
        odds: Log-odds of a shift that matters, see `belief`.
        jumped: Whether it begins a new window with this batch.
    """

    mixed: bool = False
    apart: float = 1.0
    odds: float = UNTOLD
    jumped: bool = False


def found_before(evidence: Evidence) -> Found:
    """What the site before tells; at the first one, nothing."""
    return evidence.upstream if isinstance(evidence.upstream, Found) else Found()


class Scatter(NamedTuple):
    """How far the instances of a window lie apart.

    Args:
        squares: Sums over the window of sum_c w_c (x - mean)_c^2, as (location, scale); older ones fade.
        half: Mean of the instances' half-log-variances (C,); empty before the first instance.
        excess: A, the variance between domains per unit of weight, as (location, scale); 0 if one domain explains all.
        together: Sum over the window of the squared distances of the half-log-variances' average over channels.
        mixed: Whether they scatter more than any one domain's could; only asked where no profile says what is natural.
        unlike: Whether they scatter more than instances that are alike usually do; also where they are mixed.
    """

    squares: Pair
    half: PerChannel
    excess: Pair
    together: float = 0.0
    mixed: bool = False
    unlike: bool = False

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
    limits: Limits | None = None,
    least: float = 0.0,
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
        least: The least that an instance's own statistics weigh, whatever explains the window. What is found of the
            stream does not depend on it.
        limits: Without a profile the spread was learned from this very stream, and a mixed one would explain itself.
            Then it counts as mixed only when its locations, or the scales of all channels together, vary more than one
            domain's can, here or at a site before (`evidence.upstream`); the excess of both, in this batch and the
            next, is over `limits.usual`. Beyond `limits.nearly` times that, a site does the same for itself alone.
    """
    n, judge = evidence.count, _Judge(window.count + evidence.count, spread, source, probability, limits)
    mixed, unlike, known = False, False, limits is None or scatter.unlike or found_before(evidence).mixed
    weight = source.channel_weight

    locations, ratios = standardize(evidence.instances.values, source.aligned or source.units).unbind()
    location_squares = scatter.squares[0] * window.faded + _squares(locations, window.mean, window.count, weight)
    if limits is not None:
        unlike = judge.lie_apart(location_squares, limits.most * limits.nearly)
        mixed = unlike and judge.lie_apart(location_squares, limits.most)
        known = known or unlike
    location_excess = judge.excess(location_squares, 0) if known else 0.0
    share = judge.own_share(location_excess, 0, max_weight)
    own, half = _parted(locations, ratios, use, share)
    scale_squares = scatter.squares[1] * window.faded + _squares(half, scatter.half, window.count, weight)
    together = 0.0
    if limits is not None:
        together = scatter.together * window.faded + _together(half, scatter.half, window.count, source)
        if not mixed and judge.vary_together(together, limits.together * limits.nearly):
            unlike, mixed = True, judge.vary_together(together, limits.together)
        known = known or unlike
    scale_excess = judge.excess(scale_squares, 1) if known else 0.0
    # The mean of one instance is a copy where it is kept as it is: a view would keep the batch.
    half_mean = torch.lerp(scatter.half, _mean(half), n / judge.total) if window.count > 0 else half.mean(0)
    excess = location_excess, scale_excess
    after = Scatter((location_squares, scale_squares), half_mean, excess, together, mixed, unlike)
    least = min(least, max_weight)
    if location_excess == scale_excess == least == 0.0:
        return after, None
    scale_share = judge.own_share(scale_excess, 1, max_weight)
    if least > 0:
        share, scale_share = _at_least(share, least), _at_least(scale_share, least)
        locations, ratios = standardize(evidence.instances.values, source.aligned or source.units).unbind()
        own, half = _parted(locations, ratios, use, share)
    location = (use[0] + own).expand_as(half)
    scale = use[1] + (half - use[1]) * scale_share
    return after, unstandardize(location, scale, source, source.aligned or source.units)


def _parted(
    locations: PerInstance, ratios: PerInstance, use: LocationScale, share: Tensor | float
) -> tuple[PerInstance | float, PerInstance]:
    """The share of an instance's distance from the location in use, and its half-log-variance about what results.

    `ratios` is overwritten.
    """
    rest = locations - use[0]
    own: PerInstance | float = 0.0
    if isinstance(share, Tensor) or share > 0:
        own = rest * share
        rest -= own
    return own, ratios.addcmul_(rest, rest).clamp_min_(1e-12).log_().mul_(0.5)


def _at_least(share: Tensor | float, least: float) -> Tensor | float:
    return share.clamp_min(least) if isinstance(share, Tensor) else max(share, least)


def _squares(values: Tensor, before: Tensor, count: float, weight: Tensor) -> float:
    """What instances (n, C) add to a sum of squared distances about the mean of so many others and of themselves."""
    n, mean = values.shape[0], _mean(values)
    added = float((values - mean).square_().sum(0) @ weight) if n > 1 else 0.0
    if count > 0:
        added += n * count / (count + n) * float((mean - before).square_() @ weight)
    return added


def _together(half: PerInstance, before: PerChannel, count: float, source: Source) -> float:
    """The same of one number per instance, the average of its half-log-variances (n, C) over channels."""
    if half.shape[0] > 1:
        column = source.share.unsqueeze(1)
        return _squares(half @ column, before @ column if count > 0 else before, count, column.new_ones(1))
    if count == 0:
        return 0.0
    distance = float(half[0] @ source.share) - float(before @ source.share)
    return count / (count + 1) * distance * distance


def _mean(values: Tensor) -> Tensor:
    """Over instances (n, C); of a single one, where a call less counts, itself."""
    return values[0] if values.shape[0] == 1 else values.mean(0)


class _Judge:
    """Compares sums of squares over `total` instances with what instances of one domain would give."""

    def __init__(self, total: float, spread: Spread, source: Source, probability: float, limits: Limits | None) -> None:
        self.total = total
        self.natural = [spread.total[0], spread.total[1]]
        self._expected, self._sum_weight, self._probability = spread.instance, source.sum_weight[0], probability
        self._limits = limits

    def _is_below(self, squares: float, expected: float, square: float) -> bool:
        freedom = min(self.total - 1, _DEGREES)
        if self.total < _FEWEST:
            return False
        return tail_is_below(squares / (self.total - 1), expected, square / freedom, self._probability)

    def lie_apart(self, squares: float, limit: float) -> bool:
        """Whether the locations scatter more than `limit` per unit of weight."""
        expected, square = self._expected[0]
        times = limit * self._sum_weight / expected
        return self._is_below(squares, expected * times, square * times * times)

    def vary_together(self, squares: float, limit: float) -> bool:
        """Whether one number per instance has a larger variance than `limit`."""
        return self._is_below(squares, limit, 2 * limit * limit)

    def own_share(self, excess: float, row: int, most: float) -> Tensor | float:
        """The weight (C,) that an excess gives to an instance's own, lambda; 0 without one."""
        return (excess / (excess + self.natural[row])).clamp_max(most) if excess > 0 else 0.0

    def excess(self, squares: float, row: int) -> float:
        """A per unit of weight; `natural` is then what one domain's instances scatter."""
        expected, square = self._expected[row]
        if self._limits is not None:
            times = min(1.0, self._limits.usual[row] * self._sum_weight / expected)
            expected, square = expected * times, square * times * times
            self.natural[row] = self.natural[row] * times
        if not self._is_below(squares, expected, square):
            return 0.0
        return (squares / (self.total - 1) - expected) / self._sum_weight
