"""Trees of numbers as plain dicts of tensors, and back: how an adapted model's state leaves and returns.

A tree is made of tensors, Python numbers, strings, None, tuples, NamedTuples, dataclasses and dicts. The last sign of a
key tells what a leaf was: nothing for a tensor, "#" for a number, "$" for a string, "~" for None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normadapt.errors import SnapshotError


def _children(tree: Any) -> Iterator[tuple[str, Any]]:
    if is_dataclass(tree):
        yield from ((field.name, getattr(tree, field.name)) for field in fields(tree))
    elif isinstance(tree, Mapping):
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
    if isinstance(tree, (Mapping, tuple, list)) or (is_dataclass(tree) and not isinstance(tree, type)):
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


class Each(tuple[Any, ...]):
    """Pattern of a tuple of any length whose entries are all like this one's first."""

    __slots__ = ()


class EachValue(dict[str, Any]):
    """Pattern of a mapping with any keys whose values are all like this one's only value."""


class _Leaf(NamedTuple):
    """A tensor, and the sign that says what it stands for."""

    sign: str
    value: Tensor


def _leaf(name: str, value: Tensor) -> tuple[str, _Leaf]:
    """The name of a leaf without its sign, and the leaf."""
    return (name[:-1], _Leaf(name[-1], value)) if name.endswith(("#", "$", "~")) else (name, _Leaf("", value))


def rebuild(flat: Mapping[str, Tensor], prefix: str, template: Any) -> Any:
    """The tree stored behind `prefix`; containers take their type from `template` where it has one there.

    Raises:
        SnapshotError: If a part is missing or has another shape than in `template`, or a number is not finite.
    """
    root: dict[str, Any] = {}
    for key, value in flat.items():
        if not key.startswith(prefix):
            continue
        if key[len(prefix) :] in ("", "#", "$", "~"):
            return _grown(_leaf(key, value)[1], prefix, template)
        first, *path = key[len(prefix) :].split("|")
        if first or not path:
            continue  # another's, whose name begins alike
        node = root
        for name in path[:-1]:
            node = node.setdefault(name, {})
            if isinstance(node, _Leaf):
                raise SnapshotError(f"the snapshot has an entry {key!r} below a number or a tensor")
        name, leaf = _leaf(path[-1], value)
        node[name] = leaf
    return _grown(root, prefix, template)


def _grown(node: dict[str, Any] | _Leaf, prefix: str, template: Any) -> Any:
    if isinstance(node, _Leaf):
        return _read(node, prefix, template)
    if isinstance(template, EachValue):
        (like,) = template.values()
        return {key: _grown(value, f"{prefix}|{key}", like) for key, value in node.items()}
    if is_dataclass(template) and not isinstance(template, type):
        found = {key: _grown(node.get(key, {}), f"{prefix}|{key}", value) for key, value in _children(template)}
        return type(template)(**found)
    if template is not None and hasattr(template, "_fields"):
        parts = ((key, node.get(key, {}), value) for key, value in _children(template))
        return type(template)(*(_grown(part, f"{prefix}|{key}", value) for key, part, value in parts))
    if not node and not isinstance(template, (tuple, list, Mapping)):
        raise SnapshotError(f"the snapshot has no entry {prefix!r}")
    if isinstance(template, Each):
        return tuple(_grown(node.get(str(i), {}), f"{prefix}|{i}", template[0]) for i in range(len(node)))
    length = len(template) if isinstance(template, (tuple, list)) else 0
    numbered = all(str(i) in node for i in range(len(node)))
    if numbered and not isinstance(template, Mapping) and len(node) >= length:
        known = [*template, *[None] * (len(node) - length)] if length else [None] * len(node)
        return tuple(_grown(node[str(i)], f"{prefix}|{i}", value) for i, value in enumerate(known))
    if length:
        raise SnapshotError(f"the snapshot has {len(node)} of the {length} entries at {prefix!r}")
    known_keys = template if isinstance(template, Mapping) else {}
    return {key: _grown(node[key], f"{prefix}|{key}", known_keys.get(key)) for key in sorted(node)}


def _read(leaf: _Leaf, key: str, template: Any) -> Any:
    value = leaf.value
    if leaf.sign == "~":
        return None
    if leaf.sign == "$":
        return text({key + "$": value}, key)
    if leaf.sign == "#":
        number = value.item()
        if not math.isfinite(number):
            raise SnapshotError(f"the snapshot holds non-finite numbers at {key!r}")
        return number
    # a finite sum proves it in half the time
    if value.is_floating_point() and not (math.isfinite(float(value.sum())) or bool(value.isfinite().all())):
        raise SnapshotError(f"the snapshot holds non-finite numbers at {key!r}")
    if isinstance(template, Tensor) and template.numel() > 0 and template.shape != value.shape:
        raise SnapshotError(f"the snapshot's {key!r} has shape {tuple(value.shape)}; expected {tuple(template.shape)}")
    return value.clone()


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
