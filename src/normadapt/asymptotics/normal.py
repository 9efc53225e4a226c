"""The standard normal law to full precision in both tails."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROOT_TWO = math.sqrt(2.0)
_ROOT_TWO_PI = math.sqrt(2.0 * math.pi)


def density(x: Tensor) -> Tensor:
    r"""Standard normal density, $\varphi(x) = e^{-x^2/2}/\sqrt{2\pi}$, float64 in and out (...,)."""
    return torch.exp(-0.5 * x * x) / _ROOT_TWO_PI


def tail(x: Tensor) -> Tensor:
    r"""Upper tail $Q(x) = \tfrac12\,\mathrm{erfc}(x/\sqrt2)$ (...,).

    Through erfc, which keeps its relative precision; a lower tail at -x would lose every digit below about -8.

    Example:
        >>> tail(torch.tensor(12.0, dtype=torch.float64)).item()
        1.776482112077...e-33
    """
    complement: Tensor = torch.special.erfc(x / _ROOT_TWO)
    return 0.5 * complement


def lower_tail(x: Tensor) -> Tensor:
    r"""Lower tail $\Phi(x) = Q(-x)$ (...,), with the relative precision of `tail`."""
    complement: Tensor = torch.special.erfc(-x / _ROOT_TWO)
    return 0.5 * complement


def quantile(lower_probability: Tensor) -> Tensor:
    """The x whose lower tail is `lower_probability` (...,); infinite at 0 and 1."""
    x: Tensor = torch.special.ndtri(lower_probability)
    return x
