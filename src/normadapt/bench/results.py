"""What the bits say: accuracies, regrets, shares of the reachable gain. Pure functions of cells."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from normadapt.bench.bootstrap import Interval, block_length, interval, replicates
from normadapt.bench.cells import Cell
from normadapt.bench.methods import CEILING, LIMIT, OURS, OURS_PROFILE, SOURCE, Method, Role
from normadapt.bench.runner import Plan, TaskInfo

ALL = "all suites"
REACHABLE = 0.02
"""Limit (or ceiling) minus source below which a share of the gain would be noise."""
RULES: tuple[Role, ...] = ("baseline", "gradient")
"""Roles of the rows that ours is compared with."""


@dataclass(frozen=True, order=True)
class Place:
    """Where methods are compared: a stream of a task in batches of n."""

    task: str
    stream: str
    n: int


@dataclass(frozen=True)
class Entry:
    """A method at a place.

    Args:
        place: Where.
        method: Name of the row.
        accuracy: Share of right answers; None if it failed.
        against_ours: Accuracy minus ours (with a profile where there is one).
        against_plain: Accuracy minus that of ours without a profile.
        regret: Best accuracy of any rule here, ours included, minus its own.
        share: Of the gain that the limit has; None where that is next to nothing.
        ceiling_share: Of the gain that the prequential ceiling has, likewise.
        cost: Median time of a batch relative to the plain model's.
        error: What went wrong, or None.
    """

    place: Place
    method: str
    accuracy: float | None
    against_ours: Interval | None = None
    against_plain: Interval | None = None
    regret: float | None = None
    share: float | None = None
    ceiling_share: float | None = None
    cost: float | None = None
    error: str | None = None


class Results:
    """Everything that is reported, computed when asked for.

    Args:
        plan: What was run.
        tasks: On what.
        cells: The answers.
    """

    def __init__(self, plan: Plan, tasks: Sequence[TaskInfo], cells: Iterable[Cell]) -> None:
        self.plan, self.tasks = plan, tuple(tasks)
        self.methods: dict[str, Method] = {method.name: method for method in plan.methods}
        self.cells: dict[Place, dict[str, Cell]] = {}
        for cell in cells:
            place = Place(cell.key.task, cell.key.stream, cell.key.n)
            self.cells.setdefault(place, {})[cell.key.method] = cell
        order = {task.name: i for i, task in enumerate(self.tasks)}
        streams = {name: i for i, name in enumerate(plan.streams)}
        self.places = sorted(self.cells, key=lambda p: (order[p.task], streams[p.stream], p.n))
        self._suite = {task.name: task.suite for task in self.tasks}
        self._accuracies = {
            (place, name): float(cell.bits.mean())
            for place, cells in self.cells.items()
            for name, cell in cells.items()
            if cell.error is None
        }

    # -- who and where -------------------------------------------------------------------------------------------

    @property
    def suites(self) -> list[str]:
        """Names of the suites that were run."""
        return list(dict.fromkeys(task.suite for task in self.tasks))

    @property
    def negative(self) -> set[str]:
        """Suites that are negative controls."""
        return {task.suite for task in self.tasks if task.negative}

    def scope(self, name: str) -> list[list[Place]]:
        """The places of a suite, or of all suites but the negative controls: a list per suite."""
        chosen = [s for s in self.suites if s not in self.negative] if name == ALL else [name]
        return [[p for p in self.places if self._suite[p.task] == suite] for suite in chosen]

    @property
    def scopes(self) -> list[str]:
        """All suites together where there are several that count, then each suite."""
        several = len([s for s in self.suites if s not in self.negative]) > 1
        return [*([ALL] if several else []), *self.suites]

    def rules(self, places: Iterable[Place], *, roles: Sequence[Role] = RULES) -> list[str]:
        """Rows of these roles that answered at every one of the places."""
        places = list(places)
        names = [name for name, method in self.methods.items() if method.role in roles]
        return [name for name in names if all(self.accuracy(place, name) is not None for place in places)]

    def ours(self, places: Iterable[Place]) -> str | None:
        """The row of ours to compare with: with a profile if it was run everywhere here."""
        found = self.rules(places, roles=("ours",))
        return next((name for name in (OURS_PROFILE, OURS) if name in found), found[0] if found else None)

    # -- numbers -------------------------------------------------------------------------------------------------

    def accuracy(self, place: Place, method: str) -> float | None:
        """Share of right answers; None where it was not run or failed."""
        return self._accuracies.get((place, method))

    def mean(
        self, scope: list[list[Place]], method: str, keep: Callable[[Place], bool] = lambda _: True
    ) -> float | None:
        """Mean accuracy over the places that are kept, suite by suite; None unless it answered at all of them."""
        means = []
        for suite in scope:
            kept = [self.accuracy(place, method) for place in suite if keep(place)]
            if any(value is None for value in kept):
                return None
            if kept:
                means.append(statistics.fmean(value for value in kept if value is not None))
        return statistics.fmean(means) if means else None

    def best(
        self, scope: list[list[Place]], keep: Callable[[Place], bool] = lambda _: True
    ) -> tuple[str, float] | None:
        """The best single setting of a baseline over the places that are kept."""
        names = self.rules([place for suite in scope for place in suite if keep(place)])
        found = [(value, name) for name in names if (value := self.mean(scope, name, keep)) is not None]
        return max(found)[::-1] if found else None

    @cached_property
    def entries(self) -> list[Entry]:
        """Every method at every place."""
        return [entry for place in self.places for entry in self._entries(place)]

    def _entries(self, place: Place) -> list[Entry]:
        cells = self.cells[place]
        known = {name: cells[name] for name in self.methods if self._answered(place, name)}
        ours, plain = self.ours([place]), OURS if OURS in known else None
        against = {base: self._intervals(place, list(known), base) for base in {ours, plain} if base is not None}
        accuracies = {name: float(cell.bits.mean()) for name, cell in known.items()}
        rivals = [a for name, a in accuracies.items() if self.methods[name].role in (*RULES, "ours")]
        entries = []
        for name in self.methods:
            if name in known:
                accuracy = accuracies[name]
                cell = known[name]
                entries.append(
                    Entry(
                        place,
                        name,
                        accuracy,
                        against[ours].get(name) if ours else None,
                        against[plain].get(name) if plain else None,
                        max(rivals) - accuracy if rivals else None,
                        share_of_gain(accuracy, accuracies.get(SOURCE), accuracies.get(LIMIT)),
                        share_of_gain(accuracy, accuracies.get(SOURCE), accuracies.get(CEILING)),
                        cell.batch_seconds / cell.plain_seconds if cell.plain_seconds > 0 else None,
                    )
                )
            elif name in cells:
                entries.append(Entry(place, name, None, error=cells[name].error))
        return entries

    def _answered(self, place: Place, name: str) -> bool:
        return self.accuracy(place, name) is not None

    def _intervals(self, place: Place, names: list[str], base: str) -> dict[str, Interval]:
        others = [name for name in names if name != base]
        if not others:
            return {}
        cells = self.cells[place]
        differences = _differences([cells[name] for name in others], cells[base])
        length = block_length(place.n, differences.shape[1])
        draws, k = replicates(differences, cells[base].segments, length, f"{place.task} {place.stream}")
        return _named(others, differences.mean(axis=1), draws, k)

    def average_intervals(self, scope: list[list[Place]], base: str) -> dict[str, Interval]:
        """Mean difference of every row to `base` over the scope.

        The same instances come at several batch sizes: their differences are averaged first, then blocks are drawn, so
        that what they share is not counted twice.
        """
        places = [place for suite in scope for place in suite]
        roles: tuple[Role, ...] = (*RULES, "ours", "ablation", "limit")
        names = [name for name in self.rules(places, roles=roles) if name != base]
        if not names or not places or base not in self.rules(places, roles=roles):
            return {}
        total: NDArray[np.float64] | None = None
        values = np.zeros(len(names))
        blocks = 0
        for suite in scope:
            groups: dict[tuple[str, str, tuple[int, ...]], list[Place]] = {}
            for place in suite:
                key = (place.task, place.stream, self.cells[place][base].segments)
                groups.setdefault(key, []).append(place)
            for (task, stream, segments), members in groups.items():
                differences = np.mean(
                    [_differences([self.cells[p][name] for name in names], self.cells[p][base]) for p in members],
                    axis=0,
                )
                length = block_length(max(p.n for p in members), differences.shape[1])
                draws, k = replicates(differences, segments, length, f"{task} {stream}")
                weight = len(members) / len(suite) / len(scope)
                total = weight * draws if total is None else total + weight * draws
                values += weight * differences.mean(axis=1)
                blocks += k
        return {} if total is None else _named(names, values, total, blocks)


def _differences(cells: Sequence[Cell], base: Cell) -> NDArray[np.float64]:
    """Per instance (M, L): 1 where only the method was right, -1 where only the base was."""
    return np.stack([cell.bits for cell in cells]).astype(np.float64) - base.bits


def _named(
    names: Sequence[str], values: NDArray[np.float64], draws: NDArray[np.float64], number: int
) -> dict[str, Interval]:
    """An interval of each row; of a single block none, as nothing says how far it may be off."""
    if number < 2:
        return {}
    return {name: interval(float(v), d, number) for name, v, d in zip(names, values, draws, strict=True)}


def share_of_gain(accuracy: float | None, source: float | None, limit: float | None) -> float | None:
    """What part of the way from source to a limit a method has come; None where that way is next to nothing."""
    if accuracy is None or source is None or limit is None or limit - source < REACHABLE:
        return None
    return (accuracy - source) / (limit - source)
