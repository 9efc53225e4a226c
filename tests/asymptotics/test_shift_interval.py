"""Interval of a squared shift: coverage, its ends, and its limits."""

from __future__ import annotations

import pytest
import torch

from normadapt.asymptotics.shift_interval import squared_shift_interval


def test_level_is_kept() -> None:
    rng = torch.Generator().manual_seed(4)
    d = 2 + torch.randn(4000, 20, generator=rng, dtype=torch.float64)  # wR = I: q is a noncentral chi-square(20)
    for level in (0.5, 0.8, 0.99):
        low, high = squared_shift_interval((d * d).sum(1), 20.0, 20.0, 1.0, level)
        assert float(((low <= 80) & (high >= 80)).double().mean()) == pytest.approx(level, abs=0.03)


def test_ends_leave_the_probability_outside() -> None:
    q, trace, square, along = 7.0, 2.0, 1.5, 0.4
    low, high = squared_shift_interval(q, trace, square, along, 0.9)
    for s, tail in ((low, 0.95), (high, 0.05)):
        mean, variance = s + trace, 2 * square + 4 * s * along
        below = torch.special.gammainc(mean * mean / variance, q * mean / variance)
        assert float(below) == pytest.approx(tail, abs=1e-9)


def test_no_noise_leaves_no_doubt() -> None:
    low, high = squared_shift_interval(torch.tensor([0.0, 3.0]), 0.0, 0.0, 0.0)
    torch.testing.assert_close(low, torch.tensor([0.0, 3.0], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(high, low, rtol=0, atol=1e-12)


def test_noise_alone_may_be_no_shift() -> None:
    interval = squared_shift_interval(torch.tensor([1e-9, 0.8, 1.0]), 1.0, 0.1, 0.1)
    assert interval.low.tolist() == [0, 0, 0]
    assert interval.high[0] == 0
    assert bool((interval.high.diff() > 0).all())


def test_units_do_not_matter() -> None:
    q = torch.tensor([0.5, 2.0, 40.0])
    for scale in (1e-8, 1e8):
        one = squared_shift_interval(q, 1.0, 0.3, 0.2)
        other = squared_shift_interval(q * scale, scale, 0.3 * scale**2, 0.2 * scale)
        torch.testing.assert_close(other.low, one.low * scale, rtol=1e-5, atol=1e-12 * scale)
        torch.testing.assert_close(other.high, one.high * scale, rtol=1e-5, atol=1e-12 * scale)


def test_a_batch_is_its_sites() -> None:
    q = torch.tensor([0.1, 1.0, 5.0, 300.0], dtype=torch.float64)
    along = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    together = squared_shift_interval(q, 0.5, 0.2, along)
    for i in range(4):
        one = squared_shift_interval(q[i], 0.5, 0.2, along[i])
        assert float(one.low) == float(together.low[i])
        assert float(one.high) == float(together.high[i])


def test_a_larger_observation_is_a_larger_shift() -> None:
    low, high = squared_shift_interval(torch.linspace(0, 50, 200, dtype=torch.float64), 3.0, 2.0, 0.7)
    assert bool((low.diff() >= 0).all())
    assert bool((high.diff() >= 0).all())
    assert bool((low <= high).all())


@pytest.mark.parametrize("wrong", [{"q": -1.0}, {"noise_trace": -1.0}, {"direction_noise": float("nan")}])
def test_arguments_that_make_no_sense(wrong: dict[str, float]) -> None:
    given = {"q": 1.0, "noise_trace": 1.0, "noise_square_trace": 1.0, "direction_noise": 1.0} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        squared_shift_interval(**given)
    with pytest.raises(ValueError, match="level"):
        squared_shift_interval(1.0, 1.0, 1.0, 1.0, 1.0)
