"""One batch at a time: no memory, the MSE-optimal weight of this batch against the source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from normadapt.layers.moments import Evidence
from normadapt.layers.policy import (
    Answer,
    Diagnostics,
    Policy,
    Source,
    State,
    Statistics,
    pair,
    project,
    standardize,
    unstandardize,
)
from normadapt.layers.spread import Spread
from normadapt.types import Pair
from normadapt.weights.composition import Composition
from normadapt.weights.criteria import for_output, for_tail
from normadapt.weights.robust import check_location, with_huber_location

_PRIOR = 8.0  # instances that a layer's own word on the scatter is worth
_CRITERIA = ("mse", "output", "tail")
_POOLING = ("channel", "layer", "model")


class _Pooled(NamedTuple):
    """Sums over the sites of one forward pass so far: w d^2 and w R, for locations and for scales."""

    squared: Pair
    noise: Pair


@dataclass(frozen=True)
class Blend(Policy):
    r"""Mix each batch's statistics with the source's, by the weight with the smallest estimated error.

    $$ \lambda = \Big(1 - \frac{\sum_c w_c R_c}{\sum_c w_c d_c^2}\Big)_+ $$

    with d the batch's difference from the source and R its sampling variance (instances as the unit), for locations
    and for half-log-variances. The sums run over one channel, a layer, or all layers up to this one.

    Args:
        criterion: "mse", the mean squared error of the statistics in units of the output; "output", the layer's output
            itself, with the coupling of mean and variance by skewness; "tail", the MSE weight, but no larger than what
            makes a channel worse by more than `tolerance` with at most `probability`.
        pooling: "channel": a weight for each channel alone (costs up to 1.45 times the risk of a fixed choice,
            oracle O9a); "layer": one weight for all channels of a site; "model": one weight from this site and all
            before it in the forward pass (what later sites will show is not known yet).
        tolerance: Of "tail": additional error of a channel's location, in standard deviations, or half-log-variance.
        probability: Of "tail": accepted probability of more than that, in (0, 1).
        location: "mean", or "huber": a robust location of the instance means, for batches with outliers.

    Raises:
        ValueError: If an argument is none of these.

    References:
        Kimura (2025), arXiv 2505.16257, for the optimal weight; Green and Strawderman (1991), JASA 86(416), for the
        pooled positive part.
    """

    criterion: str = "mse"
    pooling: str = "layer"
    tolerance: float = 0.1
    probability: float = 0.05
    location: str = "mean"

    memory: ClassVar[Any] = Composition()

    def __post_init__(self) -> None:
        for name, known in (("criterion", _CRITERIA), ("pooling", _POOLING)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {getattr(self, name)!r}")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0; got {self.tolerance!r}")
        if not 0 < self.probability < 1:
            raise ValueError(f"probability must lie between 0 and 1; got {self.probability!r}")
        check_location(self.location)

    def step(self, state: State, evidence: Evidence, source: Source) -> tuple[State, Statistics]:
        """The weight of this batch, and the statistics it gives."""
        n = evidence.count
        if self.location == "huber":
            evidence = with_huber_location(evidence)
        spread = source.spread or _spread_of_batch(evidence, source)
        composition: Composition | None = evidence.memory
        effective = float(n) if composition is None else composition.effective_count(n)
        between, within = 1 / effective, 1 / n
        noise = spread.sampling_variance(between, within)
        location, ratio = standardize(evidence.both, source.units).unbind()
        shift = torch.stack((location, (ratio + spread.location / n).log() / 2))
        squares = shift * shift

        weight = source.channel_weight
        squared = pair(squares @ weight)
        cumulants = spread.cumulants(between, within, (0.0, 0.0), source.sum_weight)
        expected = (cumulants[0][0], cumulants[1][0])
        carry = None
        if self.pooling == "channel":
            weights = (1 - noise / squares.clamp_min(1e-300)).clamp_min(0)
        else:
            total = _Pooled(squared, expected)
            if self.pooling == "model":
                total = carry = _merged(total, evidence.upstream)
            shares = [max(1 - r / d, 0.0) if d > 0 else 0.0 for d, r in zip(total.squared, total.noise, strict=True)]
            weights = shift.new_tensor(shares).unsqueeze(1).expand_as(shift)
        if self.criterion == "output":
            weights = for_output(weights, shift, noise, evidence, source.units)
        elif self.criterion == "tail":
            weights = for_tail(weights, shift, noise, evidence, source.units, self.tolerance, self.probability)
        use = weights * shift
        mean, variance = unstandardize(use[0], use[1], source)
        excess = (max(squared[0] - expected[0], 0.0), max(squared[1] - expected[1], 0.0))
        diagnostics = Diagnostics(
            spread.instance[0][0] / expected[0] if expected[0] > 0 else float(n),
            excess,
            squared,
            cumulants,
            weights,
            "blending",
            noise,
            project(evidence, shift, squared, weight, source.units),
        )
        return state, Statistics(mean, variance, diagnostics=diagnostics, carry=carry)

    def answered(self, states: list[State], answer: Answer) -> tuple[list[State], Any]:
        """Count the predicted classes, for the next batch."""
        if answer.probabilities is None:
            return states, answer.memory
        profile = answer.sources[0].profile
        reference = None if profile is None or not profile.class_frequencies.numel() else profile.class_frequencies
        before = answer.memory or Composition(reference=reference)
        return states, before.update(answer.probabilities)


def _spread_of_batch(evidence: Evidence, source: Source) -> Spread:
    """Without a profile: the batch's own scatter between instances, half of it between classes.

    What a batch of few cannot tell is taken from the layer: what its variance has beyond the instances' own.
    """
    units, n = source.units, evidence.count
    values = standardize(evidence.instances.values, units)
    locations, ratios = values.unbind()
    between = (1 - ratios.mean(0)).clamp(0, 1)
    prior = torch.stack((between, 0.5 * between))
    if n > 1:
        centred = locations - locations.mean(0)
        influence = ratios + centred.square()
        measured = torch.stack((centred.square().sum(0), 0.25 * (influence - influence.mean(0)).square().sum(0))) / (
            n - 1
        )
        prior = (_PRIOR * prior + (n - 1) * measured) / (_PRIOR + n - 1)
    half = 0.5 * prior
    return Spread.from_unsplit(half, half, source.channel_weight, prior.new_ones(2))


def _merged(here: _Pooled, upstream: _Pooled | None) -> _Pooled:
    if upstream is None:
        return here
    return _Pooled(
        (here.squared[0] + upstream.squared[0], here.squared[1] + upstream.squared[1]),
        (here.noise[0] + upstream.noise[0], here.noise[1] + upstream.noise[1]),
    )
