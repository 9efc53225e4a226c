"""A line per method: what it reaches on average, where it is worst, what it costs, how fast it is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from normadapt.bench.bootstrap import Interval
from normadapt.bench.methods import CEILING, LIMIT, OURS, SOURCE
from normadapt.bench.results import Entry, Place, Results, share_of_gain
from normadapt.bench.speed import Jump, jumps, recovery


@dataclass(frozen=True)
class Summary:
    """A method over all streams and batch sizes of a suite, or over all suites. Every figure is None where unknown.

    Args:
        method: Name of the row.
        accuracy: Mean over places; over `all suites` the mean of the suites' means.
        by_size: The same at each batch size.
        by_stream: The same for each stream.
        against_ours: Mean difference to ours.
        against_plain: Mean difference to ours without a profile.
        regret: Mean regret.
        worst: Largest regret, and where.
        worst_place: Its place.
        clean_loss: Source minus method on clean data, at each batch size.
        share: Of the gain that the limit has: of mean accuracies, not a mean of shares.
        ceiling_share: Of the gain that the prequential ceiling has, likewise.
        cost: Median over places of the cost relative to the plain model, at each batch size.
        recovery: Batches until 0.9 of the limit's accuracy after a jump, at each batch size; inf if never.
        failed: Number of places where it failed.
    """

    method: str
    accuracy: float | None = None
    by_size: Mapping[int, float] = field(default_factory=dict)
    by_stream: Mapping[str, float] = field(default_factory=dict)
    against_ours: Interval | None = None
    against_plain: Interval | None = None
    regret: float | None = None
    worst: float | None = None
    worst_place: Place | None = None
    clean_loss: Mapping[int, float] = field(default_factory=dict)
    share: float | None = None
    ceiling_share: float | None = None
    cost: Mapping[int, float] = field(default_factory=dict)
    recovery: Mapping[int, float] = field(default_factory=dict)
    failed: int = 0


def summarize(results: Results, name: str) -> list[Summary]:
    """Every row over a suite, or over `results.ALL`; rows that were not run there are left out."""
    scope = results.scope(name)
    places = [place for suite in scope for place in suite]
    here = set(places)
    by_method: dict[str, list[Entry]] = {}
    for entry in results.entries:
        if entry.place in here:
            by_method.setdefault(entry.method, []).append(entry)
    ours = results.ours(places)
    against_ours = {} if ours is None else results.average_intervals(scope, ours)
    against_plain = against_ours if ours == OURS else results.average_intervals(scope, OURS)
    source, limit, ceiling = (results.mean(scope, name) for name in (SOURCE, LIMIT, CEILING))
    found = []
    for method, entries in by_method.items():
        failed = sum(entry.error is not None for entry in entries)
        mean = results.mean(scope, method)
        if mean is None:
            if failed:
                found.append(Summary(method, failed=failed))
            continue
        regrets = {entry.place: entry.regret for entry in entries if entry.regret is not None}
        worst = max(regrets, key=lambda place: regrets[place]) if regrets else None
        found.append(
            Summary(
                method,
                mean,
                by_size=_means(results, scope, method, results.plan.batch_sizes, lambda p: p.n),
                by_stream=_means(results, scope, method, results.plan.streams, lambda p: p.stream),
                against_ours=against_ours.get(method),
                against_plain=against_plain.get(method),
                regret=statistics.fmean(regrets.values()) if regrets else None,
                worst=None if worst is None else regrets[worst],
                worst_place=worst,
                clean_loss=_clean_loss(results, scope, method),
                share=share_of_gain(mean, source, limit),
                ceiling_share=share_of_gain(mean, source, ceiling),
                cost=_costs(entries),
                recovery=_recovery(results, places, method),
            )
        )
    order = list(results.methods)
    return sorted(found, key=lambda s: order.index(s.method))


def _means(
    results: Results, scope: list[list[Place]], method: str, values: Iterable[Any], of: Callable[[Place], Any]
) -> dict[Any, float]:
    found = {value: results.mean(scope, method, lambda p, value=value: of(p) == value) for value in values}  # type: ignore[misc]
    return {value: mean for value, mean in found.items() if mean is not None}


def _clean_loss(results: Results, scope: list[list[Place]], method: str) -> dict[int, float]:
    losses = {}
    for n in results.plan.batch_sizes:

        def keep(place: Place, n: int = n) -> bool:
            return place.stream == "clean" and place.n == n

        source, own = results.mean(scope, SOURCE, keep), results.mean(scope, method, keep)
        if source is not None and own is not None:
            losses[n] = source - own
    return losses


def _costs(entries: Iterable[Entry]) -> dict[int, float]:
    by_size: dict[int, list[float]] = {}
    for entry in entries:
        if entry.cost is not None:
            by_size.setdefault(entry.place.n, []).append(entry.cost)
    return {n: statistics.median(costs) for n, costs in by_size.items()}


def _recovery(results: Results, places: Iterable[Place], method: str) -> dict[int, float]:
    """From all jumps of the continual streams, at each batch size."""
    found: dict[int, list[Jump]] = {}
    for place in places:
        cells = results.cells[place]
        if place.stream == "continual" and all(name in cells for name in (method, SOURCE, LIMIT)):
            found.setdefault(place.n, []).extend(jumps(cells[method], cells[SOURCE], cells[LIMIT]))
    return {n: batches for n, seen in found.items() if (batches := recovery(seen, n)) is not None}
