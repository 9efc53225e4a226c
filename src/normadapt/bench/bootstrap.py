"""Intervals for differences between two methods on the same stream: a paired bootstrap of blocks.

Instances that follow one another share batches and statistics, so blocks of consecutive instances are drawn, not
instances; both methods are taken on the same blocks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPLICATES = 1000
BLOCK = 50
_BLOCKS = 8  # at least, where batches allow it: from fewer, differences look surer than they are
LEVEL = 0.95
_NORMAL = 1.959964


@dataclass(frozen=True)
class Interval:
    """A difference in accuracy (a share, not points) and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def block_length(batch_size: int, count: int) -> int:
    """Of a stream of `count` instances: an eighth of a short one, but a batch at least, as it shares its statistics."""
    return max(min(BLOCK, count // _BLOCKS), batch_size)


def blocks(segments: Sequence[int], length: int) -> NDArray[np.int64]:
    """Where blocks start (K,), in instances: they never reach from one segment into the next.

    What is left at a segment's end is a block of its own if it is at least half as long as the others; a shorter
    rest goes to the block before.
    """
    starts: list[int] = []
    begin = 0
    for count in segments:
        number = max(1, math.floor(count / length + 0.5))
        starts += [begin + i * length for i in range(number)]
        begin += count
    return np.array(starts, dtype=np.int64)


def replicates(
    differences: NDArray[np.float64], segments: Sequence[int], length: int, seed: str
) -> tuple[NDArray[np.float64], int]:
    """Bootstrap replicates of mean differences.

    Args:
        differences: One row per comparison (M, L): per instance, right answers of one method minus the other's.
        segments: Lengths of the stream's segments; they sum to L.
        length: Of the blocks.
        seed: The same text draws the same blocks, so that comparisons on one stream stay paired.

    Returns:
        Replicates (M, `REPLICATES`) and the number of blocks.
    """
    starts = blocks(segments, length)
    sums = np.add.reduceat(differences, starts, axis=1)  # (M, K)
    sizes = np.diff(np.append(starts, differences.shape[1]))
    k = len(starts)
    rng = np.random.default_rng(zlib.crc32(f"{seed} {k}".encode()))
    weights = rng.multinomial(k, np.full(k, 1 / k), size=REPLICATES).T.astype(np.float64)  # (K, R)
    return (sums @ weights) / (sizes @ weights), k


def interval(value: float, draws: NDArray[np.float64], number: int) -> Interval:
    """Percentiles of the replicates, widened for few blocks.

    With K blocks the percentiles are too near by about sqrt((K-1)/K) and by the ratio of Student's quantile to the
    normal one (Hesterberg 2015, The American Statistician 69(4), 371-386).

    Args:
        value: The difference itself.
        draws: Its replicates (R,).
        number: Of blocks, K.
    """
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    stretch = 1.0
    if number > 1:
        stretch = _student(number - 1) / _NORMAL * math.sqrt(number / (number - 1))
    return Interval(value, value + stretch * float(low - value), value + stretch * float(high - value))


def _student(degrees: int) -> float:
    """0.975 quantile of Student's t, by its expansion about the normal one; within 2 % from 3 degrees on."""
    z, v = _NORMAL, float(max(degrees, 2))
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
