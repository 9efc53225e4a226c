"""The last few instances of a stream, beside the window: a change that single instances are too few to show.

A batch of one tells little about where a stream is. A moving average over the last instances tells as much as a batch
of them would, so that a stream of single images is found to have jumped as one of batches is, a few instances late.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from normadapt.shapes import LocationScale, PerClass
from normadapt.statistics import Composition

REACH = 16.0  # instances that the moving average reaches over; batches of so many speak for themselves
_EVERY = 4.0  # instances from one test to the next


class Recent(NamedTuple):
    """A moving average over the last instances at one site.

    Args:
        moments: Means (2, C) of (x - m_s)/sqrt(v_s + eps) and of ((x - m_s)^2 + eps)/(v_s + eps); (2, 0) for none.
        classes: Predicted class frequencies (K,); empty while unknown.
        variance: Of the average, in units of one instance's.
        since: Instances since it was last compared with the window.
    """

    moments: LocationScale
    classes: PerClass
    variance: float = 0.0
    since: float = 0.0

    def update(self, moments: LocationScale, composition: Composition | None, n: int) -> Recent:
        """The average after a batch of n with these moments (2, C)."""
        if n >= REACH or self.moments.shape != moments.shape:
            return self.begun(moments, n)
        step = -math.expm1(-n / REACH)
        classes = self.classes
        last = None if composition is None else composition.last
        if last is not None:
            classes = last if classes.shape != last.shape else classes.lerp(last, step)
        variance = (1 - step) ** 2 * self.variance + step * step / n
        since = n if self.is_due else self.since + n
        return Recent(self.moments.lerp(moments, step), classes, variance, since)

    def begun(self, moments: LocationScale, n: int) -> Recent:
        """An average of this batch alone."""
        return Recent(moments, self.classes[:0], 1 / n)

    @property
    def is_due(self) -> bool:
        """Whether it is to be compared with the window now."""
        return self.since >= _EVERY

    def share_between(self, composition: Composition | None, length: float) -> float:
        """Inverse number of independent draws of a class that the average is worth, f_B.

        The larger of what the measured correlation and what the predicted classes say: a run of one class is no jump.

        Args:
            composition: Predicted classes of the stream.
            length: Instances that count as one independent draw, see `Correlation`.
        """
        felt = min(1.0, length * self.variance)
        if composition is None or composition.reference is None or self.classes.shape != composition.reference.shape:
            return felt
        return max(felt, min(1.0, composition.imbalance(self.classes)))
