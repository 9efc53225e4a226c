"""Trees of numbers as plain dicts of tensors, and back: how an adapted model's state leaves and returns.

A tree is made of tensors, Python numbers, strings, None, tuples, NamedTuples and dicts. The last sign of a key tells
what a leaf was: nothing for a tensor, "#" for a number, "$" for a string, "~" for None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from normadapt.errors import SnapshotError


def _children(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        yield from ((str(key), value) for key, value in tree.items())
    elif hasattr(tree, "_fields"):
        yield from zip(tree._fields, tree, strict=True)
    else:
        yield from ((str(index), value) for index, value in enumerate(tree))


def flatten(tree: Any, prefix: str) -> dict[str, Tensor]:
    """Every leaf of `tree` as a tensor of its own, keyed by its path behind `prefix`."""
    if isinstance(tree, Tensor):
        return {prefix: tree.detach().clone()}
    if tree is None:
        return {prefix + "~": torch.zeros(0, dtype=torch.uint8)}
    if isinstance(tree, str):
        return {prefix + "$": torch.tensor(list(tree.encode("utf-8", "surrogatepass")), dtype=torch.uint8)}
    if isinstance(tree, float):
        return {prefix + "#": torch.tensor(tree, dtype=torch.float64)}
    if isinstance(tree, (bool, int)):
        return {prefix + "#": torch.tensor(tree)}
    if isinstance(tree, (Mapping, tuple, list)):
        flat: dict[str, Tensor] = {}
        for key, value in _children(tree):
            flat.update(flatten(value, f"{prefix}|{key}"))
        return flat
    raise SnapshotError(
        f"a policy's state holds a {type(tree).__name__} at {prefix!r}; expected tensors, numbers, strings, None, "
        "tuples, NamedTuples or dicts"
    )


def text(flat: Mapping[str, Tensor], key: str) -> str:
    """The string that `flatten` stored under `key`."""
    if key + "$" not in flat:
        raise SnapshotError(f"the snapshot has no entry {key!r}: expected what AdaptedModel.snapshot() returned")
    return bytes(flat[key + "$"].tolist()).decode("utf-8", "surrogatepass")


def rebuild(flat: Mapping[str, Tensor], prefix: str, template: Any) -> Any:
    """The tree stored behind `prefix`; containers take their type from `template` where it has one there.

    Raises:
        SnapshotError: If a part is missing or has another shape than in `template`, or a number is not finite.
    """
    if prefix in flat:
        return _checked(flat[prefix], prefix, template).clone()
    if prefix + "#" in flat:
        number = flat[prefix + "#"].item()
        if not math.isfinite(number):
            raise SnapshotError(f"the snapshot holds non-finite numbers at {prefix!r}")
        return number
    if prefix + "$" in flat:
        return text(flat, prefix)
    if prefix + "~" in flat:
        return None
    flat = {key: value for key, value in flat.items() if key.startswith(prefix + "|")}  # what the children look through
    if hasattr(template, "_fields"):
        return type(template)(*(rebuild(flat, f"{prefix}|{key}", value) for key, value in _children(template)))
    keys = {_child_name(key, prefix) for key in flat}
    if not keys and not isinstance(template, (tuple, list, Mapping)):
        raise SnapshotError(f"the snapshot has no entry {prefix!r}")
    length = len(template) if isinstance(template, (tuple, list)) else 0
    if keys == {str(i) for i in range(len(keys))} and not isinstance(template, Mapping) and len(keys) >= length:
        known = [*template, *[None] * (len(keys) - length)] if length else [None] * len(keys)
        return tuple(rebuild(flat, f"{prefix}|{i}", value) for i, value in enumerate(known))
    if length:
        raise SnapshotError(f"the snapshot has {len(keys)} of the {length} entries at {prefix!r}")
    known_keys = template if isinstance(template, Mapping) else {}
    return {key: rebuild(flat, f"{prefix}|{key}", known_keys.get(key)) for key in sorted(keys)}


def _checked(value: Tensor, key: str, template: Any) -> Tensor:
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise SnapshotError(f"the snapshot holds non-finite numbers at {key!r}")
    if isinstance(template, Tensor) and template.numel() > 0 and template.shape != value.shape:
        raise SnapshotError(f"the snapshot's {key!r} has shape {tuple(value.shape)}; expected {tuple(template.shape)}")
    return value


def _child_name(key: str, prefix: str) -> str:
    return key[len(prefix) + 1 :].split("|", 1)[0].rstrip("#$~")


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same tree with every tensor replaced by `function` of it."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(value, function) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree
