"""The test for a change of domain: what single instances do not show, their mean does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_WINDOWS = (4, 8, 16, 32, 64)
_EVERY = 8


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
    """A distance of recent means from a domain's place, against a threshold.

    Args:
        classes: Covariance (r, r) of the classes' places: a run of one class is no change.
        far: Distance from which a mean is of another domain.
        floor: Variance by which a domain's own place may drift, in natural units.
    """

    def __init__(self, classes: Floats, far: float = 60.0, floor: float = 0.1) -> None:
        self.classes, self.far, self.floor = classes, far, floor

    def until_test(self, stay: int) -> int:
        """Instances to the next test, after `stay` instances of one domain."""
        return next((k - stay for k in _WINDOWS if stay < k), _EVERY - stay % _EVERY)

    def is_due(self, stay: int) -> bool:
        """Whether a test is due after so many instances of one domain, whatever the batch size."""
        return stay in _WINDOWS or (stay > _WINDOWS[-1] and stay % _EVERY == 0)

    def look(self, recent: Floats, stay: int, known: Sequence[tuple[Floats, float]], now: int) -> Verdict | None:
        """The domain that the mean of recent places speaks for; None for the present one.

        Args:
            recent: The last places (m, r).
            stay: Instances of this stay.
            known: Place and uncertainty of each domain.
            now: Which of them is the present one.
        """
        for m in _WINDOWS:
            if m > len(recent):
                break
            mean = recent[-m:].mean(0)
            if self._distance(mean, m, *known[now]) > self.far:
                distances = [self._distance(mean, m, *one) for one in known]
                best = int(np.argmin(distances))
                if best != now and distances[best] < self.far / 3:
                    return Verdict(best, mean, m)
                return Verdict(None, mean, m)
        return None

    def _distance(self, mean: Floats, m: int, place: Floats, uncertainty: float) -> float:
        v = self.classes + (self.floor + 1 / m + uncertainty) * np.eye(len(mean))
        return float((mean - place) @ np.linalg.solve(v, mean - place))
