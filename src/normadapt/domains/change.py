"""The test for a change of domain: what single instances do not show, their mean does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_WINDOWS = (4, 8, 16, 32, 64)


class Verdict(NamedTuple):
    """A change of domain.

    Args:
        domain: Position of the known domain that the mean speaks for; None for a new one.
        mean: Mean place (r,) of the window.
        window: Instances in it.
    """

    domain: int | None
    mean: Floats
    window: int


class Change:
    def __init__(self, classes: Floats, far: float = 60.0, floor: float = 0.1) -> None:
        self.classes, self.far, self.floor = classes, far, floor

    def until_test(self, stay: int) -> int:
        for k in (4, 8, 16, 32, 64):
            if stay < k:
                return k - stay
        return 8 - stay % 8

    def is_due(self, stay: int) -> bool:
        return stay in (4, 8, 16, 32) or (stay >= 64 and stay % 8 == 0)

    def look(self, recent: Floats, stay: int, known: Sequence[tuple[Floats, float]], now: int) -> Verdict | None:
        for m in _WINDOWS:
            if m > len(recent):
                break
            mean = recent[-m:].mean(0)

            def distance(place: Floats, uncertainty: float) -> float:
                v = self.classes + (self.floor + 1 / m + uncertainty) * np.eye(len(mean))
                return float((mean - place) @ np.linalg.solve(v, mean - place))

            if distance(*known[now]) > self.far:
                distances = [distance(*k) for k in known]
                best = int(np.argmin(distances))
                if best != now and distances[best] < self.far / 3:
                    return Verdict(best, mean, m)
                return Verdict(None, mean, m)
        return None
