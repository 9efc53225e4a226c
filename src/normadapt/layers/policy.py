"""What every policy is: a frozen set of hyper-parameters with a pure step from evidence to statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from normadapt.layers.moments import Evidence
from normadapt.types import Buffers, LocationScale, Pair, PerChannel, PerInstance

_ABSURD = 1e30  # standard deviations: farther than anything real, near enough for its fourth power to be finite

State: TypeAlias = Any
"""A policy's memory of one site: a NamedTuple or dict whose values are tensors and floats; () for none."""


class Units(NamedTuple):
    """How statistics are brought to units of a layer's output about m_s and v_s, and back.

    Args:
        precision: 1/(v_s + eps) (C,).
        gain, offset: The affine map (2, C) there: see `standardize`.
        back: sqrt(v_s + eps), and v_s + eps (2, C): see `unstandardize`.
    """

    precision: PerChannel
    gain: LocationScale
    offset: LocationScale
    back: LocationScale


class Source(NamedTuple):
    """What is known of a site before any test data.

    Args:
        name: The layer's name in the model.
        mean: Source mean m_s (C,), float64.
        variance: Source variance v_s (C,), float64, as the layer normalizes with it.
        eps: What the layer adds to the variance.
        channel_weight: gamma^2 (C,): how much of a channel's error reaches the output.
        share: channel_weight over its sum (C,).
        sum_weight: sum of channel_weight and of its square.
        units: Units of the output about m_s and v_s.
        original: The layer's own buffers before any adaptation, in its own dtype.
        profile: The `profiles.SourceProfile` of the model; None without one.
        spread: Scatter of one source instance (`profiles.Spread`), from a profile; None without one.
        site_index: The site's place among the model's sites, from 0, in the order of `named_modules()`.
        site_count: Number of the model's sites.
    """

    name: str
    mean: PerChannel
    variance: PerChannel
    eps: float
    channel_weight: PerChannel
    share: PerChannel
    sum_weight: Pair
    units: Units
    original: Buffers
    profile: Any = None
    spread: Any = None
    site_index: int = 0
    site_count: int = 1


class Diagnostics(NamedTuple):
    """What a policy says about itself at one site, for the report.

    Args:
        effective_count: Independent instances that the evidence in use is worth.
        shift: Squared shift of location and half-log-variance from the source, summed over channels with weights
            gamma^2, sampling noise subtracted.
        squared: The same with the noise, as (location, scale): the statistic whose tail is reported.
        cumulants: First two cumulants of `squared` if there were no shift, for location and for scale.
        weight: Weights (2, C) or scalars on the test mean and test variance.
        status: One or two words: "source", "tracking", ...
        noise: Sampling variance (2, C) of the evidence, R; None where no weight is on it.
        projections: Recent instances along the direction of the shift (2, k), for intervals; None if not kept.
        shift_interval: 95 % interval of the mean squared shift a channel, in squared units of the output; None where
            the policy does not say.
    """

    effective_count: float
    shift: Pair
    squared: Pair
    cumulants: tuple[Pair, Pair]
    weight: LocationScale | tuple[float, float]
    status: str
    noise: LocationScale | None = None
    projections: Tensor | None = None
    shift_interval: Pair | None = None

    def unweighted(self) -> Diagnostics:
        """The same where the evidence has no say, and the source's statistics are in use."""
        if isinstance(self.weight, tuple) and not any(self.weight):
            return self
        return self._replace(weight=(0.0, 0.0), noise=None)


NO_DIAGNOSTICS = Diagnostics(0.0, (0.0, 0.0), (0.0, 0.0), ((0.0, 0.0), (0.0, 0.0)), (0.0, 0.0), "")
"""The pattern by which snapshots are read."""


class Statistics(NamedTuple):
    """What a layer is to normalize with for this batch.

    Args:
        mean: (C,); None to leave what is in use.
        variance: (C,), without eps; None to leave what is in use.
        instances: Mean and variance (n, C) of each instance's own normalization, when instances are to be
            normalized one by one; `mean` and `variance` then remain what a paused model uses.
        diagnostics: For the report, or a function that makes them when somebody asks; without any the report shows the
            shift of what is in use.
        carry: Handed to the next site of the same forward pass as `evidence.upstream`.
        status: For the report, where `diagnostics` have none to say or are not there.
        ready: `mean` and `variance` as they are written into the layer, finite and in its dtype, in place of these.
        behind: Where the sites behind this one are not to be looked at in this pass: what gives each of them, by its
            source and the rows of its input, what it is to normalize with.
    """

    mean: PerChannel | None = None
    variance: PerChannel | None = None
    instances: tuple[PerInstance, PerInstance] | None = None
    diagnostics: Diagnostics | Callable[[], Diagnostics] | None = None
    carry: Any = None
    status: str = ""
    ready: Buffers | None = None
    behind: Callable[[Source, int], Statistics] | None = None


class Answer(NamedTuple):
    """What a policy sees of a forward pass when it is over.

    Args:
        probabilities: Class probabilities (n, K) of the finite instances; None where the output gives none.
        carry: What the last site that was reached returned as `Statistics.carry`.
        memory: What `answered` returned after the batch before, or None.
        pass_index: Which pass over the batch it was, from 0.
        sources: Of all sites.
    """

    probabilities: Tensor | None
    carry: Any
    memory: Any
    pass_index: int
    sources: Sequence[Source]


class Policy:
    """Base of all policies. A user's own needs only `step`.

    `step` and `answered` must be pure: they return new states and change nothing, so that a failed forward pass leaves
    no trace.
    """

    needs_predictions: ClassVar[bool] = False
    """Whether the policy cannot work without class probabilities; the model's output must then give them."""

    needs_input: ClassVar[bool] = False
    """Whether `evidence.input` is wanted: the activations themselves, for rules that moments do not serve."""

    passes: ClassVar[int] = 1
    """Forward passes over each batch; only the last one's output is the answer. `evidence.pass_index` tells which one
    it is. Instances are counted in the first."""

    memory: ClassVar[Any] = None
    """A memory of the kind that `answered` returns, as the pattern by which snapshots are read; None for none."""

    def init(self, source: Source) -> State:
        """The state of a site that has seen nothing. Default: none."""
        return ()

    def step(self, state: State, evidence: Evidence, source: Source) -> tuple[State, Statistics]:
        """The new state, and the statistics with which this batch is normalized."""
        raise TypeError(f"{type(self).__name__} must define step(state, evidence, source) -> (state, Statistics)")

    def answered(self, states: list[State], answer: Answer) -> tuple[list[State], Any]:
        """All sites' states and the stream's memory after a pass over a batch with finite instances.

        Args:
            states: One per site, in the order of `source.site_index`; a site that the model did not call is among them.
            answer: What the pass gave.

        Returns:
            The states with which the next pass begins, in the same order, and what `evidence.memory` will be.
            Default: the same.
        """
        return states, answer.memory


def units_about(mean: PerChannel, variance: PerChannel, eps: float) -> Units:
    """Units of the output about a mean and variance (C,)."""
    precision = 1 / (variance + eps).clamp_min(1e-30)
    return Units(
        precision,
        gain=torch.stack((precision.sqrt(), precision)),
        offset=torch.stack((-mean * precision.sqrt(), eps * precision)),
        back=torch.stack((precision.rsqrt(), variance + eps)),
    )


def standardize(both: Tensor, units: Units) -> Tensor:
    """A mean and a variance (2, ..., C) in units of the layer's output about the source.

    Returns:
        (2, ..., C): row 0 (m - m_s)/sqrt(v_s + eps), row 1 the variance ratio (v + eps)/(v_s + eps).
    """
    if both.dim() == 2:
        values = torch.addcmul(units.offset, both, units.gain)
    else:
        values = torch.addcmul(units.offset.unsqueeze(1), both, units.gain.unsqueeze(1))
    return values.clamp_(-_ABSURD, _ABSURD)


def unstandardize(location: Tensor, scale: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    """Mean and variance at a shift (..., C) of location and half-log-variance; no shift gives exactly m_s and v_s."""
    back = source.units.back
    mean = torch.addcmul(source.mean, location, back[0])
    return mean, scale.exp().square_().mul_(back[1]).sub_(source.eps).clamp_min_(0.0)


def project(evidence: Evidence, shift: LocationScale, squared: Pair, weight: PerChannel, units: Units) -> Tensor:
    """Each instance's location and half-log-variance along the direction of a shift (2, n), in output units.

    Args:
        evidence: The batch.
        shift: The shift d (2, C).
        squared: Its squared length sum_c w_c d_c^2, for location and for scale.
        weight: gamma^2 (C,).
        units: Units in which the shift is.
    """
    values = standardize(evidence.instances.values, units)
    locations, ratios = values.unbind()
    deviation = locations - shift[0]
    ratios.addcmul_(deviation, deviation).div_(2 * (2 * shift[1]).exp())  # the influence on the half-log-variance
    lengths = shift.new_tensor(squared).clamp_min(1e-300).sqrt().unsqueeze(1)
    direction = shift * weight / lengths
    return (values @ direction.unsqueeze(2)).squeeze(2)


def pair(values: Tensor) -> Pair:
    """Two numbers out of a tensor of two."""
    location, scale = values.tolist()
    return location, scale
