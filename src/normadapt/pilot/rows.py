"""Batches by rows: how many there are, some of them, and the rows of two answers put back in order."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RowsError(TypeError):
    """Something that cannot be cut into rows, or two answers that do not fit together."""


def count_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Items in a call's arguments: the length of the first tensor (n, ...) or list of tensors; None without either."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
        if isinstance(value, list) and value and all(isinstance(entry, Tensor) for entry in value):
            return len(value)
    return None


def take_rows(tree: Any, rows: Sequence[int], count: int) -> Any:
    """The same arguments with only these rows of every tensor (and list) that has `count` of them.

    Example:
        >>> take_rows((torch.arange(3), 0.5), [2, 0], 3)
        (tensor([2, 0]), 0.5)
    """
    if len(rows) == count and list(rows) == list(range(count)):
        return tree
    if isinstance(tree, Tensor):
        if tree.dim() == 0 or tree.shape[0] != count:
            return tree
        return tree.index_select(0, torch.tensor(rows, dtype=torch.long, device=tree.device))
    if isinstance(tree, np.ndarray):
        return tree[list(rows)] if tree.ndim and len(tree) == count else tree
    if isinstance(tree, list) and len(tree) == count and not all(isinstance(entry, (int, float)) for entry in tree):
        return [tree[row] for row in rows]
    if isinstance(tree, (tuple, list)):
        return _sequence(tree, [take_rows(value, rows, count) for value in tree])
    if isinstance(tree, Mapping):
        return _like(tree, {key: take_rows(value, rows, count) for key, value in tree.items()})
    if _is_record(tree):
        return _record(tree, {name: take_rows(value, rows, count) for name, value in _parts(tree)})
    return tree


def are_rows(tree: Any, count: int) -> bool:
    """Whether `take_rows` would cut every tensor in it that has any dimension: else rows of it are not items."""
    if isinstance(tree, (Tensor, np.ndarray)):
        return tree.ndim == 0 or tree.shape[0] == count
    if isinstance(tree, list) and len(tree) == count:
        return not _are_columns(tree, count)
    if isinstance(tree, Mapping):
        return all(are_rows(value, count) for value in tree.values())
    if isinstance(tree, (tuple, list)):
        return all(are_rows(value, count) for value in tree)
    return not _is_record(tree) or all(are_rows(value, count) for _, value in _parts(tree))


def put_rows(whole: Any, part: Any, rows: Sequence[int], count: int) -> Any:
    """The answer `whole` (to `count` items) with the answer `part` (to the items `rows`) in these rows' places.

    Raises:
        RowsError: If the two do not have the same structure, or a part of them has no rows.
    """
    if len(rows) == count and list(rows) == list(range(count)):
        return part
    if isinstance(whole, Tensor) and isinstance(part, Tensor):
        if whole.dim() == 0 or whole.shape != (count, *part.shape[1:]) or part.shape[0] != len(rows):
            raise RowsError(f"answers of shape {tuple(whole.shape)} and {tuple(part.shape)} have no common rows")
        places = torch.tensor(rows, dtype=torch.long, device=whole.device)
        return whole.index_copy(0, places, part.to(whole.dtype))
    if isinstance(whole, np.ndarray) and isinstance(part, np.ndarray):
        if whole.ndim == 0 or whole.shape != (count, *part.shape[1:]) or len(part) != len(rows):
            raise RowsError(f"answers of shape {whole.shape} and {part.shape} have no common rows")
        filled = whole.copy()
        filled[list(rows)] = part
        return filled
    if isinstance(whole, Mapping) and isinstance(part, Mapping) and whole.keys() == part.keys():
        return _like(whole, {key: put_rows(value, part[key], rows, count) for key, value in whole.items()})
    if isinstance(whole, list) and isinstance(part, list) and (len(whole), len(part)) == (count, len(rows)):
        merged = list(whole)
        for row, value in zip(rows, part, strict=True):
            merged[row] = value
        return merged
    if isinstance(whole, tuple) and isinstance(part, tuple) and len(whole) == len(part):
        return _sequence(whole, [put_rows(a, b, rows, count) for a, b in zip(whole, part, strict=True)])
    same = type(whole) is type(part) and not isinstance(whole, (Tensor, np.ndarray, Mapping, list, tuple))
    if same and _is_record(whole):
        pairs = zip(_parts(whole), _parts(part), strict=True)
        return _record(whole, {name: put_rows(a, b, rows, count) for (name, a), (_, b) in pairs})
    if same and bool(whole == part):
        return whole
    raise RowsError(f"a {type(whole).__name__} and a {type(part).__name__} cannot be put together by rows")


def bad_rows(tree: Any, count: int, *, masked: bool = False) -> list[bool]:
    """Which of `count` items have a number that is not finite, in any part of an output.

    A part whose first dimension does not count items is everybody's.

    Args:
        tree: The output.
        count: Items.
        masked: Whether minus infinity is no fault: among logits it is a masked class.

    Example:
        >>> bad_rows({"logits": torch.zeros(2, 3), "boxes": torch.tensor([[1.0], [torch.nan]])}, 2)
        [False, True]
        >>> bad_rows([{"boxes": torch.zeros(1, 4)}, {"boxes": torch.full((2, 4), torch.nan)}], 2)
        [False, True]
    """
    if isinstance(tree, np.ndarray):
        if tree.dtype.kind not in "fc":
            return [False] * count
        tree = torch.from_numpy(np.ascontiguousarray(tree, tree.dtype.newbyteorder("=")))
    if isinstance(tree, Tensor):
        if not (tree.is_floating_point() or tree.is_complex()):
            return [False] * count
        found = ~tree.detach().isfinite()
        if masked and tree.is_floating_point():
            found &= tree.detach() != -torch.inf
        if tree.dim() and tree.shape[0] == count:
            rows: list[bool] = found.reshape(count, -1).any(1).tolist() if found.numel() else [False] * count
            return rows
        return [bool(found.any())] * count
    if isinstance(tree, list) and len(tree) == count and not _are_columns(tree, count):
        return [any(bad_rows(entry, 1, masked=masked)) for entry in tree]
    bad = [False] * count
    for part in _members(tree):
        bad = [a or b for a, b in zip(bad, bad_rows(part, count, masked=masked), strict=True)]
    return bad


def tensors(tree: Any) -> Iterator[Any]:
    """All tensors and arrays in it."""
    if isinstance(tree, (Tensor, np.ndarray)):
        yield tree
    else:
        for part in _members(tree):
            yield from tensors(part)


def _are_columns(entries: list[Any], count: int) -> bool:
    """Whether a list as long as the batch holds parts of an answer all the same, each with a row for every item."""
    return all(isinstance(entry, Tensor) and entry.dim() and entry.shape[0] == count for entry in entries)


def _members(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        yield from tree.values()
    elif isinstance(tree, (list, tuple)):
        yield from tree
    elif _is_record(tree):
        yield from (value for _, value in _parts(tree))


def _is_record(tree: Any) -> bool:
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type)


def _parts(tree: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)]


def _record(tree: Any, values: dict[str, Any]) -> Any:
    made = copy.copy(tree)  # its own __init__ may want other arguments
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _sequence(tree: Any, values: list[Any]) -> Any:
    """A tuple or list of the same type: named tuples take their fields one by one, torch's return types at once."""
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def _like(tree: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    if type(tree) is dict:
        return values
    try:
        made: Any = copy.copy(tree)  # a defaultdict's first argument is no mapping
        for key, value in values.items():
            made[key] = value
    except TypeError:  # it cannot be copied, or not be changed
        return type(tree)(values)  # type: ignore[call-arg]
    return made
