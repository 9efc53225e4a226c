"""Rules without a memory: each batch for itself, mixed with the source by a weight or channel by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from normadapt.layers.moments import Evidence
from normadapt.layers.policy import Policy, State, Statistics
from normadapt.layers.policy import Source as _Source


@dataclass(frozen=True)
class Source(Policy):
    """The source's statistics, whatever the data: the model as it was trained."""

    def step(self, state: State, evidence: Evidence, source: _Source) -> tuple[State, Statistics]:
        """Keep m_s and v_s."""
        return state, Statistics(source.mean, source.variance)


@dataclass(frozen=True)
class BatchStatistics(Policy):
    """Every batch by its own mean and biased variance (weight 1): "BN-1", tent's norm.

    References:
        Nado et al. (2020), arXiv 2006.10963; Schneider et al. (2020), NeurIPS.
    """

    def step(self, state: State, evidence: Evidence, source: _Source) -> tuple[State, Statistics]:
        """The batch's own statistics."""
        return state, Statistics(evidence.mean, evidence.variance)


@dataclass(frozen=True)
class SchneiderPrior(Policy):
    """Batch statistics mixed with the source's as if the source were worth `prior` images.

    The weight is n/(prior + n) with n the number of images; the batch variance is the unbiased one over all
    n times positions numbers, and the difference of the means does not enter the variance.

    Args:
        prior: Pseudo-count N of source images, at least 0.

    References:
        Schneider et al. (2020), "Improving robustness against common corruptions by covariate shift adaptation".
    """

    prior: float = 16.0

    def __post_init__(self) -> None:
        if not self.prior >= 0:
            raise ValueError(f"prior must be a number of images, at least 0; got {self.prior!r}")

    def step(self, state: State, evidence: Evidence, source: _Source) -> tuple[State, Statistics]:
        """Mix by image count."""
        weight = evidence.count / (self.prior + evidence.count)
        numbers = evidence.count * evidence.positions
        unbiased = evidence.variance * (numbers / max(numbers - 1, 1))
        mean = source.mean + weight * (evidence.mean - source.mean)
        return state, Statistics(mean, source.variance + weight * (unbiased - source.variance))


@dataclass(frozen=True)
class AlphaBN(Policy):
    r"""A fixed mixture with every batch, the same at every layer.

    $$ \mu = (1 - a)\, m_s + a\, m_b, \qquad v = (1 - a)\, v_s + a\, v_b $$

    The batch variance is the biased one; the difference of the means does not enter the variance.

    Args:
        alpha: Weight a on the batch, in [0, 1].

    References:
        You, Li and Zhao (2021), "Test-time batch statistics calibration for covariate shift", arXiv 2110.04065.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1]; got {self.alpha!r}")

    def step(self, state: State, evidence: Evidence, source: _Source) -> tuple[State, Statistics]:
        """Mix by `alpha`."""
        mean = torch.lerp(source.mean, evidence.mean, self.alpha)
        return state, Statistics(mean, torch.lerp(source.variance, evidence.variance, self.alpha))


@dataclass(frozen=True)
class Hybrid(Policy):
    r"""Early layers by the batch, late ones by the source, and between them the channels that moved least by the batch.

    $$ W_c = (m_{s,c} - m_{b,c})^2 + (\sqrt{v_{s,c}} - \sqrt{v_{b,c}})^2 $$

    Layer l of L (from 0) takes the fraction 1 - l/(L - 1) of its channels, those of lowest W, from the batch (biased
    variance) and the rest from the source; their number is rounded down. Left open by the rule, decided here: a single
    layer is a first one; layers are in the order of `named_modules()`.

    References:
        Vianna and others (2024), "Channel-selective normalization for label-shift robust test-time adaptation",
        arXiv 2402.04958.
    """

    def step(self, state: State, evidence: Evidence, source: _Source) -> tuple[State, Statistics]:
        """Choose channel by channel."""
        last = max(source.site_count - 1, 1)
        chosen = (last - source.site_index) * source.mean.numel() // last
        if chosen == 0:
            return state, Statistics(source.mean, source.variance)
        roots = source.variance.sqrt() - evidence.variance.clamp_min(0).sqrt()
        distance = (source.mean - evidence.mean).square().addcmul_(roots, roots)
        least = distance.topk(chosen, largest=False, sorted=False).indices
        mean = source.mean.index_copy(0, least, evidence.mean[least])
        return state, Statistics(mean, source.variance.index_copy(0, least, evidence.variance[least]))


@dataclass(frozen=True)
class EDTN(Policy):
    r"""Exponentially decaying test-time normalization, OFTTA's: every batch, the less of it the later the layer.

    $$ a_l = .1 \cdot 9.9^{l/(L-1)}, \qquad \mu = a_l\, m_s + (1 - a_l)\, m_b, \qquad
    \sigma = a_l \sqrt{v_s + \epsilon} + (1 - a_l) \sqrt{v_b + \epsilon} $$

    for layer l of L, from 0: the source weighs .1 in the first layer and .99 in the last. The batch variance is biased.
    Left open by the rule, decided here: a single layer is a first one; layers are in the order of `named_modules()`.

    References:
        Wang, Wang, Xi, Zhang and others (2023), "Optimization-free test-time adaptation for cross-person activity
        recognition", IMWUT 7(4), arXiv 2310.18562.
    """

    def step(self, state: State, evidence: Evidence, source: _Source) -> tuple[State, Statistics]:
        """Mix means and standard deviations by the layer's place."""
        test = 1 - 0.1 * 9.9 ** (source.site_index / max(source.site_count - 1, 1))
        own = (evidence.variance + source.eps).clamp_min(0).sqrt()
        deviation = torch.lerp((source.variance + source.eps).sqrt(), own, test)
        variance = (deviation.square() - source.eps).clamp_min(0)
        return state, Statistics(torch.lerp(source.mean, evidence.mean, test), variance)


@dataclass(frozen=True)
class MedBN(Policy):
    r"""Every batch by its own median, and by the mean square about it.

    $$ \mu = \mathrm{median}(x), \qquad v = \mathrm{mean}\,(x - \mu)^2 = v_b + (m_b - \mu)^2 $$

    over instances and positions. Of an even count the median is the lower of the two in the middle, as `torch.median`
    has it.

    References:
        Park, Hwang, Mun and others (2024), "MedBN: robust test-time adaptation against malicious test samples", CVPR.
    """

    needs_input: ClassVar[bool] = True

    def step(self, state: State, evidence: Evidence, source: _Source) -> tuple[State, Statistics]:
        """The batch's median and the spread about it."""
        if evidence.input is None:
            raise ValueError("MedBN needs evidence.input, the activations; AdaptedModel gives them")
        median = evidence.input.transpose(0, 1).flatten(1).median(1).values.double()
        return state, Statistics(median, evidence.variance + (evidence.mean - median).square())
