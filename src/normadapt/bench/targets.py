"""The targets that were set before the rule was written, line by line: reached or missed, with the figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType

from normadapt.bench.methods import LIMIT, OURS, OURS_PROFILE, SOURCE
from normadapt.bench.results import Place, Results

_PROFILED = "fashion-c"
_MIXED = (_PROFILED, "usps-mnist", "usps-digits")
_HARD = re.compile("contrast|noise|blur")
_FULL = 64  # batch size from which streams have their full length
_JUDGED = 0.3  # scale from which streams can judge the targets: shorter ones say too little

BEFORE = MappingProxyType({
    (_PROFILED, OURS_PROFILE): 64.69, (_PROFILED, OURS): 62.16, ("activity", OURS): 86.06,
    ("usps-mnist", OURS): 58.86, ("usps-digits", OURS): 64.14,
})  # fmt: skip
"""Averages of the rule before, `Track`: docs/BENCHMARKS.md of 2026-11-28 (report, seed 1, scale 0.6)."""
BEFORE_SIZES = MappingProxyType({1: 62.3, 4: 63.3, 16: 65.0, 64: 66.6, 200: 66.4})
"""The same with a profile on fashion-c, by batch size."""
BEFORE_STREAMS = MappingProxyType({
    "iid": 62.0, "continual": 60.6, "gradual": 69.1, "mixed": 54.5, "runs": 59.2, "dirichlet": 64.1,
    "continual-runs": 55.5, "clean": 92.5,
})  # fmt: skip
"""The same by stream."""


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
    return (
        "Track is the rule before ours; its figures are those of 2026-11-28 (report, seed 1, scale 0.6), over the "
        f"streams that there were. Small batches have shorter streams, of which starting takes a larger part.{short}"
    )


def targets(results: Results) -> list[Target]:
    """Every line, in the order in which they were set; figures are points of accuracy."""
    lines = [
        _line("average", OURS_PROFILE, "1 above Track on fashion-c", [_before(results, _PROFILED, OURS_PROFILE)], 1.0),
        _line("mixed", OURS_PROFILE, "3 above Track on fashion-c", [_stream(results, "mixed")], 3.0),
        _line(
            "each stream", OURS_PROFILE, "not below Track on fashion-c", map(_of(results, _stream), BEFORE_STREAMS), 0.0
        ),
        _line(
            "each batch size", OURS_PROFILE, "not below Track on fashion-c", map(_of(results, _size), BEFORE_SIZES), 0.0
        ),
    ]
    usps = [_before(results, suite, OURS) for suite in _MIXED[1:]]
    every = [_before(results, suite, name) for suite, name in BEFORE if name == OURS]
    lines.append(_line("average", OURS, "1 above Track on the USPS suites", usps, 1.0))
    lines.append(_line("average", OURS, "no suite below Track", every, 0.0))
    for ours in (OURS_PROFILE, OURS):
        positive = [suite for suite in results.suites if suite not in results.negative]
        sizes = [_small(results, ours, suite) for suite in positive]
        mixed = [_mixed(results, ours, suite) for suite in _MIXED]
        clean = [_gain(results, ours, s, "clean", n) for s in positive for n in results.plan.batch_sizes]
        majority = [_gain(results, ours, s, "imbalanced-clean", n) for s in positive for n in (1, 16)]
        negative = [_negative(results, ours, suite) for suite in sorted(results.negative)]
        lines += [
            _line("n = 1 against n = 64", ours, "at most 1 farther below the limit", sizes, -1.0),
            _line("mixed", ours, "at most 3 below the limit, from n = 64 on", mixed, -3.0),
            _line("clean", ours, "at most 0.1 below source", clean, -0.1),
            _line("clean, 90 % one class", ours, "at most 0.3 below source at n = 1 and 16", majority, -0.3),
            _line("negative controls", ours, "at most 0.5 below source on average", negative, -0.5),
        ]
    hard = "40 above source under contrast, noise and blur on fashion-c"
    third = "a third of the limit's gain above source"
    lines.append(_line("shifted, 90 % one class", OURS_PROFILE, hard, [_imbalanced(results)], 40.0))
    lines.append(_line("activity", OURS_PROFILE, third, [_third(results)], 0.0))
    return lines


def _line(name: str, ours: str, wanted: str, found: Iterable[_Margin | None], least: float) -> Target:
    """The smallest margin decides."""
    setting = "with a profile" if ours == OURS_PROFILE else "without a profile"
    known = [margin for margin in found if margin is not None]
    if not known:
        return Target(name, setting, wanted, "not run", None)
    worst = min(known, key=lambda margin: margin.points)
    points = round(worst.points, 2)
    return Target(name, setting, wanted, f"{points:+.2f} ({worst.where})", points >= least)


def _mean(results: Results, method: str, suite: str, keep: Callable[[Place], bool]) -> float | None:
    """Mean accuracy over the places of a suite that are kept, in points."""
    value = results.mean(results.scope(suite), method, keep)
    return None if value is None else 100 * value


def _difference(own: float | None, other: float | None, where: str) -> _Margin | None:
    return None if own is None or other is None else _Margin(own - other, where)


def _before(
    results: Results, suite: str, ours: str, keep: Callable[[Place], bool] = lambda _: True, before: float | None = None
) -> _Margin | None:
    """Ours minus the rule before, over the streams and batch sizes that it was measured on."""
    plan = results.plan
    if not set(plan.streams) >= set(BEFORE_STREAMS) or not set(plan.batch_sizes) >= set(BEFORE_SIZES):
        return None
    if plan.split != "report":
        return None
    same = _mean(results, ours, suite, lambda p: p.stream in BEFORE_STREAMS and p.n in BEFORE_SIZES and keep(p))
    return _difference(same, BEFORE[suite, ours] if before is None else before, suite)


def _of(results: Results, line: Callable[..., _Margin | None]) -> Callable[..., _Margin | None]:
    return lambda value: line(results, value)


def _stream(results: Results, name: str) -> _Margin | None:
    found = _before(results, _PROFILED, OURS_PROFILE, lambda p: p.stream == name, BEFORE_STREAMS[name])
    return found and _Margin(found.points, name)


def _size(results: Results, n: int) -> _Margin | None:
    found = _before(results, _PROFILED, OURS_PROFILE, lambda p: p.n == n, BEFORE_SIZES[n])
    return found and _Margin(found.points, f"n = {n}")


def _below_limit(results: Results, ours: str, suite: str, keep: Callable[[Place], bool]) -> _Margin | None:
    return _difference(_mean(results, ours, suite, keep), _mean(results, LIMIT, suite, keep), suite)


def _small(results: Results, ours: str, suite: str) -> _Margin | None:
    """How much farther below the limit n = 1 is than n = 64."""
    one, many = (_below_limit(results, ours, suite, lambda p, n=n: p.n == n) for n in (1, 64))  # type: ignore[misc]
    return None if one is None or many is None else _Margin(one.points - many.points, suite)


def _mixed(results: Results, ours: str, suite: str) -> _Margin | None:
    return _below_limit(results, ours, suite, lambda p: p.stream == "mixed" and p.n >= _FULL)


def _gain(results: Results, ours: str, suite: str, stream: str | None = None, n: int | None = None) -> _Margin | None:
    """Ours minus source."""

    def keep(place: Place) -> bool:
        return stream in (None, place.stream) and n in (None, place.n)

    where = suite if n is None else f"{suite}, n = {n}"
    return _difference(_mean(results, ours, suite, keep), _mean(results, SOURCE, suite, keep), where)


def _negative(results: Results, ours: str, suite: str) -> _Margin | None:
    """Ours minus source over a negative control, with the cell where most is lost."""
    found = _gain(results, ours, suite)
    if found is None:
        return None
    differences = [
        (100 * (own - source), f"{place.stream}, n = {place.n}")
        for part in results.scope(suite)
        for place in part
        if (own := results.accuracy(place, ours)) is not None
        and (source := results.accuracy(place, SOURCE)) is not None
    ]
    points, cell = min(differences)
    return _Margin(found.points, f"{suite}; worst cell {points:+.2f}: {cell}")


def _imbalanced(results: Results) -> _Margin | None:
    """Ours minus source where one class prevails under contrast, noise and blur."""
    found = []
    for place in (p for part in results.scope(_PROFILED) for p in part if p.stream == "imbalanced"):
        if results.accuracy(place, OURS_PROFILE) is None or results.accuracy(place, SOURCE) is None:
            continue
        ours, source = (results.cells[place][name] for name in (OURS_PROFILE, SOURCE))
        begin = 0
        for name, count in ours.visits:
            part = slice(begin, begin + count)
            if _HARD.search(name):
                found.append(100 * float(ours.bits[part].mean() - source.bits[part].mean()))
            begin += count
    return _Margin(statistics.fmean(found), _PROFILED) if found else None


def _third(results: Results) -> _Margin | None:
    """Ours minus source, less a third of what the limit gains."""
    ours, limit = _gain(results, OURS_PROFILE, "activity"), _gain(results, LIMIT, "activity")
    return None if ours is None or limit is None else _Margin(ours.points - limit.points / 3, "activity")
