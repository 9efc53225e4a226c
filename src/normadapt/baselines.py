"""The field's fixed rules, each from its formula, to compare with. Weights are on the **test** statistic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from normadapt.policies.base import Policy, State, Statistics
from normadapt.policies.base import Source as _Source
from normadapt.shapes import PerChannel
from normadapt.statistics import Evidence

__all__ = ["EMA", "BatchStatistics", "SchneiderPrior", "Source"]


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


class _Running(NamedTuple):
    mean: PerChannel
    variance: PerChannel


@dataclass(frozen=True)
class EMA(Policy):
    """Exponential moving average that starts at the source: running <- (1 - m) running + m batch, then used.

    Args:
        momentum: Weight m of each new batch, whatever its size, in [0, 1].
    """

    momentum: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1]; got {self.momentum!r}")

    def init(self, source: _Source) -> State:
        """Start at the source."""
        return _Running(source.mean, source.variance)

    def step(self, state: _Running, evidence: Evidence, source: _Source) -> tuple[_Running, Statistics]:
        """Move by `momentum` towards the batch (biased variance) and use the result."""
        mean = state.mean + self.momentum * (evidence.mean - state.mean)
        variance = state.variance + self.momentum * (evidence.variance - state.variance)
        return _Running(mean, variance), Statistics(mean, variance)
