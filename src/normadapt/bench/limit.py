"""The limit: each domain's true statistics, measured layer by layer from all its instances."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from normadapt.errors import NormadaptError

_BUDGET = 400_000_000
"""Numbers in the largest activation that may be held at once (1.6 GB); above it, instances are taken in chunks."""
_PROBE = 2


class _Reached(Exception):  # noqa: N818  (not an error: it ends a pass early)
    """The layer that is measured in this pass has been reached; nothing after it is needed."""


def true_statistics(model: nn.Module, inputs: Tensor, *, budget: int = _BUDGET) -> nn.Module:
    """A copy of the model in eval mode whose batch norms hold the statistics of these very inputs.

    A deep layer is measured behind layers that already use theirs: one pass over all inputs as a single batch does
    that. Where such a batch would not fit, every layer takes a pass of its own over chunks, with the same result. Only
    batch norms that keep running statistics are measured; everything else, dropout included, stays in eval mode.

    Args:
        model: In any mode; it is not changed.
        inputs: All instances of a domain (M, ...), M at least 2.
        budget: Numbers in the largest activation that may be held at once.

    Raises:
        NormadaptError: If there are fewer than two instances.
    """
    if len(inputs) < 2:
        raise NormadaptError(f"the limit needs at least two instances of a domain, got {len(inputs)}")
    measured = copy.deepcopy(model).eval()
    with torch.no_grad():
        order, largest = _look(measured, inputs[:_PROBE])
        chunk = max(1, int(budget / largest))
        if len(inputs) <= chunk:
            _in_one_batch(measured, order, inputs)
        else:
            for layer in order:
                _measure(measured, layer, inputs, chunk)
    return measured


def _look(model: nn.Module, probe: Tensor) -> tuple[list[_BatchNorm], float]:
    """The batch norms in the order in which they are reached, and the numbers per instance in the largest output."""
    order: dict[_BatchNorm, None] = {}
    sizes = [probe[0].numel()]

    def look(module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() // len(probe))
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            order[module] = None

    _with_hooks([module.register_forward_hook(look) for module in model.modules()], lambda: model(probe))
    return list(order), float(max(sizes))


def _with_hooks(handles: list[RemovableHandle], run: Callable[[], object]) -> None:
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def _in_one_batch(model: nn.Module, layers: list[_BatchNorm], inputs: Tensor) -> None:
    numbers: dict[nn.Module, int] = {}

    def count(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        numbers[layer] = args[0].numel() // args[0].shape[1]

    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.train()
        layer.momentum = 1.0  # replaces the buffers by the batch's statistics, with which the layer also answers
    _with_hooks([layer.register_forward_pre_hook(count) for layer in layers], lambda: model(inputs))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.eval()
        layer.momentum = momentum
        if layer.running_var is not None:  # torch keeps the unbiased variance; the layer answered with the biased one
            layer.running_var.mul_(1 - 1 / numbers[layer])


def _measure(model: nn.Module, layer: _BatchNorm, inputs: Tensor, chunk: int) -> None:
    """Set one layer's statistics to those of its inputs, given the layers before it."""
    sums: list[Tensor] = []
    pivot = torch.zeros(0) if layer.running_mean is None else layer.running_mean.double()

    def add(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].double().transpose(0, 1).flatten(1) - pivot.unsqueeze(1)  # (C, numbers)
        ones = torch.full_like(pivot, values.shape[1])
        sums.append(torch.stack((ones, values.sum(1), values.square().sum(1))))
        raise _Reached

    def run() -> None:
        for part in inputs.split(chunk):
            try:
                model(part)
            except _Reached:
                continue

    _with_hooks([layer.register_forward_pre_hook(add)], run)
    count, first, second = torch.stack(sums).sum(0)
    mean = first / count
    if layer.running_mean is not None and layer.running_var is not None:
        layer.running_mean.copy_(pivot + mean)
        layer.running_var.copy_(second / count - mean.square())
