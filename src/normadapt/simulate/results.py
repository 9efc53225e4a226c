"""What an experiment hands back: figures, claims and numbers, all plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


def silent(done: int, total: int) -> None:
    """A progress that nobody watches."""


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Args:
        name: What the legend calls it.
        x: Abscissas.
        y: Ordinates; a NaN leaves a gap.
        reference: Whether it is a yardstick (dashed, without colour) and not a result.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    reference: bool = False


@dataclass(frozen=True)
class Figure:
    """A line chart.

    Args:
        title: What is shown.
        text: What is seen, with its numbers.
        x_label: With the unit.
        y_label: With the unit.
        series: The lines.
        log_x: Whether the abscissa is logarithmic.
        log_y: Whether the ordinate is.
        y_max: Where the ordinate is cut off, if it is.
    """

    title: str
    text: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    y_max: float | None = None


@dataclass(frozen=True)
class Finding:
    """What was measured about one claim of the paper.

    Args:
        claim: Number of the claim, 1 to 6 (the project's THEORY lists them).
        question: What was asked.
        measured: The answer, in numbers.
        matters: Whether the higher-order terms change something that matters there.
        verdict: Why, in a few words.
    """

    claim: int
    question: str
    measured: str
    matters: bool
    verdict: str


@dataclass(frozen=True)
class Experiment:
    """Everything one experiment found.

    Args:
        name: As `--experiment` knows it.
        title: What it asks.
        figures: For the page.
        findings: For the table of claims.
        rows: All numbers, one mapping per setting.
        settings: What it ran with.
    """

    name: str
    title: str
    figures: tuple[Figure, ...]
    findings: tuple[Finding, ...]
    rows: tuple[Mapping[str, Any], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)
