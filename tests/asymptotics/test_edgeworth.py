"""Edgeworth and Cornish-Fisher expansions against oracles, exact laws, simulations, and their own derivatives."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normadapt.asymptotics.edgeworth import (
    Group,
    StatisticCumulants,
    density,
    lattice_tail,
    lower_tail,
    quantile,
    standardized,
    studentized,
    tail,
    validity,
)

ORACLES = json.loads(Path(__file__).with_name("oracles_edgeworth.json").read_text())
EXPONENTIAL = (1.0, 2.0, 6.0)  # variance, third and fourth cumulant
NORMAL = (1.0, 0.0, 0.0)


def close(value, wanted, relative=1e-9):
    assert float(value) == pytest.approx(float(wanted), rel=relative)


def gamma_group(weight, count, theta):
    return Group(weight, count, theta**2, 2 * theta**3, 6 * theta**4)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_mean_of_exponentials():
    for row in ORACLES["O1_exp_mean"]["rows"]:
        k, z, n = standardized(Group(1, row["n"], *EXPONENTIAL)), float(row["z"]), row["n"]
        for terms, name in enumerate(("norm", "edge1", "edge2")):
            close(tail(z, k, terms), row[f"sf_{name}"])
            close(math.sqrt(n) * density(z, k, terms), row[f"pdf_{name}"])
            close(1 - lower_tail(z, k, terms), row[f"sf_{name}"], 1e-7)


def test_cornish_fisher_of_exponentials():
    for row in ORACLES["O1c_cornish_fisher_exp_mean"]:
        k = standardized(Group(1, row["n"], *EXPONENTIAL))
        for terms in (0, 1, 2):
            close(quantile(float(row["p"]), k, terms), row[f"cf{terms}"])


@pytest.mark.parametrize("key", ["O2_diff_exp_means_a", "O2_diff_exp_means_b", "O3_mixture_exp_means"])
def test_weighted_sums_of_two_means(key):
    o = ORACLES[key]
    groups = [gamma_group(float(o[f"w_{i}"]), o[f"n_{i}"], float(o[f"theta_{i}"])) for i in "st"]
    k = standardized(groups)
    close(k.k3, o["A_std_skew"])
    close(k.k4, o["B_std_exkurt"])
    a, b = k.k3, k.k4  # G shows in the fourth cumulant of the studentized statistic
    close((studentized(groups, finite_sample=False).k4 + 2 * b - 12 * a * a) / 6, o["G"])
    for row in o["rows"]:
        for terms, name in enumerate(("norm", "edge1", "edge2")):
            close(tail(float(row["z"]), k, terms), row[f"sf_{name}"])


def test_the_papers_difference_of_training_and_test_mean():
    o = ORACLES["O2c_paper_Tnm"]
    k = standardized([gamma_group(-1, 40, 1.0), gamma_group(1, 8, 1.5)])
    close(k.k3, o["Delta3_over_V15"])
    for row in o["cdf_one_term"]:
        close(lower_tail(float(row["x"]) / math.sqrt(float(o["V"])), k, terms=1), row["cdf"])


def test_mean_of_lognormals():
    o = ORACLES["O4_lognormal"]
    k = standardized(Group(1, o["n"], o["var"], o["k3"], o["k4"]))
    for row in o["rows"]:
        for terms in (0, 1, 2):
            close(tail(row["z"], k, terms), row[f"sf_edge{terms}"])


def test_lattice_corrections():
    for row in ORACLES["O5_binomial"]:
        n, p = row["n"], float(row["p"])
        v = p * (1 - p)
        k = standardized(Group(1, n, v, v * (1 - 2 * p), v * (1 - 6 * v)))
        sd = math.sqrt(n * v)
        x = (row["k"] - n * p) / sd
        for name, column in (
            ("none", "edge2_no_cc"),
            ("half", "edge2_cc_half"),
            ("sheppard", "edge2_cc_sheppard"),
            ("esseen", "esseen_1term"),
        ):
            close(lattice_tail(x, k, 1 / sd, correction=name), row[column])


def test_studentized_normal_mean_and_the_denominator_of_g():
    for row in ORACLES["O6a_studentized_normal"]:
        group = Group(1, row["n"], *NORMAL)
        exact = float(row["sf_t_exact"])
        close(tail(row["x"], studentized(group, finite_sample=True)), row["with_nu"])
        close(tail(row["x"], studentized(group)), row["edge2"])
        close(row["edge2"], row["hall_form"])
        nearer, plain = abs(float(row["with_nu"]) - exact), abs(float(row["edge2"]) - exact)
        assert nearer < plain / 2


def test_studentized_mean_of_exponentials():
    for row in ORACLES["O6b_studentized_exp_edge"]:
        group = Group(1, row["n"], *EXPONENTIAL)
        k = studentized(group, finite_sample=False)
        for terms in (0, 1, 2):
            close(lower_tail(row["x"], k, terms), row[f"cdf{terms}"])
        close(density(row["x"], k), row["pdf2"])
        close(lower_tail(row["x"], standardized(group)), row["naive_standardized_poly_cdf2"])
        close(lower_tail(row["x"], studentized(group), 1), row["cdf1"])  # G is of the second order
    for row in ORACLES["O6c_studentized_exp_cf"]:
        k = studentized(Group(1, row["n"], *EXPONENTIAL), finite_sample=False)
        close(quantile(float(row["p"]), k, 1), row["cf1"])
        close(quantile(float(row["p"]), k, 2), row["cf2"])


def welch(finite_sample):
    return studentized([Group(1, 8, 1.0, 2.0, 6.0), Group(-1, 40, 1.0, 1.0, 1.5)], finite_sample=finite_sample)


def test_welch():
    o = ORACLES["O7_welch_edge"]
    k = welch(False)
    for name in ("k1", "k2", "k3", "k4"):
        close(getattr(k, name), o[name])
    for row in o["rows"]:
        for terms in (0, 1, 2):
            close(lower_tail(row["x"], k, terms), row[f"cdf{terms}"])


@pytest.mark.parametrize("finite_sample", [True, False])
def test_studentized_expansions_err_by_their_order_against_simulation(finite_sample):
    scaled = {0: [], 1: [], 2: []}
    for name, simulated in ORACLES["MC_studentized"].items():
        n = int(name.removeprefix("exp_n"))
        k = studentized(Group(1, n, *EXPONENTIAL), finite_sample=finite_sample)
        for terms, errors in scaled.items():
            found = [abs(lower_tail(r["x"], k, terms).item() - r["cdf"]) - 4 * r["se"] for r in simulated["cdf"]]
            errors.append(n ** ((terms + 1) / 2) * max(found))
        for row in simulated["quantiles"]:
            for terms, bound in enumerate((10.5, 20, 23)):
                error = abs(quantile(row["p"], k, terms).item() - row["q"])
                assert error * n ** ((terms + 1) / 2) < bound
    assert max(scaled[0]) < 0.4
    assert max(scaled[1]) < 0.7
    assert max(scaled[2]) < 1.1
    rows = ORACLES["MC_welch"]["cdf"]
    error = [max(abs(lower_tail(r["x"], welch(finite_sample), t).item() - r["cdf"]) for r in rows) for t in (0, 1, 2)]
    assert error[2] < 0.018 < 0.07 < error[0]


def test_error_of_the_two_term_expansion_falls_as_promised():
    n = double(8, 16, 32, 64, 128, 256, 512)
    x = torch.linspace(-2, 3, 21, dtype=torch.float64).unsqueeze(1)
    exact = torch.special.gammaincc(n.expand(21, 7), (n + x * n.sqrt()).clamp_min(0))
    k = standardized(Group(1, n, *EXPONENTIAL))
    for terms in (0, 1, 2):
        scaled = ((tail(x, k, terms) - exact).abs() * n ** ((terms + 1) / 2)).amax(0)
        assert scaled.max() < 1.3 * scaled[-1]
        assert scaled[-1] > 1e-3
    p = double(0.01, 0.3, 0.9).unsqueeze(1)
    found = torch.special.gammainc(n.expand(3, 7), n + quantile(p, k) * n.sqrt())
    assert ((found - p).abs() * n**1.5).max() < 0.35


def test_validity_finds_the_first_offending_points():
    for row in ORACLES["O20_monotone"]:
        group = Group(1, row["n"], *EXPONENTIAL)
        found = validity(standardized(group))
        for flag, point, (holds, where) in (
            (found.quantile_increasing, found.quantile_point, row["cf_monotone_on_pm4"]),
            (found.density_positive, found.density_point, row["edge_pdf_positive_on_pm5"]),
        ):
            assert flag.item() == holds
            if holds:
                assert point.isnan()
            else:  # the oracle scanned a grid of 2e-4
                assert point.item() == pytest.approx(where, abs=2e-4)
        k = standardized(group)
        if not found.density_positive:
            assert abs(density(found.density_point, k)) < 1e-13
            assert density(found.density_point * 0.999, k) > 0 > density(found.density_point * 1.001, k)
        if not found.tail_in_range:
            assert lower_tail(found.tail_point * 1.001, k) < 0 < lower_tail(found.tail_point * 0.999, k)
            assert lower_tail(found.tail_point * 1.001, k, clamp=True) == 0
            assert density(-found.density_point.abs() * 1.01, k, clamp=True) >= 0
    closed = (-0.6666666666666667 + math.sqrt(0.4444444444444444 - 4 * 0.08333333333333333 * 0.8055555555555556)) * 6
    close(validity(standardized(Group(1, 1, *EXPONENTIAL))).quantile_point, closed, 1e-11)


def test_validity_per_channel_and_mirrored():
    k = standardized(Group(1, double(1, 200, 5), 1.0, double(2.0, 2.0, -2.0), 6.0))
    found = validity(k)
    assert found.quantile_increasing.tolist() == [False, True, True]
    assert found.density_positive.tolist() == [False, True, False]
    close(found.density_point[2], 2.146743650401386)
    normal = validity((0.0, 1.0, 0.5, 0.5), terms=0)
    assert normal.quantile_increasing
    assert normal.density_positive
    assert normal.tail_in_range
    unknown = validity((math.nan, 1.0, 0.0, 0.0))
    assert not unknown.density_positive
    assert unknown.density_point.isnan()


def test_a_channel_that_does_not_vary_is_flagged_alone():
    variance = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    k = standardized(Group(1, 10, variance, 2.0, 6.0))
    assert k.k3.isnan().tolist() == [False, True]
    found = tail(2.0, k)
    assert found.isnan().tolist() == [False, True]
    close(found[0].detach(), tail(2.0, standardized(Group(1, 10, 1.0, 2.0, 6.0))))
    found[0].backward()
    assert variance.grad[0].isfinite()
    one_dead = studentized([Group(0.5, 1, 0.0, 0.0, 0.0), Group(0.5, 6, *NORMAL)])
    assert torch.equal(torch.stack(one_dead), torch.stack(studentized(Group(0.5, 6, *NORMAL))))
    assert studentized(Group(1, double(1, 6), *NORMAL), finite_sample=True).k2.isnan().tolist() == [True, False]


def test_far_tails_and_infinities():
    k = standardized(Group(1, 50, *EXPONENTIAL))
    close(tail(double(12.0), (0.0, 1.0, 0.0, 0.0)), 1.7764821120776762e-33)
    assert lower_tail(double(-math.inf, math.inf), k).tolist() == [0.0, 1.0]
    assert tail(double(-math.inf, math.inf), k).tolist() == [1.0, 0.0]
    assert density(double(-math.inf, math.inf), k).tolist() == [0.0, 0.0]
    assert quantile(double(0.0, 1.0), k).tolist() == [-math.inf, math.inf]


coefficient = st.floats(-0.8, 0.8)


@given(coefficient, st.floats(0.5, 2), coefficient, coefficient, st.floats(-4, 4), st.sampled_from([0, 1, 2]))
@settings(max_examples=60, deadline=None)
def test_tails_density_and_quantile_belong_together(k1, k2, k3, k4, x, terms):
    k = (k1, k2, k3, k4)
    point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    lower = lower_tail(point, k, terms)
    (slope,) = torch.autograd.grad(lower, point)
    lower = lower.detach()
    assert (lower + tail(x, k, terms)).item() == pytest.approx(1, abs=1e-12)
    assert slope.item() == pytest.approx(density(x, k, terms).item(), abs=1e-12)
    mirrored = (-k1, k2, -k3, k4)
    assert tail(-x, mirrored, terms).item() == pytest.approx(lower.item(), abs=1e-13)
    p = torch.tensor(0.5 + x / 10, dtype=torch.float64)
    assert quantile(1 - p, mirrored, terms).item() == pytest.approx(-quantile(p, k, terms).item(), abs=1e-10)


def test_gradients():
    def through(weight, variance, third, fourth, x):
        groups = [Group(weight, 20, variance, third, fourth), Group(1 - weight, 9, 1.0, 2.0, 6.0)]
        k, t = standardized(groups), studentized(groups)
        p = torch.sigmoid(x)
        return lower_tail(x, k), tail(x, t), density(x, t), quantile(p, k), quantile(p, t), *t

    inputs = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 1.3, 0.9, 1.1, 0.4)]
    assert torch.autograd.gradcheck(through, inputs)


def test_one_group_or_a_sequence_and_broadcasting():
    g = Group(1, 10, *EXPONENTIAL)
    assert torch.equal(torch.stack(standardized(g)), torch.stack(standardized([g])))
    k = standardized([Group(double(0.3, 0.7), 10, *EXPONENTIAL), Group(double(0.7, 0.3), 10, *EXPONENTIAL)])
    assert k.k1.shape == k.k2.shape == k.k3.shape == k.k4.shape == (2,)
    close(k.k3[0], k.k3[1])
    assert tail(torch.zeros(3, 1), k).shape == (3, 2)
    assert tail(torch.zeros(3, 1), k).dtype == torch.float64
    with_tuple = tail(1.0, (0.0, 1.0, 0.5, 0.1))
    assert torch.equal(with_tuple, tail(1.0, StatisticCumulants(*double(0.0, 1.0, 0.5, 0.1))))


def test_compiled_equals_eager():
    def everything(w, x, p):
        groups = [Group(w, 20, 1.0, 2.0, 6.0), Group(1 - w, 9, 1.0, 2.0, 6.0)]
        k, t = standardized(groups), studentized(groups)
        return lower_tail(x, k), tail(x, t, clamp=True), density(x, k, 1), quantile(p, t), lattice_tail(x, k, 0.1)

    arguments = double(0.2, 0.5, 0.9), double(-2.0, 0.0, 3.0), double(0.01, 0.5, 0.99)
    compiled = torch.compile(everything, backend="eager", fullgraph=True)
    for a, b in zip(everything(*arguments), compiled(*arguments), strict=True):
        assert torch.allclose(a, b, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: standardized(Group(1, 10, -2.0, 0.0, 0.0)), r"groups\[0\].variance must not be negative; got -2"),
        (
            lambda: standardized([Group(1, 10, *NORMAL), Group(1, 0, *NORMAL)]),
            r"groups\[1\].count .* at least 1; got 0",
        ),
        (lambda: studentized(Group(1, 10, 1.0, math.nan, 0.0)), r"groups\[0\].third_cumulant must not be NaN"),
        (lambda: standardized(Group(torch.ones(2), torch.full((3,), 9), *NORMAL)), "do not broadcast"),
        (lambda: standardized([]), "at least one Group"),
        (lambda: tail(math.nan, (0.0, 1.0, 0.0, 0.0)), "x must not be NaN"),
        (lambda: tail(0.0, (0.0, -1.0, 0.0, 0.0)), "cumulants.k2 must not be negative; got -1"),
        (lambda: tail(0.0, (0.0, 1.0, 0.0)), "k1, k2, k3, k4; got 3"),
        (lambda: tail(torch.zeros(2), (0.0, torch.ones(3), 0.0, 0.0)), "does not broadcast"),
        (lambda: tail(0.0, (0.0, 1.0, 0.0, 0.0), terms=3), "terms must be 0, 1 or 2; got 3"),
        (lambda: quantile(1.5, (0.0, 1.0, 0.0, 0.0)), r"lower_probability must be in \[0, 1\]; got 1.5"),
        (lambda: lattice_tail(0.0, (0.0, 1.0, 0.0, 0.0), -1.0), "span must not be negative; got -1"),
        (lambda: lattice_tail(0.0, (0.0, 1.0, 0.0, 0.0), 1.0, correction="x"), "correction must be"),
        (lambda: validity((0.0, 1.0, 0.0, 0.0), density_reach=0.0), "density_reach must be positive; got 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
