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
from normadapt.bench.targets import Target, targets

LENGTH = 200


def cell(task: str, stream: str, n: int, method: str, right: float | list[int], **more: Any) -> Cell:
    """Bits of a method: so large a share right, evenly spread; or as given."""
    if isinstance(right, list):
        bits = np.array(right, dtype=bool)
    else:
        bits = np.floor((np.arange(LENGTH) + 1) * right + 1e-9) > np.floor(np.arange(LENGTH) * right + 1e-9)
    key = Key(task, stream, n, method, "s", "report", 0, 1.0, "f")
    values: dict[str, Any] = {"seconds": 1.0, "batch_seconds": 0.3, "plain_seconds": 0.1, **more}
    return Cell(key, bits, (len(bits),), values.pop("visits", (("a", len(bits)),)), **values)


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


ROW = {"Source": 0.5, "BatchStatistics": 0.6, "EMA(0.1)": 0.55, "Track": 0.65, "Track + profile": 0.7, "limit": 0.8}


def _row(**changes: float) -> dict[str, float]:
    return {**ROW, **{name.replace("_", " + "): value for name, value in changes.items()}}


def _summaries(found: Results, scope: str) -> dict[str, Summary]:
    return {s.method: s for s in summarize(found, scope)}


def test_accuracies_regrets_and_shares() -> None:
    found = results({
        ("u", "iid", 1): _row(),
        ("u", "iid", 16): _row(BatchStatistics=0.75),
        ("u", "clean", 1): dict.fromkeys(ROW, 0.9) | {"Track": 0.85},
        ("u", "clean", 16): dict.fromkeys(ROW, 0.9),
    })  # fmt: skip
    by = _summaries(found, "u")
    batch = by["BatchStatistics"]
    assert batch.accuracy == pytest.approx((0.6 + 0.75 + 0.9 + 0.9) / 4)
    assert batch.by_size == pytest.approx({1: 0.75, 16: 0.825})
    assert batch.by_stream == pytest.approx({"iid": 0.675, "clean": 0.9})
    assert batch.regret == pytest.approx(0.1 / 4)  # 0.1 behind ours at n = 1, best elsewhere
    assert (batch.worst, batch.worst_place) == (pytest.approx(0.1), Place("u", "iid", 1))
    assert by["Track + profile"].worst == pytest.approx(0.05)  # behind batch statistics at n = 16
    assert by["limit"].regret is not None  # the limit is no rival: the best rule's regret is 0
    assert by["limit"].regret < 0
    assert by["Track"].clean_loss == pytest.approx({1: 0.05, 16: 0.0})
    assert batch.share == pytest.approx((0.7875 - 0.7) / (0.85 - 0.7))
    assert batch.cost == pytest.approx({1: 3.0, 16: 3.0})
    assert found.best(found.scope("u")) == ("BatchStatistics", pytest.approx(0.7875))


def test_against_ours_is_paired() -> None:
    found = results({("u", "iid", n): _row() for n in (1, 16)})
    by = _summaries(found, "u")
    interval = by["Source"].against_ours
    assert interval is not None
    assert interval.value == pytest.approx(-0.2)
    assert by["Track + profile"].against_ours is None
    assert by["Source"].against_track is not None
    assert by["Source"].against_track.value == pytest.approx(-0.15)
    same = results({("u", "iid", 1): _row(Track_profile=0.65)})
    track = _summaries(same, "u")["Track"].against_ours
    assert track is not None
    assert (track.low, track.value, track.high) == (0, 0, 0)  # the same bits: no doubt at all


def test_a_single_block_gives_no_interval() -> None:
    found = results({("u", "iid", LENGTH): _row()})
    assert all(entry.against_ours is None for entry in found.entries)
    assert all(summary.against_ours is None for summary in _summaries(found, "u").values())
    for entry in results({("u", "iid", LENGTH // 2): _row()}).entries:
        assert (entry.against_ours is None) == (entry.method == "Track + profile")


def test_without_a_profile_ours_is_track() -> None:
    row = {name: value for name, value in ROW.items() if name != "Track + profile"}
    found = results({("u", "iid", 1): row}, [info("u", "u", profile=False)])
    assert found.ours(found.places) == "Track"
    assert found.entries[0].against_ours == found.entries[0].against_track


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


def _verdicts(found: Results) -> dict[tuple[str, str], list[Target]]:
    lines: dict[tuple[str, str], list[Target]] = {}
    for target in targets(found):
        lines.setdefault((target.name, target.setting.split()[0]), []).append(target)
    return lines


STREAMS = ("iid", "mixed", "runs", "clean")


def _fashion(**changes: float) -> dict[tuple[str, str, int], dict[str, float]]:
    table = {("fashion-c", stream, n): _row(**changes) for stream in STREAMS for n in (1, 4)}
    for n in (1, 4):
        table["fashion-c", "clean", n] = dict.fromkeys(ROW, 0.9)
    return table


def test_targets_that_are_reached() -> None:
    found = _verdicts(results(_fashion()))
    assert all(t.reached for key, lines in found.items() if key[1] == "with" and key[0] != "negative controls"
               for t in lines if t.reached is not None)  # fmt: skip
    average = found["average", "with"][0]
    assert average.measured == "+7.50 (fashion-c, BatchStatistics)"
    assert [t.reached for t in found["average", "without"]] == [True, None]  # no other suite was run
    assert [t.reached for t in found["negative controls", "without"]] == [None]


def test_targets_that_are_missed() -> None:
    table = _fashion(Track=0.6)
    table["fashion-c", "clean", 1] = {**table["fashion-c", "clean", 1], "Track + profile": 0.89}
    table["fashion-c", "runs", 4] = {**table["fashion-c", "runs", 4], "EMA(0.1)": 0.72}
    found = _verdicts(results(table))
    assert [t.reached for t in found["average", "without"]] == [False, None]
    clean = found["clean", "with"]
    assert [t.reached for t in clean] == [True, False]  # n = 4, n = 1
    assert clean[1].measured == "-1.00 (fashion-c, n = 1)"
    correlated = found["label-correlated", "with"][0]
    assert not correlated.reached
    assert correlated.measured == "-2.00 (fashion-c, EMA(0.1), n = 4)"


def test_what_was_set_for_all_suites_is_asked_of_each_and_of_all_together() -> None:
    table = _fashion()
    for (_, stream, n), row in list(table.items()):
        if stream != "clean":
            table["u", stream, n] = {k: v for k, v in row.items() if k != "Track + profile"} | {
                "Track": row["EMA(0.1)"] - 0.04
            }
    found = _verdicts(results(table, [info("fashion-c", "fashion-c"), info("u", "u", profile=False)]))
    row = table["fashion-c", "iid", 1]
    best = max(value for name, value in row.items() if name not in ("Track", "Track + profile", "limit"))
    ahead, behind = row["Track"] - best, table["u", "iid", 1]["Track"] - best
    for name in ("each batch size", "mixed", "label-correlated"):
        each, together = found[name, "without"]
        assert ", in every suite" in each.wanted
        assert ", over all suites" in together.wanted
        assert float(each.measured.split()[0]) == pytest.approx(100 * behind, abs=0.01)
        assert not each.reached
        if name == "mixed":
            assert float(together.measured.split()[0]) == pytest.approx(50 * (ahead + behind), abs=0.01)
            assert together.measured.split("(")[1].startswith("all suites")


def test_every_negative_cell_counts() -> None:
    table = _fashion()
    row = {name: 0.9 for name in ROW if name != "Track + profile"}
    table["crepe", "iid", 1] = row
    table["crepe", "runs", 4] = {**row, "Track": 0.88}
    tasks = [info("fashion-c", "fashion-c"), info("crepe", "crepe", negative=True, profile=False)]
    found = _verdicts(results(table, tasks))["negative controls", "without"][0]
    assert (found.reached, found.measured) == (False, "-2.00 (crepe, runs, n = 4)")


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
