"""Rehearsals: generic changes of source inputs, by which a model shows how its statistics move together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Rehearsal: TypeAlias = Callable[[Tensor], Tensor]
"""A change of inputs (n, c, ...) that are standardized by the source's own mean and deviation a channel."""


def rehearsals_for(rank: int) -> Mapping[str, Rehearsal]:
    """The default rehearsals of inputs with `rank` dimensions: 2 features, 3 signals, 4 images, 5 volumes.

    Example:
        >>> sorted(set(rehearsals_for(4)) - set(rehearsals_for(2)))
        ['blur 3', 'blur 5', 'shade across', 'shade down', 'sharp']
    """
    found: dict[str, Rehearsal] = {}
    for k in (0.25, 0.5, 1.5):
        found[f"gain {k:g}"] = partial(_affine, gain=k, offset=0.0)
    for k in (-1.0, -0.5, 0.5, 1.0):
        found[f"offset {k:g}"] = partial(_affine, gain=1.0, offset=k)
    for k in (0.25, 0.5):
        found[f"low contrast, dark {k:g}"] = partial(_affine, gain=k, offset=-0.4 * (1 - k))
        found[f"low contrast, bright {k:g}"] = partial(_affine, gain=k, offset=1 - k)
    for seed, k in enumerate((0.3, 0.7, 1.2, 2.0)):
        found[f"noise {k:g}"] = partial(_noise, deviation=k, generator=torch.Generator().manual_seed(seed))
    if rank >= 3:
        for width in (3, 5):
            found[f"blur {width}"] = partial(_blur, width=width)
        found["sharp"] = _sharp
        found["shade across"] = partial(_shade, sign=1.0, dim=-1)
    if rank >= 4:
        found["shade down"] = partial(_shade, sign=-1.0, dim=-2)
    elif rank == 3:
        found["shade back"] = partial(_shade, sign=-1.0, dim=-1)
    return found


def _affine(x: Tensor, gain: float, offset: float) -> Tensor:
    return x * gain + offset


def _noise(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    # drawn on the CPU: the same numbers on every device
    return x + deviation * torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x)


def _box(x: Tensor, width: int) -> Tensor:
    pools = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
    sides = x.dim() - 2
    shortest = min(x.shape[2:])
    width = min(width, shortest if shortest % 2 else shortest - 1)
    if width < 2:
        return x
    padded = F.pad(x.float(), (width // 2,) * 2 * sides, mode="replicate")  # pooling is not there for every dtype
    blurred: Tensor = pools[x.dim()](padded, width, 1)
    return blurred.to(x)


def _blur(x: Tensor, width: int) -> Tensor:
    return _box(x, width)


def _sharp(x: Tensor) -> Tensor:
    return x + 1.5 * (x - _box(x, 3))


def _shade(x: Tensor, sign: float, dim: int) -> Tensor:
    shape = [1] * x.dim()
    shape[dim] = -1
    return x + sign * torch.linspace(-1, 1, x.shape[dim], device=x.device, dtype=x.dtype).view(shape)
