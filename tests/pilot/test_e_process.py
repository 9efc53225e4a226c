"""The e-process: exact expectations, brute force, splitting, resuming, and the edges of its domain."""

import itertools
import json
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normadapt.pilot.e_process import CASH, FRACTIONS, WEIGHTS, EProcess

MEMORY = 250
SIGNALS = st.lists(st.floats(0, 1), max_size=30)


def coins(generator, rate, count):
    return [float(generator.random() < rate) for _ in range(count)]


def by_hand(m0, items, *, reset=False):
    """Wealth by products in the order of the formula; an e-CUSUM keeps no less than it began with."""
    total = sum(WEIGHTS)
    shares = [weight / total for weight in WEIGHTS]
    cash = 0.0 if reset else CASH
    wealth = [(1 - cash) * share for share in shares]
    for i, x in enumerate(items):
        if reset:
            wealth = [max(w, share) for w, share in zip(wealth, shares, strict=True)]
        elif i and i % (MEMORY // 125 or 1) == 0:
            left = CASH * MEMORY / (MEMORY + i)
            wealth, cash = [w + (cash - left) * share for w, share in zip(wealth, shares, strict=True)], left
        wealth = [w * (1 + f / m0 * (x - m0)) for w, f in zip(wealth, FRACTIONS, strict=True)]
    return math.log(sum(wealth) + cash)


@pytest.mark.parametrize("m0", [0.05, 0.3, 0.9])
def test_at_the_rate_itself_the_expected_wealth_is_one_and_below_it_less(m0):
    for rate, expected in ((m0, pytest.approx(1, abs=1e-12)), (m0 / 2, None)):
        total = 0.0
        for items in itertools.product((0.0, 1.0), repeat=9):
            process = EProcess(m0, memory=3)
            total += math.exp(process.update(items)) * math.prod(rate if x else 1 - rate for x in items)
        assert total == expected if expected is not None else total < 1


@pytest.mark.parametrize("reset", [False, True])
@given(items=SIGNALS, m0=st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=50)
def test_the_value_is_the_product_formula(reset, items, m0):
    process = EProcess(m0, reset_at_one=reset, memory=MEMORY)
    process.update(items)
    assert process.log_value == pytest.approx(by_hand(m0, items, reset=reset), abs=1e-9)
    assert process.peak == pytest.approx(
        max(by_hand(m0, items[:n], reset=reset) for n in range(len(items) + 1)), abs=1e-9
    )
    assert process.count == len(items)


@pytest.mark.parametrize("reset", [False, True])
@given(items=SIGNALS, cut=st.integers(0, 30))
@settings(deadline=None, max_examples=50)
def test_splitting_and_resuming_change_nothing_to_the_bit(reset, items, cut):
    whole = EProcess(0.07, reset_at_one=reset)
    whole.update(items)
    parts = EProcess(0.07, reset_at_one=reset)
    parts.update(items[:cut])
    parts = EProcess.from_dict(json.loads(json.dumps(parts.to_dict(), allow_nan=False)))
    for x in items[cut:]:
        parts.update(x)
    assert parts.to_dict() == whole.to_dict()
    assert (parts.log_value, parts.peak) == (whole.log_value, whole.peak)


def test_false_alarms_stay_below_alpha_however_often_one_looks():
    generator, alpha, runs = random.Random(0), 0.05, 400
    alarms = 0
    for _ in range(runs):
        process = EProcess(0.2)
        process.update(coins(generator, 0.2, 300))
        alarms += process.peak >= math.log(1 / alpha)
    assert alarms <= runs * alpha


@pytest.mark.parametrize(("rate", "most"), [(0.1, 400), (0.2, 60), (0.5, 12)])
def test_a_rate_above_five_percent_is_found_in_time(rate, most):
    generator, found = random.Random(1), []
    for _ in range(100):
        process, items = EProcess(0.05), 0
        while process.update(float(generator.random() < rate)) < math.log(1000):
            items += 1
        found.append(items + 1)
    assert statistics.median(found) <= most


def test_a_long_quiet_past_hides_no_harm_that_begins_later():
    delays = {}
    for reset in (False, True):
        process, generator = EProcess(0.05, reset_at_one=reset), random.Random(2)
        process.update(coins(generator, 0.02, 4000))
        delays[reset] = 0
        while process.update(float(generator.random() < 0.3)) < math.log(1000):
            delays[reset] += 1
    assert delays[True] <= 40
    assert delays[False] <= 150


def test_the_cusum_never_owes_more_than_one_item():
    process = EProcess(0.05, reset_at_one=True)
    process.update([0.0] * 5000)
    assert process.log_value >= math.log(1 - max(FRACTIONS))
    assert EProcess(0.05).update([0.0] * 5000) < -2


def test_a_wealth_that_has_shrunk_for_long_can_still_come_back():
    for reset in (False, True):
        process = EProcess(0.5, reset_at_one=reset)
        process.update([0.0] * 20_000)
        assert math.isfinite(process.log_value)
        assert process.update([1.0] * 100) > math.log(1000)


def test_extreme_rates_are_allowed():
    nothing_speaks_against_one = EProcess(1.0)
    assert nothing_speaks_against_one.update([1.0] * 1000) <= 1e-12
    assert nothing_speaks_against_one.update([0.0]) < 0
    proof = EProcess(0.0)
    assert proof.update([0.0] * 100) <= 0
    assert proof.update([1.0, 1.0]) > math.log(1000)
    assert math.isfinite(proof.log_value)


def test_a_new_process_has_seen_nothing():
    process = EProcess(0.1)
    assert (process.log_value, process.peak, process.count) == (pytest.approx(0, abs=1e-12), 0, 0)
    assert math.isnan(process.mean)
    assert process.update([]) == pytest.approx(0, abs=1e-12)
    process.update([1.0, 0.5])
    assert process.mean == 0.75
    process.restart()
    assert process.to_dict() == EProcess(0.1).to_dict()


@pytest.mark.parametrize("bad", [math.nan, -0.01, 1.01, math.inf])
def test_a_signal_outside_the_unit_interval_is_refused_and_nothing_is_taken_in(bad):
    process = EProcess(0.1)
    process.update(1.0)
    before = process.to_dict()
    with pytest.raises(ValueError, match=r"signals in \[0, 1\]"):
        process.update([0.0, bad])
    assert process.to_dict() == before


def test_settings_are_checked():
    for m0 in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="rate in"):
            EProcess(m0)
    for grid in ([], [0.0], [1.0], [math.nan]):
        with pytest.raises(ValueError, match="grid must hold"):
            EProcess(0.1, grid=grid)
    for weights in ([1.0], [1.0, 0.0], [1.0, math.inf]):
        with pytest.raises(ValueError, match="weights must be positive"):
            EProcess(0.1, grid=[0.1, 0.5], weights=weights)
    with pytest.raises(ValueError, match="not the state"):
        EProcess.from_dict({"m0": 0.1})
    with pytest.raises(ValueError, match="fits no bet"):
        EProcess.from_dict({**EProcess(0.1).to_dict(), "wealth": [0.0]})
