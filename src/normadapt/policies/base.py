"""What every policy is: a frozen set of hyper-parameters with a pure step from evidence to statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from normadapt.asymptotics.quadratic import tail_is_below
from normadapt.doubts import Doubts
from normadapt.shapes import LocationScale, PerChannel, PerClass, PerInstance
from normadapt.spread import Pair, Spread
from normadapt.statistics import Evidence

_ABSURD = 1e30  # standard deviations: farther than anything real, near enough for its fourth power to be finite

State: TypeAlias = Any
"""A policy's memory of one site: a NamedTuple or dict whose values are tensors and floats; () for none."""


class Units(NamedTuple):
    """How statistics are brought to units of a layer's output about a point of reference, and back.

    Args:
        precision: 1/(v + eps) (C,) of the reference's variance v.
        gain, offset: The affine map (2, C) there: see `standardize`.
        back: sqrt(v + eps), and v_s + eps (2, C): see `unstandardize`.
        misfit: Mean of the reference minus m_s (C,).
        uncertainty: 1/(instances behind the reference), for its own sampling variance; 0 where it counts as exact.
    """

    precision: PerChannel
    gain: LocationScale
    offset: LocationScale
    back: LocationScale
    misfit: PerChannel
    uncertainty: float


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
        spread: Scatter of one source instance, from a profile; None without one.
        class_frequencies: Predicted class frequencies of the source (K,), from a profile; None without one.
        units: Units of the output about m_s and v_s.
        aligned: The same about the moments that source data really have, from a profile; None without one. They differ
            from the running statistics, which were averaged over training batches of an unfinished network.
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
    spread: Spread | None
    class_frequencies: PerClass | None
    units: Units
    aligned: Units | None = None
    site_index: int = 0
    site_count: int = 1


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
        noise: Sampling variance (2, C) of the evidence, R; None where no weight is on it.
        projections: Recent instances along the direction of the shift (2, k), for intervals; None if not kept.
    """

    effective_count: float
    shift: Pair
    squared: Pair
    cumulants: tuple[Pair, Pair]
    weight: LocationScale | tuple[float, float]
    status: str
    noise: LocationScale | None = None
    projections: Tensor | None = None

    def unweighted(self) -> Diagnostics:
        """The same where the evidence has no say, and the source's statistics are in use."""
        if isinstance(self.weight, tuple) and not any(self.weight):
            return self
        return self._replace(weight=(0.0, 0.0), noise=None)


class Statistics(NamedTuple):
    """What a layer is to normalize with for this batch.

    Args:
        mean: (C,); None to leave what is in use.
        variance: (C,), without eps; None to leave what is in use.
        instances: Mean and variance (n, C) of each instance's own normalization, when instances are to be
            normalized one by one; `mean` and `variance` then remain what a paused model uses.
        diagnostics: For the report, kept until the next; without any the report shows the shift of what is in use.
        carry: Handed to the next site of the same forward pass as `evidence.upstream`.
        jumped: Whether evidence is gathered anew from this batch on.
        mixed: Whether the stream is found to be of several domains at once.
        status: For the report, where these `diagnostics` have none to say or are not there.
    """

    mean: PerChannel | None
    variance: PerChannel | None
    instances: tuple[PerInstance, PerInstance] | None = None
    diagnostics: Diagnostics | None = None
    carry: Any = None
    jumped: bool = False
    mixed: bool = False
    status: str = ""


class Policy:
    """Base of all policies. A user's own needs only `step`.

    `step` must be pure: it returns a new state and changes nothing, so that a failed forward pass leaves no trace.
    """

    needs_predictions: ClassVar[bool] = False
    """Whether the policy cannot work without class probabilities; the model's output must then give them."""

    needs_input: ClassVar[bool] = False
    """Whether `evidence.input` is wanted: the activations themselves, for rules that moments do not serve."""

    passes: ClassVar[int] = 1
    """Forward passes over each batch; only the last one's output is the answer. `between` is called between them, and
    `evidence.pass_index` tells which one it is. Instances are counted in the first."""

    def ways(self, *, profiled: bool) -> Mapping[str, str]:
        """Ways in which `step` can normalize a batch, told by `evidence.way`; none by default.

        With several, some batches are passed through the model in each of them before they are answered in the one that
        `choose` says, which alone is remembered. Needs class probabilities, and a `choose` of the policy's own. A
        model's own forward hooks see all of these passes; one that writes its answers into the same tensor each time
        cannot be compared.

        Args:
            profiled: Whether the sources have spreads.

        Returns:
            Their names. To each belongs that of another way that gives the same answer unless that one gives instances
            statistics of their own, or "".
        """
        return {}

    def choose(self, doubts: Doubts) -> str:
        """Which of `ways` a batch is normalized in, by how the model answered in each so far. Default: "".

        Asked before every batch, and once more when the batch itself has been compared.
        """
        return ""

    def remembers(self, way: str) -> str:
        """Of which way's pass the states are kept after a batch that was compared and is answered in `way`.

        Default: its own. Another's where what deeper sites see in this way is not what they are to learn from.
        """
        return way

    def reads_again(self, n: int) -> str:
        """In which of `ways` a batch of n that begins a stream or follows a jump is passed once more; "" for none.

        Asked of batches that are compared, with the number of their finite instances. The further pass knows the
        batch's own predicted classes, see `evidence.told`, and takes the place of the way's first one.
        """
        return ""

    def init(self, source: Source) -> State:
        """The state of a site that has seen nothing. Default: none."""
        return ()

    def step(self, state: State, evidence: Evidence, source: Source) -> tuple[State, Statistics]:
        """The new state, and the statistics with which this batch is normalized."""
        raise TypeError(f"{type(self).__name__} must define step(state, evidence, source) -> (state, Statistics)")

    def between(self, states: list[State]) -> list[State]:
        """All sites' states between two passes over the same batch, for rules that compare layers. Pure, like `step`.

        Args:
            states: One per site, in the order of `source.site_index`; a site that the model did not call is among them.

        Returns:
            The states with which the next pass begins, in the same order. Default: the same.
        """
        return states


def units_about(mean: PerChannel, variance: PerChannel, m_s: PerChannel, v_s: PerChannel, eps: float) -> Units:
    """Units of the output about a reference mean and variance (C,), for a layer with source statistics m_s, v_s."""
    precision = 1 / (variance + eps).clamp_min(1e-30)
    return Units(
        precision,
        gain=torch.stack((precision.sqrt(), precision)),
        offset=torch.stack((-mean * precision.sqrt(), eps * precision)),
        back=torch.stack((precision.rsqrt(), v_s + eps)),
        misfit=mean - m_s,
        uncertainty=0.0,
    )


def standardize(both: Tensor, units: Units) -> Tensor:
    """A mean and a variance (2, ..., C) in units of the layer's output about the reference.

    Returns:
        (2, ..., C): row 0 (m - m_r)/sqrt(v_r + eps), row 1 the variance ratio (v + eps)/(v_r + eps).
    """
    if both.dim() == 2:
        values = torch.addcmul(units.offset, both, units.gain)
    else:
        values = torch.addcmul(units.offset.unsqueeze(1), both, units.gain.unsqueeze(1))
    return values.clamp_(-_ABSURD, _ABSURD)


def unstandardize(location: Tensor, scale: Tensor, source: Source, units: Units) -> tuple[Tensor, Tensor]:
    r"""Mean and variance to normalize with at a shift (..., C) of location and half-log-variance from the reference.

    They give the layer's output the moments that it has at the reference:
    $(m - M)/\sqrt{V} = (m_r - m_s)/\sqrt{v_s}$ and $v/V = v_r/v_s$. So no shift gives exactly m_s and v_s, and with
    m_s and v_s for a reference the result is m and v themselves.
    """
    root = scale.exp()
    mean = torch.addcmul(source.mean + units.misfit, location, units.back[0]).addcmul_(units.misfit, root, value=-1)
    return mean, root.square_().mul_(units.back[1]).sub_(source.eps).clamp_min_(0.0)


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


def are_below(squared: Pair, cumulants: tuple[Pair, Pair], probability: float) -> tuple[bool, bool]:
    """Whether the tails of a layer's two statistics, about location and scale, lie below `probability`."""
    (l1, l2), (s1, s2) = cumulants
    return tail_is_below(squared[0], l1, l2, probability), tail_is_below(squared[1], s1, s2, probability)
