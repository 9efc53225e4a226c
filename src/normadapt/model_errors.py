"""What torch said when a command called the user's model with data that do not fit it, told in a paragraph."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from normadapt.layers.batches import run_model, split_item
from normadapt.profiles._profile_source import _Source

_PACKAGE = Path(__file__).parent
_TORCH = Path(torch.__file__).parent
_CALLS: Mapping[CodeType, Callable[[Mapping[str, Any]], Any]] = {
    run_model.__code__: lambda names: split_item(names["item"]),
    _Source._run.__code__: lambda names: names["arguments"],
}
"""The functions of ours that call a model with data, and how its arguments are found among their names."""

# of ours, from which a model is called
_FILES = {"_adapt.py", "_profile_source.py", "batches.py", "forward.py", "start.py"}


def told(error: BaseException) -> str | None:
    """Two or three lines on an error that torch raised within a call of the user's model; None for every other error.

    Not for one of our own hooks within the call, nor for one that the model's own code raised: those need a traceback.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    calls = [index for index, frame in enumerate(frames) if frame.f_code in _CALLS]
    if not calls or _TORCH not in Path(frames[-1].f_code.co_filename).parents:
        return None
    call = calls[-1]
    ours = [path for frame in frames[call:] if _PACKAGE in (path := Path(frame.f_code.co_filename)).parents]
    if ours[-1].name not in _FILES:
        return None
    arguments = _CALLS[frames[call].f_code](frames[call].f_locals)
    where = next((place for place in reversed(traceback.extract_tb(error.__traceback__)) if _is_users(place)), None)
    line = "" if where is None else f"\n  in {where.filename}, line {where.lineno}"
    return (
        f"MODEL raised {type(error).__name__} for {_described(*arguments)}: {error}{line}\n"
        "  -> does DATA yield what MODEL takes?"
    )


def _is_users(place: traceback.FrameSummary) -> bool:
    path = Path(place.filename)
    return _PACKAGE not in path.parents and "site-packages" not in path.parts


def _described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    named: Iterable[tuple[str, Any]] = [*(("", a) for a in args), *((f"{k} ", v) for k, v in kwargs.items())]
    parts = [
        f"{name}{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
        for name, value in named
        if isinstance(value, Tensor)
    ]
    return "a batch of shape " + ", ".join(parts) if parts else "a batch without tensors"
