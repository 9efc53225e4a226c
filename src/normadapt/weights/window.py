"""A window: one domain's evidence at one site. Evidence is a sum: exact, mergeable, forgettable."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.layers.policy import Source
from normadapt.types import Buffers

_BOUND = 1e4  # source standard deviations: as far as one instance's location reaches, and its square for its variance


class Window(NamedTuple):
    """Evidence of one domain at one site, and what was made of it.

    Args:
        count: Instances in it.
        sums: Sum over these of first and second moments (2, C), float64.
        weighed: Instances that it held when it was weighed last; 0 for never.
        shift: Posterior mean of the shift then (2C,), float64.
        observed: The shift observed then (2C,).
        no_shift: Posterior probability of "no shift" then.
        draws: Inverse number of class draws that it was worth then.
        ready: What the layer normalizes with, in its own dtype.
    """

    count: float  # type: ignore[assignment]  # hides tuple.count
    sums: Tensor
    weighed: float
    shift: Tensor
    observed: Tensor
    no_shift: Tensor
    draws: Tensor
    ready: Buffers

    @classmethod
    def empty(cls, source: Source) -> Window:
        """No evidence: the source's statistics in use."""
        none = torch.zeros(2, source.mean.numel(), dtype=torch.float64, device=source.mean.device)
        flat, one = none.flatten(), none.new_ones(())
        return cls(0.0, none, 0.0, flat, flat, one, one, source.original)

    def plus(self, count: float, sums: Tensor) -> Window:
        """With the sums (2, C) of further instances."""
        return self._replace(count=self.count + count, sums=self.sums + sums)


def sums_of(values: Tensor, source: Source) -> Tensor:
    """First and second moments (2, C) of instances (2, n, C), summed; each with bounded influence."""
    mean, variance = values
    deviation = (source.variance + source.eps).sqrt()
    mean = torch.clamp(mean, source.mean - _BOUND * deviation, source.mean + _BOUND * deviation)
    variance = torch.minimum(variance.clamp_min(0.0), _BOUND**2 * deviation.square())
    return torch.stack((mean.sum(0), (variance + mean.square()).sum(0)))
