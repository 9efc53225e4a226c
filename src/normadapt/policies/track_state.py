"""What `Track` remembers of a site."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.policies.base import Source
from normadapt.policies.belief import UNTOLD
from normadapt.policies.correlation import Correlation
from normadapt.policies.mixed import Scatter
from normadapt.policies.recent import Recent
from normadapt.policies.spread_learner import LearnedSpread
from normadapt.shapes import LocationScale, PerClass
from normadapt.spread import Pair


class TrackState(NamedTuple):
    """What `Track` remembers of a site.

    Args:
        count: Instances in the window, N; older ones fade.
        moments: Window means (2, C) of (x - m_s)/sqrt(v_s + eps) and of ((x - m_s)^2 + eps)/(v_s + eps).
        classes: Predicted class frequencies of the window (K,); empty while unknown.
        use: The statistics in use (2, C), as differences from the source in output units.
        place: Where the stream is taken to be (2, C): the same without the ceiling on the weights.
        uncertainty: Mean sampling variance of `use` over channels, P, as (location, scale).
        spread: Scatter learned from the stream; None where a profile knows it.
        pending: Instances in the window that `use` does not know of yet.
        projections: Some of the window's instances along the direction of its shift (2, k), for the report's intervals.
        correlation: How alike neighbouring instances of the stream are.
        scatter: How far the window's instances lie apart.
        recent: The last instances, where batches are small.
        odds: Log-odds that the stream has a shift that matters, as this site and those before it see it.
    """

    count: float  # type: ignore[assignment]  # hides tuple.count
    moments: LocationScale
    classes: PerClass
    use: LocationScale
    place: LocationScale
    uncertainty: Pair
    spread: LearnedSpread | None
    pending: float
    projections: Tensor
    correlation: Correlation
    scatter: Scatter
    recent: Recent
    odds: float = UNTOLD

    @classmethod
    def empty(cls, source: Source) -> TrackState:
        """An empty window, and the source's statistics in use."""
        zeros = torch.zeros_like(source.mean)
        learned = LearnedSpread.empty(source) if source.spread is None else None
        none = torch.stack((zeros, zeros))
        return cls(
            0.0,
            none,
            zeros.new_zeros(0),
            none,
            none,
            (0.0, 0.0),
            learned,
            0.0,
            none[:, :0],
            Correlation(zeros),
            Scatter.empty(source),
            Recent(none[:, :0], zeros.new_zeros(0)),
        )
