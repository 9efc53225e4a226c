"""What is watched, as settings: one frozen dataclass for each signal, with the numbers that an operator may choose.

Statistical guards judge bounded signals by an e-process: they need many items and are wrong with a small, known
probability. Hard guards trip at once. All but the latter compare the adapted model with the source model on the very
same input, so that hard inputs, which both models get wrong, are not held against adapting.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from normadapt.errors import PlanError


@dataclass(frozen=True)
class Guard:
    """What all guards have in common; not used by itself.

    Attributes:
        kind: Its word in a plan file.
        hard: Whether it trips at once, without statistics.
        scale: What a difference of 1 between the models is in units of the signal; margins are in the former. At 0.5
            a signal of 0.5 says that the models are alike.
        measures: What its signal is, in words for people.
    """

    kind: ClassVar[str] = ""
    hard: ClassVar[bool] = False
    scale: ClassVar[float] = 1.0
    measures: ClassVar[str] = "signal"

    @property
    def name(self) -> str:
        """The key of its signal, unique within a plan."""
        return self.kind

    def problems(self) -> list[str]:
        """What is wrong with the settings, for one message about all of a plan."""
        return []

    def __post_init__(self) -> None:
        found = self.problems()
        if found:
            raise PlanError(f"{type(self).__name__}: " + "; ".join(found))


@dataclass(frozen=True)
class _Statistical(Guard):
    margin: float = 0.05

    def problems(self) -> list[str]:
        """As `Guard.problems`."""
        return _outside("margin", self.margin, 0, 1)


@dataclass(frozen=True)
class Disagreement(_Statistical):
    """The adapted model answers another class than the source model, on an item that the source is confident of.

    Blind to items on which the source itself is unsure. Under a strong shift the source is confidently wrong and a good
    adaptation disagrees with it more than in the shadow phase: give the shadow phase the conditions of use, or a
    margin.

    Args:
        margin: How much the rate may rise above the shadow phase's.
        confident: Source confidence from which on an item counts.
    """

    kind: ClassVar[str] = "disagreement"
    measures: ClassVar[str] = "share of another class than the source's, where the source is sure"

    confident: float = 0.8

    def problems(self) -> list[str]:
        """As `Guard.problems`."""
        return [*super().problems(), *_outside("confident", self.confident, 0, 1)]


@dataclass(frozen=True)
class ClassConcentration(_Statistical):
    r"""The adapted model's answers crowd into few classes, more than the source's on the same items do.

    $$ X_t = \tfrac12 \bigl(1 + f^a_{t}(a_t) - f^s_{t}(s_t)\bigr) $$

    where a_t and s_t are the classes that the two models give item t and f their frequencies among the items before it,
    with a memory that decays. A run of one class raises both alike and cancels, whether the shadow phase had seen runs
    or not; a collapse raises only the first.

    Args:
        margin: How much the difference of the frequencies may exceed the shadow phase's.
        memory: Items that the frequencies remember; longer than a run of one class.
    """

    kind: ClassVar[str] = "class_concentration"
    measures: ClassVar[str] = "crowding into few classes beyond the source's"
    scale: ClassVar[float] = 0.5

    margin: float = 0.1
    memory: int = 100

    def problems(self) -> list[str]:
        """As `Guard.problems`."""
        return [*super().problems(), *_outside("memory", self.memory, 1, 1e6, whole=True)]


@dataclass(frozen=True)
class ConfidenceCollapse(_Statistical):
    """The adapted model is much less sure of its answers than it was in the shadow phase, or much surer.

    An item is bad if the adapted model's confidence is below a low quantile of the shadow phase's *and* below the
    source's on this item, or above a high quantile and above the source's. Both directions, because a model that
    collapses to one class is often surer than before, and entropy alone would call that an improvement; the source's
    confidence, because inputs that are harder or easier for both models are nobody's fault. Where more than the tail's
    share of the shadow phase's answers has confidence 1 to float32, only the lower direction is left.

    Args:
        margin: How much the share of bad items may rise above the shadow phase's.
        tail: Share of the shadow phase's confidences beyond each quantile, in (0, 0.5).
    """

    kind: ClassVar[str] = "confidence_collapse"
    measures: ClassVar[str] = "share of confidences far out of the usual"

    tail: float = 0.05

    def problems(self) -> list[str]:
        """As `Guard.problems`."""
        return [*super().problems(), *_outside("tail", self.tail, 0, 0.5, open_ends=True)]


@dataclass(frozen=True)
class Score(_Statistical):
    """A score of your own: what the application itself knows about a bad answer.

    Args:
        margin: How much the mean (the mean difference, if paired) may exceed the shadow phase's.
        function: `function(outputs, inputs)` gives a score in [0, 1] for each item (n,), higher is worse; the function
            itself or, for a plan file, "module:callable". NaN counts as 1, numbers outside [0, 1] as the nearer end.
        name: The key of its signal, to tell several scores apart.
        paired: Judge the difference to the source output's score on the same item. False judges the adapted output's
            score alone, which also works on items that the source does not answer, and also rises when inputs get
            harder for everyone.
    """

    kind: ClassVar[str] = "score"

    function: str | Callable[[Any, Any], Any] = ""
    name: str = "score"
    paired: bool = True

    @property
    def scale(self) -> float:  # type: ignore[override]
        """As `Guard.scale`."""
        return 0.5 if self.paired else 1.0

    @property
    def measures(self) -> str:  # type: ignore[override]
        """As `Guard.measures`."""
        return "score beyond the source's" if self.paired else "score"

    def problems(self) -> list[str]:
        """As `Guard.problems`."""
        found = super().problems()
        if not (isinstance(self.name, str) and self.name and "/" not in self.name):
            found.append(f"name must be a word without '/', got {self.name!r}")
        try:
            self.resolve()
        except PlanError as error:
            found.append(str(error))
        return found

    def resolve(self) -> Callable[[Any, Any], Any]:
        """The function; imported if it is named.

        Raises:
            PlanError: If the name leads to nothing that can be called.
        """
        if callable(self.function):
            return self.function
        module, colon, path = str(self.function).partition(":")
        if not (isinstance(self.function, str) and colon and module and path):
            raise PlanError(f"function must be a function or its name as 'module:callable'; got {self.function!r}")
        try:
            found: Any = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise PlanError(f"function {self.function!r} cannot be imported ({error}) -> check its spelling") from error
        if not callable(found):
            raise PlanError(f"function {self.function!r} is a {type(found).__name__}, which cannot be called")
        return found  # type: ignore[no-any-return]


@dataclass(frozen=True)
class LabelledError(_Statistical):
    r"""When labels arrive: the adapted model is wrong where the source is right, more than the other way round.

    $$ X = \tfrac12 (1 + [\text{adapted wrong}] - [\text{source wrong}]), \qquad m_0 = \tfrac12 (1 + \text{margin}) $$

    Needs no shadow phase: both being wrong alike is the baseline. Labels that did arrive there show bursts.

    Args:
        margin: By how much the adapted model's error may exceed the source's.
    """

    kind: ClassVar[str] = "labelled_error"
    measures: ClassVar[str] = "error rate beyond the source's"
    scale: ClassVar[float] = 0.5

    margin: float = 0.02


@dataclass(frozen=True)
class NonFinite(Guard):
    """An output holds NaN or infinity where the source's does not: trips at the first.

    All tensors of an output are looked at. A logit of minus infinity is a masked class, not a fault.

    Args:
        own_only: Only what adapting did is harm. Where the source's answer is not finite either, as on an input of NaN,
            going back would not help: the source answers the request, `answers not finite` is an event, and the
            statistics are as if it had not come. False trips on any such answer.
    """

    kind: ClassVar[str] = "non_finite"
    hard: ClassVar[bool] = True

    own_only: bool = True


@dataclass(frozen=True)
class VarianceRatio(Guard):
    """A variance in use over the source's, both with the layer's eps, is out of bounds in some channel: trips at once.

    Args:
        low: Least ratio.
        high: Largest ratio.
        every: Items from one look at the statistics to the next; the first batch is always looked at.
    """

    kind: ClassVar[str] = "variance_ratio"
    hard: ClassVar[bool] = True

    low: float = 1e-3
    high: float = 1e3
    every: int = 16

    def problems(self) -> list[str]:
        """As `Guard.problems`."""
        if 0 <= self.low < 1 < self.high <= math.inf:
            return _outside("every", self.every, 1, 1e9, whole=True)
        return [f"low and high must be below and above 1, the source itself; got {self.low!r} and {self.high!r}"]


@dataclass(frozen=True)
class Latency(Guard):
    """Answers take too long: trips when more than half of the last `requests` were over the budget.

    Args:
        seconds: Budget of a request.
        requests: How many are looked back upon; fewer never trip, so that one pause of the machine does not.
    """

    kind: ClassVar[str] = "latency"
    hard: ClassVar[bool] = True

    seconds: float = 1.0
    requests: int = 20

    def problems(self) -> list[str]:
        """As `Guard.problems`."""
        return [
            *_outside("seconds", self.seconds, 0, 1e9, open_ends=True),
            *_outside("requests", self.requests, 1, 1e6, whole=True),
        ]


def _outside(
    name: str, value: Any, low: float, high: float, *, open_ends: bool = False, whole: bool = False
) -> list[str]:
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if number and (low < value < high if open_ends else low <= value <= high):
        return []
    ends = f"({low:g}, {high:g})" if open_ends else f"[{low:g}, {high:g}]"
    return [f"{name} must be a {'whole ' if whole else ''}number in {ends}, got {value!r}"]
