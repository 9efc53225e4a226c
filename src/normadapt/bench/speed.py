"""How many batches a method needs after a jump.

Taken from the continual stream, where shift follows shift. Only jumps that hurt are counted: to a shift on which the
source model stays below 0.9 of the limit's accuracy. All of them are laid over one another, and a window slides along
the instances since the jump; recovered is where the method's accuracy in the window first reaches 0.9 of the limit's
in the same window. A window is a batch, or 25 instances where batches are smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from normadapt.bench.cells import Bits, Cell

SHARE = 0.9
WINDOW = 25


class Jump(NamedTuple):
    """What came after a jump: right or wrong for each instance (L,), of a method and of the limit."""

    method: Bits
    limit: Bits


def jumps(method: Cell, source: Cell, limit: Cell) -> list[Jump]:
    """The jumps of a stream that hurt, from the answers of three rows to it."""
    if method.error is not None or source.error is not None or limit.error is not None:
        return []
    found, begin = [], 0
    for _, count in method.visits:
        part = slice(begin, begin + count)
        if source.bits[part].mean() < SHARE * limit.bits[part].mean():
            found.append(Jump(method.bits[part], limit.bits[part]))
        begin += count
    return found


def recovery(seen: Iterable[Jump], batch_size: int) -> float | None:
    """Batches after which a method is back at 0.9 of the limit: 0 if at once, inf if not before the next jump.

    Args:
        seen: Jumps, of streams with batches of `batch_size`.
        batch_size: Instances per batch.

    Returns:
        The number of batches that passed before the first window that is good enough; None without jumps.
    """
    seen = list(seen)
    length = max((len(jump.method) for jump in seen), default=0)
    if length == 0:
        return None
    method, limit = (_right_by_position(bits, length) for bits in zip(*seen, strict=True))
    window = max(batch_size, WINDOW)
    for batch in range(max(0, length - window) // batch_size + 1):
        part = slice(batch * batch_size, batch * batch_size + window)
        if method[part].sum() >= SHARE * limit[part].sum():
            return float(batch)
    return math.inf


def _right_by_position(bits: Iterable[Bits], length: int) -> NDArray[np.int64]:
    """Right answers at each position since the jump (length,), summed over jumps."""
    total = np.zeros(length, dtype=np.int64)
    for jump in bits:
        total[: len(jump)] += jump
    return total
