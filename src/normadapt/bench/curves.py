"""Accuracy over time, in bins, for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from normadapt.bench.cells import Bits, Cell
from normadapt.bench.results import Place, Results

OVER_TIME = ("continual", "continual-runs", "gradual", "mixed", "clean", "long")
"""Streams that one model answers from beginning to end."""
_BINS = 72
_LEAST = 25  # instances a bin


@dataclass(frozen=True)
class Curves:
    """All methods along one stream.

    Args:
        place: Which stream, of which task, in batches of what size.
        bin: Instances per bin; the last may have fewer.
        length: Of the stream.
        marks: Where a domain begins, in instances, and its name.
        lines: Share of right answers in each bin, by method.
    """

    place: Place
    bin: int
    length: int
    marks: tuple[tuple[int, str], ...]
    lines: Mapping[str, tuple[float, ...]]


def curves(results: Results) -> list[Curves]:
    """One for every place whose stream runs through."""
    return [_curves(results, place) for place in results.places if place.stream in OVER_TIME]


def _curves(results: Results, place: Place) -> Curves:
    cells = {name: cell for name, cell in results.cells[place].items() if cell.error is None}
    length = max((len(cell.bits) for cell in cells.values()), default=0)
    width = max(_LEAST, -(-length // _BINS))
    lines = {name: binned(cells[name].bits, width) for name in results.methods if name in cells}
    marks = next((_marks(cell) for cell in cells.values()), ())
    return Curves(place, width, length, marks, lines)


def binned(bits: Bits, width: int) -> tuple[float, ...]:
    """Means of consecutive bins of so many instances; a rest of less than half a bin joins the one before."""
    number = max(1, math.floor(len(bits) / width + 0.5))
    starts = np.arange(number) * width
    counts = np.diff(np.append(starts, len(bits)))
    return tuple((np.add.reduceat(bits.astype(np.float64), starts) / counts).tolist())


def _marks(cell: Cell) -> tuple[tuple[int, str], ...]:
    """Where another shift begins; the severities of a ramp are one."""
    marks, begin = [], 0
    for name, group in groupby(cell.visits, key=lambda visit: _shift(visit[0])):
        marks.append((begin, name))
        begin += sum(count for _, count in group)
    return tuple(marks)


def _shift(domain: str) -> str:
    """A domain's name without its severity; nothing for a mixture of several."""
    return "" if "+" in domain else domain.rstrip("0123456789").rstrip("/-_ ") or domain
