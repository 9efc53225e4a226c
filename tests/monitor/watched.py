"""Models to look at while they adapt, with a profile: so that they know their layers and domains at once."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import normadapt as na


def adapted(model: nn.Module, policy: na.Policy | None = None) -> na.AdaptedModel:
    """The model, profiled on standard normal images (n, 1, 8, 8)."""
    return na.adapt(model, profile_of(model), policy)


def profile_of(model: nn.Module, shape: tuple[int, ...] = (1, 8, 8)) -> Any:
    """A profile from 64 standard normal inputs."""
    inputs = torch.randn(64, *shape, generator=torch.Generator().manual_seed(100))
    with warnings.catch_warnings(action="ignore"):  # such a model was trained on nothing
        return na.profile_source(model, [inputs])
