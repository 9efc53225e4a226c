"""The targets that were set before anything was measured, line by line: reached or missed, with the figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from normadapt.bench.methods import SOURCE, TRACK, TRACK_PROFILE
from normadapt.bench.results import ALL, Place, Results

CORRELATED = ("runs", "dirichlet", "continual-runs")
_PROFILED = "fashion-c"
_SIZES = "each batch size's average within 0.3 of the best baseline's"
_MIXED = "mixed: within 1 point of the best baseline"
_EVERY: Callable[[Place], bool] = lambda _place: True  # noqa: E731

_JUDGED = 0.3  # scale from which streams can judge the targets: shorter ones say too little


@dataclass(frozen=True)
class Target:
    """A line of the table.

    Args:
        name: What is asked about.
        setting: "with a profile" or "without a profile".
        wanted: The target, in words.
        measured: The figures, in words.
        reached: Whether it is; None where it cannot be said, because something was not run.
    """

    name: str
    setting: str
    wanted: str
    measured: str
    reached: bool | None


@dataclass(frozen=True)
class _Margin:
    """A figure in points, and where it was found."""

    points: float
    where: str


def can_judge(results: Results) -> bool:
    """Whether the streams are long enough to judge the targets."""
    return results.plan.scale >= _JUDGED


def reservation(results: Results) -> str:
    """What is to be known beside the verdicts."""
    short = "" if can_judge(results) else " These streams are too short to judge them."
    return f"Those with a profile were set for {_PROFILED}.{short}"


def targets(results: Results) -> list[Target]:
    """Every line, in the order in which they were set; figures are points of accuracy.

    Three of those without a profile were set for "all suites": they are asked of every suite by itself and, where
    there are several, of all of them together.
    """
    together = [ALL] if ALL in results.scopes else []
    return [
        _average(results, TRACK_PROFILE, [_PROFILED], 4.0, "at least 4 points above the best single baseline setting"),
        _average(results, TRACK, [_PROFILED], 2.0, f"at least 2 points above it on {_PROFILED}"),
        _average(results, TRACK, _third_party(results), 0.0, "not below it on every other suite"),
        _sizes(results, TRACK_PROFILE, [_PROFILED], 0.0, "each batch size's average above every baseline's"),
        *_each_and(_positive(results), together, lambda s, w: _sizes(results, TRACK, s, -0.3, f"{_SIZES}{w}")),
        _clean(results, TRACK_PROFILE, [_PROFILED], 0.1, [n for n in results.plan.batch_sizes if n >= 4]),
        _clean(results, TRACK_PROFILE, [_PROFILED], 0.3, [n for n in results.plan.batch_sizes if n == 1]),
        _clean(results, TRACK, _positive(results), 0.3, list(results.plan.batch_sizes)),
        _stream(results, TRACK_PROFILE, [_PROFILED], 0.0, "mixed: above every baseline"),
        *_each_and(_positive(results), together, lambda s, w: _stream(results, TRACK, s, -1.0, f"{_MIXED}{w}")),
        _correlated(results, TRACK_PROFILE, [_PROFILED], -0.5),
        *_each_and(_positive(results), together, lambda s, w: _correlated(results, TRACK, s, -1.0, w)),
        _negative(results, TRACK_PROFILE),
        _negative(results, TRACK),
    ]


def _each_and(suites: list[str], together: list[str], line: Callable[[list[str], str], Target]) -> list[Target]:
    """A line about every suite by itself, and one about all of them together where that is something else."""
    return [
        line(suites, ", in every suite" if together else ""),
        *[line([name], f", over {name}") for name in together],
    ]


def _positive(results: Results) -> list[str]:
    return [suite for suite in results.suites if suite not in results.negative]


def _third_party(results: Results) -> list[str]:
    return [suite for suite in _positive(results) if suite != _PROFILED]


def _lead(results: Results, ours: str, suite: str, keep: Callable[[Place], bool] = _EVERY) -> _Margin | None:
    """Ours minus the best single baseline setting over the places that are kept, in points."""
    scope = results.scope(suite)
    if not any(keep(place) for part in scope for place in part):
        return None
    own, best = results.mean(scope, ours, keep), results.best(scope, keep)
    return None if own is None or best is None else _Margin(100 * (own - best[1]), f"{suite}, {best[0]}")


def _verdict(
    name: str, ours: str, wanted: str, found: list[_Margin | None], least: float, *, strictly: bool = False
) -> Target:
    """The smallest margin decides."""
    setting = "with a profile" if ours == TRACK_PROFILE else "without a profile"
    known = [margin for margin in found if margin is not None]
    if not known:
        return Target(name, setting, wanted, "not run", None)
    worst = min(known, key=lambda margin: margin.points)
    shown = round(worst.points, 2)
    reached = shown > least if strictly else shown >= least
    return Target(name, setting, wanted, f"{worst.points:+.2f} ({worst.where})", reached)


def _suites(results: Results, suites: list[str]) -> list[str]:
    return [suite for suite in suites if suite in results.scopes]


def _average(results: Results, ours: str, suites: list[str], least: float, wanted: str) -> Target:
    found = [_lead(results, ours, suite) for suite in _suites(results, suites)]
    return _verdict("average", ours, wanted, found, least)


def _at(margin: _Margin | None, where: str) -> _Margin | None:
    return None if margin is None else _Margin(margin.points, f"{margin.where}, {where}")


def _sizes(results: Results, ours: str, suites: list[str], least: float, wanted: str) -> Target:
    found = [
        _at(_lead(results, ours, suite, lambda p, n=n: p.n == n), f"n = {n}")  # type: ignore[misc]
        for suite in _suites(results, suites)
        for n in results.plan.batch_sizes
    ]
    return _verdict("each batch size", ours, wanted, found, least, strictly=ours == TRACK_PROFILE)


def _gain(results: Results, ours: str, suite: str, keep: Callable[[Place], bool], where: str) -> _Margin | None:
    """Ours minus source, in points."""
    scope = results.scope(suite)
    own, source = results.mean(scope, ours, keep), results.mean(scope, SOURCE, keep)
    return None if own is None or source is None else _Margin(100 * (own - source), f"{suite}, {where}")


def _clean(results: Results, ours: str, suites: list[str], most: float, sizes: list[int]) -> Target:
    found = [
        _gain(results, ours, suite, lambda p, n=n: p.stream == "clean" and p.n == n, f"n = {n}")  # type: ignore[misc]
        for suite in _suites(results, suites)
        for n in sizes
    ]
    which = f" at n = {', '.join(map(str, sizes))}" if len(sizes) < len(results.plan.batch_sizes) else ""
    return _verdict("clean", ours, f"at most {most:g} below source{which}", found, -most)


def _stream(results: Results, ours: str, suites: list[str], least: float, wanted: str) -> Target:
    found = [_lead(results, ours, suite, lambda p: p.stream == "mixed") for suite in _suites(results, suites)]
    return _verdict("mixed", ours, wanted, found, least, strictly=ours == TRACK_PROFILE)


def _correlated(results: Results, ours: str, suites: list[str], least: float, where: str = "") -> Target:
    found = [
        _at(_lead(results, ours, suite, lambda p, n=n: p.stream in CORRELATED and p.n == n), f"n = {n}")  # type: ignore[misc]
        for suite in _suites(results, suites)
        for n in results.plan.batch_sizes
    ]
    wanted = f"at most {-least:g} below the best baseline at each batch size{where}"
    return _verdict("label-correlated", ours, wanted, found, least)


def _negative(results: Results, ours: str) -> Target:
    found = []
    for suite in results.suites:
        for place in [p for part in results.scope(suite) for p in part if suite in results.negative]:
            where = f"{place.stream}, n = {place.n}"
            found.append(_gain(results, ours, suite, lambda p, place=place: p == place, where))  # type: ignore[misc]
    return _verdict("negative controls", ours, "never more than 1 point below source", found, -1.0)
