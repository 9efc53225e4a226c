"""The moments that source data have at a site, and the way from a shift relative to them to statistics in use."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.layers.policy import Source
from normadapt.types import Buffers, PerChannel

_FARTHEST = 20.0  # half-log-variance: e^40 times the source's variance


class Reference(NamedTuple):
    """Where shifts are measured from.

    Args:
        mean: (C,) float64.
        variance: (C,) float64, with the layer's eps.
    """

    mean: PerChannel
    variance: PerChannel

    @classmethod
    def of_running_statistics(cls, source: Source) -> Reference:
        """The layer's own statistics: what is known without source data."""
        return cls(source.mean, (source.variance + source.eps).clamp_min(1e-30))

    def shift_of(self, mean: PerChannel, variance: PerChannel) -> Tensor:
        """Shift (2C,) of a mean and a variance (without eps) (C,): location and half-log-variance."""
        location = (mean - self.mean) / self.variance.sqrt()
        return torch.cat((location, 0.5 * torch.log((variance / self.variance).clamp_min(1e-8))))

    def buffers(self, shift: Tensor, source: Source) -> Buffers:
        """What the layer is to normalize with at a shift (2C,), in its own dtype, always finite.

        The layer's output gets the moments that it has on source data: (m - M)/sqrt(V) = (m_ref - m_s)/sqrt(v_s) and
        v/V = v_ref/v_s. No shift gives m_s and v_s.
        """
        location, scale = shift.view(2, -1)
        scale = scale.clamp(-_FARTHEST, _FARTHEST)
        of_source = (source.variance + source.eps).clamp_min(1e-30)
        variance = of_source * torch.exp(2 * scale)
        misfit = (self.mean - source.mean) * scale.exp()
        mean = self.mean + location * self.variance.sqrt() - misfit
        like = source.original[0]
        largest = torch.finfo(like.dtype).max
        written = (variance - source.eps).clamp_min(0.0)
        return mean.clamp(-largest, largest).to(like), written.clamp(max=largest).to(like)
