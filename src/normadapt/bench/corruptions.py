"""Corruptions of grey images in plain torch, at five severities each; the strongest are about those of the demo.

All take images (n, 1, H, W) of grey values between 0 and 1, a severity from 1 to 5 and a seed, and give images of the
same kind. What is random is drawn in the same way at every severity, so that a corruption only grows with it. Lengths
are in sixteenths of the image's side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)
Corruption: TypeAlias = Callable[[Tensor, int, int], Tensor]
"""(images, severity, seed) to images."""


def contrast(images: Tensor, severity: int, seed: int) -> Tensor:
    """Every grey value times 0.8 to 0.3."""
    return images * (0.8, 0.65, 0.5, 0.4, 0.3)[severity - 1]


def brightness(images: Tensor, severity: int, seed: int) -> Tensor:
    """Every grey value plus 0.06 to 0.31, at most 1."""
    return (images + (0.06, 0.12, 0.18, 0.25, 0.31)[severity - 1]).clamp(0, 1)


def noise(images: Tensor, severity: int, seed: int) -> Tensor:
    """Gaussian noise of standard deviation 0.07 to 0.33, then clamped to 0..1."""
    deviation = (0.07, 0.13, 0.2, 0.27, 0.33)[severity - 1]
    return (images + deviation * torch.randn(images.shape, generator=_generator(seed))).clamp(0, 1)


def blur(images: Tensor, severity: int, seed: int) -> Tensor:
    """Gaussian blur of standard deviation 0.5 to 1 sixteenth."""
    deviation = (0.5, 0.6, 0.7, 0.85, 1.0)[severity - 1] * images.shape[-1] / 16
    reach = math.ceil(2 * deviation)
    kernel = torch.exp(-(torch.arange(-reach, reach + 1.0) ** 2) / (2 * deviation**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))


def salt(images: Tensor, severity: int, seed: int) -> Tensor:
    """2 to 15 % of the pixels become black or white."""
    share = (0.02, 0.04, 0.07, 0.1, 0.15)[severity - 1]
    generator = _generator(seed)
    hit = torch.rand(images.shape, generator=generator) < share
    white = torch.rand(images.shape, generator=generator) < 0.5
    return torch.where(hit, white.to(images.dtype), images)


def shade(images: Tensor, severity: int, seed: int) -> Tensor:
    """Light from one side, another for each image: grey rises from 0 on the far side to 0.1 to 0.5 on the near one."""
    most = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    angle = 2 * math.pi * torch.rand((len(images), 1, 1, 1), generator=_generator(seed))
    place = torch.linspace(-1, 1, images.shape[-1])
    along = angle.cos() * place.view(1, 1, 1, -1) + angle.sin() * place.view(1, 1, -1, 1)
    light = most * (along / (angle.cos().abs() + angle.sin().abs()) + 1) / 2
    return (images + light).clamp(0, 1)


def pixelate(images: Tensor, severity: int, seed: int) -> Tensor:
    """Cells of one grey value each, 14 to 6 per side."""
    side = images.shape[-1]
    few = round(side * (14, 12, 10, 8, 6)[severity - 1] / 16)
    cell = torch.arange(side) * few // side
    same = (cell.unsqueeze(0) == cell.unsqueeze(1)).to(images.dtype)
    mean = same / same.sum(1, keepdim=True)  # (side, side): puts the mean of its cell at every place
    return mean @ images @ mean.T


CORRUPTIONS: Mapping[str, Corruption] = {
    "contrast": contrast,
    "brightness": brightness,
    "noise": noise,
    "blur": blur,
    "salt": salt,
    "shade": shade,
    "pixelate": pixelate,
}
"""By name, in the order in which continual streams visit them."""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
