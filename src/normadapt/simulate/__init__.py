"""Statistic-level experiments: what the higher-order asymptotics bring, measured. `normadapt simulate` runs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normadapt.simulate import coverage, distribution, risk, skewness, tail
from normadapt.simulate.page import page as whole_page
from normadapt.simulate.results import Experiment, Figure, Finding, Progress, Series

__all__ = ["EXPERIMENTS", "Experiment", "Figure", "Finding", "Series", "Simulation", "run_simulation"]

EXPERIMENTS: Mapping[str, Callable[[int, bool, Progress], Experiment]] = {
    "risk": risk.risk,
    "distribution": distribution.distribution,
    "coverage": coverage.coverage,
    "skewness": skewness.skewness,
    "tail": tail.tail,
}
"""The experiments by name, in the order in which they run."""


@dataclass(frozen=True)
class Simulation:
    """What the experiments found.

    Args:
        experiments: One entry per experiment that ran.
        seed: Of all draws; every experiment starts from it anew.
        full: Whether it ran at full size.
        seconds: How long it took, per experiment.
    """

    experiments: tuple[Experiment, ...]
    seed: int
    full: bool
    seconds: Mapping[str, float]

    def findings(self) -> list[Finding]:
        """The table of claims: what was measured about each, in the order of the claims."""
        return sorted((f for e in self.experiments for f in e.findings), key=lambda f: f.claim)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "seed": self.seed,
            "full": self.full,
            "seconds": dict(self.seconds),
            "experiments": {e.name: e.to_dict() for e in self.experiments},
        }

    def to_html(self, version: str) -> str:
        """One page with the claims and all figures, which needs nothing else and fetches nothing."""
        return whole_page(self.experiments, version)


def run_simulation(
    experiments: Sequence[str] | None = None,
    seed: int = 0,
    full: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Simulation:
    """Run the experiments.

    Args:
        experiments: Names from `EXPERIMENTS`; all of them by default.
        seed: Of all draws. The same seed gives the same numbers.
        full: Whether to take ten minutes for less noise, instead of one.
        progress: Called with steps done, steps in all and the experiment's name; steps start anew for each.

    Raises:
        ValueError: If a name is unknown.

    Example:
        >>> found = run_simulation(["distribution"])
        >>> [finding.claim for finding in found.findings()]
        [1, 3, 4]
    """
    names = list(EXPERIMENTS) if experiments is None else list(experiments)
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"experiments must be among {', '.join(EXPERIMENTS)}; got {', '.join(unknown)}")
    found, seconds = [], {}
    for name in names:
        begin = time.perf_counter()

        def advance(done: int, total: int, name: str = name) -> None:
            if progress is not None:
                progress(done, total, name)

        found.append(EXPERIMENTS[name](seed, full, advance))
        seconds[name] = round(time.perf_counter() - begin, 1)
    return Simulation(tuple(found), seed, full, seconds)
