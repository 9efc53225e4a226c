"""Batches by rows: how many there are, some of them, and the rows of two answers put back in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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
    if isinstance(tree, list) and len(tree) == count and not all(isinstance(entry, (int, float)) for entry in tree):
        return [tree[row] for row in rows]
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(take_rows(value, rows, count) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(take_rows(value, rows, count) for value in tree)
    if isinstance(tree, Mapping):
        return _like(tree, {key: take_rows(value, rows, count) for key, value in tree.items()})
    return tree


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
    if isinstance(whole, Mapping) and isinstance(part, Mapping) and whole.keys() == part.keys():
        return _like(whole, {key: put_rows(value, part[key], rows, count) for key, value in whole.items()})
    if isinstance(whole, list) and isinstance(part, list) and (len(whole), len(part)) == (count, len(rows)):
        merged = list(whole)
        for row, value in zip(rows, part, strict=True):
            merged[row] = value
        return merged
    if isinstance(whole, tuple) and isinstance(part, tuple) and len(whole) == len(part):
        values = [put_rows(a, b, rows, count) for a, b in zip(whole, part, strict=True)]
        return type(whole)(*values) if hasattr(whole, "_fields") else tuple(values)
    if type(whole) is type(part) and not isinstance(whole, (Tensor, Mapping, list, tuple)) and whole == part:
        return whole
    raise RowsError(f"a {type(whole).__name__} and a {type(part).__name__} cannot be put together by rows")


def _like(tree: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    return values if type(tree) is dict else type(tree)(values)  # type: ignore[call-arg]
