"""A window is a sum: exact whatever the batches, merged in any order, and no instance can carry it away."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normadapt as na
from normadapt.layers.moments import instance_moments
from normadapt.weights.window import Window, sums_of

SOURCE = na.adapt(nn.BatchNorm2d(3).eval()).sources[0]


def values(n, seed=0):
    x = 2 + 3 * torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return instance_moments(x).values, x


def test_sums_are_those_of_all_numbers():
    moments, x = values(7)
    sums = sums_of(moments, SOURCE)
    torch.testing.assert_close(sums[0], x.mean((2, 3)).sum(0))
    torch.testing.assert_close(sums[1], x.square().mean((2, 3)).sum(0))


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_splitting_and_merging_change_nothing(cuts):
    moments, _ = values(12)
    whole = Window.empty(SOURCE).plus(12, sums_of(moments, SOURCE))
    ends = [0, *sorted(cuts), 12]
    parts = [moments[:, a:b] for a, b in itertools.pairwise(ends)]
    forward = backward = Window.empty(SOURCE)
    for part in parts:
        forward = forward.plus(part.shape[1], sums_of(part, SOURCE))
    for part in reversed(parts):
        backward = backward.plus(part.shape[1], sums_of(part, SOURCE))
    for other in (forward, backward):
        assert other.count == whole.count
        torch.testing.assert_close(other.sums, whole.sums, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1e6, 1e30, 1e150])
def test_the_influence_of_one_instance_is_bounded(size):
    moments, _ = values(5)
    loud = moments.clone()
    loud[0, 2], loud[1, 2] = size, size
    change = (sums_of(loud, SOURCE) - sums_of(moments, SOURCE)).abs()
    assert float(change[0].max()) < 1.01e4
    assert float(change[1].max()) < 2.01e8
    assert torch.equal(sums_of(moments, SOURCE), sums_of(moments.clone(), SOURCE))
