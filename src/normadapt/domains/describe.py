"""What an input looks like: a few named numbers that a person can read, and the moments at the first site."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normadapt.layers.moments import InstanceMoments
from normadapt.types import PerChannel

_SHADES = 1e-4  # variance of an input below which its shape is not told, in squared source deviations
_PIECES = 7  # across the shorter side, for what is seen from afar


def names(channels: int, rank: int) -> tuple[str, ...]:
    """Names of the numbers that `describe` gives for inputs of this many channels and dimensions."""
    plane = ("edges down", "grain across", "grain down", "large scale", "slope across", "slope down")
    lines = ("grain across",)
    middle = () if rank < 3 else lines if rank == 3 else plane
    edges = () if rank < 3 else ("edges across",)
    levels = tuple(f"level {k}" for k in range(channels)) if channels > 1 and rank >= 3 else ()
    return ("mean", "contrast", *edges, *middle, "skewness", "tails", "at maximum", "at minimum", *levels)


def describe(x: Tensor) -> Tensor:
    """Named numbers (n, p) of inputs that are standardized by the source's own mean and deviation a channel.

    Mean, contrast, energy of edges and of grain, large-scale contrast, slopes, skewness, tails, shares at the maximum
    and at the minimum, averaged over the channels, and each channel's own level. Energies are half-logarithms of
    variances.

    Args:
        x: Features (n, c), signals (n, c, w), images (n, c, h, w) or volumes (n, c, d, h, w).

    Returns:
        (n, p) float64, see `names`.
    """
    rank = x.dim()
    if rank == 2:
        x = x.unsqueeze(1)  # the features of an instance are the positions of one channel
    if rank <= 3:
        x = x.unsqueeze(2)
    x = x.float()
    c, h = x.shape[1], x.shape[-2]
    flat = x.flatten(2)
    mean = flat.mean(2)
    deviation = flat - mean.unsqueeze(2)
    squares = deviation * deviation
    variance = squares.mean(2)
    found = [mean, _half_log(variance)]
    if rank >= 3:
        across = x.diff(dim=-1)
        found.append(_energy(across))
        grain = _energy(across.diff(dim=-1))
        if h > 1:
            down = x.diff(dim=-2)
            planes = x if rank < 5 else x.flatten(1, 2)  # a volume's slices one by one
            block = F.avg_pool2d(planes, max(1, min(x.shape[-2:]) // _PIECES))
            sideways = torch.linspace(-1, 1, block.shape[3], device=x.device)
            upright = torch.linspace(-1, 1, block.shape[2], device=x.device)
            found += [_energy(down), grain, _energy(down.diff(dim=-2))]
            found.append(_energy(block - block.mean((2, 3), keepdim=True)))
            found += [3 * (block * sideways).mean((2, 3)), 3 * (block * upright.unsqueeze(1)).mean((2, 3))]
        elif rank == 3:
            found.append(grain)
        else:
            found += [grain.new_full(grain.shape, _half_log(grain.new_zeros(())).item()), grain] + [grain * 0] * 4
    top, low = flat.amax(2, keepdim=True), flat.amin(2, keepdim=True)
    found += [
        (squares * deviation).mean(2) / (variance + _SHADES) ** 1.5,
        torch.log(squares.square().mean(2) / (variance + _SHADES) ** 2 + 0.1),
        (top - flat < 0.01).float().mean(2),
        (flat - low < 0.01).float().mean(2),
    ]
    columns = [t.mean(1, keepdim=True) for t in found]
    if c > 1:
        columns.append(mean - mean.mean(1, keepdim=True))
    return torch.cat(columns, 1).double()


def _half_log(variance: Tensor) -> Tensor:
    return 0.5 * torch.log(variance + 1e-5)


def _energy(differences: Tensor) -> Tensor:
    if differences.numel() == 0:
        return _half_log(differences.new_zeros(differences.shape[:2]))
    return _half_log(differences.square().flatten(2).mean(2))


def first_moments(moments: InstanceMoments, mean: PerChannel, variance: PerChannel) -> Tensor:
    """Location, half-log second moment about the reference and half-log variance within, at the first site (n, 3C)."""
    location = (moments.mean - mean) / variance.sqrt()
    within = moments.variance / variance
    second = within + location * location
    return torch.cat((location, _floor_log(second), _floor_log(within)), 1)


def _floor_log(ratio: Tensor) -> Tensor:
    return 0.5 * torch.log(ratio.clamp_min(1e-4))


def only_input(arguments: tuple[tuple[Any, ...], Any]) -> Tensor | None:
    """The one tensor that a model was called with, where that is all, of floating numbers and 2 to 5 dimensions."""
    args, kwargs = arguments
    every = [*args, *kwargs.values()]
    tensors = [value for value in every if isinstance(value, Tensor)]
    if len(tensors) != 1 or any(isinstance(value, (dict, list, tuple)) for value in every):
        return None
    x = tensors[0]
    return x if x.is_floating_point() and 2 <= x.dim() <= 5 and x.numel() > 0 else None
