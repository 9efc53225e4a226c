"""Saddlepoint approximations where they are delicate: at the mean, far out, at the ends of reach, and as gradients."""

import json
import math
from pathlib import Path

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normadapt.asymptotics.saddlepoint import (
    CGF,
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
METHODS = ("lugannani-rice", "barndorff-nielsen")


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def families():
    """Each kind of law as a function of two parameters."""
    return {
        "normal": lambda a, b: NormalCGF(a, b),
        "gamma": lambda a, b: GammaCGF(a, b),
        "binomial": lambda a, b: BinomialCGF(10, a / 10),
        "cumulants": lambda a, b: CumulantCGF(a, b, 0.3, 0.4),
        "mixture": lambda a, b: ChiSquareMixtureCGF(torch.stack((a, b), -1)),
        "sample": lambda a, b: WeightedMeans([(1, 4, EmpiricalCGF(torch.stack((a, b, 2 * a, 3 * b))))]),
        "adapted": lambda a, b: WeightedMeans([(0.7, 4, GammaCGF(a, b)), (0.3, 2, GammaCGF(1.0, 1.0))]),
    }


def gamma_formulas(shape, x):
    """Both formulas for a gamma law of rate 1, in 50 digits."""
    with mpmath.workdps(50):
        a, x = mpmath.mpf(shape), mpmath.mpf(x)
        t = 1 - a / x
        w = mpmath.sign(t) * mpmath.sqrt(2 * (t * x + a * mpmath.log(1 - t)))
        u = t * x / mpmath.sqrt(a)
        upper = mpmath.erfc(w / mpmath.sqrt(2)) / 2 + mpmath.npdf(w) * (1 / u - 1 / w)
        return upper, mpmath.erfc((w + mpmath.log(u / w) / w) / mpmath.sqrt(2)) / 2


@pytest.mark.parametrize("shape", [0.5, 1.0, 5.0, 100.0, 1e6])
@pytest.mark.parametrize("grouped", [False, True])
def test_both_formulas_from_the_mean_to_1e_minus_300(shape, grouped):
    deviations = (-2.0, -2e-3, -1.1e-3, -0.9e-3, -1e-5, 1e-7, 1e-4, 0.99e-3, 1.01e-3, 1e-2, 0.1, 1.0, 8.0, 30.0)
    for z in deviations:
        x = shape + z * math.sqrt(shape)
        if x <= 0:
            continue
        law = WeightedMeans([(1, 1, GammaCGF(shape, 1.0))]) if grouped else GammaCGF(shape, 1.0)
        for method, exact in zip(METHODS, gamma_formulas(shape, x), strict=True):
            if exact > 1e-300:
                assert float(tail(law, x, method)) == pytest.approx(float(exact), rel=1e-9, abs=0)


@pytest.mark.parametrize("lattice", ["first", "second"])
@pytest.mark.parametrize("method", METHODS)
def test_lattice_corrections_across_the_mean(method, lattice):
    """Against 50 digits of the formula; the mean comes close to k (or to k - 1/2)."""
    n, k, shift = 20, 6, 0.5 if lattice == "second" else 0.0
    for offset in (-1e-2, -1e-4, 3e-9, 1e-4, 2e-4, 1e-3):
        p = (k - shift) / n + offset
        with mpmath.workdps(50):
            exact_p, y = mpmath.mpf(p), mpmath.mpf(k) - shift
            t = mpmath.log(y * (1 - exact_p) / (exact_p * (n - y)))
            cgf = n * mpmath.log(1 - exact_p + exact_p * mpmath.exp(t))
            w = mpmath.sign(t) * mpmath.sqrt(2 * (t * y - cgf))
            step = 1 - mpmath.exp(-t) if lattice == "first" else 2 * mpmath.sinh(t / 2)
            u = step * mpmath.sqrt(y * (n - y) / n)
            if method == "lugannani-rice":
                exact = mpmath.erfc(w / mpmath.sqrt(2)) / 2 + mpmath.npdf(w) * (1 / u - 1 / w)
            else:
                exact = mpmath.erfc((w + mpmath.log(u / w) / w) / mpmath.sqrt(2)) / 2
        assert float(tail(BinomialCGF(n, p), k, method, lattice)) == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("what", [*METHODS, "density", "second", "normalized", "quantile"])
def test_gradients_in_the_parameters_by_value(name, what):
    """Five-point differences in both parameters and the argument, at the mean, in its series, and outside."""

    def value(a, b, x):
        law = families()[name](a, b)
        if what in METHODS:
            return tail(law, x, what)
        if what == "quantile":
            return quantile(law, torch.sigmoid(x))
        return density(law, x, order=2 if what == "second" else 1, normalized=what == "normalized")

    a, b = 2.1, 1.7
    law = families()[name](*doubles(a, b))
    for z in (0.0, 5e-4, -5e-4, 0.5):
        x = z - 0.3 if what == "quantile" else float(law.mean + z * law.variance.sqrt())
        point = [v.requires_grad_() for v in doubles(a, b, x).unbind()]
        found = torch.autograd.grad(value(*point), point, allow_unused=True, materialize_grads=True)
        for i, gradient in enumerate(found):

            def moved(h, i=i, x=x):
                return float(value(*(doubles(a, b, x) + h * torch.eye(3, dtype=torch.float64)[i]).unbind()))

            h = 1e-3
            expected = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
            assert float(gradient) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_second_derivatives_pass_through_an_iterated_root():
    def f(x):
        return tail(WeightedMeans([(1, 3, GammaCGF(1.0, 1.0))]), x)

    x = doubles(1.4).requires_grad_()
    assert torch.autograd.gradgradcheck(f, (x,), eps=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", ORACLES["O15_empirical_saddlepoint"]["quantiles"], ids=lambda r: str(r["p"]))
def test_quantiles_of_a_bootstrap(row):
    o = ORACLES["O15_empirical_saddlepoint"]
    law = WeightedMeans([(1, 10, EmpiricalCGF(doubles(*map(float, o["data"]))))])
    found = float(quantile(law, 1 - row["p"])) - float(o["xbar"])
    assert found == pytest.approx(float(row["q_ESA_minus_xbar"]), rel=1e-9)


@pytest.mark.parametrize("name", families())
def test_quantiles_invert_the_tail(name):
    law = families()[name](*doubles(2.1, 1.7))
    levels = (0.7, 0.5, 0.3, 0.1) if name in ("sample", "binomial") else (0.99, 0.5, 0.3, 1e-3, 1e-12, 1e-30)
    for level in levels:
        x = quantile(law, level)
        assert not bool(solve(law, x).clamped)
        assert float(tail(law, x)) == pytest.approx(level, rel=1e-10)


def test_quantiles_whose_first_guess_lies_at_the_pole():
    laws = GammaCGF(doubles(0.5, 5.0, 50.0, 5000.0), 1.0)
    for level in (1e-6, 1e-12, 1e-100):
        assert tail(laws, quantile(laws, level)).tolist() == pytest.approx([level] * 4, rel=1e-9)


def test_a_quantile_beyond_reach_is_the_end_of_reach():
    law = EmpiricalCGF(doubles(0.0, 0.0, 0.0, 0.0, 1.0))  # P(X = 1) = 0.2
    assert float(quantile(law, 1e-3)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("n", "constant"), ORACLES["O1_exp_mean"]["spa_norm_const"].items())
def test_the_integral_of_the_density(n, constant):
    law = GammaCGF(float(n), float(n))
    for grouped in (law, WeightedMeans([(1, float(n), GammaCGF(1.0, 1.0))])):
        ratio = density(grouped, 1.3) / density(grouped, 1.3, normalized=True)
        assert float(ratio) == pytest.approx(float(constant), rel=1e-9)


@pytest.mark.parametrize(
    ("law", "low", "high"),
    [
        (WeightedMeans([(-1, 20, GammaCGF(1, 1)), (1, 5, GammaCGF(1, 1))]), -6.0, 12.0),
        (CumulantCGF(0.0, 1.0, 0.2, 0.5), -12.0, 12.0),
        (NormalCGF(1.0, 4.0), -30.0, 32.0),
    ],
)
@pytest.mark.parametrize("order", [1, 2])
def test_a_normalized_density_integrates_to_one(law, low, high, order):
    x = torch.linspace(low, high, 20001, dtype=torch.float64)
    assert float(torch.trapezoid(density(law, x, order, normalized=True), x)) == pytest.approx(1.0, abs=1e-9)


def test_a_law_with_a_generating_function_of_ones_own():
    """O4: the lognormal mean by its true CGF, which has no closed form and ends at t = 0."""

    class LognormalCGF(CGF):
        def __init__(self, sigma):
            self.nodes = torch.linspace(-9, 9, 2001, dtype=torch.float64)
            self.x = torch.exp(sigma * self.nodes)
            self.log_weights = -0.5 * self.nodes**2 - 0.5 * math.log(2 * math.pi) + math.log(18 / 2000)
            self.first = torch.tensor(math.exp(sigma * sigma / 2), dtype=torch.float64)

        def _moments(self, t, order):
            logs = t.unsqueeze(-1) * self.x + self.log_weights
            p, y = torch.softmax(logs, -1), self.x
            m1 = (p * y).sum(-1, keepdim=True)
            central = [(p * (y - m1) ** r).sum(-1) for r in range(2, 6)]
            k = [torch.logsumexp(logs, -1), m1.squeeze(-1), central[0], central[1], central[2] - 3 * central[0] ** 2]
            return k[: order + 1], central[3] - 10 * central[1] * central[0]

        def cumulants(self):
            k, fifth = self._moments(torch.zeros((), dtype=torch.float64), 4)
            return self.first, k[2], k[3], k[4], fifth

        def centred(self, t, order):
            k, _ = self._moments(t, order)
            return (k[0] - self.first * t, *(k[1:2] and [k[1] - self.first]), *k[2:])

        @property
        def domain(self):
            return doubles(-torch.inf)[0], doubles(0.0)[0]

    o = ORACLES["O4_lognormal"]
    law = WeightedMeans([(1, o["n"], LognormalCGF(o["sigma"]))])
    rows = [row for row in o["rows"] if "sf_LR_true_cgf" in row]
    assert len(rows) == 2
    for row in rows:
        assert float(solve(law, row["x"]).t) / o["n"] == pytest.approx(float(row["t_hat_true_per_obs"]), rel=1e-9)
        assert float(tail(law, row["x"])) == pytest.approx(float(row["sf_LR_true_cgf"]), rel=1e-9)


def test_the_reach_of_a_truncated_law():
    o = ORACLES["O18_truncated_cgf"]
    flat = CumulantCGF(0.0, 1 / 12, 0.0, -1 / 120)
    assert not bool(flat.is_convex)
    assert float(flat.domain[1]) == pytest.approx(float(o["t_star"]), rel=1e-12)
    assert float(flat.reach[1]) == pytest.approx(float(o["max_reachable_dev"]), rel=1e-12)
    # a mean of n reaches exactly as far
    assert float(WeightedMeans([(1, 7, flat)]).reach[1]) == pytest.approx(float(o["max_reachable_dev"]), rel=1e-6)
    rectified = CumulantCGF(0.398942280401433, 0.340845056908105, 0.326458412069198, 0.279708338352703)
    assert bool(rectified.is_convex)
    assert [float(end) for end in rectified.reach] == [-math.inf, math.inf]
    skewed = CumulantCGF(0.0, 1.0, 2.0, 1.0)  # K'' = 1 + 2 t + t^2/2, zero at -2 + sqrt(2)
    assert float(skewed.domain[0]) == pytest.approx(-2 + math.sqrt(2), rel=1e-12)
    assert float(skewed.domain[1]) == math.inf


def test_the_ends_of_a_lattice_and_of_a_sample():
    k = doubles(0.0, 5.0, 10.0)
    for lattice in (None, "first", "second"):
        found = tail(BinomialCGF(10, 0.3), k, lattice=lattice)
        assert float(found[0]) == 1.0
        assert 0.05 < float(found[1]) < 0.2
    assert float(tail(BinomialCGF(10, 0.3), 10, lattice="first")) == pytest.approx(0.3**10, rel=1e-9)
    sample = doubles(1.0, 2.0, 5.0)
    law = WeightedMeans([(1, 3, EmpiricalCGF(sample))])
    assert tail(law, doubles(1.0, 5.0)).tolist() == pytest.approx([1.0, 3.0**-3], rel=1e-9)


def test_a_dead_channel_is_flagged_and_the_others_are_not_affected():
    sample = torch.stack((doubles(1.0, 2.0, 4.0), doubles(3.0, 3.0, 3.0)), -1)
    both = WeightedMeans([(1, 3, EmpiricalCGF(sample))])
    alone = WeightedMeans([(1, 3, EmpiricalCGF(sample[:, 0]))])
    x = doubles(2.8, 3.1).requires_grad_()
    point, found = solve(both, x), tail(both, x)
    assert point.clamped.tolist() == [False, True]
    assert found[0].item() == tail(alone, 2.8).item()
    assert tail(both, doubles(2.8, 3.0))[1] == 1
    assert found[1] == 0
    assert density(both, doubles(2.8, 3.0))[1] == 0
    assert float(quantile(both, 0.1)[1]) == 3.0
    found.sum().backward()
    assert bool(x.grad.isfinite().all())
    assert tail(NormalCGF(0.0, doubles(0.0, 1.0)), 1.0).tolist() == pytest.approx([0.0, 0.158655253931457], rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.floats(0.3, 300),
    scale=st.floats(1e-3, 1e3),
    z=st.floats(-2, 8),
    weight=st.floats(0.1, 0.9),
)
def test_units_do_not_matter(shape, scale, z, weight):
    """The law of scale times S, at scale times x."""

    def law(unit):
        return WeightedMeans([(weight, 3, GammaCGF(shape, unit)), (weight - 1, 2, GammaCGF(1.0, unit))])

    one, other = law(1.0), law(1 / scale)
    x = one.mean + z * one.variance.sqrt()
    for method in METHODS:
        assert float(tail(other, scale * x, method)) == pytest.approx(float(tail(one, x, method)), rel=1e-8)


@settings(max_examples=40, deadline=None)
@given(data=st.lists(st.floats(-100, 100), min_size=1, max_size=12), count=st.integers(1, 30))
def test_any_sample_gives_probabilities_within_chernoffs_bound(data, count):
    law = WeightedMeans([(1, count, EmpiricalCGF(doubles(*data)))])
    low, high = law.reach
    x = low + (high - low) * torch.linspace(-0.2, 1.2, 21, dtype=torch.float64)
    for method in METHODS:
        found, w = tail(law, x, method), solve(law, x).w
        assert bool(((found >= 0) & (found <= 1)).all())
        assert bool((found[w > 0] <= torch.exp(-0.5 * w[w > 0] ** 2)).all())


@settings(max_examples=40, deadline=None)
@given(shape=st.floats(0.5, 100), weight=st.floats(-1, 1).filter(lambda v: abs(v) > 1e-3))
def test_tails_of_sums_of_gammas_fall(shape, weight):
    law = WeightedMeans([(1, 3, GammaCGF(shape, 1.0)), (weight, 2, GammaCGF(2.0, 1.0))])
    z = torch.linspace(-0.9 * float(law.mean / law.variance.sqrt()) if weight > 0 else -4.0, 20, 60)
    for method in METHODS:
        falls = tail(law, law.mean + z * law.variance.sqrt(), method).diff()
        assert bool((falls <= 4e-16).all())  # next to 1 only rounding is left to fall
        assert bool((falls[len(z) // 2 :] < 0).all())


@pytest.mark.parametrize("n", [1, 4, 16])
def test_a_single_group_of_gammas_is_a_gamma(n):
    x = doubles(0.3, 0.999999, 1.0, 2.0, 9.0)
    mean, direct = WeightedMeans([(1, n, GammaCGF(2.0, 2.0))]), GammaCGF(2.0 * n, 2.0 * n)
    torch.testing.assert_close(tail(mean, x), tail(direct, x), rtol=1e-11, atol=0)
    torch.testing.assert_close(solve(mean, x).u, solve(direct, x).u, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WeightedMeans([]), "at least one group"),
        (lambda: EmpiricalCGF(torch.empty(0)), "sample needs at least one draw"),
        (lambda: EmpiricalCGF(doubles(1.0, math.inf)), "sample must be finite; got inf"),
        (lambda: CumulantCGF(0.0, -2.0, 0.0, 0.0), "k2 must not be negative; got -2"),
        (lambda: ChiSquareMixtureCGF(doubles(1.0, -3.0)), "eigenvalues must not be negative; got -3"),
        (lambda: BinomialCGF(0, 0.5), "trials must be at least 1; got 0"),
        (lambda: tail(BinomialCGF(10, 0.5), 11), "x must lie in the support of the law; got 11"),
        (lambda: tail(NormalCGF(0.0, 1.0), math.inf), "x must be finite; got inf"),
        (lambda: tail(NormalCGF(0.0, 1.0), 0.0, lattice="third"), "lattice must be .*'third'"),
        (lambda: density(NormalCGF(0.0, 1.0), 0.0, order=3), "order must be 1 or 2; got 3"),
        (lambda: quantile(NormalCGF(0.0, 1.0), 0.0), "tail_probability .*; got 0"),
        (
            lambda: WeightedMeans([(1, 2, NormalCGF(torch.zeros(2), 1.0)), (1, 2, NormalCGF(torch.zeros(3), 1.0))]),
            "do not broadcast",
        ),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_an_iterated_root_compiles_in_one_graph():
    def formula(k3, x):
        return tail(WeightedMeans([(1, 4, CumulantCGF(0.0, 1.0, k3, 2.0))]), x, "barndorff-nielsen")

    k3, x = doubles(0.5, 1.0), doubles(0.7, 1.7)
    compiled = torch.compile(formula, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(k3, x), formula(k3, x), rtol=1e-10, atol=0)
