"""What every policy is: a frozen set of hyper-parameters with a pure step from evidence to statistics."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from normadapt.asymptotics.quadratic import tail_is_below
from normadapt.shapes import LocationScale, PerChannel, PerClass, PerInstance
from normadapt.spread import Pair, Spread
from normadapt.statistics import Evidence

_ABSURD = 1e30  # standard deviations: farther than anything real, near enough for its fourth power to be finite

State: TypeAlias = Any
"""A policy's memory of one site: a NamedTuple or dict whose values are tensors and floats; () for none."""


class Source(NamedTuple):
    """What is known of a site before any test data.

    Args:
        name: The layer's name in the model.
        mean: Source mean m_s (C,), float64.
        variance: Source variance v_s (C,), float64, as the layer normalizes with it.
        eps: What the layer adds to the variance.
        channel_weight: gamma^2 (C,): how much of a channel's error reaches the output.
        deviation: sqrt(v_s + eps) (C,).
        precision: 1/(v_s + eps) (C,).
        floor: eps/(v_s + eps) (C,), the least variance ratio.
        gain, offset: The affine map (2, C) from a mean and variance to units of the output: see `standardize`.
        share: channel_weight over its sum (C,).
        sum_weight: sum of channel_weight and of its square.
        spread: Scatter of one source instance, from a profile; None without one.
        class_frequencies: Predicted class frequencies of the source (K,), from a profile; None without one.
    """

    name: str
    mean: PerChannel
    variance: PerChannel
    eps: float
    channel_weight: PerChannel
    deviation: PerChannel
    precision: PerChannel
    floor: PerChannel
    gain: LocationScale
    offset: LocationScale
    share: PerChannel
    sum_weight: Pair
    spread: Spread | None
    class_frequencies: PerClass | None


class Diagnostics(NamedTuple):
    """What a policy says about itself at one site, for the report. Reduced to numbers only when asked for.

    Args:
        effective_count: Independent instances that the evidence in use is worth.
        shift: Squared shift of location and half-log-variance from the source, summed over channels with weights
            gamma^2, sampling noise subtracted.
        squared: The same with the noise, as (location, scale): the statistic whose tail is reported.
        cumulants: First two cumulants of `squared` if there were no shift, for location and for scale.
        weight: Weights (2, C) or scalars on the test mean and test variance.
        status: One or two words: "source", "tracking", "new window", ...
    """

    effective_count: float
    shift: Pair
    squared: Pair
    cumulants: tuple[Pair, Pair]
    weight: LocationScale | tuple[float, float]
    status: str


class Statistics(NamedTuple):
    """What a layer is to normalize with for this batch.

    Args:
        mean: (C,); None to leave what is in use.
        variance: (C,), without eps; None to leave what is in use.
        instances: Mean and variance (n, C) of each instance's own normalization, when instances are to be
            normalized one by one; `mean` and `variance` then remain what a paused model uses.
        diagnostics: For the report, kept until the next; without any the report shows the shift of what is in use.
        carry: Handed to the next site of the same forward pass as `evidence.upstream`.
    """

    mean: PerChannel | None
    variance: PerChannel | None
    instances: tuple[PerInstance, PerInstance] | None = None
    diagnostics: Diagnostics | None = None
    carry: Any = None


class Policy:
    """Base of all policies. A user's own needs only `step`.

    `step` must be pure: it returns a new state and changes nothing, so that a failed forward pass leaves no trace.
    """

    needs_predictions: ClassVar[bool] = False
    """Whether the policy cannot work without class probabilities; the model's output must then give them."""

    def init(self, source: Source) -> State:
        """The state of a site that has seen nothing. Default: none."""
        return ()

    def step(self, state: State, evidence: Evidence, source: Source) -> tuple[State, Statistics]:
        """The new state, and the statistics with which this batch is normalized."""
        raise TypeError(f"{type(self).__name__} must define step(state, evidence, source) -> (state, Statistics)")


def standardize(both: Tensor, source: Source) -> Tensor:
    """A mean and a variance (2, ..., C) in units of the layer's output about the source.

    Returns:
        (2, ..., C): row 0 (m - m_s)/sqrt(v_s + eps), row 1 the variance ratio (v + eps)/(v_s + eps).
    """
    if both.dim() == 2:
        units = torch.addcmul(source.offset, both, source.gain)
    else:
        units = torch.addcmul(source.offset.unsqueeze(1), both, source.gain.unsqueeze(1))
    return units.clamp_(-_ABSURD, _ABSURD)


def unstandardize(location: Tensor, scale: Tensor, source: Source) -> tuple[Tensor, Tensor]:
    """Mean and variance at a location and half-log-variance (..., C) from the source: the inverse of `standardize`."""
    mean = torch.addcmul(source.mean, location, source.deviation)
    ratio = (scale * 2).exp_()
    return mean, ratio.sub_(source.floor).clamp_min_(0.0).div_(source.precision)


def pair(values: Tensor) -> Pair:
    """Two numbers out of a tensor of two."""
    location, scale = values.tolist()
    return location, scale


def are_below(squared: Pair, cumulants: tuple[Pair, Pair], probability: float) -> tuple[bool, bool]:
    """Whether the tails of a layer's two statistics, about location and scale, lie below `probability`."""
    (l1, l2), (s1, s2) = cumulants
    return tail_is_below(squared[0], l1, l2, probability), tail_is_below(squared[1], s1, s2, probability)
