"""Two functions whose textbook form cancels near zero, where a saddlepoint lives."""

from __future__ import annotations

import torch
from torch import Tensor

_SERIES_BELOW = 0.3


def log1p_minus(y: Tensor) -> Tensor:
    r"""$\log(1 + y) - y$ for y > -1 (...,), to full relative precision: about -y^2/2 near zero.

    With $s = y/(2 + y)$ it is $-s y + 2 s^3 (1/3 + s^2/5 + s^4/7 + \dots)$.

    Example:
        >>> log1p_minus(torch.tensor(1e-9, dtype=torch.float64)).item()
        -4.99999999...e-19
    """
    small = y.abs() < _SERIES_BELOW
    inner = torch.where(small, y, 0.0)
    s = inner / (2 + inner)
    square = s * s
    series = torch.full_like(s, 1 / 25)
    for power in range(23, 1, -2):
        series = series * square + 1 / power
    outer = torch.where(small, 1.0, y)
    return torch.where(small, s * (2 * square * series - inner), torch.log1p(outer) - outer)


def expm1_minus(y: Tensor) -> Tensor:
    r"""$e^y - 1 - y$ (...,), to full relative precision: about y^2/2 near zero.

    Example:
        >>> expm1_minus(torch.tensor(1e-9, dtype=torch.float64)).item()
        5.0000000...e-19
    """
    small = y.abs() < _SERIES_BELOW
    inner = torch.where(small, y, 0.0)
    series = torch.ones_like(inner)
    for power in range(13, 2, -1):
        series = 1 + series * inner / power
    outer = torch.where(small, 1.0, y)
    return torch.where(small, 0.5 * inner * inner * series, torch.expm1(outer) - outer)
