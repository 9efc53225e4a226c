"""Saddlepoint approximations against numbers computed elsewhere, at their singular points, and with bad input."""

import json
import math
from pathlib import Path

import mpmath
import pytest
import torch

from normadapt.asymptotics import saddlepoint
from normadapt.asymptotics.saddlepoint import (
    BinomialCGF,
    ChiSquareMixtureCGF,
    CumulantCGF,
    EmpiricalCGF,
    GammaCGF,
    NormalCGF,
    WeightedMeans,
    density,
    quantile,
    solve,
    tail,
)

ORACLES = json.loads((Path(__file__).parent / "oracles_saddlepoint.json").read_text())
EXACT = {"rel": 1e-9, "abs": 0.0}


def number(value):
    return torch.tensor(float(value), dtype=torch.float64)


def exponential_mean(n):
    return WeightedMeans([(1.0, n, GammaCGF(1.0, 1.0))])


@pytest.mark.parametrize("row", ORACLES["O1_exp_mean"]["rows"], ids=lambda r: f"n{r['n']} z{r['z']}")
def test_mean_of_exponentials(row):
    law, x = exponential_mean(row["n"]), number(row["x"])
    point = solve(law, x)
    assert float(point.w) == pytest.approx(float(row["w"]), rel=1e-9, abs=1e-12)
    assert float(point.u) == pytest.approx(float(row["u"]), rel=1e-9, abs=1e-12)
    assert float(tail(law, x)) == pytest.approx(float(row["sf_LR"]), **EXACT)
    assert float(tail(law, x, method="barndorff-nielsen")) == pytest.approx(float(row["sf_rstar"]), **EXACT)
    assert float(density(law, x)) == pytest.approx(float(row["pdf_spa"]), **EXACT)
    assert float(density(law, x, order=2)) == pytest.approx(float(row["pdf_spa_2nd"]), **EXACT)
    # renormalized, the saddlepoint density of a gamma law is exact
    assert float(density(law, x, normalized=True)) == pytest.approx(float(row["pdf_exact"]), rel=1e-7)


@pytest.mark.parametrize("row", ORACLES["O1b_LR_near_mean"]["rows"], ids=lambda r: f"n{r['n']} {r['x_minus_mean']}")
def test_next_to_the_mean(row):
    found = tail(exponential_mean(row["n"]), 1 + number(row["x_minus_mean"]))
    assert float(found) == pytest.approx(float(row["sf_LR"]), **EXACT)


@pytest.mark.parametrize("key", ["O2_diff_exp_means_a", "O2_diff_exp_means_b", "O3_mixture_exp_means"])
def test_weighted_means_of_exponentials(key):
    o = ORACLES[key]
    groups = [(float(o[f"w_{s}"]), o[f"n_{s}"], GammaCGF(1.0, 1 / float(o[f"theta_{s}"]))) for s in "st"]
    law = WeightedMeans(groups)
    for row in o["rows"]:
        x = number(row["x"])
        assert float(tail(law, x)) == pytest.approx(float(row["sf_LR"]), **EXACT)
        assert float(tail(law, x, method="barndorff-nielsen")) == pytest.approx(float(row["sf_rstar"]), **EXACT)
        assert float(density(law, x)) == pytest.approx(float(row["pdf_spa"]), **EXACT)


@pytest.mark.parametrize("row", ORACLES["O5_binomial"], ids=lambda r: f"n{r['n']} p{r['p']} k{r['k']}")
def test_counts(row):
    law = BinomialCGF(row["n"], float(row["p"]))
    for lattice, key in ((None, "LR_none_at_k"), ("first", "LR_cc1_at_k"), ("second", "LR_cc2_at_k_minus_half")):
        assert float(tail(law, number(row["k"]), lattice=lattice)) == pytest.approx(float(row[key]), **EXACT)


def test_an_empirical_law_and_the_ends_of_its_reach():
    o = ORACLES["O15_empirical_saddlepoint"]
    sample = torch.tensor([float(v) for v in o["data"]], dtype=torch.float64)
    law = WeightedMeans([(1.0, len(sample), EmpiricalCGF(sample))])
    for row in o["rows"]:
        assert float(tail(law, number(row["x"]))) == pytest.approx(float(row["sf_ESA_LR"]), **EXACT)
        assert float(density(law, number(row["x"]))) == pytest.approx(float(row["pdf_ESA"]), **EXACT)
    assert solve(law, torch.tensor([9.6, 20.0, 33.8], dtype=torch.float64)).clamped.tolist() == [True, False, True]


def test_a_truncated_law():
    o = ORACLES["O4_lognormal"]
    law = WeightedMeans([(1.0, o["n"], CumulantCGF(o["mean"], o["var"], o["k3"], o["k4"]))])
    rows = [row for row in o["rows"] if "sf_LR_trunc4" in row]
    assert len(rows) >= 3
    for row in rows:
        assert float(tail(law, number(row["x"]))) == pytest.approx(float(row["sf_LR_trunc4"]), **EXACT)
    uniform = ORACLES["O18_truncated_cgf"]
    reach = float(uniform["max_reachable_dev"])
    flat = CumulantCGF(0.0, 1 / 12, 0.0, -1 / 120)
    inside, outside = solve(flat, number(0.99 * reach)), solve(flat, number(1.5 * reach))
    assert (bool(inside.clamped), bool(outside.clamped)) == (False, True)
    assert bool(torch.isfinite(tail(flat, number(1.5 * reach))))


def test_a_normal_law_is_exact_to_1e_minus_300():
    x = torch.tensor([-5.0, 0.0, 1.0, 11.0, 37.0], dtype=torch.float64)
    for method in ("lugannani-rice", "barndorff-nielsen"):
        found = tail(NormalCGF(0.0, 1.0), x, method=method)
        for value, at in zip(found.tolist(), x.tolist(), strict=True):
            assert value == pytest.approx(float(mpmath.erfc(at / mpmath.sqrt(2)) / 2), rel=1e-12)


@pytest.mark.parametrize("n", [1, 5, 10, 50, 200])
def test_lugannani_rice_is_within_six_percent_over_n(n):
    for z in (-0.9, -0.5, 0.01, 0.5, 2.0, 6.0, 20.0):
        x = 1 + z / math.sqrt(n)
        if x <= 0:
            continue
        exact = float(mpmath.gammainc(n, n * x, mpmath.inf, regularized=True))
        assert abs(float(tail(exponential_mean(n), number(x))) / exact - 1) <= 0.06 / n


@pytest.mark.parametrize("method", ["lugannani-rice", "barndorff-nielsen"])
@pytest.mark.parametrize("offset", [0.0, 1e-10, -1e-6, 1e-3, 0.3])
def test_gradients_by_value(method, offset):
    """The derivative of the tail at and beside the mean, against high-precision differences of the same formula."""
    n = 5

    def formula(x):
        x, t = mpmath.mpf(x), 1 - 1 / mpmath.mpf(x)  # root of K'(t) = 1/(1 - t)
        k = -mpmath.log(1 - t)
        w = mpmath.sign(t) * mpmath.sqrt(2 * n * (t * x - k))
        u = t * mpmath.sqrt(n) / (1 - t)
        if method == "lugannani-rice":
            return mpmath.erfc(w / mpmath.sqrt(2)) / 2 + mpmath.npdf(w) * (1 / u - 1 / w)
        return mpmath.erfc((w + mpmath.log(u / w) / w) / mpmath.sqrt(2)) / 2

    with mpmath.workdps(60):
        at, step = mpmath.mpf(1) + mpmath.mpf(offset), mpmath.mpf("1e-15")
        expected = float((formula(at + step) - formula(at - step)) / (2 * step))
    x = number(1 + offset).requires_grad_()
    tail(exponential_mean(n), x, method=method).backward()
    assert float(x.grad) == pytest.approx(expected, rel=1e-6)


def test_quantiles_invert_tails():
    law = GammaCGF(torch.tensor([0.5, 2.0, 30.0], dtype=torch.float64), 1.0)
    for p in (0.99, 0.5, 0.05, 1e-6, 1e-30):
        torch.testing.assert_close(
            tail(law, quantile(law, p)), torch.full((3,), p, dtype=torch.float64), rtol=1e-9, atol=0
        )


def test_a_chi_square_mixture_of_equal_weights_is_a_gamma_law():
    mixture, gamma = ChiSquareMixtureCGF(torch.full((6,), 2.0)), GammaCGF(3.0, 0.25)
    x = torch.tensor([1.0, 12.0, 40.0, 200.0], dtype=torch.float64)
    torch.testing.assert_close(tail(mixture, x), tail(gamma, x), rtol=1e-9, atol=0)


def test_broadcasting_leaves_other_channels_alone():
    shapes = torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    x = torch.tensor([0.5, 1.0, 30.0], dtype=torch.float64)
    found = tail(GammaCGF(shapes, shapes), x)
    assert found.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert float(found[i, j]) == pytest.approx(
                float(tail(GammaCGF(shapes[i, 0], shapes[i, 0]), x[j])), rel=1e-12
            )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NormalCGF(0.0, -1.0), "variance must not be negative; got -1"),
        (lambda: GammaCGF(0.0, 1.0), "shape must be positive; got 0"),
        (lambda: GammaCGF(1.0, math.nan), "rate must not be NaN"),
        (lambda: BinomialCGF(10, 1.5), "probability .*1.5"),
        (lambda: tail(GammaCGF(1.0, 1.0), -1.0), "x .*-1"),
        (lambda: tail(GammaCGF(1.0, 1.0), math.nan), "x must not be NaN"),
        (lambda: tail(GammaCGF(1.0, 1.0), 1.0, method="exact"), "exact"),
        (lambda: quantile(GammaCGF(1.0, 1.0), 1.5), "1.5"),
        (lambda: WeightedMeans([(1.0, 0.0, NormalCGF(0.0, 1.0))]), "count"),
        (lambda: tail(GammaCGF(torch.ones(2), 1.0), torch.ones(3)), "broadcast"),
    ],
)
def test_bad_input_is_named_with_its_value(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_it_compiles_in_one_graph():
    def tails(shape, x):
        return saddlepoint.tail(GammaCGF(shape, shape), x)

    shape, x = torch.tensor([2.0, 9.0], dtype=torch.float64), torch.tensor([1.0, 1.7], dtype=torch.float64)
    compiled = torch.compile(tails, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(shape, x), tails(shape, x), rtol=1e-12, atol=0)
