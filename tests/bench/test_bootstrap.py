from __future__ import annotations

import numpy as np
import pytest

from normadapt.bench.bootstrap import Interval, _student, block_length, blocks, interval, replicates


def test_blocks_stay_within_segments_and_cover_everything() -> None:
    assert blocks([100, 30, 130], 50).tolist() == [0, 50, 100, 130, 180, 230]
    assert blocks([120], 50).tolist() == [0, 50]  # a rest of less than half a block joins the one before
    assert blocks([10], 50).tolist() == [0]
    assert (block_length(1, 1000), block_length(200, 1000)) == (50, 200)
    assert (block_length(1, 64), block_length(16, 64)) == (8, 16)


def test_replicates_of_a_constant_do_not_vary() -> None:
    draws, k = replicates(np.full((2, 300), 0.25), [100, 200], 50, "s")
    assert k == 6
    assert draws.shape[0] == 2
    assert np.allclose(draws, 0.25)


def test_the_same_seed_draws_the_same_blocks() -> None:
    values = np.random.default_rng(0).standard_normal((1, 500))
    one, two = (replicates(values, [500], 50, "a")[0] for _ in range(2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, replicates(values, [500], 50, "b")[0])


def test_pairs_stay_pairs() -> None:
    values = np.random.default_rng(0).standard_normal((1, 500))
    draws, _ = replicates(np.concatenate((values, values + 1)), [500], 50, "a")
    assert np.allclose(draws[1] - draws[0], 1)


@pytest.mark.parametrize("correlated", [False, True])
def test_coverage(correlated: bool) -> None:
    """95 % intervals hold the true mean about 95 times in 100, also where neighbours are alike."""
    rng = np.random.default_rng(1)
    hits, trials = 0, 400
    for trial in range(trials):
        values = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=1000)
        if correlated:
            values = np.repeat(values[:100], 10)  # ten instances share their fate
        draws, k = replicates(values[None], [500, 500], 50, str(trial))
        found = interval(float(values.mean()), draws[0], k)
        hits += found.low <= 0.1 <= found.high
    assert 0.92 <= hits / trials <= 0.98


def test_an_interval_is_about_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(2).standard_normal((1, 10_000))
    draws, k = replicates(values, [10_000], 50, "x")
    found = interval(0.0, draws[0], k)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 / 100, rel=0.12)
    assert isinstance(found, Interval)


@pytest.mark.parametrize(("degrees", "quantile"), [(4, 2.776), (10, 2.228), (100, 1.984)])
def test_students_quantile(degrees: int, quantile: float) -> None:
    assert _student(degrees) == pytest.approx(quantile, rel=0.01)
