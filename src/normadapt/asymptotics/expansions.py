"""The polynomials of the Edgeworth and Cornish-Fisher expansions, and the search for where they fail.

Inputs are float64 tensors that broadcast, already checked: `edgeworth` is the module to use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normadapt.asymptotics import normal

_FAR = 40.0  # the density is exactly 0 beyond; keeps 0 * infinity out of the polynomials


def correction(x: Tensor, k: Sequence[Tensor], terms: int) -> Tensor:
    """What is taken off the normal lower tail, and added to the normal upper one."""
    x = x.clamp(-_FAR, _FAR)
    square = x * x
    total = torch.zeros_like(x)
    if terms >= 1:
        total = total + k[0] + k[2] / 6 * (square - 1)
    if terms >= 2:
        he3, he5 = (square - 3) * x, ((square - 10) * square + 15) * x
        total = total + (k[1] - 1 + k[0] ** 2) / 2 * x + (k[3] + 4 * k[0] * k[2]) / 24 * he3 + k[2] ** 2 / 72 * he5
    return normal.density(x) * total


def density_ratio(x: Tensor, k: Sequence[Tensor], terms: int) -> Tensor:
    """Density of the expansion over the normal density."""
    x = x.clamp(-_FAR, _FAR)
    square = x * x
    total = torch.ones_like(x)
    if terms >= 1:
        total = total + k[0] * x + k[2] / 6 * (square - 3) * x
    if terms >= 2:
        he2, he4 = square - 1, (square - 6) * square + 3
        he6 = ((square - 15) * square + 45) * square - 15
        total = total + (k[1] - 1 + k[0] ** 2) / 2 * he2 + (k[3] + 4 * k[0] * k[2]) / 24 * he4 + k[2] ** 2 / 72 * he6
    return total


def cornish_fisher(z: Tensor, k: Sequence[Tensor], terms: int) -> Tensor:
    """The statistic's quantile at the normal quantile z (finite)."""
    square = z * z
    total = z
    if terms >= 1:
        total = total + k[0] + k[2] / 6 * (square - 1)
    if terms >= 2:
        total = total + (k[1] - 1) / 2 * z + k[3] / 24 * (square - 3) * z - k[2] ** 2 / 36 * (2 * square - 5) * z
    return total


def cornish_fisher_slope(z: Tensor, k: Sequence[Tensor], terms: int) -> Tensor:
    """Derivative of `cornish_fisher` in z."""
    square = z * z
    total = torch.ones_like(z)
    if terms >= 1:
        total = total + k[2] / 3 * z
    if terms >= 2:
        total = total + (k[1] - 1) / 2 + k[3] / 8 * (square - 1) - k[2] ** 2 / 36 * (6 * square - 5)
    return total


def first_negative(
    function: Callable[[Tensor], Tensor], shape: torch.Size, reach: Tensor, steps: int = 1000
) -> tuple[Tensor, Tensor]:
    """Whether a function is nowhere negative within +-reach, and the point nearest to 0 where it first is.

    Args:
        function: From points (..., *shape) to values of that shape.
        shape: Shape of the channels.
        reach: How far to look, scalar.
        steps: Grid points on either side.

    Returns:
        Flags and points (*shape); the point is NaN where there is none, and where the function is NaN (flag False).
    """
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=reach.device) * reach
    grid = grid.reshape(-1, *(1,) * len(shape))
    flags, points = [], []
    for sign in (-1.0, 1.0):
        values = function(sign * grid).broadcast_to(grid.shape[0], *shape)
        bad = ~(values >= 0)
        index = bad.to(torch.uint8).argmax(0)
        high = grid.reshape(-1)[index]
        low = grid.reshape(-1)[(index - 1).clamp_min(0)]
        for _ in range(50):
            middle = (low + high) / 2
            negative = function(sign * middle) < 0
            low, high = torch.where(negative, low, middle), torch.where(negative, middle, high)
        found = bad.any(0)
        flags.append(~found)
        unknown = ~found | values.isnan().any(0)
        points.append(torch.where(unknown, torch.full_like(high, torch.nan), sign * high))
    left, right = points
    nearer_left = (left.abs() <= right.abs()) | right.isnan()
    return flags[0] & flags[1], torch.where(nearer_left, left, right)
