"""How many draws of a class a stream is worth: against a slow loop, and what it says of plain streams."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normadapt.domains.class_draws import FIRST, after, draws_of

PI = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def slow(streams, pi):
    """In the words of the reference: one instance at a time, one domain after the other."""
    numerator = denominator = raw = seen = 0.0
    for rows in streams:
        total, own, pairs, together, last = torch.zeros_like(pi), 0.0, 0, 0.0, None
        for p in rows.double():
            total, own = total + p, own + float(p @ p)
            if last is not None:
                pairs, together = pairs + 1, together + float(p @ last)
            last = p
        n = len(rows)
        mean = total / n
        raw += n * (float((mean - pi) @ (mean - pi)) - (own / n - float(mean @ mean)) / n)
        seen += n
        if pairs:
            base = (total + 32 * pi) / (n + 32)
            base = float(base @ base)
            numerator += pairs * (together / pairs - base)
            denominator += pairs * (max(own / n, together / pairs) - base)
    rho = min(max((numerator + 0.6) / (denominator + 1.2), 0.0), 0.97)
    return (1 + rho) / (1 - rho), min(1.0, max(raw / (seen * (1 - float(pi @ pi))), 1e-4))


def probabilities(n, seed, sharpness=3.0):
    g = torch.Generator().manual_seed(seed)
    return torch.softmax(sharpness * torch.randn(n, 4, generator=g), 1)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_same_as_a_slow_loop_whatever_the_batches(lengths, size, seed):
    streams, known = [probabilities(n, seed + k) for k, n in enumerate(lengths)], []
    for rows in streams:
        one = None
        for batch in rows.split(size):
            one = after(one, batch)
        known.append(one)
    assert tuple(draws_of([None, *known], PI)) == pytest.approx(slow(streams, PI), rel=1e-9)


def one_hot(labels):
    return torch.eye(4)[labels]


def drawn(n, seed, weights=PI):
    return torch.multinomial(weights, n, replacement=True, generator=torch.Generator().manual_seed(seed))


def said(*streams):
    return draws_of([after(None, rows) for rows in streams], PI)


def test_independent_instances_are_a_draw_each():
    found = said(one_hot(drawn(2000, 0)))
    assert found.run < 1.15
    assert found.imbalance < 0.01


@pytest.mark.parametrize("length", [5, 10])
def test_runs_of_one_class_are_a_draw_each(length):
    found = said(one_hot(drawn(4000 // length, 1).repeat_interleave(length)))
    assert found.run == pytest.approx(2 * length - 1, rel=0.25)  # (1 + rho)/(1 - rho) of runs of a fixed length
    assert found.imbalance < 0.03


def test_one_class_of_nine_in_ten_is_imbalance_and_no_correlation():
    mostly = torch.tensor([0.9, 0.1 / 3, 0.1 / 3, 0.1 / 3], dtype=torch.float64)
    found = said(one_hot(drawn(2000, 2, mostly)))
    assert found.run < 1.3
    expected = float((mostly - PI) @ (mostly - PI)) / (1 - float(PI @ PI))
    assert found.imbalance == pytest.approx(expected, rel=0.1)


def test_before_any_answer():
    assert draws_of([None], PI) == FIRST
    assert draws_of([], PI) == FIRST
