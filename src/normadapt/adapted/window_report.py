"""What `Domains` says of one site: its domain's window in the terms of a report."""

from __future__ import annotations

import torch

from normadapt.asymptotics.shift_interval import squared_shift_interval
from normadapt.layers.policy import Diagnostics, Source, pair
from normadapt.profiles.source_profile import SiteProfile
from normadapt.weights.noise import noise_of
from normadapt.weights.window import Window


class Told:
    """The diagnostics of a window, made when somebody asks for the first time; it can be copied and pickled."""

    def __init__(self, window: Window, site: SiteProfile, source: Source) -> None:
        self._of = window, site, source
        self._made: Diagnostics | None = None

    def __call__(self) -> Diagnostics:
        """The diagnostics."""
        if self._made is None:
            self._made = diagnostics_of(*self._of)
        return self._made


def diagnostics_of(window: Window, site: SiteProfile, source: Source) -> Diagnostics:
    """The shift, its noise and the weights of a window that was weighed."""
    weight = source.channel_weight
    observed, used = window.observed.view(2, -1), window.shift.view(2, -1)
    draws = float(window.draws)
    noise = noise_of(site.prior, max(window.weighed, 1.0), draws, weight, window.observed)
    squared = observed.square() @ weight
    share = ((used * observed) @ weight / squared.clamp_min(1e-300)).clamp(0, 1)
    one = noise_of(site.prior, 1.0, 1.0, weight, window.observed)
    trace, squares = noise.trace.tolist(), (2 * noise.squares).tolist()
    interval = squared_shift_interval(squared.sum(), noise.trace[2], noise.squares[2], noise.direction[2])
    return Diagnostics(
        effective_count=float(one.trace[2] / noise.trace[2].clamp_min(1e-300)),
        shift=pair((squared - noise.trace[:2]).clamp_min(0)),
        squared=pair(squared),
        cumulants=((trace[0], squares[0]), (trace[1], squares[1])),
        weight=share.unsqueeze(1).expand(2, weight.numel()).contiguous(),
        status="tracking" if bool(torch.any(window.shift != 0)) else "source",
        noise=noise.variance,
        shift_interval=(float(interval.low) / weight.numel(), float(interval.high) / weight.numel()),
    )
