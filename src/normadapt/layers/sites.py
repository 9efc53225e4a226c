"""The normalization layers of a model: found, read and written. A site is one such layer.

Statistics are written by putting new tensors in the layer's own buffers; its forward is never replaced. So any
layer with `running_mean` and `running_var` works as it is, state_dict keys stay, and taking the hooks off leaves an
ordinary model.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from normadapt.errors import UnsupportedLayerError
from normadapt.types import PerChannel


class Site(NamedTuple):
    """One normalization layer.

    Args:
        name: Its dotted name in the model.
        module: The layer.
        channels: Number of channels, C.
        tracked: Whether it keeps running statistics; if not, its source statistics come from a profile.
    """

    name: str
    module: nn.Module
    channels: int
    tracked: bool

    @property
    def kind(self) -> str:
        """The layer's class name."""
        return type(self.module).__name__

    @property
    def eps(self) -> float:
        """What the layer adds to the variance before the root."""
        return float(getattr(self.module, "eps", 0.0))

    def channel_weight(self) -> PerChannel:
        """Squared affine scale gamma^2 (C,), float64: how much of each channel reaches the output.

        Ones where the layer has no affine scale, and where all of it is 0 (nothing reaches the output, and
        any weighting serves).
        """
        gamma = getattr(self.module, "weight", None)
        if not isinstance(gamma, Tensor):
            device = self.module.running_mean.device if isinstance(self.module.running_mean, Tensor) else None
            return torch.ones(self.channels, dtype=torch.float64, device=device)
        weight = gamma.detach().double() ** 2
        return weight if bool(weight.sum() > 0) else torch.ones_like(weight)

    def buffers(self) -> tuple[Tensor | None, Tensor | None]:
        """The tensors now in the layer's running_mean and running_var (None, None where it keeps none)."""
        return self.module._buffers.get("running_mean"), self.module._buffers.get("running_var")

    def write(self, mean: Tensor | None, variance: Tensor | None) -> None:
        """Put these very tensors (C,) in the layer's running_mean and running_var; None to keep none.

        Replacing instead of copying keeps a backward pass through an earlier forward valid.
        """
        self.module._buffers["running_mean"] = mean
        self.module._buffers["running_var"] = variance


def _running_statistics(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    mean, variance = module._buffers.get("running_mean"), module._buffers.get("running_var")
    if mean is None or variance is None or isinstance(mean, nn.parameter.UninitializedBuffer):
        return None
    if mean.dim() != 1 or mean.shape != variance.shape or not mean.is_floating_point():
        return None
    return mean, variance


def find_sites(model: nn.Module, *, with_profile: bool = False, verb: str = "adapt()") -> list[Site]:
    """Every normalization layer of `model` that can be adapted, in the order of `named_modules()`.

    Args:
        model: Any module. Layers that keep running statistics are sites: BatchNorm1d, 2d, 3d, SyncBatchNorm,
            their subclasses and look-alikes (`running_mean` and `running_var` of shape (C,)).
        with_profile: Whether batch norms without running statistics are sites too (a profile supplies theirs).
        verb: The function on whose behalf this is asked; for the error message.

    Raises:
        UnsupportedLayerError: If there is no such layer, or one without running statistics and no profile. Every
            offending layer is named.
    """
    sites: list[Site] = []
    offending: list[str] = []
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise UnsupportedLayerError(_nothing_found(model, verb))
    for name, module in model.named_modules():
        statistics = _running_statistics(module)
        if statistics is not None:
            sites.append(Site(name, module, int(statistics[0].numel()), True))
        elif isinstance(module, nn.modules.lazy.LazyModuleMixin) and isinstance(module, _BatchNorm):
            offending.append(f"  {name}: not initialized yet -> call the model once on a batch first")
        elif isinstance(module, _BatchNorm):
            if with_profile:
                sites.append(Site(name, module, int(module.num_features), False))
            else:
                offending.append(f"  {name}: track_running_stats=False -> pass profile=profile_source(model, loader)")
    if offending:
        raise UnsupportedLayerError(
            f"{verb} needs layers that keep running statistics, or a source profile.\n" + "\n".join(offending)
        )
    if not sites:
        raise UnsupportedLayerError(_nothing_found(model, verb))
    return sites


def _nothing_found(model: nn.Module, verb: str) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower()})
    if isinstance(model, torch.jit.ScriptModule):
        remedy = "it is a TorchScript module, whose layers cannot be hooked -> pass the module it was made from"
    elif hasattr(model, "_orig_mod"):
        remedy = "it is a compiled module -> pass the module it was made from, and compile the result of freeze()"
    elif kinds:
        remedy = f"its normalization layers ({', '.join(kinds)}) normalize each instance by itself"
    else:
        remedy = "it has no normalization layer"
    return f"{verb} found no layer to adapt in {type(model).__name__}: {remedy}."


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a layer that was called with these arguments: the first one, by position or by keyword."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode that shares every parameter with it and owns all else."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module in model.modules():  # deepcopy refuses tensors with a history, which weight_norm keeps as attributes
        computed = (value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf)
        memo.update((id(value), value.detach()) for value in computed)
    return copy.deepcopy(model, memo).eval()


class Fingerprint(NamedTuple):
    """What tells one model from another: its class and a hash of its names, shapes and values."""

    model_name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.model_name} ({self.digest[:12]})"


def fingerprint(model: nn.Module) -> Fingerprint:
    """Hash of every entry of the model's state_dict (name, shape, dtype and value) but the batch counters."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or name.endswith("num_batches_tracked"):
            continue
        value = value.detach().cpu().contiguous()
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return Fingerprint(type(model).__name__, digest.hexdigest())
