"""Tails of weighted sums of chi-squares against Imhof's integral."""

import math

import mpmath
import pytest
import torch

from normadapt.asymptotics.quadratic import tail, tail_from_cumulants, tail_is_below

SPECTRA = {
    "one": [1.0],
    "two equal": [1.0, 1.0],
    "fifty equal": [1.0] * 50,
    "one dominating": [1.0] + [1e-3] * 20,
    "halving": [0.5**i for i in range(6)],
    "two unequal": [1.0, 0.1],
}


def imhof(q, eigenvalues):
    """P(Q >= q) by numerical inversion of the characteristic function (Imhof 1961), along a shifted line."""
    with mpmath.workdps(20):
        lam = [mpmath.mpf(v) for v in eigenvalues]
        top = max(lam)
        # the line through the saddlepoint keeps relative precision in the tail
        derivative = lambda s: sum(v / (1 - 2 * s * v) for v in lam) - q  # noqa: E731
        high = (1 - mpmath.mpf("1e-12")) / (2 * top)
        low = mpmath.mpf("1e-6") / top
        root = low if derivative(low) >= 0 else mpmath.findroot(derivative, (low, high), solver="anderson")

        def integrand(y):
            s = root + 1j * y
            k = -sum(mpmath.log(1 - 2 * s * v) for v in lam) / 2
            return mpmath.re(mpmath.exp(k - s * q) / s)

        scale = 1 / mpmath.sqrt(sum(2 * (v / (1 - 2 * root * v)) ** 2 for v in lam))
        ends = [0, *(scale * 2**i for i in range(14)), mpmath.inf]
        return float(mpmath.quad(integrand, ends, maxdegree=7) / mpmath.pi)


def quantiles(eigenvalues):
    total, top = sum(eigenvalues), max(eigenvalues)
    return [total, total + 4 * top, total + 15 * top, total + 40 * top]


@pytest.mark.parametrize("name", ["two equal", "fifty equal"])
def test_equal_weights_are_a_chi_square(name):
    k = len(SPECTRA[name])
    for q in quantiles(SPECTRA[name]):
        exact = float(mpmath.gammainc(k / 2, q / 2, mpmath.inf, regularized=True))
        assert float(tail(q, torch.tensor(SPECTRA[name]))) == pytest.approx(exact, rel=1e-8)
        cumulants = torch.tensor([k, 2.0 * k], dtype=torch.float64)
        assert float(tail_from_cumulants(q, cumulants)) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("name", ["one dominating", "halving", "two unequal"])
def test_unequal_weights_against_imhof(name):
    eigenvalues = SPECTRA[name]
    for q in quantiles(eigenvalues):
        exact = imhof(q, eigenvalues)
        assert 1e-12 < exact < 0.6
        assert float(tail(q, torch.tensor(eigenvalues, dtype=torch.float64))) == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("name", SPECTRA)
def test_four_cumulants_come_nearer_than_two(name):
    spectrum = torch.tensor(SPECTRA[name], dtype=torch.float64)
    cumulants = torch.stack([2 ** (r - 1) * math.factorial(r - 1) * (spectrum**r).sum() for r in (1, 2, 3, 4)])
    for q in quantiles(SPECTRA[name]):
        exact = float(tail(q, spectrum))
        errors = [abs(math.log(float(tail_from_cumulants(q, cumulants[:r])) / exact)) for r in (2, 4)]
        assert errors[1] <= errors[0] + 1e-6


def test_nothing_and_negative_statistics():
    assert float(tail(0.0, torch.tensor([1.0, 2.0]))) == 1.0
    assert float(tail(-3.0, torch.tensor([1.0, 2.0]))) == 1.0
    with pytest.raises(ValueError, match="eigenvalues must not be negative; got -1"):
        tail(1.0, torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="q must not be NaN"):
        tail(math.nan, torch.tensor([1.0]))


@pytest.mark.parametrize("level", [0.05, 0.01, 1e-3, 5e-7])
def test_a_gate_answers_as_the_tail_does(level):
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        k1, spread, ratio = (torch.rand(3, generator=generator, dtype=torch.float64) * 3 + 0.05).tolist()
        k2 = 2 * k1 * k1 * spread
        q = k1 * ratio * 20
        exact = float(tail_from_cumulants(q, torch.tensor([k1, k2], dtype=torch.float64)))
        assert tail_is_below(q, k1, k2, level) == (exact < level)
    assert tail_is_below(1.0, 0.0, 0.0, level)
    assert not tail_is_below(0.0, 0.0, 0.0, level)
