"""Figures from bits made by hand, with answers that can be counted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from normadapt.bench.cells import Cell, Key
from normadapt.bench.curves import binned, curves
from normadapt.bench.methods import METHODS, Method
from normadapt.bench.results import ALL, Place, Results, share_of_gain
from normadapt.bench.runner import Plan, TaskInfo
from normadapt.bench.speed import Jump, jumps, recovery
from normadapt.bench.summary import Summary, summarize
from normadapt.bench.targets import BEFORE_SIZES, BEFORE_STREAMS, targets

LENGTH = 200


def cell(task: str, stream: str, n: int, method: str, right: float | list[int], **more: Any) -> Cell:
    """Bits of a method: so large a share right, evenly spread; or as given."""
    if isinstance(right, list):
        bits = np.array(right, dtype=bool)
    else:
        bits = np.floor((np.arange(LENGTH) + 1) * right + 1e-9) > np.floor(np.arange(LENGTH) * right + 1e-9)
    key = Key(task, stream, n, method, "s", "report", 0, 1.0, "f")
    values: dict[str, Any] = {"seconds": 1.0, "batch_seconds": 0.3, "plain_seconds": 0.1, **more}
    return Cell(key, bits, (len(bits),), values.pop("visits", (("noise", len(bits)),)), **values)


def info(suite: str, name: str, *, negative: bool = False, profile: bool = True) -> TaskInfo:
    return TaskInfo(suite, name, negative, ("a",), True, profile)


def results(
    table: dict[tuple[str, str, int], dict[str, float]], tasks: list[TaskInfo] | None = None, **changes: Any
) -> Results:
    """Results from accuracies by (task, stream, n) and method."""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    streams = tuple(dict.fromkeys(stream for _, stream, _ in table))
    sizes = tuple(sorted({n for _, _, n in table}))
    methods = tuple(sorted((METHODS[name] for name in names), key=lambda m: list(METHODS).index(m.name)))
    plan = replace(Plan((), streams, methods, sizes), **changes)
    tasks = tasks or [info(task.partition("/")[0], task) for task in dict.fromkeys(task for task, _, _ in table)]
    return Results(
        plan, tasks, [cell(*place, name, right) for place, row in table.items() for name, right in row.items()]
    )


ROW = {"Source": 0.5, "BatchStatistics": 0.6, "EMA(0.1)": 0.55, "Domains": 0.65, "Domains + profile": 0.7,
       "ceiling": 0.75, "limit": 0.8}  # fmt: skip


def _row(**changes: float) -> dict[str, float]:
    return {**ROW, **{name.replace("_", " + "): value for name, value in changes.items()}}


def _summaries(found: Results, scope: str) -> dict[str, Summary]:
    return {s.method: s for s in summarize(found, scope)}


def test_accuracies_regrets_and_shares() -> None:
    found = results({
        ("u", "iid", 1): _row(),
        ("u", "iid", 16): _row(BatchStatistics=0.75),
        ("u", "clean", 1): dict.fromkeys(ROW, 0.9) | {"Domains": 0.85},
        ("u", "clean", 16): dict.fromkeys(ROW, 0.9),
    })  # fmt: skip
    by = _summaries(found, "u")
    batch = by["BatchStatistics"]
    assert batch.accuracy == pytest.approx((0.6 + 0.75 + 0.9 + 0.9) / 4)
    assert batch.by_size == pytest.approx({1: 0.75, 16: 0.825})
    assert batch.by_stream == pytest.approx({"iid": 0.675, "clean": 0.9})
    assert batch.regret == pytest.approx(0.1 / 4)  # 0.1 behind ours at n = 1, best elsewhere
    assert (batch.worst, batch.worst_place) == (pytest.approx(0.1), Place("u", "iid", 1))
    assert by["Domains + profile"].worst == pytest.approx(0.05)  # behind batch statistics at n = 16
    assert by["limit"].regret is not None  # the limit is no rival: the best rule's regret is 0
    assert by["limit"].regret < 0
    assert by["Domains"].clean_loss == pytest.approx({1: 0.05, 16: 0.0})
    assert batch.share == pytest.approx((0.7875 - 0.7) / (0.85 - 0.7))
    assert batch.cost == pytest.approx({1: 3.0, 16: 3.0})
    assert found.best(found.scope("u")) == ("BatchStatistics", pytest.approx(0.7875))


def test_against_ours_is_paired() -> None:
    found = results({("u", "iid", n): _row() for n in (1, 16)})
    by = _summaries(found, "u")
    interval = by["Source"].against_ours
    assert interval is not None
    assert interval.value == pytest.approx(-0.2)
    assert by["Domains + profile"].against_ours is None
    assert by["Source"].against_plain is not None
    assert by["Source"].against_plain.value == pytest.approx(-0.15)
    same = results({("u", "iid", 1): _row(Domains_profile=0.65)})
    track = _summaries(same, "u")["Domains"].against_ours
    assert track is not None
    assert (track.low, track.value, track.high) == (0, 0, 0)  # the same bits: no doubt at all


def test_a_single_block_gives_no_interval() -> None:
    found = results({("u", "iid", LENGTH): _row()})
    assert all(entry.against_ours is None for entry in found.entries)
    assert all(summary.against_ours is None for summary in _summaries(found, "u").values())
    for entry in results({("u", "iid", LENGTH // 2): _row()}).entries:
        assert (entry.against_ours is None) == (entry.method == "Domains + profile")


def test_without_a_profile_ours_is_the_plain_one() -> None:
    row = {name: value for name, value in ROW.items() if name != "Domains + profile"}
    found = results({("u", "iid", 1): row}, [info("u", "u", profile=False)])
    assert found.ours(found.places) == "Domains"
    assert found.entries[0].against_ours == found.entries[0].against_plain


def test_all_suites_weigh_the_same_and_negative_controls_nothing() -> None:
    table = {
        ("u", "iid", 1): _row(Source=0.2),
        ("v/1", "iid", 1): _row(Source=0.4),
        ("v/2", "iid", 1): _row(Source=0.6),
        ("w", "iid", 1): _row(Source=1.0),
    }
    tasks = [info("u", "u"), info("v", "v/1"), info("v", "v/2"), info("w", "w", negative=True)]
    found = results(table, tasks)
    assert found.scopes == [ALL, "u", "v", "w"]
    assert _summaries(found, ALL)["Source"].accuracy == pytest.approx((0.2 + 0.5) / 2)
    assert _summaries(found, "w")["Source"].accuracy == 1.0


def test_a_method_that_failed_somewhere_has_no_average() -> None:
    found = results({("u", "iid", n): _row() for n in (1, 16)})
    place = Place("u", "iid", 16)
    broken = replace(found.cells[place]["EMA(0.1)"], bits=np.zeros(0, dtype=bool), error="RuntimeError: no")
    cells = [c for row in found.cells.values() for c in row.values() if c.key != broken.key]
    found = Results(found.plan, found.tasks, [*cells, broken])
    summary = _summaries(found, "u")["EMA(0.1)"]
    assert (summary.accuracy, summary.failed) == (None, 1)
    assert [e.error for e in found.entries if e.method == "EMA(0.1)"] == [None, "RuntimeError: no"]
    assert "EMA(0.1)" not in found.rules(found.places)


def test_shares_are_not_given_where_there_is_nothing_to_gain() -> None:
    assert share_of_gain(0.6, 0.5, 0.7) == pytest.approx(0.5)
    assert share_of_gain(0.4, 0.5, 0.7) == pytest.approx(-0.5)
    assert share_of_gain(0.6, 0.5, 0.505) is None
    assert share_of_gain(0.6, None, 0.7) is None


def test_averages_over_batch_sizes_do_not_count_the_same_instances_twice() -> None:
    """The same answers at two batch sizes are no more evidence than at one."""
    rng = np.random.default_rng(0)
    bits = {name: (rng.random(2000) < share).astype(int).tolist() for name, share in ROW.items()}
    methods = tuple(METHODS[name] for name in METHODS if name in ROW)
    widths = []
    for sizes in ((16,), (16, 17)):
        cells = [cell("u", "iid", n, name, values) for n in sizes for name, values in bits.items()]
        found = Results(Plan((), ("iid",), methods, sizes), [info("u", "u")], cells)
        interval = _summaries(found, "u")["Source"].against_ours
        assert interval is not None
        assert interval.low < interval.value < interval.high
        widths.append(interval.high - interval.low)
    assert widths[0] == pytest.approx(widths[1], rel=1e-9)


# -- speed ----------------------------------------------------------------------------------------------------------


def _jump(wrong: int, length: int = 200) -> Jump:
    method = np.ones(length, dtype=bool)
    method[:wrong] = False
    return Jump(method, np.ones(length, dtype=bool))


def test_recovery_counts_the_batches_before_the_first_good_window() -> None:
    assert recovery([_jump(0)], 16) == 0
    # wrong for 64 instances: the window of 25 from 64 on is right, the one from 48 on has 16 wrong
    assert recovery([_jump(64)], 16) == 4
    # windows of 25 that begin at 62, 61 have 2 wrong of 25 (92 %), at 61 three (88 %)
    assert recovery([_jump(64)], 1) == 62
    assert recovery([_jump(200)], 16) == math.inf
    assert recovery([], 16) is None


def test_recovery_is_of_all_jumps_together_and_relative_to_the_limit() -> None:
    assert recovery([_jump(0)] * 9 + [_jump(200)], 50) == 0  # 0.9 of the limit over all
    half = np.arange(200) % 2 == 0
    assert recovery([Jump(half, half)], 50) == 0


def test_only_jumps_that_hurt_are_counted() -> None:
    visits = (("easy", 100), ("hard", 100))
    source = cell("u", "continual", 16, "Source", [1] * 100 + [0] * 100, visits=visits)
    method = cell("u", "continual", 16, "EMA(0.1)", [1] * 150 + [0] * 50, visits=visits)
    limit = cell("u", "continual", 16, "limit", [1] * 200, visits=visits)
    found = jumps(method, source, limit)
    assert [jump.method.tolist() for jump in found] == [[True] * 50 + [False] * 50]
    assert jumps(replace(method, error="x"), source, limit) == []


def test_recovery_is_taken_from_continual_streams() -> None:
    right = {"Source": [0] * 200, "EMA(0.1)": [0] * 40 + [1] * 160, "limit": [1] * 200}
    methods = tuple(METHODS[name] for name in right)
    cells = [cell("u", s, 20, name, bits) for s in ("continual", "iid") for name, bits in right.items()]
    found = Results(Plan((), ("continual", "iid"), methods, (20,)), [info("u", "u")], cells)
    assert _summaries(found, "u")["EMA(0.1)"].recovery == {20: 2.0}
    assert _summaries(found, "u")["Source"].recovery == {20: math.inf}


# -- targets --------------------------------------------------------------------------------------------------------


SIZES = tuple(BEFORE_SIZES)
SUITES = ("fashion-c", "activity", "usps-mnist", "usps-digits")


def _judged(**changes: float) -> dict[tuple[str, str, int], dict[str, float]]:
    """Four suites on which all targets are reached, but for what `changes` adds to ours with a profile, by stream."""
    table = {}
    for suite in SUITES:
        for stream in (*BEFORE_STREAMS, "imbalanced", "imbalanced-clean"):
            for n in SIZES:
                clean = stream.endswith("clean")
                row = dict.fromkeys(ROW, 0.95) if clean else {**_row(), "Source": 0.2, "limit": 0.94}
                if not clean:
                    row["Domains + profile"] = row["Domains"] = 0.92
                if stream in changes:
                    row["Domains + profile"] += changes[stream]
                table[suite, stream, n] = row
    return table


def test_targets_that_are_reached() -> None:
    found = targets(results(_judged()))
    assert {t.name for t in found if t.reached is None} == {"negative controls"}
    assert [t for t in found if t.reached is False] == []
    by = {(t.name, t.setting): t for t in found}
    assert by["each stream", "with a profile"].measured == "+2.50 (clean)"
    assert by["shifted, 90 % one class", "with a profile"].measured == "+72.00 (fashion-c)"
    assert by["n = 1 against n = 64", "without a profile"].measured == "+0.00 (fashion-c)"


@pytest.mark.parametrize(
    ("stream", "change", "missed"),
    [("mixed", -0.04, {"mixed"}), ("iid", -0.35, {"each stream"}), ("clean", -0.002, {"clean"}),
     ("imbalanced-clean", -0.004, {"clean, 90 % one class"}), ("imbalanced", -0.35, {"shifted, 90 % one class"})],
)  # fmt: skip
def test_targets_that_are_missed(stream: str, change: float, missed: set[str]) -> None:
    found = targets(results(_judged(**{stream: change})))
    assert {t.name for t in found if t.reached is False and t.setting == "with a profile"} == missed
    assert not [t for t in found if t.reached is False and t.setting == "without a profile"]


def test_small_batches_are_compared_below_their_own_limit() -> None:
    table = _judged()
    for suite in SUITES:
        for stream in BEFORE_STREAMS:
            row = table[suite, stream, 1]
            table[suite, stream, 1] = {**row, "limit": row["limit"] + 0.02}
    (line, _) = (t for t in targets(results(table)) if t.name == "n = 1 against n = 64")
    assert line.measured == "-1.60 (fashion-c)"  # 0.02 in eight streams of ten
    assert line.reached is False


def test_hard_shifts_are_told_by_their_names() -> None:
    table = _judged()
    visits = (("contrast", 50), ("fog", 100), ("gaussian_noise", 50))
    cells = results(table).cells
    found = [
        replace(cell, visits=visits, bits=np.array([i < 50 or i >= 150 for i in range(200)]) == (name != "Source"))
        if place.stream == "imbalanced" and place.task == "fashion-c" and name in ("Source", "Domains + profile")
        else cell
        for place, row in cells.items()
        for name, cell in row.items()
    ]
    judged = results(table)
    line = next(t for t in targets(Results(judged.plan, judged.tasks, found)) if t.name.startswith("shifted"))
    assert line.measured == "+100.00 (fashion-c)"


@pytest.mark.parametrize("change", [{"split": "dev"}, {"batch_sizes": (1, 4)}, {"streams": ("iid",)}])
def test_what_was_not_run_as_then_is_not_compared_with_the_rule_before(change: dict[str, Any]) -> None:
    lines = targets(results(_judged(), **change)) if "streams" not in change else targets(results(
        {place: row for place, row in _judged().items() if place[1] == "iid"}))  # fmt: skip
    assert all(t.measured == "not run" for t in lines if "Track" in t.wanted)


def test_negative_controls_say_their_worst_cell() -> None:
    table = _judged()
    row = {name: 0.9 for name in ROW if name != "Domains + profile"}
    table["crepe", "iid", 1] = row
    table["crepe", "runs", 4] = {**row, "Domains": 0.88}
    tasks = [*(info(suite, suite) for suite in SUITES), info("crepe", "crepe", negative=True, profile=False)]
    lines = {t.setting: t for t in targets(results(table, tasks)) if t.name == "negative controls"}
    assert lines["without a profile"].measured == "-1.00 (crepe; worst cell -2.00: runs, n = 4)"
    assert lines["without a profile"].reached is False
    assert lines["with a profile"].reached is None


# -- curves ---------------------------------------------------------------------------------------------------------


def test_bins_are_means_of_consecutive_instances() -> None:
    assert binned(np.array([1, 1, 0, 0, 1], dtype=bool), 2) == pytest.approx((1.0, 0.0, 1.0))
    assert binned(np.array([1, 1, 0, 0, 1], dtype=bool), 4) == pytest.approx((0.6,))


def test_curves_mark_where_shifts_begin_whatever_their_severity() -> None:
    visits = (("blur/1", 50), ("blur/2", 50), ("noise/1", 100))
    methods: tuple[Method, ...] = (METHODS["Source"],)
    cells = [cell("u", "gradual", 1, "Source", 0.5, visits=visits), cell("u", "iid", 1, "Source", 0.5)]
    (curve,) = curves(Results(Plan((), ("gradual", "iid"), methods, (1,)), [info("u", "u")], cells))
    assert curve.marks == ((0, "blur"), (100, "noise"))
    assert curve.length == 200
    assert len(curve.lines["Source"]) == 8
