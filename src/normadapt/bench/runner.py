"""Runs the benchmark: every method on every stream of every task, on as many processes as there are cores."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch

from normadapt.bench.cells import Cell, Key, fingerprint
from normadapt.bench.methods import Method
from normadapt.bench.streams import Stream, build_stream, scale_at
from normadapt.bench.suites.base import Split, Suite, Task
from normadapt.bench.workshop import Job, Workshop, answer
from normadapt.demo import one_thread

Tell: TypeAlias = Callable[[int, int, str], None]
"""Called with the instances answered, those in all, and what is under way."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        suites: All of which must be there.
        streams: Names from `STREAMS`.
        methods: The rows.
        batch_sizes: Instances per call.
        split: "report" or "dev": other seeds, and for some suites other shifts.
        seed: Of all draws.
        scale: Relative length of the streams.
        without: Names of tasks that are left out.
    """

    suites: tuple[Suite, ...]
    streams: tuple[str, ...]
    methods: tuple[Method, ...]
    batch_sizes: tuple[int, ...]
    split: Split = "report"
    seed: int = 0
    scale: float = 1.0
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskInfo:
    """What the report says about a task.

    Args:
        suite: Name of its suite.
        name: Of the task, the suite's name first.
        negative: Whether adapting should do nothing here.
        shifts: Names of its shifted domains.
        clean: Whether it has a domain without shift.
        profile: Whether source data are available.
    """

    suite: str
    name: str
    negative: bool
    shifts: tuple[str, ...]
    clean: bool
    profile: bool


@dataclass(frozen=True)
class _Work:
    """A job, the cells it fills and what it costs to do, in instances."""

    job: Job
    keys: tuple[Key, ...]
    cost: int


def run_plan(
    plan: Plan,
    *,
    jobs: int = 1,
    known: Mapping[Key, Cell] | None = None,
    keep: Callable[[Sequence[Cell]], None] | None = None,
    tell: Tell | None = None,
) -> tuple[list[TaskInfo], list[Cell]]:
    """Every cell of the plan; a method that fails gives cells with an error, not an exception.

    Args:
        plan: What to run.
        jobs: Processes; with 1 all is done in this one.
        known: Cells of an earlier run, reused where their key is the same.
        keep: Called with cells as they come.
        tell: Called as work gets done.

    Returns:
        The tasks, and the cells in no particular order.
    """
    tell = tell or (lambda _done, _total, _label: None)
    infos: list[TaskInfo] = []
    works: list[_Work] = []
    cells: list[Cell] = []
    with _processes(plan.suites, jobs) as pool:
        for suite in plan.suites:
            tell(0, 0, f"preparing {suite.name}")
            for task in suite.tasks(plan.split, plan.seed):
                if task.name in plan.without:
                    continue
                _make_ahead(plan, suite, task, pool)
                info = _info(suite, task)
                infos.append(info)
                for work in _works(plan, suite, task, info):
                    found = [known[key] for key in work.keys if known is not None and key in known]
                    cells += found
                    missing = tuple(key for key in work.keys if known is None or key not in known)
                    if missing:
                        asked = tuple((key.stream, key.n) for key in missing)
                        works.append(_Work(replace(work.job, asked=asked), missing, work.cost))
        done, total = 0, sum(work.cost for work in works)
        tell(0, total, "bench")
        for work, outcome in _outcomes(works, plan.suites, pool):
            fresh = outcome if isinstance(outcome, list) else [_failed(key, outcome) for key in work.keys]
            cells += fresh
            if keep is not None:
                keep(fresh)
            done += work.cost
            tell(done, total, f"{work.job.task}: {work.job.method.name}")
    return infos, cells


def _make_ahead(plan: Plan, suite: Suite, task: Task, pool: ProcessPoolExecutor | None) -> None:
    """What a domain takes long to make is made by all processes together, before each of them asks for it."""
    if pool is not None:
        met = task.domain_names if "gradual" in plan.streams else task.shifts
        for future in [pool.submit(call) for call in suite.ahead(task, met, plan.split, plan.seed)]:
            future.result()


def _info(suite: Suite, task: Task) -> TaskInfo:
    profile = task.source_batches() is not None
    return TaskInfo(suite.name, task.name, task.negative, tuple(task.shifts), task.clean is not None, profile)


def _works(plan: Plan, suite: Suite, task: Task, info: TaskInfo) -> Iterator[_Work]:
    """The jobs of a task, those that take longest first."""
    lengths: dict[tuple[str, int], int] = {}
    built: dict[tuple[str, float], Stream | None] = {}
    for name in plan.streams:
        for n in plan.batch_sizes:
            scale = scale_at(n, plan.scale)
            if (name, scale) not in built:
                built[name, scale] = build_stream(name, task, plan.split, plan.seed, scale)
            stream = built[name, scale]
            if stream is not None:
                lengths[name, n] = len(stream)

    def work(method: Method, asked: tuple[tuple[str, int], ...], cost: int) -> _Work:
        job = Job(suite.name, task.name, method, asked, plan.split, plan.seed, plan.scale)
        mark = fingerprint(method, type(suite).__module__)
        keys = tuple(
            Key(task.name, name, n, method.name, method.setting, plan.split, plan.seed, plan.scale, mark)
            for name, n in asked
        )
        return _Work(job, keys, cost)

    rows = [method for method in plan.methods if info.profile or not method.uses_profile]
    for method in sorted(rows, key=lambda m: m.role != "limit"):
        if method.batch_independent and lengths:
            yield work(method, tuple(lengths), max(lengths.values()))
    # What a batch costs beside what its instances cost makes small batches take longest.
    by_cost = sorted(lengths, key=lambda asked: -lengths[asked] / min(asked[1], 16))
    for asked in by_cost:
        for method in rows:
            if not method.batch_independent:
                yield work(method, (asked,), lengths[asked])


def _failed(key: Key, error: BaseException) -> Cell:
    text = " ".join(str(error).split())
    message = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return Cell(key, np.zeros(0, dtype=np.bool_), (), (), 0.0, 0.0, 0.0, message[:300])


@contextmanager
def _processes(suites: Sequence[Suite], jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """So many, which start when there is something to do; None for one, as everything is then done in this one."""
    if jobs == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(jobs, context, _start, (tuple(suites),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _outcomes(
    works: list[_Work], suites: Sequence[Suite], pool: ProcessPoolExecutor | None
) -> Iterator[tuple[_Work, list[Cell] | BaseException]]:
    if pool is None or len(works) < 2:
        with one_thread(), torch.random.fork_rng(devices=[]):
            workshop = Workshop(suites)
            for work in works:
                try:
                    yield work, answer(workshop, work.job, work.keys)
                except Exception as error:  # whatever a method raises is its result
                    yield work, error
        return
    futures: dict[Future[list[Cell]], _Work] = {pool.submit(_run, w.job, w.keys): w for w in works}
    for future in as_completed(futures):
        failure = future.exception()
        yield futures[future], future.result() if failure is None else failure


_WORKSHOP: Workshop | None = None


def _start(suites: tuple[Suite, ...]) -> None:
    """In a new process."""
    global _WORKSHOP
    torch.set_num_threads(1)
    _WORKSHOP = Workshop(suites)


def _run(job: Job, keys: tuple[Key, ...]) -> list[Cell]:
    if _WORKSHOP is None:
        raise RuntimeError("this process was not started by the benchmark")
    return answer(_WORKSHOP, job, keys)
