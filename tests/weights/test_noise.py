"""The noise of an observed shift: sums of full matrices, and the interval of the shift that they give."""

import pytest
import torch

from normadapt.asymptotics.shift_interval import squared_shift_interval
from normadapt.weights.matrix import SitePrior
from normadapt.weights.noise import noise_of

FLAT = torch.float64
CHANNELS, RANK = 5, 3
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.0, 0.7], dtype=FLAT)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLAT)


def made():
    """A prior of which the noise alone is known."""
    size, none = 2 * CHANNELS, torch.zeros(0, dtype=FLAT)
    basis = torch.linalg.qr(randn(size, RANK, seed=1))[0]
    unit, freedom = 0.5 + randn(size, seed=2).abs(), 1 - basis.square().sum(1)
    within, between = (0.3 * randn(RANK, RANK, seed=seed) for seed in (3, 4))
    within, between = within @ within.T, between @ between.T
    rest, beyond = 0.02 * randn(size, seed=5).abs(), 0.02 * randn(size, seed=6).abs()
    zero = torch.zeros(RANK, RANK, dtype=FLAT)
    return SitePrior(unit, basis, zero, within, between, zero, rest, beyond, freedom, none, none, none, none)


def full(prior, count, draws):
    """R as a matrix (2C, 2C)."""
    inner = prior.within / count + prior.between * draws
    rest = prior.freedom * (prior.within_rest / count + prior.between_rest * draws)
    unit = torch.diag(prior.unit)
    return unit @ (prior.basis @ inner @ prior.basis.T + torch.diag(rest)) @ unit


def test_sums_are_those_of_full_matrices():
    prior, d = made(), 5 * randn(4, 2 * CHANNELS, seed=7)
    found, R = noise_of(prior, 20.0, 0.15, WEIGHT, d), full(prior, 20.0, 0.15)
    torch.testing.assert_close(found.variance.flatten(), R.diagonal())
    for row, part in enumerate((slice(0, CHANNELS), slice(CHANNELS, None), slice(None))):
        w = torch.diag(torch.cat((WEIGHT, WEIGHT))[part])
        wr, moved = w @ R[part, part], d[:, part]
        trace, squares = wr.trace(), (wr @ wr).trace()
        torch.testing.assert_close(found.trace[row], trace)
        torch.testing.assert_close(found.squares[row], squares)
        length = ((moved @ w) * moved).sum(1)
        along = ((moved @ wr @ w) * moved).sum(1)
        kept = 1 - trace / length
        torch.testing.assert_close(found.direction[:, row], (along - squares * kept) / (length - trace * kept))


@pytest.mark.parametrize("size", [0.0, 0.1, 0.5, 2.0, 10.0])
def test_the_interval_covers_the_shift_of_location_and_scale_together(size):
    prior, w = made(), torch.cat((WEIGHT, WEIGHT))
    u = size * torch.nn.functional.normalize(randn(2 * CHANNELS, seed=8), dim=0)
    d = u + randn(4000, 2 * CHANNELS, seed=9) @ torch.linalg.cholesky(full(prior, 8.0, 0.2)).T
    noise = noise_of(prior, 8.0, 0.2, WEIGHT, d)
    low, high = squared_shift_interval(d.square() @ w, noise.trace[2], noise.squares[2], noise.direction[:, 2])
    s = u.square() @ w
    covered = float(((low <= s) & (s <= high)).double().mean())
    # One direction has half of this noise, and whether the shift lies along it is seen with error: 0.86 to 0.99.
    assert covered > 0.85


def test_a_shift_of_nothing_has_no_direction():
    noise = noise_of(made(), 20.0, 0.15, WEIGHT, torch.zeros(2 * CHANNELS, dtype=FLAT))
    assert noise.direction.tolist() == [0, 0, 0]
    assert all(bool(part.isfinite().all()) for part in noise)
