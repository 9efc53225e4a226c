"""One process's share of the benchmark: it loads tasks, gathers streams once, and feeds them to methods."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normadapt.bench.ceiling import Known
from normadapt.bench.cells import Bits, Cell, Key
from normadapt.bench.limit import true_statistics
from normadapt.bench.methods import Answering, Method
from normadapt.bench.streams import Segment, Stream, build_stream, materialize, scale_at
from normadapt.bench.suites.base import Split, Suite, Task
from normadapt.errors import NormadaptError
from normadapt.profiles._profile_source import profile_source
from normadapt.profiles.source_profile import SourceProfile

# All times are the processor's, not the clock's: other processes then do not count, and there is one thread.
_CHUNK = 256  # instances per call where a batch's size changes nothing
_PLAIN_SHARE, _PLAIN_LEAST = 0.1, 3  # time for timing the plain model, relative to the method's; calls at least
_TIMED_CALLS, _TIMED_SECONDS = 30, 0.5  # of methods that are not run on whole streams


@dataclass(frozen=True)
class Job:
    """What a process is asked to do at a time.

    Args:
        suite: Name of the suite.
        task: Name of the task.
        method: The row.
        asked: Names of streams and batch sizes.
        split: "report" or "dev".
        seed: Of all draws.
        scale: Relative length of the streams.
    """

    suite: str
    task: str
    method: Method
    asked: tuple[tuple[str, int], ...]
    split: Split
    seed: int
    scale: float


class Workshop:
    """Keeps what the next job will need again: the task, its profile, its streams and their inputs.

    Args:
        suites: Those that jobs may name.
    """

    def __init__(self, suites: Sequence[Suite]) -> None:
        self._suites = {suite.name: suite for suite in suites}
        self._tasks: dict[tuple[str, str, int], dict[str, Task]] = {}
        self._of: tuple[str, str, int] | None = None  # the task that the rest belongs to
        self._profile: SourceProfile | None = None
        self._streams: dict[tuple[str, float], Stream] = {}
        self._inputs: dict[tuple[str, float], list[tuple[Tensor, Tensor]]] = {}

    def task(self, job: Job) -> Task:
        """The job's task; what was kept for another one is let go."""
        place = (job.suite, job.split, job.seed)
        if place not in self._tasks:
            self._tasks = {place: {task.name: task for task in self._suites[job.suite].tasks(job.split, job.seed)}}
        of = (job.task, job.split, job.seed)
        if self._of != of:
            self._of, self._profile = of, None
            self._streams.clear()
            self._inputs.clear()
        return self._tasks[place][job.task]

    def profile(self, task: Task) -> SourceProfile:
        """Measured once."""
        if self._profile is None:
            batches = task.source_batches()
            if batches is None:
                raise NormadaptError(f"{task.name} has no source data to measure a profile on")
            self._profile = profile_source(task.model, batches)
        return self._profile

    def stream(self, job: Job, task: Task, name: str, n: int) -> Stream:
        """As long as batches of n get it."""
        scale = scale_at(n, job.scale)
        if (name, scale) not in self._streams:
            stream = build_stream(name, task, job.split, job.seed, scale)
            if stream is None:
                raise NormadaptError(f"{task.name} has no stream {name!r}")
            self._streams[name, scale] = stream
        return self._streams[name, scale]

    def inputs(self, job: Job, task: Task, name: str, n: int) -> list[tuple[Tensor, Tensor]]:
        """Inputs and labels of each segment, gathered once."""
        key = (name, scale_at(n, job.scale))
        if key not in self._inputs:
            stream = self.stream(job, task, name, n)
            self._inputs[key] = [materialize(task, segment) for segment in stream.segments]
        return self._inputs[key]


def answer(workshop: Workshop, job: Job, keys: Sequence[Key]) -> list[Cell]:
    """The job's cells, one per key, in the order of the keys.

    Gradients are off around every call; a method that needs them switches them on itself.
    """
    task = workshop.task(job)
    profile = workshop.profile(task) if job.method.uses_profile else None
    with torch.no_grad():
        if job.method.batch_independent:
            return _answer_instances(workshop, job, task, keys, profile)
        return [_answer_stream(workshop, job, task, key, profile) for key in keys]


def _answer_stream(workshop: Workshop, job: Job, task: Task, key: Key, profile: SourceProfile | None) -> Cell:
    stream, n = workshop.stream(job, task, key.stream, key.n), key.n
    bits: list[Tensor] = []
    full: list[float] = []
    total = 0.0
    inputs = workshop.inputs(job, task, key.stream, n)
    for position, (values, labels) in enumerate(inputs):
        torch.manual_seed(zlib.crc32(f"{job.seed} {key.task} {key.stream} {position}".encode()))
        call = job.method.make(task.model, profile)
        domains = torch.from_numpy(stream.segments[position].domain)
        for batch, truth, domain in zip(values.split(n), labels.split(n), domains.split(n), strict=True):
            if isinstance(call, Known):
                call.tell(domain)
            begin = time.process_time()
            output = call(batch)
            took = time.process_time() - begin
            total += took
            if len(batch) == n:
                full.append(took)
            bits.append(task.correct(output, truth))
    plain = _time_calls(task.model, [b for v, _ in inputs[:2] for b in v.split(n)], _PLAIN_SHARE * total)
    answers = np.asarray(torch.cat(bits).cpu().numpy(), dtype=np.bool_)
    each = statistics.median(full) if full else total / max(len(bits), 1)
    return _cell(key, stream, answers, total, each, plain)


def _time_calls(call: Callable[[Tensor], Any], batches: Sequence[Tensor], seconds: float) -> float:
    """Median time of a call, over as many as fit in so many seconds, and at least a few."""
    times: list[float] = []
    for batch in batches[:_TIMED_CALLS]:
        begin = time.process_time()
        call(batch)
        times.append(time.process_time() - begin)
        if len(times) >= _PLAIN_LEAST and sum(times) > seconds:
            break
    return statistics.median(times)


def _answer_instances(
    workshop: Workshop, job: Job, task: Task, keys: Sequence[Key], profile: SourceProfile | None
) -> list[Cell]:
    """For methods whose answers do not depend on what else is in the batch: every instance is asked once."""
    streams = {(key.stream, key.n): workshop.stream(job, task, key.stream, key.n) for key in keys}
    wanted: dict[str, list[NDArray[np.int64]]] = {}
    for stream in streams.values():
        for segment in stream.segments:
            for i, name in enumerate(segment.domains):
                wanted.setdefault(name, []).append(segment.index[segment.domain == i])
    right = {name: _instance_bits(job, task, name, np.unique(np.concatenate(i)), profile) for name, i in wanted.items()}
    times: dict[int, tuple[float, float]] = {}
    cells = []
    for key in keys:
        stream = streams[key.stream, key.n]
        if key.n not in times:
            inputs = workshop.inputs(job, task, key.stream, key.n)
            batches = [batch for values, _ in inputs[:2] for batch in values.split(key.n)]
            plain = _time_calls(task.model, batches, _TIMED_SECONDS)
            same = job.method.role == "limit"  # it is the plain model with other statistics
            make = job.method.make
            times[key.n] = plain if same else _time_calls(make(task.model, profile), batches, _TIMED_SECONDS), plain
        each, plain = times[key.n]
        bits = np.concatenate([_looked_up(segment, right) for segment in stream.segments])
        cells.append(_cell(key, stream, bits, each * sum(-(-len(s) // key.n) for s in stream.segments), each, plain))
    return cells


def _cell(key: Key, stream: Stream, bits: Bits, seconds: float, each: float, plain: float) -> Cell:
    segments = tuple(len(segment) for segment in stream.segments)
    visits = tuple(visit for segment in stream.segments for visit in segment.visits)
    return Cell(key, bits, segments, visits, seconds, each, plain)


def _instance_bits(
    job: Job, task: Task, name: str, positions: NDArray[np.int64], profile: SourceProfile | None
) -> Bits:
    """Right or wrong for every position asked for (M,); False elsewhere."""
    domain = task.domain(name)
    model: Answering
    if job.method.role == "limit":
        model = true_statistics(task.model, domain.inputs)
    else:
        model = job.method.make(task.model, profile)
    bits = np.zeros(len(domain.labels), dtype=np.bool_)
    for part in torch.from_numpy(positions).split(_CHUNK):
        bits[part.numpy()] = task.correct(model(domain.inputs[part]), domain.labels[part]).cpu().numpy()
    return bits


def _looked_up(segment: Segment, right: Mapping[str, Bits]) -> Bits:
    bits = np.zeros(len(segment), dtype=np.bool_)
    for i, name in enumerate(segment.domains):
        here = segment.domain == i
        bits[here] = right[name][segment.index[here]]
    return bits
