"""TEMA: a moving average, and a weight per layer from a comparison of the layers; two forward passes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from normadapt.layers.moments import Evidence
from normadapt.layers.policy import Answer, Policy, Source, State, Statistics
from normadapt.types import PerChannel

_MOMENTA = ((64, 1.0), (4, 0.1), (0, 0.01))  # the weight on a batch of at least so many instances


class Layer(NamedTuple):
    """What TEMA keeps of a layer.

    Args:
        mean, variance: The moving average t (C,).
        distance: d, how far t is from the source; None before the first batch.
        source_weight: l, the weight on the source in the pass that comes next.
        average: Running average of l.
    """

    mean: PerChannel
    variance: PerChannel
    distance: float | None
    source_weight: float
    average: float


@dataclass(frozen=True)
class TEMA(Policy):
    r"""A test moving average t, mixed with the source the more the farther a layer has moved, compared to the others.

    The first pass over a batch updates t at every layer and measures

    $$ d = \tfrac14 \sum_c\left[\frac{v_s}{v_t} + \frac{v_t}{v_s} - 2
    + (m_s - m_t)^2\left(\frac1{v_s} + \frac1{v_t}\right)\right] $$

    (a symmetric Kullback-Leibler divergence of Gaussians with diagonal covariances, with eps added to the variances).
    With z for d standardized over the layers and clipped to [-1, 1], the second pass normalizes by

    $$ \mu = l\, m_s + (1-l)\, m_t, \qquad v = l\, v_s + (1-l)\, v_t + l (1-l)(m_s - m_t)^2, \qquad l = (z + 1)/4 $$

    and updates nothing. The first pass of the next batch normalizes by the same formula with the running average
    a <- .9 a + .1 l in place of l. Left open, decided here: t starts at (0, 1) and a at 1/4 (the value of z = 0); the
    standard deviation over layers is the biased one, and z = 0 where it is 0; a batch of a size between those of the
    paper takes the momentum of the next smaller.

    Args:
        momentum: Weight on each batch in t, in [0, 1]; None for the paper's by batch size: 1 from 64 instances on,
            .1 from 4 on, .01 below.
        decay: Weight on the past in the running average of l, in [0, 1]; the paper's .9. (Both l and `decay` are
            weights on the past, as in the paper; the weight on the test statistic is 1 - l.)

    References:
        Su, Guo, Yao and others (2024), "Unraveling batch normalization for realistic test-time adaptation", AAAI.
    """

    momentum: float | None = None
    decay: float = 0.9

    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], or be None for one by batch size; got {self.momentum!r}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must lie in [0, 1]; got {self.decay!r}")

    def init(self, source: Source) -> State:
        """Start t at mean 0 and variance 1."""
        return Layer(torch.zeros_like(source.mean), torch.ones_like(source.variance), None, 0.25, 0.25)

    def step(self, state: Layer, evidence: Evidence, source: Source) -> tuple[Layer, Statistics]:
        """In the first pass update t and measure d; in both, normalize by the mixture."""
        if evidence.pass_index == 0:
            weight = self.momentum
            if weight is None:
                weight = next(value for least, value in _MOMENTA if evidence.count >= least)
            mean = torch.lerp(state.mean, evidence.mean, weight)
            variance = torch.lerp(state.variance, evidence.variance, weight)
            state = state._replace(mean=mean, variance=variance, distance=_distance(mean, variance, source))
        test = 1 - state.source_weight
        mean = torch.lerp(source.mean, state.mean, test)
        variance = torch.lerp(source.variance, state.variance, test)
        gap = source.mean - state.mean
        return state, Statistics(mean, variance.addcmul_(gap, gap, value=test * state.source_weight))

    def answered(self, states: list[State], answer: Answer) -> tuple[list[State], Any]:
        """After the first pass compare the layers' distances; after the second return to the running average."""
        if answer.pass_index > 0:
            return [state._replace(source_weight=state.average) for state in states], None
        known = [state.distance for state in states if state.distance is not None]
        centre = sum(known) / max(len(known), 1)
        spread = math.sqrt(sum((d - centre) ** 2 for d in known) / max(len(known), 1))
        return [self._weighted(state, centre, spread) for state in states], None

    def _weighted(self, state: Layer, centre: float, spread: float) -> Layer:
        if state.distance is None:  # the model does not use this layer
            return state
        z = max(-1.0, min(1.0, (state.distance - centre) / spread)) if spread > 0 else 0.0
        weight = (z + 1) / 4
        return state._replace(source_weight=weight, average=self.decay * state.average + (1 - self.decay) * weight)


def _distance(mean: PerChannel, variance: PerChannel, source: Source) -> float:
    v_s, v_t = (source.variance + source.eps).clamp_min(1e-30), (variance + source.eps).clamp_min(1e-30)
    gap = source.mean - mean
    return float((v_s / v_t + v_t / v_s - 2 + gap.square() * (1 / v_s + 1 / v_t)).sum()) / 4
