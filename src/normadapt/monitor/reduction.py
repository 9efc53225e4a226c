"""From one pass to numbers, cheaply: what policies said is taken as it is, and put together only when asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from normadapt.adapted.streams import Record
from normadapt.asymptotics.quadratic import tail_from_cumulants
from normadapt.layers.policy import Diagnostics, Source, standardize
from normadapt.reports.history import Numbers

_SMALLEST = 1e-300
_NO_WEIGHTS = (float("nan"), float("nan"))
_Said: TypeAlias = tuple[tuple[float, ...], tuple[float, float]]


class Layers(NamedTuple):
    """Numbers of all layers (L,) at one pass; NaN where the policy does not say. See `History`."""

    shift: Numbers
    tail: Numbers
    mean_weight: Numbers
    variance_weight: Numbers


class Glimpse(NamedTuple):
    """What one pass said of each layer, not yet reduced.

    Args:
        told: (shift^2 * channels, squared of location and scale, their two cumulants each), by layer.
        weights: Average weights by layer.
    """

    told: list[tuple[float, ...]]
    weights: list[tuple[float, float]]


class Reducer:
    """Takes glimpses of passes; what a policy says is reduced once for as long as it says the same.

    Args:
        sources: Of all sites.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self._channels = np.array([float(source.mean.numel()) for source in sources])
        self._before: list[tuple[object, _Said | None]] = [(None, None)] * len(self._sources)

    def glimpse(self, records: Sequence[Record], *, exact: bool = True) -> Glimpse:
        """What the records say.

        Args:
            records: Of all sites.
            exact: Whether to ask the policy anew; else what it said last is taken, which costs nothing.
        """
        said = [self._said(place, record, exact=exact) for place, record in enumerate(records)]
        return Glimpse([told for told, _ in said], [weights for _, weights in said])

    def _said(self, place: int, record: Record, *, exact: bool) -> _Said:
        before, said = self._before[place]
        told = record.told
        if said is not None and (not exact or before is told is not None or (callable(told) and told == before)):
            return said
        if told is None:
            said = _measured(record, self._sources[place]), _NO_WEIGHTS
        else:
            found = told() if callable(told) else told
            (l1, l2), (s1, s2) = found.cumulants
            said = (sum(found.shift), *found.squared, l1, l2, s1, s2), self._average(place, found)
        self._before[place] = told, said
        return said

    def _average(self, place: int, told: Diagnostics) -> tuple[float, float]:
        if not isinstance(told.weight, Tensor):
            return told.weight
        mean, variance = (told.weight.double() @ self._sources[place].share).tolist()
        return mean, variance

    def reduce(self, glimpses: Sequence[Glimpse]) -> list[Layers]:
        """Numbers for each of the glimpses; the tails are computed for all of them at once."""
        if not glimpses:
            return []
        table = np.array([glimpse.told for glimpse in glimpses])  # (P, L, 7)
        weights = np.array([glimpse.weights for glimpse in glimpses])  # (P, L, 2)
        shift = np.sqrt(np.maximum(table[..., 0], 0.0) / self._channels)
        tail = np.full(shift.shape, float("nan"))
        known = np.isfinite(table[..., 1:]).all(-1)
        if known.any():
            values = torch.from_numpy(table[known])
            squared, cumulants = values[:, 1:3], values[:, 3:].clamp_min(0.0).unflatten(1, (2, 2))
            smallest = tail_from_cumulants(squared, cumulants).min(1).values
            tail[known] = (2 * smallest).clamp(_SMALLEST, 1.0).log10().numpy()
        return [Layers(*row) for row in zip(shift, tail, weights[..., 0], weights[..., 1], strict=True)]


def _measured(record: Record, source: Source) -> tuple[float, ...]:
    """The shift of the statistics in use, where the policy tests nothing."""
    location, ratio = standardize(torch.stack(record.buffers).double(), source.units).unbind()
    squared = float((location.square() + (ratio.log() / 2).square()) @ source.channel_weight)
    return (squared, *(float("nan"),) * 6)


def answers_of(passes: Sequence[Tensor | None]) -> list[tuple[float, Numbers | None]]:
    """Mean entropy in nats and class shares (K,) of the answers (n, K) to each of some passes; all at once.

    Rows with NaN do not count; a pass without any other has NaN and None.
    """
    told: list[tuple[float, Numbers | None]] = [(float("nan"), None)] * len(passes)
    widths = {p.shape[1] for p in passes if p is not None}
    for width in widths:
        places = [place for place, p in enumerate(passes) if p is not None and p.shape[1] == width and len(p)]
        if not places:
            continue
        some = torch.cat([passes[place] for place in places]).float()  # type: ignore[misc]
        entropy, classes = torch.special.entr(some).sum(1).cpu().numpy(), some.argmax(1).cpu().numpy()
        start = 0
        for place in places:
            stop = start + len(passes[place])  # type: ignore[arg-type]
            finite = np.isfinite(entropy[start:stop])
            if finite.any():
                counts = np.bincount(classes[start:stop][finite], minlength=width)
                told[place] = float(entropy[start:stop][finite].mean()), counts / finite.sum()
            start = stop
    return told
