"""Rules with a running average: the statistics of the batches so far, newer ones heavier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from normadapt.layers.moments import Evidence
from normadapt.layers.policy import Policy, Source, State, Statistics
from normadapt.types import PerChannel


class Running(NamedTuple):
    """A running average of means and (biased) variances (C,)."""

    mean: PerChannel
    variance: PerChannel

    def towards(self, evidence: Evidence, momentum: float) -> Running:
        """Moved to a batch by the weight `momentum` on it."""
        return Running(
            torch.lerp(self.mean, evidence.mean, momentum), torch.lerp(self.variance, evidence.variance, momentum)
        )


@dataclass(frozen=True)
class EMA(Policy):
    """Exponential moving average that starts at the source: running <- (1 - m) running + m batch, then used.

    Args:
        momentum: Weight m of each new batch (biased variance), whatever its size, in [0, 1].
    """

    momentum: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1]; got {self.momentum!r}")

    def init(self, source: Source) -> State:
        """Start at the source."""
        return Running(source.mean, source.variance)

    def step(self, state: Running, evidence: Evidence, source: Source) -> tuple[Running, Statistics]:
        """Move by `momentum` towards the batch and use the result."""
        moved = state.towards(evidence, self.momentum)
        return moved, Statistics(*moved)


@dataclass(frozen=True)
class RBN(Policy):
    r"""Robust batch normalization: an exponential moving average with a small weight on the batch, RoTTA's.

    $$ g \leftarrow (1 - \alpha)\, g + \alpha\, b, \quad\text{then } g \text{ is used} $$

    It is `EMA` under the name and with the weight of RoTTA; RoTTA's memory bank and teacher are not part of it.

    Args:
        alpha: Weight on the batch (biased variance), in [0, 1].

    References:
        Yuan, Xie and Li (2023), "Robust test-time adaptation in dynamic scenarios", CVPR.
    """

    alpha: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1]; got {self.alpha!r}")

    def init(self, source: Source) -> State:
        """Start at the source."""
        return Running(source.mean, source.variance)

    def step(self, state: Running, evidence: Evidence, source: Source) -> tuple[Running, Statistics]:
        """Move by `alpha` towards the batch and use the result."""
        moved = state.towards(evidence, self.alpha)
        return moved, Statistics(*moved)


class Fading(NamedTuple):
    """DUA's state: the running statistics and the momentum p that is left."""

    running: Running
    momentum: float


@dataclass(frozen=True)
class DUA(Policy):
    r"""A moving average from the source whose weight on the batch fades from batch to batch to a floor.

    $$ m_k = p_k + \zeta, \qquad p_{k+1} = \omega\, p_k, \qquad g \leftarrow (1 - m_k)\, g + m_k\, b $$

    Decided here: the first weight is p0 + zeta; the variance is the biased one, as for `EMA`; the augmented copies
    that the paper makes of a single image are not part of the rule.

    Args:
        p0: Weight on the batch that fades, at least 0.
        zeta: Weight that stays, at least 0; p0 + zeta at most 1.
        omega: What p is multiplied with after each batch, in [0, 1].

    References:
        Mirza, Micorek, Possegger and Bischof (2022), "The norm must go on: dynamic unsupervised domain adaptation by
        normalization", CVPR.
    """

    p0: float = 0.1
    zeta: float = 0.005
    omega: float = 0.94

    def __post_init__(self) -> None:
        if not (self.p0 >= 0 and self.zeta >= 0 and self.p0 + self.zeta <= 1):
            raise ValueError(
                f"p0 and zeta must be weights of at least 0, with a sum of at most 1; got {self.p0!r} and {self.zeta!r}"
            )
        if not 0 <= self.omega <= 1:
            raise ValueError(f"omega must lie in [0, 1]; got {self.omega!r}")

    def init(self, source: Source) -> State:
        """Start at the source, with p0."""
        return Fading(Running(source.mean, source.variance), float(self.p0))

    def step(self, state: Fading, evidence: Evidence, source: Source) -> tuple[Fading, Statistics]:
        """Move by p + zeta towards the batch, use the result and let p fade."""
        moved = state.running.towards(evidence, state.momentum + self.zeta)
        return Fading(moved, state.momentum * self.omega), Statistics(*moved)


class Renormal(NamedTuple):
    """TBR's state: running mean and standard deviation (C,), and the batches behind them."""

    mean: PerChannel
    deviation: PerChannel
    batches: int


@dataclass(frozen=True)
class TBR(Policy):
    r"""Test-time batch renormalization, DELTA's: by the running average as it was before the batch.

    Batch renormalization corrects the batch's own normalization by constants r and d, whose product has the value

    $$ (x - \hat\mu)/\hat\sigma, \qquad \hat\mu \leftarrow d\,\hat\mu + (1 - d)\,m_b, \quad
    \hat\sigma \leftarrow d\,\hat\sigma + (1 - d)\sqrt{v_b + \epsilon} $$

    with the averages updated afterwards. They start at the first batch, not at the source, so the first batch is
    normalized by its own statistics.

    Args:
        decay: Weight d on the past, as in the paper; the weight on the batch is 1 - d. In [0, 1].

    References:
        Zhao, Chen and Xia (2023), "DELTA: degradation-free fully test-time adaptation", ICLR.
    """

    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay must lie in [0, 1]; got {self.decay!r}")

    def init(self, source: Source) -> State:
        """Nothing seen; the values stand for nothing yet."""
        return Renormal(source.mean, (source.variance + source.eps).sqrt(), 0)

    def step(self, state: Renormal, evidence: Evidence, source: Source) -> tuple[Renormal, Statistics]:
        """Use the average up to the batch before, then take the batch in."""
        deviation = (evidence.variance + source.eps).clamp_min(0).sqrt()
        if state.batches == 0:
            return Renormal(evidence.mean, deviation, 1), Statistics(evidence.mean, evidence.variance)
        in_use = Statistics(state.mean, (state.deviation.square() - source.eps).clamp_min(0))
        new = 1 - self.decay
        moved = torch.lerp(state.mean, evidence.mean, new), torch.lerp(state.deviation, deviation, new)
        return Renormal(*moved, state.batches + 1), in_use
