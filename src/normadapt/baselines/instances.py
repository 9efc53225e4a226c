"""Rules that normalize every instance by statistics of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from normadapt.layers.moments import Evidence
from normadapt.layers.policy import Policy, Source, State, Statistics


@dataclass(frozen=True)
class IABN(Policy):
    r"""Instance-aware batch normalization, NOTE's: the instance's own statistics where they differ by k sigma.

    With $S_t(z) = \mathrm{sign}(z)\max(|z| - t, 0)$, L positions and the unbiased variance $v_i$ over them,

    $$ \mu = m_s + S_{k\sqrt{(v_s+\epsilon)/L}}(m_i - m_s), \qquad
    v = \left[v_s + S_{k (v_s+\epsilon)\sqrt{2/(L-1)}}(v_i - v_s)\right]_+ $$

    An instance of one position has no variance: it keeps the source's statistics, as does a paused model.

    Args:
        k: Width of the tolerance in standard errors of independent positions, at least 0.

    References:
        Gong, Jeong, Kim and others (2022), "NOTE: robust continual test-time adaptation against temporal correlation",
        NeurIPS.
    """

    k: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.k < math.inf:
            raise ValueError(f"k must be a finite number, at least 0; got {self.k!r}")

    def step(self, state: State, evidence: Evidence, source: Source) -> tuple[State, Statistics]:
        """Soft-shrink each instance's difference from the source."""
        positions = evidence.positions
        if positions <= 1:
            return state, Statistics(source.mean, source.variance)
        width = source.variance + source.eps
        near = _shrunk(evidence.instances.mean - source.mean, self.k * (width / positions).sqrt())
        unbiased = evidence.instances.variance * (positions / (positions - 1))
        wide = _shrunk(unbiased - source.variance, self.k * math.sqrt(2 / (positions - 1)) * width)
        own = source.mean + near, (source.variance + wide).clamp_min_(0)
        return state, Statistics(source.mean, source.variance, instances=own)


def _shrunk(difference: Tensor, threshold: Tensor) -> Tensor:
    """S_t(z) for every row: what of (n, C) is beyond -t and t (C,)."""
    return difference - torch.minimum(torch.maximum(difference, -threshold), threshold)


class Components(NamedTuple):
    """UnMix-TNS's state: means and variances (K, C) of the components."""

    means: Tensor
    variances: Tensor


@dataclass(frozen=True)
class UnMixTNS(Policy):
    r"""K drifting components per layer; each instance is mixed into those that it is like, and normalized by the whole.

    $$ \mu_k = m_s + \sqrt{\tfrac{K}{2(K-1)}}\sqrt{v_s}\,\xi_k, \quad v_k = \tfrac12 v_s, \quad \xi \sim N(0, 1) $$
    $$ p_k = \mathrm{softmax}_k \cos(m_i, \mu_k)/T, \qquad m_k = (1-p_k)\mu_k + p_k m_i, \quad
    w_k = (1-p_k) v_k + p_k v_i $$
    $$ \mu = \overline{m_k}, \qquad v = \overline{w_k} + \overline{m_k^2} - \mu^2 $$
    $$ \mu_k \leftarrow \mu_k + M\,\mathrm{mean}_i\,p_k (m_i - \mu_k), \qquad M = 1 - (1 - \mathrm{momentum})^{n/64} $$

    (bars: over k; v_k moves likewise; v_i is biased). Decided here: a batch is normalized with the components as they
    were before it; a paused model uses the mean and variance of the components' mixture.

    Args:
        components: Number K of components, at least 2; the paper has 16, and 128 for mixed streams.
        temperature: T, above 0.
        momentum: Weight on the test statistics of 64 instances, in [0, 1].
        seed: Of the draws xi; every layer draws its own.

    References:
        Tomar, Vray, Thiran and Bozorgtabar (2024), "Un-mixing test-time normalization statistics: combatting label
        temporal correlation", ICLR.
    """

    components: int = 16
    temperature: float = 0.07
    momentum: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.components, int) or self.components < 2:
            raise ValueError(f"components must be a whole number, at least 2; got {self.components!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a finite number above 0; got {self.temperature!r}")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1]; got {self.momentum!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number, at least 0; got {self.seed!r}")

    def init(self, source: Source) -> State:
        """Components scattered about the source so that their mixture has its statistics, on average over draws."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + source.site_index)
        shape = self.components, source.mean.numel()
        draws = torch.randn(shape, generator=generator, dtype=torch.float64).to(source.mean.device)
        reach = math.sqrt(self.components / (2 * (self.components - 1)))
        means = source.mean + reach * source.variance.sqrt() * draws
        return Components(means, (0.5 * source.variance).expand(shape).clone())

    def step(self, state: Components, evidence: Evidence, source: Source) -> tuple[Components, Statistics]:
        """Normalize each instance by the components with it mixed in, then move them."""
        means, variances = state
        mean_i, variance_i = evidence.instances.values.unbind()
        likeness = F.normalize(mean_i, dim=1) @ F.normalize(means, dim=1).T
        p = (likeness / self.temperature).softmax(1)  # (n, K)
        # Sums over k of m_k and m_k^2 as matrix products, about m_s: no (n, K, C) tensor, no cancellation.
        about, instance = means - source.mean, mean_i - source.mean
        rest = 1 - p
        mean = (rest @ about + instance).div_(self.components)  # the p_k of an instance sum to 1
        squares = rest.square() @ about.square() + 2 * instance * ((p * rest) @ about)
        squares = squares.addcmul_(p.square().sum(1, keepdim=True), instance.square())
        variance = (rest @ variances + variance_i + squares).div_(self.components).addcmul_(mean, mean, value=-1)
        moved = self._moved(state, p, mean_i, variance_i)
        whole = moved.means.mean(0), moved.variances.mean(0) + moved.means.var(0, correction=0)
        own = mean + source.mean, variance.clamp_min_(0)
        return moved, Statistics(*whole, instances=own)

    def _moved(self, state: Components, p: Tensor, mean: Tensor, variance: Tensor) -> Components:
        """The components after a batch of n instances with the shares p (n, K) and moments (n, C)."""
        count = p.shape[0]
        rate = 1 - (1 - self.momentum) ** (count / 64)
        shares = (p.sum(0) * (rate / count)).unsqueeze(1)
        pull = p.T * (rate / count)
        return Components(
            torch.addmm(state.means, pull, mean).addcmul_(shares, state.means, value=-1),
            torch.addmm(state.variances, pull, variance).addcmul_(shares, state.variances, value=-1).clamp_min_(0),
        )
