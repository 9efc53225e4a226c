"""Without a source profile, the scatter of one instance is learned from the stream itself."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from normadapt.policies.base import Source, standardize
from normadapt.shapes import LocationScale, PerChannel
from normadapt.spread import Pair, Spread
from normadapt.statistics import Evidence

_PRIOR_VARIANCE = 0.1  # of v_s; half-log-variances likewise
_PRIOR_DEGREES = 2.0
_PRIOR_COUNT = 8.0  # instances that the prior of the degrees is worth; that of the variance half as many
_PRIOR_WORTH = 4.0
# What source instances scatter follows from how much they vary within themselves: see `natural`. In units of v_s, each
# a constant and a multiple of that; the variance of half-log-variances is about as large.
_MOST = (0.3, 1.5)  # of locations, more than any layer's scatter, with what the estimate itself errs
_CAP = (0.1, 1.5)  # what a layer is taken to scatter at most
_USUAL = ((0.02, 1.1), (0.03, 1.2))  # as good a guess as there is, for locations and for scales
_TOGETHER = (0.09, 1.5)  # more than the scales of all channels vary together
_FEW_DIFFER, _NEARLY = 0.15, 0.3  # where images hardly differ (such a usual scatter), this part of the limits tells
_ALIKE, _UNLIKE = 0.1, 0.3  # at most such a share of their variance lies between images, between a watch's signals
_LEAST = 0.02  # between classes that nobody has seen
_APART = 4.0  # times what instances of one class scatter, the classes lie apart at most
_OWN_WORTH = 2.0  # instances that the prior of their scatter is worth there: blurred images are alike from the start
_SEEN = 2.0  # independent stretches of the stream after which what they showed counts half
_SHARE, _SHARE_RISE = 0.35, 1.2  # of the locations' scatter that lies between classes; what the natural scatter adds
_SHARE_UNTOLD = 0.45  # the same where instances have one position, and nothing tells
_SCALE_SHARE = 0.6  # of that of the half-log-variances
_SKETCH = 16
_BOUND = 14.5  # times the expectation counts a batch at most: where a gate of 5e-7 fires with two degrees of freedom
_VARIED = 10.0  # times v_s counts the variance within an instance at most
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


class Limits(NamedTuple):
    """What a site's instances would scatter if they were all of one domain.

    Args:
        usual: The best guess, per unit of weight, as (location, scale).
        most: Of the locations, what only instances of several domains exceed.
        together: Likewise the variance of their half-log-variances averaged over channels.
        nearly: Part of `most` and `together` beyond which a site's instances are not alike, though they may be of one
            domain; 1 where the source's are not alike themselves.
    """

    usual: Pair
    most: float
    together: float
    nearly: float


class LearnedSpread(NamedTuple):
    """Running scatter of the instances about where the stream is.

    The degrees of freedom (tr S)^2/tr S^2 need the covariance between channels; a fixed random projection to 16
    numbers keeps enough of it at a cost that does not grow with C^2.

    Args:
        count: Instances behind it, fading with the policy's memory.
        unseen: Instances that have passed since it was updated.
        total: Variance (2, C) across instances.
        sketch: Covariance (2, 16, 16) of the projected instances, channels weighted by gamma.
        one: sum_c w_c times the location's variance (C,), shrunk to its prior: variance 0.1 worth 4 instances.
        spread: What the source's instances are taken to scatter: the same with two degrees of freedom for a prior,
            split into a part within classes and one between them, and no more than `natural` allows. What is above that
            comes from several domains.
        inner: Mean variance within an instance over v_s, channels weighted by gamma^2.
        met: Instances behind `inner`, fading likewise.
    """

    count: float  # type: ignore[assignment]  # hides tuple.count
    unseen: float
    total: LocationScale
    sketch: Tensor
    one: float
    spread: Spread
    inner: float
    met: float

    @property
    def natural(self) -> float:
        r"""What the means of source instances scatter, in units of v_s: the part of v_s that no instance has within.

        $$ v_s = E[\mathrm{within}_b] + \tau^2 \quad\Rightarrow\quad \tau^2 / v_s = 1 - E[\mathrm{within}_b] / v_s $$

        On source-like data it is exact, and a single instance says something of it. Where a domain changes the contrast
        it is wrong: too much under a lower one, 0 under a higher one.
        """
        return max(0.0, 1 - self.inner) if self.met else 0.0

    def apart(self, source: Source) -> float:
        """Share of the stream's own variance that lies between instances, whatever their contrast is."""
        return _apart(self.one / source.sum_weight[0], self.inner) if self.met else 0.0

    def limits(self, apart: float) -> Limits:
        """What the instances would scatter if they were of one domain.

        Args:
            apart: The least of `apart` here and at the sites before. Where the inputs themselves differ much, as
                signals do, instances may differ everywhere, and a higher contrast, which leaves nothing of `natural`,
                does not hide it.
        """
        location, scale = (constant + factor * self.natural for constant, factor in _USUAL)
        inputs = _inputs_differ(apart)
        most = _at_most(_MOST, self.natural, self.inner, inputs)
        together = _TOGETHER[0] + max(_TOGETHER[1] * self.natural, inputs / 2)
        location *= _gain(self.inner)
        alike = location <= _FEW_DIFFER and inputs == 0
        return Limits((location, scale), most, together, _NEARLY if alike else 1.0)

    @classmethod
    def empty(cls, source: Source) -> LearnedSpread:
        """Nothing learned: the prior."""
        zeros = torch.zeros_like(source.units.offset)
        sketch = zeros.new_zeros(2, _SKETCH, _SKETCH)
        return cls(0.0, 0.0, zeros, sketch, *_shrunk(0.0, zeros, sketch, 0.0, 1.0, source), 0.0, 0.0)

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
        apart: float = 1.0,
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
            apart: The least of `apart` at the sites before.
        """
        n = evidence.count
        if not jumped and self.count >= _PRIOR_COUNT and self.unseen + n < _LOOK_EVERY:
            return self._replace(unseen=self.unseen + n)
        others = 0.0 if window is None else window.count
        lone = n == 1 and 1 <= others < _WINDOW_CENTRE
        own_centre = others < _WINDOW_CENTRE and not lone
        degrees = n - 1 if own_centre else n
        instances = evidence.instances.values
        if self.count >= _PRIOR_COUNT and n >= 2 * _LOOK_EVERY:
            instances = instances[:, :: n // _LOOK_EVERY]
            degrees += instances.shape[1] - n
        learned = self._met(instances, source, memory)
        if degrees <= 0:
            one, spread = _shrunk(
                self.count, self.total, self.sketch, learned.natural, learned.inner, source, stretches, apart
            )
            return learned._replace(one=one, spread=spread)
        values = standardize(instances, source.units)
        locations, ratios = values.unbind()
        if window is None or own_centre:
            centre, width = locations.mean(0), ratio.clamp_min(1e-12)
        else:
            centre = window.moments[0]
            width = width_of(*window.moments.unbind())
        locations -= centre
        ratios.addcmul_(locations, locations).div_(width).sub_(1).mul_(0.5)
        if lone:  # about the mean of so few others it scatters more than about the truth
            values *= (others / (others + 1)) ** 0.5
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
        one, spread = _shrunk(count, total, sketch, learned.natural, learned.inner, source, stretches, apart)
        return LearnedSpread(count, 0.0, total, sketch, one, spread, learned.inner, learned.met)

    def _met(self, instances: Tensor, source: Source, memory: float) -> LearnedSpread:
        """The same with the variances within these instances (2, n, C) in `inner`."""
        n = instances.shape[1]
        within = (instances[1] @ (source.units.precision * source.share)).clamp_max(_VARIED)
        met = min(self.met, max(memory - n, 0.0)) + n
        return self._replace(inner=self.inner + (float(within.mean()) - self.inner) * n / met, met=met)


def width_of(mean: PerChannel, second: PerChannel) -> PerChannel:
    """Variance ratio (C,) from first and second moments about the source."""
    return torch.addcmul(second, mean, mean, value=-1).clamp_min_(1e-12)


def shrink_to_prior(variance: LocationScale, degrees: float) -> LocationScale:
    """A variance across instances (2, C) known from so many degrees of freedom, shrunk to the prior's 0.1."""
    weight = degrees / (degrees + _PRIOR_WORTH)
    return variance * weight + _PRIOR_VARIANCE * (1 - weight)


def _gain(inner: float) -> float:
    """How much more than the source instances vary within themselves: so much more do their means scatter, too."""
    return max(1.0, inner)


def _apart(own: float, inner: float) -> float:
    """Share of a variance that lies between instances."""
    return own / (own + inner)


def _inputs_differ(apart: float) -> float:
    """How much the inputs themselves differ, from 0 for images to 0.2 for signals."""
    return max(0.0, min(apart, _UNLIKE) - _ALIKE)


def _at_most(bound: Pair, natural: float, inner: float, inputs: float) -> float:
    """What the locations scatter at most, per unit of weight: a higher gain, too, leaves nothing of `natural`."""
    return _gain(inner) * (bound[0] + max(bound[1] * natural, 2 * inputs))


def _shrunk(
    count: float,
    total: LocationScale,
    sketch: Tensor,
    natural: float,
    inner: float,
    source: Source,
    stretches: float = 0.0,
    apart: float = 1.0,
) -> tuple[float, Spread]:
    """The scatter of one instance of the stream, and what source instances are taken to scatter.

    Instances of one class teach only what they scatter among themselves. How far the classes lie apart is then what is
    left of the natural scatter, but no more than four times theirs: a low contrast lets little of v_s be within the
    instances, too, but it makes them alike. This counts until some independent stretches of the stream have passed.
    """
    degrees = _degrees_of_freedom(count, total, sketch, source)
    variance = shrink_to_prior(total, count)
    level = variance @ source.share
    one = float(level[0]) * source.sum_weight[0]
    inputs = _inputs_differ(min(apart, _apart(float(level[0]), inner)))
    most = _at_most(_CAP, natural, inner, inputs)
    variance = variance * (most / level).clamp_max(1.0).unsqueeze(1)

    within = max(1 - natural, _LEAST)
    own = (float(total[0] @ source.share) * count + _PRIOR_VARIANCE * within * _OWN_WORTH) / (count + _OWN_WORTH)
    unseen = min(max(natural, _LEAST), _APART * own / (own + within))
    # Where instances differ most, they differ by their class: 0.4 to 0.6 of a scatter of 0.02 to 0.2 v_s lies between
    # classes, 0.8 of one of 0.5 and more. It errs on the wide side there, which runs of one class need.
    # Where an instance has one position it has nothing within, whatever the classes do.
    of_locations = min(1.0, _SHARE + _SHARE_RISE * unseen) if natural < 1 else _SHARE_UNTOLD
    share = variance.new_tensor(((of_locations,), (_SCALE_SHARE,)))
    new = _SEEN / (stretches + _SEEN)
    between = variance * share
    between = torch.maximum(between, between * (1 - new) + share * unseen * new)
    return one, Spread.from_unsplit(between, variance * (1 - share), source.channel_weight, degrees)


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
