"""What a run leaves behind, as it goes: one line per cell in an append-only file, so that a run can be resumed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from normadapt.bench.closure import digest
from normadapt.bench.methods import Method
from normadapt.errors import NormadaptError

Bits: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True)
class Key:
    """What a cell is the answer to. Two runs with equal keys would give equal bits.

    Args:
        task: Name of the task, the suite's name first.
        stream: Name of the stream.
        n: Batch size.
        method: Name of the method.
        setting: All its hyper-parameters, as text.
        split: "report" or "dev".
        seed: Of all draws.
        scale: Of the streams' lengths.
        fingerprint: Of the code that gave the answer.
    """

    task: str
    stream: str
    n: int
    method: str
    setting: str
    split: str
    seed: int
    scale: float
    fingerprint: str


@dataclass(frozen=True)
class Cell:
    """A method's answers to one stream in batches of n.

    Args:
        key: What was asked.
        bits: Right or wrong, one per instance (L,), in the order of the stream; empty if it failed.
        segments: Instances of each part met with a fresh model.
        visits: What came one after another: (domain, instances).
        seconds: Processor time in the method's calls.
        batch_seconds: Median processor time of a call with a full batch.
        plain_seconds: Median time of the plain model in eval mode for the same, measured beside it.
        error: What went wrong, in a line; None if nothing did.
    """

    key: Key
    bits: Bits
    segments: tuple[int, ...]
    visits: tuple[tuple[str, int], ...]
    seconds: float
    batch_seconds: float
    plain_seconds: float
    error: str | None = None

    def to_line(self) -> str:
        """One line of JSON."""
        values: dict[str, Any] = {**self.__dict__, "key": self.key.__dict__, "count": len(self.bits)}
        values["bits"] = base64.b64encode(np.packbits(self.bits).tobytes()).decode()
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> Cell:
        """What `to_line` wrote."""
        values = json.loads(line)
        packed = np.frombuffer(base64.b64decode(values["bits"]), dtype=np.uint8)
        bits = np.unpackbits(packed, count=values.pop("count")).astype(np.bool_)
        values["key"] = Key(**values["key"])
        values["segments"] = tuple(values["segments"])
        values["visits"] = tuple((str(name), int(count)) for name, count in values["visits"])
        return cls(**{**values, "bits": bits})


def fingerprint(method: Method, suite: str) -> str:
    """Of the code that a method's answers to a suite depend on. Settings are in the key beside it.

    Args:
        method: The row.
        suite: Name of the module of the suite.
    """
    profile = ("normadapt.profiles._profile_source",) if method.uses_profile else ()
    answering = ("normadapt.bench.workshop", "normadapt.bench.streams", suite)
    # Of these only the file itself counts: the workshop imports every method, a suite the demo for its digits, and
    # `adapt` the default rule, with which a baseline has nothing to do.
    ends = ["normadapt.bench.workshop", "normadapt.demo"]
    if method.role not in ("ours", "ablation"):
        ends.append("normadapt.adapted._adapt")
    return digest((*method.make.modules, *profile, *answering), tuple(ends))


def read_cells(path: Path) -> dict[Key, Cell]:
    """The cells of a file, by key; failures and a line cut off by a crash are left out.

    Raises:
        NormadaptError: If a line other than the last cannot be read.
    """
    cells: dict[Key, Cell] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            cell = Cell.from_line(line)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise NormadaptError(
                f"{path}: line {number} is not a cell of this benchmark ({error})\n"
                "  -> remove it, or run without --resume"
            ) from error
        if cell.error is None:
            cells[cell.key] = cell
    return cells


class CellFile:
    """Appends cells, each at once on disk. Nothing is ever removed: of equal keys the last line counts.

    Args:
        path: The file; it is made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text and not text.endswith("\n"):  # a line that a crash has cut off
            path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")

    def append(self, cells: Iterable[Cell]) -> None:
        """Write them and leave nothing in a buffer."""
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(cell.to_line() + "\n" for cell in cells)
