from __future__ import annotations

from itertools import groupby, pairwise

import numpy as np
import pytest
import torch

from bench.fake import FakeTask, data
from normadapt.bench.streams import (
    CLEAN,
    LONG,
    MAJORITY,
    MIXED,
    PER_SHIFT,
    RUN_LENGTHS,
    STREAMS,
    Stream,
    build_stream,
    materialize,
    scale_at,
)
from normadapt.bench.suites.base import Domain, Task

SHIFTS = tuple("abcdefgh")
OLDER = {"iid": 18167359, "continual": 144837129, "gradual": 111986472, "mixed": 200199523, "runs": 20527804,
         "dirichlet": 20348961, "continual-runs": 145604642, "clean": 199863787}  # fmt: skip
SIZE = 90


def _domain(name: str) -> Domain:
    inputs, labels = data(name, SIZE, 0)
    # the domain's name and the instance's position can be read from the instance
    inputs = torch.full_like(inputs, float(ord(name[0])))
    inputs[:, 0, 0, 0] = torch.arange(SIZE)
    return Domain(inputs, labels)


def _task(
    shifts: tuple[str, ...] = SHIFTS, ramps: dict[str, tuple[str, ...]] | None = None, clean: str | None = "z"
) -> Task:
    return FakeTask("t", torch.nn.Identity(), _domain, clean=clean, shifts=shifts, ramps=ramps)


def _build(name: str, task: Task | None = None, seed: int = 0, scale: float = 1.0) -> Stream:
    stream = build_stream(name, task or _task(), "report", seed, scale)
    assert stream is not None
    return stream


def _names(stream: Stream) -> list[str]:
    return [s.domains[i] for s in stream.segments for i in s.domain]


def _labels(stream: Stream) -> list[list[int]]:
    return [materialize(_task(), segment)[1].tolist() for segment in stream.segments]


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_is_a_function_of_its_arguments(name: str) -> None:
    one, again, other = _build(name), _build(name), _build(name, seed=1)
    for a, b in zip(one.segments, again.segments, strict=True):
        assert (a.domain == b.domain).all()
        assert (a.index == b.index).all()
    assert any(not np.array_equal(a.index, b.index) for a, b in zip(one.segments, other.segments, strict=True))
    dev = build_stream(name, _task(), "dev", 0, 1.0)
    assert dev is not None
    assert any(not np.array_equal(a.index, b.index) for a, b in zip(one.segments, dev.segments, strict=True))


@pytest.mark.parametrize("name", STREAMS)
def test_instances_come_without_replacement_until_all_were_seen(name: str) -> None:
    stream = _build(name)
    for domain in {*_names(stream)}:
        seen = np.concatenate([s.index[s.domain == list(s.domains).index(domain)] for s in stream.segments
                               if domain in s.domains])  # fmt: skip
        if name in ("runs", "continual-runs", "imbalanced", "imbalanced-clean"):  # without replacement within a class
            for label in range(3):
                counts = np.bincount(seen[seen % 3 == label], minlength=SIZE)[label::3]
                assert counts.max() - counts.min() <= 1
        else:
            counts = np.bincount(seen, minlength=SIZE)
            assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("name", "segments", "each"),
    [("iid", 8, PER_SHIFT), ("runs", 9, PER_SHIFT), ("dirichlet", 9, PER_SHIFT), ("continual", 1, 8 * PER_SHIFT),
     ("continual-runs", 1, 8 * PER_SHIFT), ("mixed", 1, MIXED), ("clean", 1, CLEAN), ("gradual", 1, 7 * PER_SHIFT),
     ("long", 1, 3 * LONG), ("imbalanced", 8, PER_SHIFT), ("imbalanced-clean", 4, PER_SHIFT)],
)  # fmt: skip
def test_lengths(name: str, segments: int, each: int) -> None:
    stream = _build(name)
    assert [len(s) for s in stream.segments] == [each] * segments
    assert len(stream) == segments * each
    assert len(_build(name, scale=0.5)) == len(stream) / 2
    for segment in stream.segments:
        assert sum(count for _, count in segment.visits) == len(segment)


def test_small_batches_get_shorter_streams() -> None:
    assert [scale_at(n, 2.0) for n in (1, 4, 16, 64, 200)] == [0.5, 0.5, 1.2, 2.0, 2.0]


def test_iid_has_one_shift_a_segment_and_mixes_its_classes() -> None:
    stream = _build("iid")
    assert [s.domains for s in stream.segments] == [(name,) for name in SHIFTS]
    for labels in _labels(stream):
        assert max(len(list(run)) for _, run in groupby(labels)) < 15


def test_continual_visits_the_shifts_in_order() -> None:
    assert [name for name, _ in groupby(_names(_build("continual")))] == list(SHIFTS)
    few = _build("continual", _task(("a", "b")))
    assert [name for name, _ in groupby(_names(few))] == ["a", "b"] * 4


@pytest.mark.parametrize("name", ["runs", "continual-runs"])
def test_runs_are_of_one_class_and_of_10_to_40(name: str) -> None:
    stream = _build(name)
    lengths: list[int] = []
    for segment, labels in zip(stream.segments, _labels(stream), strict=True):
        begin = 0
        for _, count in segment.visits:
            runs = [(label, len(list(run))) for label, run in groupby(labels[begin : begin + count])]
            lengths += [length for _, length in runs[:-1]]
            assert runs[-1][1] <= RUN_LENGTHS[1]  # the last of a visit is cut
            begin += count
    assert min(lengths) >= RUN_LENGTHS[0]
    assert max(lengths) <= RUN_LENGTHS[1]
    assert max(lengths) - min(lengths) > 20


def test_runs_of_a_domain_with_one_class_have_that_class() -> None:
    def single(name: str) -> Domain:
        inputs, labels = data(name, SIZE, 0)
        return Domain(inputs, torch.zeros_like(labels))

    task = FakeTask("t", torch.nn.Identity(), single, clean=None, shifts=("a",))
    assert len(_build("runs", task)) == PER_SHIFT


def test_dirichlet_makes_neighbours_alike_without_runs_of_a_fixed_kind() -> None:
    same = [np.mean([a == b for a, b in pairwise(labels)]) for labels in _labels(_build("dirichlet"))]
    assert np.mean(same) > 0.5  # a third if classes were independent
    for labels in _labels(_build("dirichlet")):
        assert np.bincount(labels).min() >= PER_SHIFT // 3 - 10  # the classes are those of the domain


def test_mixed_draws_every_domain_for_every_instance() -> None:
    names = _names(_build("mixed"))
    counts = np.array([names.count(name) for name in SHIFTS])
    assert abs(counts - MIXED / 8).max() < 5 * (MIXED / 8) ** 0.5
    assert np.mean([a == b for a, b in pairwise(names)]) < 0.2


def test_long_visits_three_shifts() -> None:
    assert [(name, len(list(run))) for name, run in groupby(_names(_build("long")))] == [
        (name, LONG) for name in ("a", "c", "e")
    ]
    assert [name for name, _ in groupby(_names(_build("long", _task(("a", "b")))))] == ["a", "b"]


@pytest.mark.parametrize(("name", "domains"), [("imbalanced", list(SHIFTS)), ("imbalanced-clean", ["z"] * 4)])
def test_imbalanced_streams_are_mostly_of_one_class_in_random_order(name: str, domains: list[str]) -> None:
    stream = _build(name)
    assert [segment.domains for segment in stream.segments] == [(domain,) for domain in domains]
    for i, labels in enumerate(_labels(stream)):
        counts = np.bincount(labels, minlength=3) / len(labels)
        assert counts[i % 3] == pytest.approx(MAJORITY, abs=0.06)
        assert min(counts) > 0.01
        assert max(len(list(run)) for label, run in groupby(labels) if label != i % 3) < 6
    assert build_stream("imbalanced-clean", _task(clean=None), "report", 0, 1.0) is None


def test_the_draws_of_older_streams_do_not_change() -> None:
    """A stream is drawn by its own name: what other streams there are does not matter."""
    sums = {name: int(sum((s.index * np.arange(len(s))).sum() for s in _build(name).segments)) for name in OLDER}
    assert sums == OLDER


def test_gradual_goes_up_and_down_the_ramp() -> None:
    ramps = {name: (f"{name}1", f"{name}2", name) for name in SHIFTS}
    stream = _build("gradual", _task(ramps=ramps))
    order = [name for name, _ in groupby(_names(stream))]
    assert order[:5] == ["a1", "a2", "a", "a2", "a1"]
    assert len(order) == 5 * len(SHIFTS)
    assert len(stream) == 8 * PER_SHIFT


def test_gradual_without_ramps_fades_into_the_next_shift() -> None:
    names = _names(_build("gradual", scale=4))
    fade = names[: 4 * PER_SHIFT]
    assert set(fade) == {"a", "b"}
    quarters = [np.mean([name == "b" for name in part]) for part in np.array_split(fade, 4)]
    assert quarters == pytest.approx([0.125, 0.375, 0.625, 0.875], abs=0.1)


def test_streams_that_a_task_cannot_have_are_none() -> None:
    assert build_stream("clean", _task(clean=None), "report", 0, 1.0) is None
    for name in ("continual", "mixed", "gradual", "continual-runs"):
        assert build_stream(name, _task(("a",)), "report", 0, 1.0) is None
    assert len(_build("runs", _task(clean=None)).segments) == 8


def test_materialized_instances_are_those_of_the_segment() -> None:
    segment = _build("mixed").segments[0]
    inputs, labels = materialize(_task(), segment)
    assert inputs[:, 0, 1, 1].tolist() == [ord(segment.domains[i]) for i in segment.domain]
    assert inputs[:, 0, 0, 0].tolist() == segment.index.tolist()
    assert labels.tolist() == (segment.index % 3).tolist()
