"""The output loss, its expectation and the risk bound: exact laws, quadrature, simulation."""

import json
import math
from pathlib import Path

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normadapt.asymptotics.bounds import expected_output_loss, mean_output_change, output_loss, output_risk, risk_bound
from normadapt.asymptotics.weights import output_optimal

ORACLES = json.loads(Path(__file__).with_name("oracles_bounds.json").read_text())


def close(value, wanted, relative=1e-9):
    assert float(value) == pytest.approx(float(wanted), rel=relative)


def test_output_loss():
    for row in ORACLES["O10a_bn_loss"]:
        given_ = [float(row[name]) for name in ("m", "v", "m_star", "v_star")]
        close(output_loss(*given_), row["loss_gamma1"])
        close(output_loss(*given_, scale=-3.0), 9 * float(row["loss_gamma1"]))


@given(st.floats(-3, 3), st.floats(0.01, 9), st.floats(-3, 3), st.floats(0.01, 9), st.floats(-2, 2), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_output_loss_is_the_outputs_squared_error(m, v, m_true, v_true, scale, eps):
    """Over the two-point law of that mean and variance, which is exact for a squared error."""
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64) * v_true**0.5 + m_true
    wrong, right = scale * (x - m) / math.sqrt(v + eps), scale * (x - m_true) / math.sqrt(v_true + eps)
    wanted = (wrong - right).square().mean().item()
    assert output_loss(m, v, m_true, v_true, scale, eps).item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_output_loss_keeps_its_digits_near_the_truth():
    with mpmath.workdps(40):
        v = mpmath.mpf(1 + 1e-9)
        wanted = (1 / mpmath.sqrt(v) - 1) ** 2
    close(output_loss(0.0, 1 + 1e-9, 0.0, 1.0), wanted, 1e-12)
    assert output_loss(0.0, 0.0, 0.0, 1.0).isinf()
    assert output_loss(1.0, 1.0, 0.0, 0.0).item() == 1.0


def test_expected_output_loss_for_normal_data():
    for row in ORACLES["O10b_bn_loss_expected_normal"]["rows"]:
        close(expected_output_loss(row["n"]), row["E_loss_normal_unbiased_v"])
        close(expected_output_loss(row["n"], unbiased=False), row["E_loss_normal_biased_v"])
        close(output_risk(0.0, 0.0, row["n"]).total, 1 / row["n"] + 0.5 / (row["n"] - 1))
        close(1.5 / row["n"], row["leading_1p5_over_n"])

    def exact(n, unbiased):
        x = mpmath.mpf(n - 1) / 2
        factor = 1 if unbiased else mpmath.mpf(n) / (n - 1)
        root = mpmath.gammaprod([x - 0.5], [x]) * mpmath.sqrt(x * factor)
        return (1 + mpmath.mpf(1) / n) * factor * x / (x - 1) - 2 * root + 1

    for n in (3.5, 5, 33, 34, 35, 1000, 10**8):  # the series takes over at 34
        for unbiased in (True, False):
            with mpmath.workdps(40):
                close(expected_output_loss(n, 2.0, unbiased), 4 * exact(n, unbiased), 1e-12)
    n = torch.tensor([1.0, 3.0, 3.5], dtype=torch.float64)
    assert expected_output_loss(n).isinf().tolist() == [True, True, False]


def test_leading_loss_is_approached_at_rate_n2():
    n = torch.tensor([16.0, 64.0, 256.0, 1024.0, 4096.0], dtype=torch.float64)
    scaled = n * n * (expected_output_loss(n) - output_risk(0.0, 0.0, n).total)
    assert (scaled > 2).all()  # there is something to bound
    assert scaled.max() < 8
    assert (scaled.diff() < 0).all()


@pytest.mark.parametrize(("shift", "scale_shift"), [(0.5, 0.0), (-0.5, 0.6), (0.0, -0.4)])
def test_output_risk_against_simulation(shift, scale_shift):
    """Mixed statistics of exponential data: the parts add up to the simulated loss within O(n^-2)."""
    torch.manual_seed(0)
    errors = []
    for n in (64, 256):
        x = -torch.rand(40_000, n, dtype=torch.float64).log()
        v, m = torch.var_mean(x, 1)
        lam, rho = 0.8, 0.6
        used = (1 - rho) * (1 + scale_shift) + rho * v
        loss = output_loss((1 - lam) * (1 + shift) + lam * m, used, 1.0, 1.0)
        parts = output_risk(shift, scale_shift, n, lam, rho, 2.0, 6.0)
        error = (loss.mean() - parts.total).abs().item()
        errors.append(n * n * max(error - 4 * (loss.std() / 200).item(), 0))
        assert (parts.skewness * shift <= 0).all()
    assert max(errors) < 150
    assert output_risk(0.5, 0.3, 64, 0.0, 0.0).total == pytest.approx(output_loss(0.5, 1.3, 0.0, 1.0).item(), rel=1e-12)


def test_output_risk_and_optimal_weight_agree():
    """Without the weight's own 1/n correction of the scale part the minimum is that of `output_optimal`."""
    lam = torch.linspace(0.5, 1, 100_001, dtype=torch.float64)
    errors = []
    for n in (64, 256, 1024):
        risk = output_risk(1.0, 0.5, n, lam, 0.5, 2.0, 6.0).total
        errors.append(n * abs(lam[risk.argmin()] - output_optimal(1.0, 0.5, 2.0, n, 0.5)).item())
    assert max(errors) < 0.5


def test_risk_bound_and_what_it_majorizes():
    row = ORACLES["O21_risk_bound"]
    a, u, slope = float(row["a"]), float(row["u"]), float(row["L_times_gamma"])
    close(risk_bound(slope, 1.0, a, u), row["bound"])
    close(risk_bound(1.0, -slope, a, u), row["bound"])
    # the oracle's quadrature missed a kink: it is 5e-8 off the folded normal, which mpmath confirms
    close(mean_output_change(a, u, slope), row["exact_E_abs_normal"], 1e-7)
    factor = 1 / mpmath.sqrt(1.2)
    kink = 0.1 * factor / (factor - 1)
    exact = mpmath.quad(lambda x: slope * abs((x - 0.1) * factor - x) * mpmath.npdf(x), [-12, -6, kink, 0, 3, 12])
    close(mean_output_change(a, u, slope), exact, 1e-12)
    assert mean_output_change(0.3, 0.0).item() == 0.3


@given(st.floats(-2, 2), st.floats(-0.9, 5))
@settings(max_examples=60, deadline=None)
def test_risk_bound_majorizes_the_mean_change(a, u):
    assert mean_output_change(a, u) <= risk_bound(1.0, 1.0, a, u) * (1 + 1e-12) + 1e-15


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_risk_bound_holds_with_its_probability(confidence):
    torch.manual_seed(2)
    n, lam, rho, a, u = 32, 0.7, 0.6, 0.4, 0.3
    normal = torch.randn(50_000, n, dtype=torch.float64)
    exponential = -torch.rand(50_000, n, dtype=torch.float64).log() - 1
    # (x - 1)^2 of an exponential: third central moment over variance^1.5, variance 8
    mu = [math.factorial(r) * sum((-1) ** j / math.factorial(j) for j in range(r + 1)) for r in range(7)]
    square_skewness = (mu[6] - 3 * mu[4] + 2) / 8**1.5
    for x, shape in (
        (normal, {}),
        (exponential, {"skewness": 2.0, "excess_kurtosis": 6.0, "square_skewness": square_skewness}),
    ):
        bound = risk_bound(1.0, 1.0, a, u, count=n, weight=lam, variance_weight=rho, confidence=confidence, **shape)
        v, m = torch.var_mean(x, 1)
        loss = output_loss((1 - lam) * a + lam * m, (1 - rho) * (1 + u) + rho * v, 0.0, 1.0)
        held = (loss.sqrt() <= bound).double().mean().item()
        assert held >= confidence - 4 * math.sqrt(confidence * (1 - confidence) / 50_000)
        expected = risk_bound(1.0, 1.0, a, u, count=n, weight=lam, variance_weight=rho, **shape)
        assert loss.sqrt().mean() < expected
        if confidence >= 0.9:
            assert bound > expected


def test_more_confidence_costs_more_and_too_much_is_infinite():
    bounds = risk_bound(1.0, 1.0, 0.1, 0.0, count=64, confidence=torch.tensor([0.5, 0.9, 0.999]))
    assert (bounds.diff() > 0).all()
    assert risk_bound(1.0, 1.0, 0.1, 0.0, count=4, excess_kurtosis=6.0, square_skewness=0.0, confidence=0.999).isinf()


def test_gradients_by_value():
    inputs = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.3, 1.4, 0.1, 0.9, 1.2, 0.01)]
    assert torch.autograd.gradcheck(output_loss, inputs)
    a, u, g = inputs[0], inputs[2], inputs[4]
    assert torch.autograd.gradcheck(
        lambda a, u, g: (risk_bound(1.0, g, a, u, count=20, skewness=a, confidence=0.9), mean_output_change(a, u, g)),
        (a, u, g),
    )
    assert torch.autograd.gradcheck(lambda a, u, g: tuple(output_risk(a, u, 20, 0.7, 0.6, g)), (a, u, g))
    n = torch.tensor([4.0, 17.0, 60.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(expected_output_loss, n)
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # at the truth
    for value in (output_loss(zero, 1.0, 0.0, 1.0), risk_bound(1.0, 1.0, zero, zero), mean_output_change(0.5, zero)):
        (slope,) = torch.autograd.grad(value.sum(), zero)
        assert slope.isfinite().all()


def test_compiled_equals_eager():
    def everything(a, u):
        return (
            output_loss(a, 1 + u, 0.0, 1.0),
            expected_output_loss(10 + u),
            output_risk(a, u, 16).total,
            mean_output_change(a, u),
            risk_bound(1.0, 1.0, a, u, count=16, confidence=0.9),
        )

    a, u = torch.tensor([0.3, -1.0], dtype=torch.float64), torch.tensor([0.2, -0.5], dtype=torch.float64)
    compiled = torch.compile(everything, backend="eager", fullgraph=True)
    for x, y in zip(everything(a, u), compiled(a, u), strict=True):
        assert torch.allclose(x, y, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: output_loss(0.0, -1.0, 0.0, 1.0), "variance must not be negative; got -1"),
        (lambda: output_loss(0.0, 1.0, 0.0, -1.0), "true_variance must not be negative; got -1"),
        (lambda: output_loss(0.0, 1.0, math.nan, 1.0), "true_mean must not be NaN"),
        (lambda: output_loss(torch.zeros(2), torch.ones(3), 0.0, 1.0), "do not broadcast"),
        (lambda: output_loss(0.0, 1.0, 0.0, 1.0, eps=-1e-5), "eps must not be negative"),
        (lambda: expected_output_loss(0.5), "count must be at least 1; got 0.5"),
        (lambda: output_risk(0.0, -1.0, 16), "scale_shift must be above -1"),
        (lambda: output_risk(0.0, 0.0, 1), "count must be above 1; got 1"),
        (lambda: mean_output_change(0.0, -1.0), "scale_shift must be above -1"),
        (lambda: risk_bound(-1.0, 1.0, 0.1, 0.2), "lipschitz must not be negative; got -1"),
        (lambda: risk_bound(1.0, 1.0, 0.1, 0.2, confidence=0.9), "needs count"),
        (lambda: risk_bound(1.0, 1.0, 0.1, 0.2, count=9, confidence=1.0), r"confidence must be in \(0, 1\); got 1"),
        (lambda: risk_bound(1.0, 1.0, 0.1, 0.2, count=9, variance_weight=2.0), r"variance_weight must be in \[0, 1\]"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
