from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.fake import Control, Fake
from normadapt.bench.cells import Cell, CellFile, Key, read_cells
from normadapt.bench.limit import true_statistics
from normadapt.bench.methods import METHODS, Method, select_methods
from normadapt.bench.runner import Plan, run_plan
from normadapt.bench.streams import STREAMS, build_stream, materialize, scale_at
from normadapt.bench.suites.base import Split, Task
from normadapt.errors import NormadaptError

CALLS: list[int] = []


@dataclass(frozen=True)
class Counting:
    """Answers as the model does, and notes the length of each batch; the setting is part of its name."""

    setting: int = 0
    modules: tuple[str, ...] = ()

    def __call__(self, model: nn.Module, profile: Any) -> Callable[[Tensor], Any]:
        CALLS.append(0)  # a fresh model

        def answer(batch: Tensor) -> Any:
            CALLS.append(len(batch))
            return model(batch)

        return answer


@dataclass(frozen=True)
class Failing:
    modules: tuple[str, ...] = ()

    def __call__(self, model: nn.Module, profile: Any) -> Callable[[Tensor], Any]:
        def answer(batch: Tensor) -> Any:
            raise RuntimeError("two\nlines")

        return answer


class Costly(Fake):
    def ahead(self, task: Task, names: Sequence[str], split: Split, seed: int) -> list[Callable[[], object]]:
        return [
            partial(_note, self.cache / f"{task.name} {name}".replace("/", "-")) for name in names if name != task.clean
        ]


def _note(path: Path) -> None:
    path.write_text(str(os.getpid()))


COUNTING = Method("counting", "counting", "baseline", Counting())
FAILING = Method("failing", "failing", "baseline", Failing())


def _plan(**changes: Any) -> Plan:
    plan = Plan((Fake(),), ("iid", "clean"), tuple(select_methods(["EMA(0.1)"])), (1, 16), scale=0.1)
    return replace(plan, **changes)


def _by(cells: list[Cell]) -> dict[tuple[str, str, int, str], Cell]:
    return {(c.key.task, c.key.stream, c.key.n, c.key.method): c for c in cells}


def test_every_cell_of_the_plan_is_there_and_right() -> None:
    plan = _plan(streams=tuple(STREAMS))
    tasks, cells = run_plan(plan)
    assert len(cells) == len({c.key for c in cells}) == 2 * len(STREAMS) * 2 * 4
    assert [t.name for t in tasks] == ["fake/0", "fake/1"]
    assert all(t.profile and t.clean and not t.negative for t in tasks)
    task = Fake().tasks("report", 0)[0]
    for cell in cells:
        if cell.key.method != "EMA(0.1)" or cell.key.task != "fake/0":
            continue
        stream = build_stream(cell.key.stream, task, "report", 0, scale_at(cell.key.n, 0.1))
        assert stream is not None
        expected = []
        for segment in stream.segments:  # by hand, a fresh model for each segment
            model = METHODS["EMA(0.1)"].make(task.model, None)
            inputs, labels = materialize(task, segment)
            with torch.no_grad():
                for batch, truth in zip(inputs.split(cell.key.n), labels.split(cell.key.n), strict=True):
                    expected += task.correct(model(batch), truth).tolist()
        assert cell.bits.tolist() == expected
        assert cell.segments == tuple(len(s) for s in stream.segments)
        assert sum(count for _, count in cell.visits) == len(expected)
        assert cell.error is None


def test_the_limit_has_each_domains_own_statistics() -> None:
    _, cells = run_plan(_plan(streams=("mixed",), batch_sizes=(16,)))
    cell = _by(cells)["fake/0", "mixed", 16, "limit"]
    task = Fake().tasks("report", 0)[0]
    segment = build_stream("mixed", task, "report", 0, scale_at(16, 0.1)).segments[0]  # type: ignore[union-attr]
    models = [true_statistics(task.model, task.domain(name).inputs) for name in segment.domains]
    for bit, domain, index in zip(cell.bits, segment.domain, segment.index, strict=True):
        found = task.domain(segment.domains[domain])
        with torch.no_grad():
            answer = models[domain](found.inputs[index : index + 1])
        assert bit == bool(task.correct(answer, found.labels[index : index + 1]))


def test_batches_are_as_asked_and_the_last_one_is_kept() -> None:
    CALLS.clear()
    run_plan(_plan(methods=(COUNTING,), streams=("iid",), batch_sizes=(16,)))
    assert CALLS == [0, 16, 3] * 4  # two tasks of two shifts with 19 instances each


def test_profiles_are_used_only_where_they_are() -> None:
    methods = (METHODS["Domains + profile"],)
    tasks, cells = run_plan(_plan(suites=(Fake(), Control()), methods=methods, streams=("clean",), batch_sizes=(16,)))
    assert {c.key.task for c in cells} == {"fake/0", "fake/1"}
    assert [t.profile for t in tasks] == [True, True, False, False]
    assert [t.negative for t in tasks] == [False, False, True, True]


def test_a_failing_method_fails_alone() -> None:
    kept: list[Cell] = []
    _, cells = run_plan(_plan(methods=(FAILING, COUNTING)), keep=kept.extend)
    failed = [c for c in cells if c.key.method == "failing"]
    assert {c.error for c in failed} == {"RuntimeError: two lines"}
    assert len(failed) == 8
    assert all(c.error is None and len(c.bits) for c in cells if c.key.method == "counting")
    assert len(kept) == len(cells)


def test_known_cells_are_not_computed_again(tmp_path: Path) -> None:
    file = CellFile(tmp_path / "cells.jsonl")
    plan = _plan(methods=(COUNTING, FAILING))
    _, first = run_plan(plan, keep=file.append)
    known = read_cells(tmp_path / "cells.jsonl")
    assert len(known) == 8  # the failures are tried again
    CALLS.clear()
    _, again = run_plan(plan, known=known)
    assert CALLS == []
    assert {key: cell.bits.tolist() for key, cell in _by(again).items()} == {
        key: cell.bits.tolist() for key, cell in _by(first).items()
    }
    changed = Method("counting", "counting", "baseline", Counting(setting=1))
    for other in (replace(plan, methods=(changed,)), replace(plan, seed=1), replace(plan, scale=0.2)):
        CALLS.clear()
        run_plan(other, known=known)
        assert CALLS


def test_resuming_computes_what_is_missing_only() -> None:
    plan = _plan(methods=(COUNTING,), streams=("iid",))
    _, cells = run_plan(plan)
    CALLS.clear()
    _, more = run_plan(replace(plan, streams=("iid", "clean")), known={c.key: c for c in cells})
    assert len(more) == 8
    batches = [0, *([1] * 75), 0, *([16] * 11), 4]
    assert batches * 2 == CALLS


def test_tasks_can_be_left_out() -> None:
    tasks, cells = run_plan(_plan(without=("fake/0",)))
    assert [task.name for task in tasks] == ["fake/1"]
    assert {cell.key.task for cell in cells} == {"fake/1"}


@pytest.mark.parametrize(("streams", "steps"), [(("iid",), []), (("gradual",), ["fake-0 bright-low"])])
def test_costly_domains_are_made_ahead_by_all_processes(
    tmp_path: Path, streams: tuple[str, ...], steps: list[str]
) -> None:
    run_plan(_plan(suites=(Costly(tmp_path),), streams=streams, batch_sizes=(16,)), jobs=2)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted([*(f"fake-{i} {name}" for i in (0, 1) for name in ("bright", "faint")), *steps])
    assert os.getpid() not in {int(path.read_text()) for path in tmp_path.iterdir()}


def test_two_processes_give_the_same_as_one() -> None:
    plan = _plan(methods=tuple(select_methods(["EMA(0.1)", "UnMixTNS"])))
    told: list[tuple[int, int]] = []
    one, two = run_plan(plan), run_plan(plan, jobs=2, tell=lambda done, total, _: told.append((done, total)))
    assert one[0] == two[0]
    first, second = _by(one[1]), _by(two[1])
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key].bits, second[key].bits) for key in first)
    assert told[-1][0] == told[-1][1] > 0
    assert [done for done, total in told if total] == sorted(done for done, total in told if total)


def test_the_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    run_plan(_plan(streams=("clean",)))
    assert torch.equal(torch.get_rng_state(), before)


def _cell(bits: list[bool], **key: Any) -> Cell:
    values: dict[str, Any] = {"task": "t", "stream": "iid", "n": 4, "method": "m", "setting": "s", "split": "dev",
                              "seed": 3, "scale": 0.5, "fingerprint": "f", **key}  # fmt: skip
    return Cell(Key(**values), np.array(bits), (len(bits),), (("a", len(bits)),), 1.5, 0.25, 0.125)


def test_cells_come_back_from_their_file(tmp_path: Path) -> None:
    cells = [_cell([True, False, True] * 7), _cell([False], n=1)]
    CellFile(tmp_path / "c").append(cells)
    found = read_cells(tmp_path / "c")
    for cell in cells:
        again = found[cell.key]
        assert again.bits.tolist() == cell.bits.tolist()
        assert replace(again, bits=cell.bits) == cell


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "c"
    CellFile(path).append([_cell([True])])
    with path.open("a") as file:
        file.write('{"key": {"task"')
    assert len(read_cells(path)) == 1
    CellFile(path).append([_cell([True], n=1)])
    assert len(read_cells(path)) == 2


def test_a_file_of_something_else_is_said(tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_text("hello\n" + _cell([True]).to_line() + "\n")
    with pytest.raises(NormadaptError, match=r"line 1 is not a cell[\s\S]*  -> remove it"):
        read_cells(path)
