"""Moments, k-statistics and cumulants: merging, enumeration, float stress, clustered instances, effective counts."""

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normadapt.asymptotics.cumulants import (
    Moments,
    cluster_cumulants,
    cumulants_from_moments,
    effective_count,
    ema_effective_count,
    moments_from_cumulants,
    sampling_covariance,
)
from normadapt.asymptotics.edgeworth import Group, standardized

ORACLES = json.loads(Path(__file__).with_name("oracles_cumulants.json").read_text())
finite = st.floats(-3, 3)


def doubles(values):
    return torch.tensor([float(Fraction(v)) for v in values], dtype=torch.float64)


def close(value, wanted, relative=1e-9):
    assert float(value) == pytest.approx(float(Fraction(wanted)), rel=relative, abs=1e-15)


def test_merging_chunks_is_the_whole():
    row = ORACLES["O12_pebay"]
    parts = [Moments.from_sample(doubles(row[name])) for name in ("chunkA", "chunkB")]
    for found, wanted in (*zip(parts, (row["A"], row["B"]), strict=True), (parts[0].merge(parts[1]), row["merged"])):
        for value, number in zip(found, wanted, strict=True):
            close(value, number)
    k = parts[0].merge(parts[1]).k_statistics()
    for name in ("k2", "k3", "k4"):
        close(getattr(k, name), row[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_thousands_of_deviations_away_costs_no_digits(dtype):
    row = ORACLES["O12b_float32_stress"]
    x = (4096 + (torch.arange(1, 100001) % 17) / 64).to(dtype)
    found = Moments.from_sample(x)
    halves = Moments.from_sample(x[:30000]).merge(Moments.from_sample(x[30000:]))
    for moments in (found, halves):
        close(moments.mean, row["mean"])
        close(moments.m2, row["M2"])
        close(moments.m4, row["M4"])
        close(moments.m2 / moments.count, row["var_biased"])
    close(found.m3, row["M3"])
    close(halves.m3, row["M3"], 1e-6)  # merged thirds cancel: five digits are lost, and not more


def test_cumulants_of_clustered_instances():
    between, within = (1.0, 0.5, 0.5, 0.75), (0.0, 1.0, 2.0, 6.0)  # gamma(2, 1/2), and exponential minus 1
    for row in ORACLES["O13_clusters"]["rows"]:
        k = cluster_cumulants(between, within, row["H"])
        for value, wanted in zip(k[1:], row["k_image_mean"], strict=True):
            close(value, wanted)
        close(k.k2 / row["B"], row["var_grand"])
        grand = standardized(Group(1, row["B"], *k[1:]))
        close(grand.k3, row["std_skew_grand"])
        close(grand.k4, row["std_exkurt_grand"])
        pixels = cluster_cumulants(between, within, 1)
        close(standardized(Group(1, row["n_eff"], *pixels[1:])).k3, row["WRONG_skew_pixel_with_neff"])


def test_moment_identities_by_enumeration():
    row = ORACLES["O17_enumeration"]
    values, p = doubles(row["values"].split(",")), doubles(row["p"].split(","))
    n = row["n"]
    raw = [(p * values**r).sum() for r in (1, 2, 3, 4)]
    k = cumulants_from_moments(*raw)
    for value, name in zip(k, ("mu", "k2", "k3", "k4"), strict=True):
        close(value, row[name])
    index = torch.tensor(list(itertools.product(range(3), repeat=n)))
    chance = p[index].prod(1)
    sample = Moments.from_sample(values[index], dim=1).k_statistics()

    def mean(x):
        return (chance * x).sum()

    for value, wanted in zip(sample[:3], k[:3], strict=True):  # unbiased
        close(mean(value), wanted.item(), 1e-13)
    d, s2 = sample.k1 - k.k1, sample.k2 - k.k2
    formula = sampling_covariance(n, *k[1:])
    for value, found, name in (
        (formula.mixed, mean(d * s2), "cov_xbar_s2"),
        (formula.variance, mean(s2 * s2), "var_s2"),
        (k.k4 / n**2, mean(d * d * s2) - mean(d * d) * mean(s2), "cum_xbar_xbar_s2"),
    ):
        close(value, row[name][0])
        close(found, row[name][0])
    close(formula.mean, mean(d * d).item(), 1e-13)


def test_k4_is_unbiased_by_enumeration():
    values, p = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    index = torch.tensor(list(itertools.product(range(3), repeat=4)))
    k4 = Moments.from_sample(values[index], dim=1).k_statistics().k4
    close((p[index].prod(1) * k4).sum(), ORACLES["O17_enumeration"]["k4"])


def test_effective_count_of_an_average_is_that_of_its_weights():
    for row in ORACLES["O19_ema"]:
        a = row["momentum"]
        close(ema_effective_count(a), row["n_eff_batches"])
        close(1 / ema_effective_count(a), row["sum_w2"])
        weights = a * (1 - a) ** torch.arange(4000, dtype=torch.float64)
        close(effective_count(weights), row["n_eff_batches"])
    assert effective_count(torch.ones(2, 7)).tolist() == [7.0, 7.0]


@given(finite, st.floats(0, 5), finite, finite, st.booleans())
@settings(max_examples=50, deadline=None)
def test_moments_and_cumulants_invert_each_other(k1, k2, k3, k4, central):
    there = moments_from_cumulants(k1, k2, k3, k4, central=central)
    back = cumulants_from_moments(*there, central=central)
    assert torch.allclose(torch.stack(back), torch.tensor([k1, k2, k3, k4], dtype=torch.float64), atol=1e-11)


@given(st.lists(finite, min_size=4, max_size=12), finite, st.floats(0.1, 3))
@settings(max_examples=50, deadline=None)
def test_k_statistics_are_equivariant(values, shift, factor):
    x = torch.tensor(values, dtype=torch.float64)
    k = Moments.from_sample(x).k_statistics()
    moved = Moments.from_sample(factor * x + shift).k_statistics()
    assert torch.allclose(moved.k1, factor * k.k1 + shift, atol=1e-12)
    for order in (2, 3, 4):
        assert torch.allclose(moved[order - 1], factor**order * k[order - 1], atol=1e-9)


def test_conversions_have_gradients_and_compile():
    raw = [torch.tensor(m, dtype=torch.float64, requires_grad=True) for m in (1.0, 2.0, 6.0, 24.0)]
    assert torch.autograd.gradcheck(lambda *m: tuple(cumulants_from_moments(*m)), raw)
    assert torch.autograd.gradcheck(lambda *k: tuple(moments_from_cumulants(*k)), raw)

    def everything(x, w):
        k = Moments.from_sample(x).k_statistics()
        raw = moments_from_cumulants(*k)
        return (
            *cumulants_from_moments(*raw),
            *sampling_covariance(9, *k[1:]),
            effective_count(w),
            ema_effective_count(w),
        )

    x, w = torch.randn(9, 4, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    compiled = torch.compile(everything, backend="eager", fullgraph=True)
    for a, b in zip(everything(x, w), compiled(x, w), strict=True):
        assert torch.allclose(a, b, rtol=1e-14)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sampling_covariance(0, 1.0, 0.0, 0.0), "count must be at least 1; got 0"),
        (lambda: sampling_covariance(5, -1.0, 0.0, 0.0), "k2 must not be negative; got -1"),
        (lambda: cumulants_from_moments(float("nan"), 1.0, 0.0, 3.0), "m1 must not be NaN"),
        (lambda: moments_from_cumulants(torch.zeros(2), torch.zeros(3), 0.0, 0.0), "do not broadcast"),
        (lambda: cluster_cumulants((0, 1, 0, 0), (0, 1, 0, 0), 0.5), "size must be at least 1; got 0.5"),
        (lambda: effective_count(torch.tensor([1.0, -2.0])), "weights must not be negative; got -2"),
        (lambda: ema_effective_count(1.5), r"momentum must be in \(0, 1\]; got 1.5"),
        (lambda: Moments.from_sample(torch.zeros(0, 3)), "at least one draw"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
