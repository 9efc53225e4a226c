"""What a loader may yield, and how a model is called on it: one place for all that walk over data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def split_item(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keywords with which a model is called on a loader's item.

    Args:
        item: A tensor; a tuple or list whose first element is the input (the rest, such as labels, is not
            used); or a mapping for models that are called with keywords.

    Raises:
        TypeError: If the item is none of these.
    """
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, (tuple, list)):
        if not item:
            raise TypeError("a loader yielded an empty tuple or list; expected its first element to be the input")
        item = item[0]
        if isinstance(item, Mapping):
            return (), dict(item)
    if isinstance(item, Tensor):
        return (item,), {}
    raise TypeError(
        f"a loader yielded {type(item).__name__}; expected a tensor, a tuple or list whose first element is the "
        "input tensor, or a dict of keyword arguments"
    )


def run_model(model: nn.Module, item: Any) -> Any:
    """Call `model` on a loader's item, on the device where the model's parameters are."""
    args, kwargs = moved_item(split_item(item), model)
    return model(*args, **kwargs)


def moved_item(
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]], model: nn.Module
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keywords on the device where the model's parameters are."""
    args, kwargs = arguments
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    if device is None:
        return args, dict(kwargs)
    return tuple(_moved(a, device) for a in args), {name: _moved(value, device) for name, value in kwargs.items()}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def batch_length(item: Any) -> int:
    """Number of instances in a loader's item: the first dimension of its first tensor, 0 if there is none."""
    args, kwargs = split_item(item)
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 0]
    return int(tensors[0].shape[0]) if tensors else 0


def split_length(item: Any, bad: Tensor | None) -> tuple[int, int]:
    """Number of instances in an item that were finite at every site, and of those that were not.

    Args:
        item: A loader's item.
        bad: Mask (n,) of the instances that some site left out; None for none.
    """
    length = batch_length(item)
    lost = int(bad.sum()) if bad is not None and bad.shape[0] == length else 0
    return length - lost, lost


def check_loader(loader: Any, verb: str) -> None:
    """Raise `TypeError` for a tensor or module where batches are wanted: a tensor would be walked row by row."""
    if isinstance(loader, Tensor):
        raise TypeError(f"{verb} needs batches, got one tensor of shape {tuple(loader.shape)} -> pass a list: [tensor]")
    if not isinstance(loader, Iterable):
        raise TypeError(f"{verb} needs an iterable of batches, got {type(loader).__name__}")


def check_model(model: Any, verb: str) -> None:
    """Raise `TypeError` unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} needs a torch.nn.Module, got {type(model).__name__}")


def iterates_once(loader: Iterable[Any]) -> bool:
    """Whether `loader` is an iterator (a generator, a file, a map): used up after one pass."""
    return isinstance(loader, Iterator)  # asking iter(loader) could already use it up
