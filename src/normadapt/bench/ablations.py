"""`Track` with one step removed each: what every step is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from normadapt.policies import Policy, Track
from normadapt.policies.belief import Belief
from normadapt.policies.mixed import Window
from normadapt.policies.ways import OWN, TOGETHER

_NEVER = 1e-300
_ALWAYS = 1 - 1e-9


@dataclass(frozen=True)
class NoPredictions(Track):
    """The imbalance of the predicted classes is not used: only the measured correlation bounds what is unknown."""

    def _between_classes(self, composition: Any, *others: Any) -> float:
        return super()._between_classes(None, *others)


@dataclass(frozen=True)
class NoCorrelation(Track):
    """Instances count as independent draws of a class, but for what the predicted classes say of them."""

    def _between_classes(
        self, composition: Any, classes: Any, imbalance: float, correlation: Any, window: Any, n: int, *_: Any
    ) -> float:
        if composition is None or classes.numel() == 0:
            return float(1 / (window.count + n))
        return self._said(composition, imbalance, window, n)


@dataclass(frozen=True)
class NoBelief(Track):
    """The positive part: a site's shift is what its window's distance has above its noise, whatever others saw."""

    def _believe(self, squared: Any, cumulants: Any, source: Any, odds: float) -> Belief:
        excess = [max(q - k1, 0.0) / source.sum_weight[0] for q, (k1, _) in zip(squared, cumulants, strict=True)]
        return Belief((excess[0], excess[1]), odds)


@dataclass(frozen=True)
class NoInstances(Track):
    """All instances of a batch share their statistics."""

    def choose(self, doubts: Any) -> str:
        """Another way where that would be instances' own statistics."""
        way = super().choose(doubts)
        return TOGETHER if way == OWN else way

    def _split(self, scatter: Any, window: Any, evidence: Any, *others: Any) -> tuple[Any, Any]:
        if evidence.way != OWN:
            return scatter, None
        # They are still compared, as what they tell bears on the source, too; of the window nothing is kept.
        return scatter, super()._split(scatter, Window(0.0, 0.0, window.mean), evidence, *others)[1]


@dataclass(frozen=True)
class NoAverage(Track):
    """Small batches are tested for a jump alone, without those before them."""

    def _moved(self, *_: Any) -> bool:
        return False


@dataclass(frozen=True)
class NoSecondReading(Track):
    """A window is weighed without the predicted classes of the batch that it begins with."""

    def reads_again(self, n: int) -> str:
        """Never."""
        return ""


ABLATED: tuple[tuple[str, Policy], ...] = (
    ("Track, no jump test", Track(jump_probability=_NEVER)),
    ("Track, no jumps over batches", NoAverage()),
    ("Track, no second reading", NoSecondReading()),
    ("Track, no window", Track(memory=1.0)),
    ("Track, no significance test", Track(significance=_ALWAYS)),
    ("Track, no predicted classes", NoPredictions()),
    ("Track, no measured correlation", NoCorrelation()),
    ("Track, no belief about shifts", NoBelief()),
    ("Track, no instances of their own", NoInstances()),
    ("Track, no look at the answers", Track(compares=False)),
)
"""Names and policies."""
