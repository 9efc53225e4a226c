"""Without a source profile, the scatter of one instance is learned from the stream itself."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from normadapt.policies.base import Source, standardize
from normadapt.shapes import LocationScale, PerChannel
from normadapt.spread import Spread
from normadapt.statistics import Evidence

_PRIOR_VARIANCE = 0.1  # of v_s; half-log-variances likewise
_PRIOR_DEGREES = 2.0
_PRIOR_COUNT = 8.0  # instances that the prior is worth
_MOST = (0.3, 0.5)  # what a layer but the last few can scatter between source instances, as a mean over channels
_DEEP = 0.15  # of the layers, the last ones, whose instances lie apart because the classes do
# Between classes, as far as nobody has seen: in deep networks the last layers keep the classes apart.
_FIRST = 0.05  # variance of a source instance's location in the first layers, in units of v_s
_LAST = 0.5  # the same in the last layer of a deep network
_RISES = 0.6  # share of the layers from which on it rises to that
_SHARE, _SHARE_RISE = 0.3, 0.6  # of it that lies between classes in the first layers; what depth adds
_DEPTH = 8.0  # layers that make a network deep
_SKETCH = 16
_BOUND = 14.5  # times the expectation counts a batch at most: where a gate of 5e-7 fires with two degrees of freedom
_ABSURD = 1000.0  # times the expectation: no domain lies there, a broken sensor does; such a batch teaches nothing
_WINDOW_CENTRE = 8  # instances in the window from which its mean is a better centre than the batch's
_LOOK_EVERY = (
    32  # instances: once the prior is outweighed it is enough to look at so many of a batch, or one in so many
)


class Window(Protocol):
    """What a policy must remember of the stream for its instances to be centred."""

    @property
    def count(self) -> float:
        """Instances in the window."""

    @property
    def moments(self) -> LocationScale:
        """Window means (2, C) of (x - m_s)/sqrt(v_s + eps) and of its square."""


class LearnedSpread(NamedTuple):
    """Running scatter of the instances about where the stream is.

    The degrees of freedom (tr S)^2/tr S^2 need the covariance between channels; a fixed random projection to 16
    numbers keeps enough of it at a cost that does not grow with C^2.

    Args:
        count: Instances behind it, fading with the policy's memory.
        unseen: Instances that have passed since it was updated.
        total: Variance (2, C) across instances.
        sketch: Covariance (2, 16, 16) of the projected instances, channels weighted by gamma.
        one: sum_c w_c times the location's variance (C,), shrunk to its prior: variance 0.1 worth 8 instances.
        spread: What the source's instances are taken to scatter: the same with two degrees of freedom for a prior,
            split into a part within classes and one between them (see `_between_classes`), and at most 0.3 (scale 0.5)
            in all layers but the last 15 %. What is above that comes from several domains.
    """

    count: float  # type: ignore[assignment]  # hides tuple.count
    unseen: float
    total: LocationScale
    sketch: Tensor
    one: float
    spread: Spread

    @classmethod
    def empty(cls, source: Source) -> LearnedSpread:
        """Nothing learned: the prior."""
        zeros = torch.zeros_like(source.units.offset)
        sketch = zeros.new_zeros(2, _SKETCH, _SKETCH)
        return cls(0.0, 0.0, zeros, sketch, *_shrunk(0.0, zeros, sketch, source))

    def learn(
        self,
        evidence: Evidence,
        window: Window | None,
        ratio: PerChannel,
        source: Source,
        memory: float,
        *,
        jumped: bool = False,
        stretches: float = 0.0,
    ) -> LearnedSpread:
        """The scatter after a batch.

        Every batch has bounded influence, one that jumped too: a stream that jumps again and again (runs of one class)
        teaches that it scatters so, a new domain does not spoil what was learned, and an absurd batch teaches nothing.

        Args:
            evidence: The batch.
            window: Where the stream was before it; None if nothing is known of that.
            ratio: The batch's variance (C,) over the source's.
            source: The site's source.
            memory: Instances after which old ones have faded.
            stretches: Independent stretches of the stream seen so far, see `Correlation`.
            jumped: Whether the batch lies too far from the window to belong to it; such a one is always looked at.
        """
        n = evidence.count
        if not jumped and self.count >= _PRIOR_COUNT and self.unseen + n < _LOOK_EVERY:
            return self._replace(unseen=self.unseen + n)
        own_centre = window is None or window.count < _WINDOW_CENTRE
        degrees = n - 1 if own_centre else n
        if degrees <= 0:
            return self
        instances = evidence.instances.values
        if self.count >= _PRIOR_COUNT and n >= 2 * _LOOK_EVERY:
            instances = instances[:, :: n // _LOOK_EVERY]
            degrees += instances.shape[1] - n
        values = standardize(instances, source.units)
        locations, ratios = values.unbind()
        if window is None or own_centre:
            centre, width = locations.mean(0), ratio.clamp_min(1e-12)
        else:
            centre = window.moments[0]
            width = width_of(*window.moments.unbind())
        locations -= centre
        ratios.addcmul_(locations, locations).div_(width).sub_(1).mul_(0.5)
        size = values.square().mean(1) @ source.channel_weight
        size /= self.spread.total @ source.channel_weight
        if float(size.max()) > _ABSURD:
            return self
        values *= (_BOUND / size.clamp_min(1e-9)).clamp_max(1.0).sqrt().view(2, 1, 1)
        share = degrees / (min(self.count, max(memory - degrees, 0.0)) + degrees)
        projected = values @ _projection(source)
        total = torch.lerp(self.total, values.square_().sum(1).div_(degrees), share)
        covariance = projected.transpose(1, 2) @ projected
        sketch = torch.lerp(self.sketch, covariance.div_(degrees), share)
        count = min(self.count + degrees, max(memory, degrees))
        return LearnedSpread(count, 0.0, total, sketch, *_shrunk(count, total, sketch, source, stretches))


def width_of(mean: PerChannel, second: PerChannel) -> PerChannel:
    """Variance ratio (C,) from first and second moments about the source."""
    return torch.addcmul(second, mean, mean, value=-1).clamp_min_(1e-12)


def shrink_to_prior(variance: LocationScale, degrees: float) -> LocationScale:
    """A variance across instances (2, C) known from so many degrees of freedom, shrunk to the prior's 0.1."""
    weight = degrees / (degrees + _PRIOR_COUNT)
    return variance * weight + _PRIOR_VARIANCE * (1 - weight)


def _shrunk(
    count: float, total: LocationScale, sketch: Tensor, source: Source, stretches: float = 0.0
) -> tuple[float, Spread]:
    degrees = _degrees_of_freedom(count, total, sketch, source)
    variance = shrink_to_prior(total, count)
    level = variance @ source.share
    one = float(level[0]) * source.sum_weight[0]
    if source.site_index < source.site_count - max(1, round(_DEEP * source.site_count)):
        variance = variance * (level.new_tensor(_MOST) / level).clamp_max(1.0).unsqueeze(1)
    share, unseen = _between_classes(source)
    seen = stretches / (stretches + 1)
    between = variance * share
    between = torch.maximum(between, between * seen + unseen * (1 - seen))
    return one, Spread.from_unsplit(between, variance * (1 - share), source.channel_weight, degrees)


def _between_classes(source: Source) -> tuple[float, float]:
    """Share of the scatter that is taken to lie between classes, and how large that part is before classes were seen.

    Instances of one class teach only what they scatter among themselves. How far classes lie apart follows a layer's
    depth, and counts until some independent stretches of the stream have passed.
    """
    place = (source.site_index + 1) / source.site_count
    deep = -math.expm1(-source.site_count / _DEPTH)
    share = _SHARE + _SHARE_RISE * place * deep
    rise = max(0.0, (place - _RISES) / (1 - _RISES))
    return share, share * _FIRST * max(_LAST * deep / _FIRST, 1.0) ** rise


def _degrees_of_freedom(count: float, total: LocationScale, sketch: Tensor, source: Source) -> Tensor:
    prior = torch.full_like(total[:, 0], _PRIOR_DEGREES)
    if count < 2:
        return prior
    trace = total @ source.channel_weight
    square = trace * trace
    # E |P S P'|^2 = tr S^2 (1 + 1/r) + (tr S)^2/r for a Gaussian projection to r numbers, and a sample covariance of
    # f degrees adds (tr S)^2/f of its own (Srivastava 2005).
    raw = sketch.square().sum((1, 2))
    projected = (raw - square / _SKETCH) / (1 + 1 / _SKETCH)
    unbiased = count * count / ((count - 1) * (count + 2)) * (projected - square / count)
    # Between the extremes: one direction has all of it, or every channel has the same.
    channels = float(source.channel_weight.numel())
    degrees = square / torch.maximum(torch.minimum(unbiased, square), square / channels).clamp_min(1e-300)
    weight = count / (count + _PRIOR_COUNT)
    return degrees.clamp(1.0, channels) * weight + prior * (1 - weight)


_PROJECTIONS: dict[int, Tensor] = {}


def _projection(source: Source) -> Tensor:
    """Fixed Gaussian projection (C, 16) with gamma folded in; the same for every layer with as many channels."""
    channels = source.channel_weight.numel()
    if channels not in _PROJECTIONS:
        generator = torch.Generator().manual_seed(channels)
        projection = torch.randn(channels, _SKETCH, generator=generator, dtype=torch.float64)
        _PROJECTIONS[channels] = projection / _SKETCH**0.5
    root = source.channel_weight.sqrt().unsqueeze(1)
    return _PROJECTIONS[channels].to(root.device) * root
