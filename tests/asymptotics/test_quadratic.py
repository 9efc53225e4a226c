"""Weighted sums of chi-squares: against convolutions, closed forms and differences; the gate against the tail."""

import json
import math
from pathlib import Path

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normadapt.asymptotics import quadratic
from normadapt.asymptotics.quadratic import tail, tail_from_cumulants, tail_is_below

ORACLES = json.loads((Path(__file__).parent / "oracles_quadratic.json").read_text())


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def cumulants_of(eigenvalues, orders=4):
    powers = [2.0 ** (r - 1) * math.factorial(r - 1) * (eigenvalues**r).sum(-1) for r in range(1, orders + 1)]
    return torch.stack(powers, -1)


@pytest.mark.parametrize("row", ORACLES["rows"], ids=lambda r: f"{r['ones']}+{r['other']}x{r['others']} q{r['q']:.3g}")
def test_two_groups_by_convolution(row):
    eigenvalues = doubles(*[1.0] * row["ones"], *[row["other"]] * row["others"])
    assert float(tail(row["q"], eigenvalues)) == pytest.approx(row["tail"], rel=1e-8, abs=0)
    # two different eigenvalues are exactly what four cumulants can tell
    assert float(tail_from_cumulants(row["q"], cumulants_of(eigenvalues))) == pytest.approx(
        row["tail"], rel=1e-5, abs=0
    )


@pytest.mark.parametrize("count", [1, 2, 5, 50, 500])
def test_equal_eigenvalues_down_to_1e_minus_300(count):
    q = count + math.sqrt(2 * count) * doubles(-3.0, -0.9, -0.5, 0.0, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0)
    q = q[q > 0]
    found = tail(3.0 * q, torch.full((count,), 3.0, dtype=torch.float64))
    for value, at in zip(found.tolist(), q.tolist(), strict=True):
        exact = float(mpmath.gammainc(mpmath.mpf(count) / 2, mpmath.mpf(at) / 2, mpmath.inf, regularized=True))
        if exact > 1e-300:
            assert value == pytest.approx(exact, rel=1e-10, abs=0)


def test_small_lower_tails_keep_one_minus_their_value():
    q = doubles(1e-12, 1e-6, 1e-3)
    assert (1 - tail(q, 1.0)).tolist() == pytest.approx([math.erf(math.sqrt(v / 2)) for v in q.tolist()], abs=1e-15)


@settings(max_examples=40, deadline=None)
@given(
    eigenvalues=st.lists(st.floats(1e-6, 1), min_size=1, max_size=12),
    scale=st.floats(1e-6, 1e6),
    z=st.floats(-2, 40),
)
def test_neither_units_nor_order_nor_zeros_matter(eigenvalues, scale, z):
    spectrum = doubles(*eigenvalues)
    q = spectrum.sum() + z * (2 * (spectrum**2).sum()).sqrt()
    one = float(tail(q, spectrum))
    other = float(tail(scale * q, torch.cat((doubles(0.0, 0.0), scale * spectrum.flip(0)))))
    assert other == pytest.approx(one, rel=1e-7, abs=0)


@settings(max_examples=30, deadline=None)
@given(eigenvalues=st.lists(st.floats(1e-4, 1), min_size=1, max_size=30))
def test_the_tail_falls_and_finer_steps_change_nothing(eigenvalues):
    spectrum = doubles(*eigenvalues)
    sd = float((2 * (spectrum**2).sum()).sqrt())
    q = torch.linspace(0.05, 1, 30, dtype=torch.float64) * (float(spectrum.sum()) + 25 * sd)
    found = tail(q, spectrum)
    # next to 1 only rounding is left to fall
    assert bool((found.diff() <= 4e-16).all())
    step, nodes = quadratic._STEP, quadratic._NODES
    try:
        quadratic._STEP, quadratic._NODES = 0.4 * step, 3 * nodes
        torch.testing.assert_close(tail(q, spectrum), found, rtol=1e-8, atol=0)
    finally:
        quadratic._STEP, quadratic._NODES = step, nodes


def test_gradients_are_those_of_the_law():
    q, spectrum = doubles(4.0, 0.8, 30.0).requires_grad_(), doubles(1.0, 0.5, 0.2).requires_grad_()
    assert torch.autograd.gradcheck(tail, (q, spectrum))
    cumulants = doubles(2.0, 3.0, 11.0, 70.0).requires_grad_()
    assert torch.autograd.gradcheck(tail_from_cumulants, (q, cumulants))
    # the density of chi-square(4)
    (slope,) = torch.autograd.grad(tail(q, torch.ones(4)).sum(), q)
    assert (-slope).tolist() == pytest.approx([v / 4 * math.exp(-v / 2) for v in q.tolist()], rel=1e-10)


def test_three_cumulants_are_a_gamma_law_with_an_origin():
    """k = (c + a b, a b^2, 2 a b^3) of c + b Gamma(a)."""
    origin, shape, scale = 2.0, 1.5, 4.0
    k = doubles(origin + shape * scale, shape * scale**2, 2 * shape * scale**3)
    q = doubles(1.0, 3.0, 20.0, 200.0)
    expected = [
        float(mpmath.gammainc(shape, max(v - origin, 0) / scale, mpmath.inf, regularized=True)) for v in q.tolist()
    ]
    assert tail_from_cumulants(q, k).tolist() == pytest.approx(expected, rel=1e-12)


def test_cumulants_that_no_sum_has_fall_back_on_those_below():
    """p2^2 > p1 p3 for the third, p3^2 > p2 p4 for the fourth."""
    q = 9.0
    two = float(tail_from_cumulants(q, doubles(2.0, 4.0)))
    assert float(tail_from_cumulants(q, doubles(2.0, 4.0, 10.0))) == two
    assert float(tail_from_cumulants(q, doubles(2.0, 4.0, 10.0, 1000.0))) == two
    three = float(tail_from_cumulants(q, doubles(2.0, 3.0, 11.0)))
    assert float(tail_from_cumulants(q, doubles(2.0, 3.0, 11.0, 1.0))) == three


def test_shapes_broadcast_and_sites_do_not_meet():
    spectra = doubles(*[1.0, 0.5, 0.1, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0]).reshape(3, 3)
    q = doubles(-1.0, 0.0, 4.0, 40.0)
    found = tail(q.unsqueeze(-1), spectra)
    assert found.shape == (4, 3)
    for i in range(4):
        for j in range(3):
            assert float(found[i, j]) == pytest.approx(float(tail(q[i], spectra[j])), rel=1e-12)
    assert found[:, 1].tolist() == [1.0, 1.0, 0.0, 0.0]
    by_cumulants = tail_from_cumulants(q.unsqueeze(-1), cumulants_of(spectra))
    assert by_cumulants.shape == (4, 3)
    assert by_cumulants[:, 1].tolist() == [1.0, 1.0, 0.0, 0.0]
    torch.testing.assert_close(by_cumulants[:, 2], found[:, 2], rtol=1e-10, atol=0)


@pytest.mark.parametrize("level", [0.05, 1e-3, 5e-7])
def test_a_gate_with_four_cumulants_answers_as_the_tail_does(level):
    generator = torch.Generator().manual_seed(1)
    answers = []
    for _ in range(60):
        spectrum = torch.rand(4, generator=generator, dtype=torch.float64) ** 6
        q = float(spectrum.max()) * 50 * float(torch.rand(1, generator=generator))
        k = cumulants_of(spectrum)
        below = tail_is_below(q, *k[:2].tolist(), level, *k[2:].tolist())
        assert below == bool(tail_from_cumulants(q, k) < level)
        answers.append(below)
    assert 0 < sum(answers) < 60


def test_a_gate_next_to_its_level_is_computed():
    k = doubles(2.0, 3.0, 11.0, 70.0)
    for q in (24.0, 26.0, 28.0):
        exact = float(tail_from_cumulants(q, k))
        assert tail_is_below(q, 2.0, 3.0, exact * 1.0001, 11.0, 70.0)
        assert not tail_is_below(q, 2.0, 3.0, exact * 0.9999, 11.0, 70.0)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tail(1.0, doubles(1.0, -0.5)), "eigenvalues must not be negative; got -0.5"),
        (lambda: tail(1.0, doubles(1.0, math.inf)), "eigenvalues must be finite; got inf"),
        (lambda: tail(math.inf, doubles(1.0)), "q must be finite; got inf"),
        (lambda: tail(doubles(1.0, 2.0), torch.ones(3, 4)), "do not broadcast"),
        (lambda: tail_from_cumulants(1.0, doubles(1.0)), "cumulants must be 2, 3 or 4"),
        (lambda: tail_from_cumulants(1.0, doubles(1.0, -2.0)), "cumulants must not be negative; got -2"),
        (lambda: tail_from_cumulants(math.nan, doubles(1.0, 2.0)), "q must not be NaN"),
    ],
)
def test_bad_input(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_it_compiles_in_one_graph():
    def both(q, spectrum):
        return tail(q, spectrum), tail_from_cumulants(q, cumulants_of(spectrum))

    q, spectrum = doubles(2.0, 50.0), doubles(1.0, 0.5, 0.1)
    compiled = torch.compile(both, fullgraph=True, backend="eager")(q, spectrum)
    for found, expected in zip(compiled, both(q, spectrum), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
