"""Weights against oracles: risks by quadrature over the rules themselves, global optima, enumeration, exact harm."""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normadapt.asymptotics import weights
from normadapt.asymptotics.cumulants import Moments
from normadapt.asymptotics.weights import oracle, output_optimal, plug_in, pooled, shrink, tail_safe, unbiased_risk

ORACLES = json.loads(Path(__file__).with_name("oracles_weights.json").read_text())


def close(value, wanted, relative=1e-9):
    assert float(value) == pytest.approx(float(Fraction(wanted)), rel=relative, abs=1e-14)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def nodes(breaks, per=24):
    """Gauss-Legendre points and weights on the intervals between sorted break points."""
    x, w = (torch.tensor(v, dtype=torch.float64) for v in np.polynomial.legendre.leggauss(per))
    ends = torch.tensor(sorted(breaks), dtype=torch.float64)
    half = (ends[1:] - ends[:-1]).unsqueeze(1) / 2
    return ((ends[1:] + ends[:-1]).unsqueeze(1) / 2 + half * x).flatten(), (half * w).flatten()


def test_risks_under_normal_data_are_the_rules_integrals():
    for row in ORACLES["O9a_gaussian_risk_units_of_tau"]["rows"]:
        h = float(row["h"])
        d, w = nodes([*np.arange(h - 12, h + 12.01, 0.25), -1, 0, 1])
        w = w * torch.exp(-0.5 * (d - h) ** 2) / math.sqrt(2 * math.pi)
        close(oracle(h, 1.0), row["oracle"])
        naive, positive = oracle(d, 1.0), plug_in(d, 1.0)
        close((w * (naive * d - h) ** 2).sum(), row["plugin_d2_over_d2p1"])
        close((w * (positive * d - h) ** 2).sum(), row["positive_part_1_minus_1_over_d2"])
        close((w * naive).sum(), row["E_plugin_lambda"])
        close((w * unbiased_risk(0.3, d, 1.0)).sum(), 0.49 * h * h + 0.09)


def test_risks_under_exponential_data_are_the_rules_integrals():
    """The rule's derivatives, through autograd, also give the cumulant-corrected Stein estimates."""
    for row in ORACLES["O9b_exp_risk_known_tau"]["rows"]:
        n, h = row["n"], float(row["h"])
        tau = 1 / n
        delta = h * math.sqrt(tau)
        start = 1 - delta  # the source's mean
        kinks = [start - math.sqrt(tau), start, start + math.sqrt(tau)]
        breaks = [*np.linspace(0, 2, 101), *np.linspace(2.1, 2 + 60 / n**0.5, 100), *(k for k in kinks if k > 0)]
        mean, w = nodes(breaks)
        w = w * torch.exp(n * math.log(n) + (n - 1) * mean.log() - n * mean - math.lgamma(n))
        d = (mean - start).requires_grad_()
        naive = oracle(d, tau)
        g = (naive - 1) * d
        g1, g2, g3 = (torch.zeros_like(d) for _ in range(3))
        (g1,) = torch.autograd.grad(g.sum(), d, create_graph=True)
        (g2,) = torch.autograd.grad(g1.sum(), d, create_graph=True)
        (g3,) = torch.autograd.grad(g2.sum(), d)
        g, g1, g2, naive, d = (v.detach() for v in (g, g1, g2, naive, d))
        close(oracle(delta, tau), row["oracle_risk_over_tau"])
        close(n * (w * (naive * d - delta) ** 2).sum(), row["plugin_risk_over_tau"])
        close(n * (w * (plug_in(d, tau) * d - delta) ** 2).sum(), row["pospart_risk_over_tau"])
        gauss = n * (w * (tau + 2 * tau * g1 + g * g)).sum()
        skewed = gauss + n * (w * g2 * 2 / n**2).sum()
        close(gauss, row["E_SURE_gauss_over_tau"])
        close(skewed, row["plus_skew"])
        close(skewed + n * (w * g3 * 6 / n**3).sum() / 3, row["plus_skew_kurt"])


def test_pooled_and_shrunk_weights():
    row = ORACLES["O9c_pooled"]
    d, r = double(*row["d"]), double(*row["tau"])
    close(pooled(d, r), row["lambda_pool_SURE"])
    for found, name in ((plug_in(d, r), "pospart"), (oracle(d, r), "plugin")):
        for value, wanted in zip(found, row[f"per_channel_{name}"], strict=True):
            close(value, wanted)
    pairs = [(mpmath.mpf(a), mpmath.mpf(b)) for a, b in zip(row["d"], row["tau"], strict=True)]
    slopes = {
        "sure": lambda a: sum(t**2 * (a + t - x**2) / (a + t) ** 3 for x, t in pairs),
        "ml": lambda a: sum((a + t - x**2) / (a + t) ** 2 for x, t in pairs),
    }
    for method, slope in slopes.items():
        found = shrink(d, r, method)
        # the oracle's minimizer stopped at 1e-9 (sure) and 5e-9 (ml); the root of the derivative has all digits
        close(found.prior_variance, row[f"A_{method.upper()}"], 5e-9)
        with mpmath.workdps(30):
            close(found.prior_variance, float(mpmath.findroot(slope, row[f"A_{method.upper()}"])), 1e-14)
        for value, wanted in zip(found.weights, row[f"lambda_c_{method.upper()}"], strict=True):
            close(value, wanted, 3e-9)
    a = shrink(d, r).prior_variance
    risk = ((r / (a + r)) ** 2 * d**2 + r * (a - r) / (a + r)).sum()
    close(risk, row["SURE_at_A"])


@pytest.mark.parametrize("method", ["sure", "ml"])
def test_shrink_finds_the_global_minimum(method):
    torch.manual_seed(0)
    for scale in (1e-6, 1.0, 1e5):
        d = (
            scale
            * torch.randn(20, 30, dtype=torch.float64)
            * torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64).repeat(10)
        )
        r = scale**2 * 10 ** (4 * torch.rand(20, 30, dtype=torch.float64) - 2)
        found = shrink(d, r, method).prior_variance

        def risk(a, d=d, r=r):
            total = a.unsqueeze(-1) + r
            if method == "sure":
                return ((r / total) ** 2 * d**2 + r * (a.unsqueeze(-1) - r) / total).sum(-1)
            return (total.log() + d**2 / total).sum(-1)

        dense = torch.cat(
            (torch.zeros(1, dtype=torch.float64), scale**2 * torch.logspace(-4, 4, 20001, dtype=torch.float64))
        )
        least = risk(dense.unsqueeze(1).expand(-1, 20).unsqueeze(-1).squeeze(-1)).amin(0)
        assert (risk(found) <= least + 1e-12 * least.abs()).all()


@pytest.mark.parametrize(
    ("method", "many", "last", "far"),
    [
        ("sure", (17, 0.84, 0.69), (8.13, 20.4), True),  # local minima at 0.19 and 43
        ("sure", (17, 0.84, 0.69), (6.0, 20.4), False),
        ("ml", (2, 0.59, 0.62), (24.0, 44.2), False),  # at 0 and 107
        ("ml", (4, 0.09, 0.69), (25.0, 12.3), True),
    ],
)
def test_shrink_chooses_among_several_minima(method, many, last, far):
    """Many small shifts measured well and a large one measured badly: the risk has a minimum at either scale."""
    count, *small = many
    d, r = double(*[small[0]] * count, last[0]), double(*[small[1]] * count, last[1])
    grid = torch.cat((double(0.0), torch.logspace(-4, 3, 20001, dtype=torch.float64))).unsqueeze(1)
    total = grid + r
    terms = (r / total) ** 2 * d**2 + r * (grid - r) / total if method == "sure" else total.log() + d**2 / total
    risk = terms.sum(1)
    inner = (risk[1:-1] < risk[:-2]) & (risk[1:-1] <= risk[2:])
    assert int(inner.sum()) + int(risk[0] < risk[1]) == 2
    best = grid[risk.argmin()].item()
    assert (best > 10) == far
    assert shrink(d, r, method).prior_variance.item() == pytest.approx(best, rel=1e-3, abs=1e-3)


def test_shrink_edges():
    nothing = shrink(double(0.1, -0.1), double(1.0, 1.0))
    assert nothing.prior_variance == 0
    assert nothing.weights.tolist() == [0.0, 0.0]
    exact = shrink(double(3.0, 2.0), double(0.0, 1.0), "ml")
    assert exact.weights[0] == 1
    assert shrink(double(0.0, 0.0), 0.0).weights.tolist() == [0.0, 0.0]
    batch = shrink(torch.randn(4, 3, 5), 0.1)
    assert batch.prior_variance.shape == (4, 3)
    assert batch.weights.shape == (4, 3, 5)
    weighted = shrink(double(3.0, 0.1), double(1.0, 1.0), channel_weight=double(1.0, 0.0))
    close(weighted.prior_variance, 8.0)
    close(pooled(double(3.0, 0.1), 1.0, double(1.0, 0.0)), 8 / 9)
    assert pooled(double(0.0, 0.0), 1.0) == 0


def test_squared_shift_is_unbiased_and_its_variance_needs_two_moments():
    row = ORACLES["O9d_ustat_identity"]
    index = torch.tensor(list(itertools.product(range(2), repeat=3)))
    chance = double(0.7, 0.3)[index].prod(1)
    k = Moments.from_sample(index.double(), dim=1).k_statistics()
    estimate = unbiased_risk(0.0, k.k1 - 0.1, k.k2 / 3)
    close((chance * estimate).sum(), row["delta2"])
    close((chance * (estimate - 0.04) ** 2).sum(), row["Var"])
    for weight in (0.3, 1.0):
        risk = (chance * ((1 - weight) * 0.1 + weight * k.k1 - 0.3) ** 2).sum()
        close((chance * unbiased_risk(weight, k.k1 - 0.1, k.k2 / 3)).sum(), risk.item())


def test_weights_of_mean_variance_and_both():
    for row in ORACLES["O10c_weights"]:
        a, u, kurtosis, n = (float(row[name]) for name in ("a_s", "u_s", "exkurt", "n"))
        close(oracle(a, 1 / n), row["lambda_mean"])
        close(weights.variance_weight(3 * (1 + u), 3.0, n, 9 * kurtosis), row["rho_var"])
        close(weights.shared(a, u, n, kurtosis), row["lambda_shared_quadratic"])
    assert weights.variance_weight(2.0, 1.0, 1) == 0
    assert weights.shared(2.0, 1.0, 1) == 0


def test_log_variance_moments_and_squeezed_variances():
    for row in ORACLES["O11a_log_s2_normal"]:
        found = weights.log_variance_moments(row["n"] - 1)
        close(found.mean, row["E_log_s2_minus_log_sigma2"])
        close(found.variance, row["Var_log_s2"])
    for nu in (0.3, 31.0, 32.0, 33.0, 1e3, 1e7):
        with mpmath.workdps(40):
            close(weights.log_variance_moments(nu).mean, float(mpmath.digamma(nu / 2) - mpmath.log(nu / 2)), 1e-13)
            close(weights.log_variance_moments(nu).variance, float(mpmath.psi(1, nu / 2)), 1e-13)
    row = ORACLES["O11b_squeezeVar"]
    s2 = double(*(float(v) for v in row["s2"]))
    found = weights.squeeze(s2, row["df"])
    close(found.prior_degrees, row["df_prior"])
    close(found.prior_variance, row["var_prior"])
    for value, wanted in zip(found.variance, row["var_post"], strict=True):
        close(value, wanted)
    alike = weights.squeeze(torch.stack((s2, torch.ones(8))), row["df"])
    assert alike.prior_degrees.isinf().tolist() == [False, True]
    assert torch.equal(alike.variance[0], found.variance)
    assert alike.variance[1].max() == alike.variance[1].min()


def test_plug_in_risk_against_simulation():
    """The formula's error is O(n^-3): n^2 times it falls as 1/n, from n = 50 to n = 200 to a quarter."""
    errors = {}
    for name, row in ORACLES["MC_plugin_shrinkage"].items():
        n, factor = row["n"], 1.0 if row["c"] == "plugin" else row["c"]
        found = (weights.plug_in_risk(row["delta"], 1.0, 2.0, n, factor) - 1 / n).item()
        close(found, row["pred_order_n2"])
        errors[name] = abs(n * n * found - row["n2_times"]), row["n2_se"]
        assert n * (errors[name][0] - 4 * row["n2_se"]) < 70
    for name, (error, se) in errors.items():
        if name.startswith("n50_"):
            later, later_se = errors[name.replace("n50_", "n200_")]
            assert later - 4 * later_se < 0.35 * (error + 4 * se), name
    assert weights.plug_in_risk(0.0, 1.0, 2.0, 50).isinf()


def test_output_optimal_weight():
    for row in ORACLES["MC_bnloss_huber"]["bn_output_lambda_exp"]:
        given_ = (row["a_s"], row["u_s"])
        skewed = output_optimal(*given_, 2.0, row["n"], row["rho"])
        plain = output_optimal(*given_, 0.0, row["n"], row["rho"])
        close(skewed, row["skew_corrected"])
        close(plain, row["no_skew"])
        simulated = row["lambda_star_exact_MC"]
        assert row["n"] * (abs(skewed.item() - simulated) - 4 * row["se"]) < 0.27
        assert abs(skewed - simulated) < abs(plain - simulated)


def test_output_optimal_is_clipped_and_convex_or_at_an_end():
    assert output_optimal(-1.0, 0.0, 2.0, 16, 1.0) == 1.0
    close(output_optimal(-1.0, 0.0, 2.0, 16, 1.0, clip=False), "14/13")
    assert output_optimal(0.0, 0.0, 2.0, 16, 1.0) == 0
    assert output_optimal(1.0, -1.0, 2.0, 16, 0.0).isfinite()


@given(st.floats(-2, 2), st.floats(-0.9, 3), st.floats(-4, 4), st.integers(1, 64), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_output_optimal_minimizes_its_quadratic(a, u, g, n, rho):
    best = output_optimal(a, u, g, n, rho)
    coupling = a * rho * g / (1 + (1 - rho) * u) / n
    lam = torch.cat((torch.linspace(0, 1, 401, dtype=torch.float64), best.reshape(1)))
    loss = (1 - lam) ** 2 * a * a + lam**2 / n - 2 * coupling * lam * (1 - lam)
    assert 0 <= best <= 1
    assert loss[-1] <= loss.min() + 1e-12


SIZES = st.just(0.0) | st.floats(1e-100, 1e3)  # squares of less, in smaller units, are no numbers any more


@given(SIZES | SIZES.map(lambda d: -d), SIZES, SIZES, st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_rules_ignore_units_and_stay_in_range(d, r, source, unit):
    for rule in (lambda c: oracle(c * d, c * c * r, c * c * source), lambda c: plug_in(c * d, c * c * r)):
        assert 0 <= rule(1.0) <= 1
        assert rule(1.0).item() == pytest.approx(rule(unit).item(), rel=1e-9, abs=1e-9)
    assert tail_safe(d, r, 1.0).item() == pytest.approx(tail_safe(unit * d, unit**2 * r, unit).item(), rel=1e-7)


def harm(lam, shift, tolerance, upper, lower):
    """Exact probability that the weight moves the statistic further from its target than the tolerance."""
    reach = shift.abs() + tolerance
    above = ((1 - lam) * shift + reach) / lam
    below = ((1 - lam) * shift - reach) / lam
    return torch.where(lam > 0, upper(above) + lower(below), 0.0)


SHIFTS = torch.tensor([-3, -1, -0.3, 0, 0.3, 1, 3], dtype=torch.float64).view(-1, 1, 1)  # standard errors
TOLERANCES = torch.tensor([0, 0.5, 1, 2], dtype=torch.float64).view(-1, 1)
LEVELS = torch.tensor([1e-3, 0.01, 0.05, 0.2], dtype=torch.float64)


def test_tail_safe_meets_its_probability_exactly_for_normal_data():
    lam = tail_safe(SHIFTS, 1.0, TOLERANCES, LEVELS)

    def upper(x):
        return torch.special.erfc(x / math.sqrt(2)) / 2

    found = harm(lam, SHIFTS, TOLERANCES, upper, lambda x: upper(-x)) / LEVELS
    assert (found <= 1 + 1e-9).all()
    assert torch.allclose(found[(lam > 0) & (lam < 1)], torch.ones(()).double(), rtol=1e-9)


@pytest.mark.parametrize(("n", "excess"), [(5, 0.08), (20, 0.035), (100, 0.003)])
def test_tail_safe_meets_its_probability_for_exponential_data(n, excess):
    sd = n**-0.5
    count = torch.tensor(float(n), dtype=torch.float64)

    def upper(x):
        return torch.special.gammaincc(count, (n * (1 + x)).clamp_min(0))

    def lower(x):
        return torch.special.gammainc(count, (n * (1 + x)).clamp_min(0))

    for sign in (1, -1):  # skewed to either side
        sides = (upper, lower) if sign == 1 else (lambda x: lower(-x), lambda x: upper(-x))
        lam = tail_safe(SHIFTS * sd, sd**2, TOLERANCES * sd, LEVELS, 2.0 * sign, 6.0, n)
        found = harm(lam, SHIFTS * sd, TOLERANCES * sd, *sides) / LEVELS
        assert found.max() < 1 + excess
        assert found[(lam > 0) & (lam < 1)].min() > 1 - 0.05 * 5 / n - 1e-3
        normal = tail_safe(SHIFTS * sd, sd**2, TOLERANCES * sd, LEVELS, terms=0)
        assert harm(normal, SHIFTS * sd, TOLERANCES * sd, *sides)[..., 0].max() > 2e-3  # twice alpha and more


def test_tail_safe_in_a_simulation():
    torch.manual_seed(1)
    n, draws, alpha = 8, 200_000, 0.1
    mean = torch.randn(draws, n, dtype=torch.float64).square().mean(1)  # chi-square(1): skewness sqrt 8, kurtosis 12
    for shift in (0.0, 0.4, -0.4):
        lam = tail_safe(shift, 2 / n, 0.3, alpha, math.sqrt(8), 12.0, n).item()
        assert 0 < lam < 1
        moved = (1 - lam) * (1 - shift) + lam * mean
        rate = ((moved - 1).abs() > abs(shift) + 0.3).double().mean().item()
        assert rate < alpha * 1.06 + 4 * math.sqrt(alpha / draws)


def test_tail_safe_grows_with_tolerance_shift_and_probability():
    base = tail_safe(
        double(0.2, 0.2, 0.2, 0.9), 1.0, double(0.5, 0.8, 0.5, 0.5), double(0.05, 0.05, 0.1, 0.05), 1.0, 2.0, 9
    )
    assert (base[1:] > base[0]).all()
    assert tail_safe(0.0, 1.0, 0.0) == 0
    assert tail_safe(1.0, 1e-9, 0.0) == 1
    # a quantile that is not increasing is not trusted: a bounded law's is held, a wild kurtosis gives the normal one
    assert tail_safe(0.0, 1.0, 0.98, 1e-6, 0.0, -1.2, 2) < 1
    assert tail_safe(0.0, 1.0, 0.98, 1e-6, 0.0, 30.0, 2) == tail_safe(0.0, 1.0, 0.98, 1e-6)


def test_gradients_by_value():
    numbers = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.3, 0.4, 0.2)]
    assert torch.autograd.gradcheck(oracle, numbers)
    assert torch.autograd.gradcheck(lambda d, r, w: (plug_in(d, r), unbiased_risk(w, d, r)), numbers)
    assert torch.autograd.gradcheck(lambda a, u, g: output_optimal(a, u, g, 16, 0.7), numbers)
    assert torch.autograd.gradcheck(lambda v, s, k: weights.variance_weight(v, s, 16, k), numbers)
    row = ORACLES["O9c_pooled"]
    d, r = double(*row["d"]).requires_grad_(), double(*row["tau"]).requires_grad_()
    for method in ("sure", "ml"):
        assert torch.autograd.gradcheck(lambda d, r, m=method: tuple(shrink(d, r, m)), (d, r), eps=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(pooled, (d, r))
    s2 = double(0.8, 1.1, 2.5, 0.3, 1.7).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: tuple(weights.squeeze(s, 7)), s2)
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    for value in (oracle(zero, 1.0), oracle(zero, 0.0), plug_in(zero, 1.0), plug_in(zero, 0.0)):
        (slope,) = torch.autograd.grad(value.sum(), zero)
        assert slope.tolist() == [0.0, 0.0]


def test_compiled_equals_eager():
    def everything(d, r):
        return (
            oracle(d, r),
            plug_in(d, r),
            pooled(d, r),
            output_optimal(d, 0.1, r, 16, 0.5),
            weights.variance_weight(r, 1.0, 16),
            *shrink(d, r),
            *weights.squeeze(r, 7),
        )

    torch.manual_seed(0)
    d, r = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.1
    compiled = torch.compile(everything, backend="eager", fullgraph=True)
    for a, b in zip(everything(d, r), compiled(d, r), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: oracle(1.0, -1.0), "sampling_variance must not be negative; got -1"),
        (lambda: oracle(1.0, 1.0, -2.0), "source_sampling_variance must not be negative; got -2"),
        (lambda: plug_in(math.nan, 1.0), "difference must not be NaN"),
        (lambda: plug_in(torch.zeros(2), torch.ones(3)), "do not broadcast"),
        (lambda: unbiased_risk(0.5, 1.0, -1.0), "sampling_variance must not be negative"),
        (lambda: pooled(torch.ones(3), 1.0, -1.0), "channel_weight must not be negative; got -1"),
        (lambda: pooled(torch.tensor([math.inf]), 1.0), "difference must be finite; got inf"),
        (lambda: shrink(torch.ones(0), 1.0), "at least one channel"),
        (lambda: shrink(torch.ones(3), 1.0, method="map"), "method must be"),
        (lambda: weights.squeeze(torch.ones(1), 5), "at least two channels"),
        (lambda: weights.squeeze(torch.ones(3), 0.0), "degrees must be positive; got 0"),
        (lambda: output_optimal(1.0, -1.5, 0.0, 16, 1.0), "scale_shift must be at least -1"),
        (lambda: output_optimal(1.0, 0.0, 0.0, 0, 1.0), "count must be at least 1; got 0"),
        (lambda: output_optimal(1.0, 0.0, 0.0, 16, 1.1), r"variance_weight must be in \[0, 1\]; got 1.1"),
        (lambda: tail_safe(0.0, 1.0, -1.0), "tolerance must not be negative; got -1"),
        (lambda: tail_safe(0.0, 1.0, 1.0, 0.0), r"probability must be in \(0, 1\); got 0"),
        (lambda: tail_safe(0.0, 1.0, 1.0, terms=4), "terms must be"),
        (lambda: weights.plug_in_risk(1.0, -1.0, 0.0, 9), "variance must not be negative"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
