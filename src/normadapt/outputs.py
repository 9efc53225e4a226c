"""What commands write: folders, files, JSON and the lines that name them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from normadapt.errors import SpecError
from normadapt.version import __version__


def folder(path: Path) -> Path:
    """The folder, made if it is not there: before the work, not after it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"--out: {path} cannot be made a folder ({error.strerror})\n  -> name another") from error
    return path


def check_file(path: Path) -> None:
    """Raise `SpecError` unless a file can be written there; its folder is made."""
    if path.is_dir():
        raise SpecError(
            f"--out: expected a file, got the folder {path}\n  -> name a file in it, such as {path}/it.safetensors"
        )
    folder(path.parent)


def save_statistics(module: nn.Module, path: Path, spec: str) -> None:
    """The running_mean and running_var of every layer, keyed as in the state_dict, as safetensors."""
    buffers = {
        name: value.detach().contiguous()
        for name, value in module.named_buffers(remove_duplicate=False)
        if name.rpartition(".")[2] in ("running_mean", "running_var")
    }
    save_file(buffers, str(path), metadata={"normadapt": __version__, "model": spec})


def plain(value: Any) -> Any:
    """Plain data for strict JSON: numbers that JSON has no word for become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_json(values: Any) -> None:
    """Strict JSON on standard output."""
    typer.echo(json.dumps(values, indent=2, allow_nan=False))


def print_files(console: Console, paths: Iterable[Path]) -> None:
    """Say what was written, one path a line that can be copied."""
    for path in paths:
        console.print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
