"""From the shadow phase to what counts as normal."""

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normadapt.pilot.baseline import BLOCK, Baseline, divergence, upper_bound

DELTA = 1e-3


def learned(items):
    baseline = Baseline()
    baseline.learn(items)
    return baseline


def in_bursts(generator, blocks, rates):
    return [float(generator.random() < rate) for _ in range(blocks) for rate in [generator.choice(rates)] * BLOCK]


def test_independent_items_give_their_mean_and_the_margin():
    generator = random.Random(0)
    known = learned(float(generator.random() < 0.05) for _ in range(3000)).hypothesis(0.05, DELTA)
    assert known.block is None
    assert known.rate == pytest.approx(0.05, abs=0.015)
    assert known.item == pytest.approx(known.rate + 0.05, abs=0.02)


def test_a_short_shadow_phase_is_uncertain():
    ends = [learned([0.0] * n).hypothesis(0.02, DELTA).item for n in (1, 10, 100, 1000, 10_000)]
    assert ends == sorted(ends, reverse=True)
    assert ends[0] == pytest.approx(1 - DELTA, abs=1e-6)
    assert ends[-1] == 0.02


def test_nothing_learned_makes_a_guard_blind():
    known = Baseline().hypothesis(0.05, DELTA)
    assert known.blind
    assert known.item == 1
    assert math.isnan(known.rate)
    assert known.items == 0
    assert not learned([0.0] * 500).hypothesis(0.05, DELTA).blind


def test_bursts_raise_what_is_normal_for_items_and_not_what_is_normal_for_blocks():
    generator = random.Random(1)
    known = learned(in_bursts(generator, 60, [0.4, 0, 0, 0, 0, 0, 0, 0])).hypothesis(0.05, DELTA)
    assert known.dispersion > 5
    assert known.item > 0.4
    assert known.block < 0.25
    calm = learned(float(generator.random() < known.rate) for _ in range(3000)).hypothesis(0.05, DELTA)
    assert calm.item < known.item / 2
    assert not known.blind


def test_bursts_that_are_all_bad_leave_the_blocks_to_judge():
    known = learned(in_bursts(random.Random(2), 100, [1.0] + [0.0] * 9)).hypothesis(0.05, DELTA)
    assert known.item > 0.99
    assert known.block < 0.4
    assert not known.blind


def test_a_baseline_that_is_fixed_learns_only_bursts():
    assert Baseline().hypothesis(0.01, DELTA, fixed=0.51).item == 0.51
    bursty = [x / 2 + 0.25 for x in in_bursts(random.Random(3), 60, [0.0, 1.0])]
    known = learned(bursty).hypothesis(0.01, DELTA, fixed=0.51)
    assert known.block == 0.51
    assert known.item > 0.75


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_signal_is_no_special_case(value):
    known = learned([value] * 500).hypothesis(0.05, DELTA)
    assert known.rate == pytest.approx(value)
    assert value < known.item <= 1 or known.item == value == 1


@given(rate=st.floats(0, 1), count=st.floats(0.5, 1e5))
@settings(deadline=None)
def test_the_bound_is_where_the_divergence_says_so(rate, count):
    bound = upper_bound(rate, count, DELTA)
    assert rate <= bound <= 1
    if rate < bound < 1 - 1e-9:
        assert count * divergence(rate, bound) == pytest.approx(math.log(1 / DELTA), rel=1e-3)


def test_the_bound_covers_the_mean():
    generator, misses = random.Random(4), 0
    for _ in range(2000):
        bad = sum(generator.random() < 0.05 for _ in range(100))
        misses += upper_bound(bad / 100, 100, 0.05) < 0.05
    assert misses <= 0.05 * 2000


@given(items=st.lists(st.floats(0, 1), max_size=120), cut=st.integers(0, 120))
@settings(deadline=None, max_examples=30)
def test_splitting_and_resuming_change_nothing_to_the_bit(items, cut):
    parts = learned(items[:cut])
    parts = Baseline.from_dict(json.loads(json.dumps(parts.to_dict(), allow_nan=False)))
    parts.learn(items[cut:])
    assert parts.to_dict() == learned(items).to_dict()


def test_the_worst_block_that_was_seen_is_normal_for_items():
    """Six standard deviations of rare, grave bursts are less than one of them."""
    generator = random.Random(2)
    quiet = [float(generator.random() < 0.02) for _ in range(100 * BLOCK)]
    known = learned([*quiet, *[1.0] * BLOCK, *quiet]).hypothesis(0.05, DELTA)
    assert known.block < 0.2
    assert known.item > 0.9
