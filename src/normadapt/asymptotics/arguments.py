"""What the formulas accept: numbers and tensors as float64, with errors that name the argument and the value.

Checks look at values, which a compiled graph cannot; under `torch.compile` they are left out.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Real: TypeAlias = Tensor | float | int
"""What an argument of a formula may be; everything is computed in float64."""


def as_doubles(**arguments: Real) -> list[Tensor]:
    """The arguments as float64 tensors on one device, checked for NaN and for shapes that broadcast.

    Raises:
        ValueError: If one holds NaN, or their shapes do not broadcast; the message names them.
    """
    device = next((a.device for a in arguments.values() if isinstance(a, Tensor)), None)
    tensors = {
        name: value.to(torch.float64) if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, value in arguments.items()
    }
    tensors = {name: value if device is None else value.to(device) for name, value in tensors.items()}
    try:
        torch.broadcast_shapes(*(value.shape for value in tensors.values()))
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
        raise ValueError(f"the shapes of these arguments do not broadcast: {shapes}") from None
    if not torch.compiler.is_compiling():
        for name, value in tensors.items():
            if bool(value.isnan().any()):
                raise ValueError(f"{name} must not be NaN; got {shown(value)}")
    return list(tensors.values())


def require(name: str, value: Tensor, holds: Tensor, what: str) -> None:
    """Raise `ValueError` unless `holds` is true everywhere.

    Args:
        name: The argument's name.
        value: The argument.
        holds: Whether each of its numbers is acceptable; same shape or broadcastable.
        what: What it must be, for the message: "must be positive".
    """
    if not torch.compiler.is_compiling() and not bool(holds.all()):
        wrong = value.detach().broadcast_to(holds.shape)[~holds]
        raise ValueError(f"{name} {what}; got {shown(wrong)}")


def require_positive(**arguments: Tensor) -> None:
    """Raise `ValueError` for the first argument that is not positive everywhere."""
    for name, value in arguments.items():
        require(name, value, value > 0, "must be positive")


def require_non_negative(**arguments: Tensor) -> None:
    """Raise `ValueError` for the first argument that is negative somewhere."""
    for name, value in arguments.items():
        require(name, value, value >= 0, "must not be negative")


def require_count(**arguments: Tensor) -> None:
    """Raise `ValueError` for the first argument that is below 1 somewhere."""
    for name, value in arguments.items():
        require(name, value, value >= 1, "must be at least 1")


def shown(value: Tensor) -> str:
    """At most four numbers of a tensor, for a message."""
    numbers = value.detach().flatten()[:4].tolist()
    text = ", ".join(f"{number:g}" for number in numbers)
    return text if value.numel() <= 4 else f"{text}, ... ({value.numel()} numbers)"
