"""`Track` and a stream that changes in batches too small to show it: the moving average over the last instances."""

import math
from functools import cache

import pytest
import torch

import normadapt as na
from normadapt.bench.ablations import NoAverage
from normadapt.demo import as_is, brightness, contrast, mnist_digits, noise, normalized, usps_net
from normadapt.policies.recent import REACH, Recent
from normadapt.layers.moments import Composition

EMPTY = Recent(torch.zeros(2, 0).double(), torch.zeros(0).double())


def test_the_average_by_hand():
    values = torch.randn(12, 2, 3, dtype=torch.float64)
    recent = EMPTY
    weights = [1.0]
    for index, (value, n) in enumerate(zip(values, [1, 2, 1, 4] * 3, strict=True)):
        recent = recent.update(value, None, n)
        if index:
            step = 1 - math.exp(-n / REACH)
            weights = [w * (1 - step) for w in weights] + [step]
    weight = torch.tensor(weights, dtype=torch.float64)
    assert torch.allclose(recent.moments, (weight.view(-1, 1, 1) * values).sum(0), rtol=1e-12)
    counts = torch.tensor([1.0, 2, 1, 4] * 3, dtype=torch.float64)
    assert recent.variance == pytest.approx(float((weight.square() / counts).sum()), rel=1e-12)


def test_it_is_compared_once_in_four_instances_and_a_batch_that_speaks_for_itself_begins_anew():
    recent, due = EMPTY, []
    for _ in range(12):
        recent = recent.update(torch.ones(2, 3), None, 1)
        due.append(recent.is_due)
    assert due == [False] + [False, False, False, True] * 2 + [False, False, False]
    assert recent.update(torch.ones(2, 3), None, 16).variance == 1 / 16


def test_what_it_is_worth_between_classes():
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    told = Composition(last=uniform, reference=uniform, chance=0.25)
    recent = EMPTY._replace(variance=1 / 20)
    assert recent.share_between(None, 5.0) == 5 / 20
    assert recent.share_between(None, 50.0) == 1
    assert recent.share_between(told, 5.0) == 5 / 20  # no classes are known
    spread = recent._replace(classes=uniform)
    assert spread.share_between(told, 5.0) == 5 / 20
    alike = recent._replace(classes=torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
    assert alike.share_between(told, 5.0) == 1
    half = recent._replace(classes=torch.tensor([0.5, 0.5, 0, 0], dtype=torch.float64))
    assert half.share_between(told, 5.0) == pytest.approx(1 / 3)


@cache
def in_turn(seed):
    """A hundred digits as they are, with less contrast, and brighter."""
    images, _ = mnist_digits(seed)
    parts = (as_is, contrast, brightness)
    return torch.cat([change(images[100 * k : 100 * k + 100], seed) for k, change in enumerate(parts)])


def jumps(policy, x, n):
    """In which batches a window began anew, in the first norm and in the second."""
    adapted, found = na.adapt(usps_net(), policy=policy), ([], [])
    with torch.no_grad():
        for index, batch in enumerate(normalized(x).split(n)):
            adapted(batch)
            for site, where in zip(adapted.report().sites, found, strict=True):
                if site.status.startswith("new window"):
                    where.append(index * n)
    return found


def test_changes_that_single_images_do_not_show_are_found():
    alone = 0
    for seed in (1, 2, 3):
        first, second = jumps(na.Track(), in_turn(seed), 1)
        assert [where // 100 for where in first] == [1, 2]
        assert all(where % 100 < 60 for where in first)
        assert set(first) <= set(second)  # the windows behind were of inputs that are no more
        alone += len(jumps(NoAverage(), in_turn(seed), 1)[0])
    assert alone < 6


@pytest.mark.parametrize(("met", "jumped"), [(12, False), (16, True)])
def test_a_window_as_young_as_a_batch_is_not_emptied_with_those_before_it(met, jumped):
    images = normalized(mnist_digits(0)[0][: met + 4])
    told = []

    class Told(na.Track):
        def step(self, state, evidence, source):
            if evidence.upstream is not None and state.count == met:
                evidence = evidence._replace(upstream=evidence.upstream._replace(jumped=True))
            after, statistics = super().step(state, evidence, source)
            if evidence.upstream is not None:
                told.append((state.count, statistics.jumped))
            return after, statistics

    adapted = na.adapt(usps_net(), policy=Told(compares=False))
    with torch.no_grad():
        for batch in images.split(4):
            adapted(batch)
    assert told[-1] == (met, jumped)
    assert not any(jump for _, jump in told[:-1])


@pytest.mark.parametrize("n", [1, 4])
def test_nothing_is_found_where_nothing_changes(n):
    for seed in (1, 2):
        for change in (as_is, noise):
            assert jumps(na.Track(), change(mnist_digits(seed)[0][:300], seed), n)[0] == []
