from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from normadapt.asymptotics.m_estimation import (
    Huber,
    Mean,
    MeanVariance,
    bias,
    log_likelihood_ratio,
    one_step,
    solve,
)

ORACLES: dict[str, Any] = json.loads((Path(__file__).parent / "oracles_m_estimation.json").read_text())
HUBER = ORACLES["O8_huber_exp"]
THETA = float(HUBER["theta0"])
SAMPLES = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=30)


def exponential_grid(count: int) -> Tensor:
    """The exponential law as equally likely points."""
    p = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return -torch.log(p)


def exponential(count: int, channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count, channels, dtype=torch.float64).exponential_(generator=generator)


def test_huber_of_the_exponential_law() -> None:
    grid = exponential_grid(1_000_000)
    assert solve(Huber(1.345), grid).item() == pytest.approx(THETA, abs=1e-6)
    assert bias(Huber(1.345), grid).item() == pytest.approx(float(HUBER["n_times_bias_iterated"]), abs=2e-4)


@pytest.mark.parametrize("row", HUBER["newton_limits_from_fixed_start"], ids=lambda row: row["delta"])
def test_one_newton_step_from_a_fixed_start(row: dict[str, str]) -> None:
    found = one_step(Huber(1.345), exponential_grid(1_000_000), THETA + float(row["delta"]))
    assert found.item() - THETA == pytest.approx(float(row["newton_limit_minus_theta0"]), rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("count", [50, 200])
def test_simulated_huber(count: int) -> None:
    row = ORACLES["MC_bnloss_huber"][f"huber_n{count}"]
    x = exponential(count, 10_000, seed=count)
    for found, key in (
        (solve(Huber(1.345), x), "bias_iterated"),
        (one_step(Huber(1.345), x, THETA + 0.25), "onestep_newton_from_theta0_plus_0p25"),
    ):
        expected, error = row[key]
        # the oracle's simulation used a control variate; ours is a plain one
        error = math.hypot(error, (found.std() / math.sqrt(found.numel())).item())
        assert abs(found.mean().item() - THETA - expected) < 4 * error


def test_the_bias_correction_removes_most_of_the_bias() -> None:
    x = exponential(50, 40_000, seed=5)
    plain, removed = solve(Huber(), x), bias(Huber(), x) / 50
    # the solution's bias at n = 50 is known to 5e-6 from the oracle: only the correction is simulated
    left = ORACLES["MC_bnloss_huber"]["huber_n50"]["bias_iterated"][0] - removed.mean().item()
    assert abs(left) < 0.25 * (0.14147 / 50)
    assert plain.shape == removed.shape == (40_000,)


def test_joint_step_of_mean_and_variance() -> None:
    row = ORACLES["O16_joint_one_step"]
    x = torch.tensor(row["x"], dtype=torch.float64)
    found = one_step(MeanVariance(), x, (row["m_s"], row["v_s"]))
    assert found.mean.item() == 5
    assert found.variance.item() == pytest.approx(26 / 5, rel=1e-15)
    assert one_step(Mean(), x, 1.0).item() == 5


@pytest.mark.parametrize("row", ORACLES["O14_LAN_tilt"], ids=lambda row: f"n{row['n']}h{row['h']}")
def test_local_asymptotic_normality(row: dict[str, Any]) -> None:
    for terms, key in ((1, "LAN1"), (2, "LAN2_skew"), (3, "LAN3_kurt")):
        found = log_likelihood_ratio(float(row["h"]), float(row["Z"]), 2, 6, row["n"], terms)  # type: ignore[arg-type]
        assert found.item() == pytest.approx(float(row[key]), rel=1e-12)


def test_rates_of_the_lan_expansion() -> None:
    n = torch.tensor([1e2, 1e4, 1e6], dtype=torch.float64)
    h, z = 1.5, 0.7
    t = h / n.sqrt()  # tilt of an exponential law: sum t x - n K(t), K(t) = -log(1 - t)
    exact = t * (n + n.sqrt() * z) + n * torch.log1p(-t)
    for terms in (1, 2, 3):
        scaled = (log_likelihood_ratio(h, z, 2, 6, n, terms) - exact).abs() * n ** (terms / 2)  # type: ignore[arg-type]
        assert scaled.max() < 2.1
        assert scaled.min() > 0.5 * scaled.max()


def test_error_of_one_step_is_quadratic_in_the_start() -> None:
    grid = exponential_grid(400_000)
    root = solve(Huber(1.345), grid)
    delta = torch.tensor([0.2, 0.1, 0.05], dtype=torch.float64)
    scaled = (one_step(Huber(1.345), grid, root + delta) - root) / delta**2
    limit = -float(HUBER["m2_E_psi2"]) / (2 * float(HUBER["A_Epsi_prime"]))
    assert torch.allclose(scaled, torch.full_like(scaled, limit), rtol=0.2)
    assert abs(scaled[2] - limit) < abs(scaled[0] - limit)


@given(SAMPLES, st.floats(0.01, 50))
def test_solution_is_a_root(values: list[float], cut: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    root = solve(Huber(cut), x)
    assert (x - root).clamp(-cut, cut).mean().abs() < 1e-9 * cut
    assert x.min() <= root + 1e-9
    assert root - 1e-9 <= x.max()


@given(SAMPLES, st.floats(-50, 50), st.floats(0.1, 10))
def test_affine_equivariance(values: list[float], shift: float, factor: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    y = shift + factor * x
    mean, variance = solve(MeanVariance(), x)
    moved = solve(MeanVariance(), y)
    assert torch.allclose(moved.mean, shift + factor * mean, rtol=0, atol=1e-10)
    assert torch.allclose(moved.variance, factor**2 * variance, rtol=1e-10, atol=1e-9)
    # Where a draw lies on the threshold psi has two slopes, and rounding of y chooses between them.
    assume(bool(((x.abs() - 1.5).abs() > 1e-6).all()))
    step = one_step(Huber(1.5, scale=factor), y, shift)
    assert torch.allclose(step, shift + factor * one_step(Huber(1.5), x, 0.0), atol=1e-9, equal_nan=True)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.floats(-1e6, 1e6), st.floats(0, 1e6))
@settings(max_examples=50)
def test_variance_is_never_negative(values: list[float], mean: float, variance: float) -> None:
    found = one_step(MeanVariance(), torch.tensor(values, dtype=torch.float64), (mean, variance))
    assert found.variance >= 0


def test_a_wide_threshold_is_the_mean_and_a_narrow_one_the_median() -> None:
    x = exponential(101, 7, seed=1)
    assert torch.allclose(solve(Huber(1e6), x), x.mean(0), rtol=1e-12)
    assert torch.allclose(solve(Huber(1e-9), x), x.median(0).values, rtol=0, atol=1e-8)


def test_outliers_even_infinite_ones_do_not_move_huber() -> None:
    x = exponential(40, 1, seed=2)
    spoilt = torch.cat([x, torch.tensor([[math.inf], [1e300]], dtype=torch.float64)])
    assert (solve(Huber(), spoilt) - solve(Huber(), x)).abs() < 0.25
    assert bias(Huber(), spoilt).isfinite().all()


def test_bias_of_the_exact_estimators() -> None:
    x = exponential(9, 3, seed=3)
    assert torch.equal(bias(Mean(), x), torch.zeros(3, dtype=torch.float64))
    plain, removed = solve(MeanVariance(), x), bias(MeanVariance(), x)
    assert torch.allclose(plain.variance - removed.variance / 9, x.var(0), rtol=1e-13)
    assert torch.equal(removed.mean, torch.zeros(3, dtype=torch.float64))
    symmetric = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert bias(Huber(), symmetric).abs() < 1e-12
    assert (bias(Huber(), -exponential_grid(1000)) + bias(Huber(), exponential_grid(1000))).abs() < 1e-12
    assert bias(Huber(), torch.full((8,), 2.5)).item() == 0


def test_channels_do_not_disturb_one_another() -> None:
    x = exponential(16, 3, seed=4)
    x[:, 1] = torch.tensor([0.0, 1e6]).repeat(8)  # nothing near a start in the middle
    found = one_step(Huber(), x, torch.tensor([1.0, 5e5, 1.0]))
    assert found.isnan().tolist() == [False, True, False]
    assert found[0] == one_step(Huber(), x[:, 0], 1.0)
    assert bias(Huber(), x)[2] == bias(Huber(), x[:, 2])
    per_channel = solve(Huber(scale=torch.tensor([1.0, 2.0, 0.5])), x)
    for channel, scale in enumerate((1.0, 2.0, 0.5)):
        assert per_channel[channel] == solve(Huber(scale=scale), x[:, channel])


def test_starts_and_scales_may_have_more_channels_than_the_sample() -> None:
    x = exponential(12, 1, seed=6)[:, 0]
    starts = torch.tensor([0.5, 1.0, 1.5])
    assert torch.equal(one_step(Huber(), x, starts), torch.stack([one_step(Huber(), x, s) for s in starts]))
    assert torch.equal(solve(Huber(scale=starts), x), torch.stack([solve(Huber(scale=s), x) for s in starts]))
    assert one_step(MeanVariance(), x, (starts, 1.0)).variance.shape == (3,)


def test_gradients() -> None:
    x = exponential(12, 2, seed=7)
    for psi in (Mean(), Huber(0.8)):
        assert torch.autograd.gradcheck(lambda v, psi=psi: solve(psi, v), x.clone().requires_grad_())
        start = torch.tensor([0.9, 1.1], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda v, s, psi=psi: one_step(psi, v, s), (x.clone().requires_grad_(), start))
    assert torch.autograd.gradcheck(lambda v: solve(MeanVariance(), v), x.clone().requires_grad_())
    root = solve(Huber(0.8), x.requires_grad_())
    inside = (x - root).abs() < 0.8
    (gradient,) = torch.autograd.grad(root.sum(), x)
    assert torch.allclose(gradient, inside.double() / inside.sum(0))


def test_gradients_of_the_likelihood_ratio() -> None:
    arguments = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.5, 0.7, 2.0, 6.0, 25.0)]
    assert torch.autograd.gradcheck(log_likelihood_ratio, arguments)


def test_compiled_as_eager() -> None:
    x = exponential(16, 4, seed=8)

    def all_of_it(x: Tensor) -> tuple[Tensor, ...]:
        huber = Huber(1.2)
        ratio = log_likelihood_ratio(x, 0.1, 2, 6, 10)
        return solve(huber, x), one_step(huber, x, 1.0), bias(huber, x), *solve(MeanVariance(), x), ratio

    compiled = torch.compile(all_of_it, backend="eager", fullgraph=True)
    for found, expected in zip(compiled(x), all_of_it(x), strict=True):
        assert torch.allclose(found, expected, rtol=1e-14)


def test_bad_input() -> None:
    x = torch.ones(4)
    with pytest.raises(ValueError, match=r"sample needs draws along its first dimension; got shape \(\)"):
        solve(Mean(), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"got shape \(0, 3\)"):
        bias(Huber(), torch.empty(0, 3))
    with pytest.raises(ValueError, match="at least two draws"):
        bias(MeanVariance(), torch.ones(1, 3))
    with pytest.raises(ValueError, match="threshold must be positive; got 0"):
        solve(Huber(0), x)
    with pytest.raises(ValueError, match="scale must be positive; got -1"):
        one_step(Huber(1, scale=torch.tensor([1.0, -1.0])), torch.ones(4, 2), 0.0)
    with pytest.raises(ValueError, match="sample must not be NaN"):
        solve(Huber(), torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="start must not be NaN"):
        one_step(Mean(), x, math.nan)
    with pytest.raises(ValueError, match="start_variance must not be negative; got -4"):
        one_step(MeanVariance(), x, (0, -4))
    with pytest.raises(ValueError, match=r"do not broadcast: start \(2,\), sample \(3,\)"):
        one_step(Mean(), torch.ones(4, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="terms must be 1, 2 or 3; got 0"):
        log_likelihood_ratio(1, 1, 0, 0, 10, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        log_likelihood_ratio(1, 1, 0, 0, 0, 1)
