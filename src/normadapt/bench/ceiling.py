"""The prequential ceiling: what could be known of each domain by now, if somebody said where domains begin and end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normadapt.adapted._adapt import adapt
from normadapt.layers.moments import Evidence
from normadapt.layers.policy import Policy, Source, State, Statistics


class Known:
    """Answers each instance with the statistics of all that its domain has shown so far, the present batch included.

    Instances are pooled, each as heavy, at every layer by itself. Nothing is taken from the source.

    Args:
        model: In eval mode; it is not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._policy = _Pooled()
        self._adapted = adapt(model, None, self._policy)

    def tell(self, domain: Tensor) -> None:
        """Say the domain of each instance (n,) of the batch that comes next."""
        self._policy.domain = domain

    def __call__(self, batch: Tensor) -> Any:
        """The output for a batch (n, ...)."""
        return self._adapted(batch)


class _Pooled(Policy):
    """The state of a site is, by domain, the sums (2, C) of its first two moments about m_s, and their number."""

    domain: Tensor

    def init(self, source: Source) -> State:
        return {}

    def step(self, state: State, evidence: Evidence, source: Source) -> tuple[State, Statistics]:
        domain = self.domain if evidence.kept is None else self.domain[evidence.kept]
        mean_i, variance_i = evidence.instances.mean - source.mean, evidence.instances.variance
        moments = torch.stack((mean_i, variance_i + mean_i.square()))
        after = dict(state)
        means, variances = torch.empty_like(mean_i), torch.empty_like(mean_i)
        for d in domain.unique().tolist():
            mine = domain == d
            sums, count = after.get(d, (0.0, 0))
            sums, count = sums + moments[:, mine].sum(1), count + int(mine.sum())
            after[d] = sums, count
            first, second = sums / count
            means[mine], variances[mine] = source.mean + first, (second - first.square()).clamp_min(0)
        return after, Statistics(means[-1], variances[-1], instances=(means, variances))
