"""From activations to evidence, and merging: against float64 and the oracles of docs THEORY sections 2 and 10."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from normadapt.asymptotics.cumulants import Moments
from normadapt.layers.moments import exact_instance_moments, gather_evidence, instance_moments

ORACLES = json.loads((Path(__file__).parent / "oracles_moments.json").read_text())
SHAPES = [(5, 3), (5, 3, 7), (5, 3, 4, 6), (5, 3, 2, 3, 4), (1, 3, 8), (1, 3), (4, 1, 1, 1)]


def sample(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 3).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moments_against_float64(shape, dtype):
    x = sample(shape, dtype)
    exact = x.double().reshape(*shape[:2], -1)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    moments = instance_moments(x)
    assert moments.values.dtype == torch.float64
    torch.testing.assert_close(moments.mean, exact.mean(2), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(moments.variance, exact.var(2, correction=0), rtol=tolerance, atol=20 * tolerance)
    evidence, excluded = gather_evidence(x)
    pooled = exact.transpose(0, 1).flatten(1)
    assert (evidence.kept, excluded, evidence.count, evidence.positions) == (None, 0, shape[0], exact.shape[2])
    torch.testing.assert_close(evidence.mean, pooled.mean(1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(evidence.variance, pooled.var(1, correction=0), rtol=tolerance, atol=20 * tolerance)
    between = exact.mean(2).var(0, correction=0)
    torch.testing.assert_close(evidence.scatter.expand_as(between), between, rtol=1e-5, atol=20 * tolerance)


def test_large_activations_in_pieces():
    x = sample((37, 2, 200, 301))
    exact = x.double().flatten(2)
    moments = instance_moments(x)
    torch.testing.assert_close(moments.mean, exact.mean(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(moments.variance, exact.var(2, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_any_memory_layout(layout):
    x = sample((4, 3, 6, 8))
    view = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(2, 3),
        "strided": lambda: x[:, :, ::2],
        "expanded": lambda: x[:, :1].expand(-1, 3, -1, -1),
    }[layout]()
    ours, plain = (gather_evidence(x)[0].both for x in (view, view.contiguous()))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(10, 1, 10_000), (1, 1, 100_000), (100, 1, 10, 100), (100_000, 1)])
def test_float32_far_from_zero_keeps_the_variance(shape):
    oracle = ORACLES["O12b_float32_stress"]
    x = (4096 + (torch.arange(1, 100_001) % 17).double() / 64).float().reshape(shape)
    assert float((x * x).mean() - x.mean() ** 2) == pytest.approx(oracle["naive_f32_E_x2_minus_mean2"], abs=1.0)
    evidence = gather_evidence(x)[0]
    assert float(evidence.mean) == pytest.approx(oracle["mean"], rel=1e-12)
    assert float(evidence.variance) == pytest.approx(oracle["var_biased"], rel=1e-9)
    moments = exact_instance_moments(x.reshape(10, 1, -1), torch.tensor([4096.0], dtype=torch.float64))
    total = float(moments.variance.mean() + moments.mean.var(correction=0))
    assert total * 100_000 == pytest.approx(oracle["M2"], rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(offset=st.floats(-1e5, 1e5), spread=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
@example(offset=95092.0, spread=157.53125, seed=0)
def test_float32_cancellation_never_costs_more_than_a_hundredth(offset, spread, seed):
    x = (offset + spread * sample((6, 2, 50), torch.float64, seed)).float()
    exact = x.double().transpose(0, 1).flatten(1).var(1, correction=0)
    torch.testing.assert_close(gather_evidence(x)[0].variance, exact, rtol=0.01, atol=0)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_the_instance_is_the_unit(row):
    oracle = ORACLES["O13_clusters"]["rows"][row]
    n, positions, replicates = oracle["B"], oracle["H"], 400_000 // (oracle["B"] * oracle["H"])
    generator = torch.Generator().manual_seed(1)

    def exponential(*shape):
        return torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)

    level = (exponential(n, replicates, 1) + exponential(n, replicates, 1)) / 2  # Gamma(2, 1/2)
    x = level + exponential(n, replicates, positions) - 1
    evidence = gather_evidence(x)[0]
    error = 5 * (2 / replicates) ** 0.5  # five standard errors of a relative variance, and skewed
    predicted = float((evidence.scatter / (n - 1)).mean())  # what a policy takes as Var(mean) of one batch
    assert predicted == pytest.approx(oracle["var_grand"], rel=error)
    assert float(evidence.mean.var()) == pytest.approx(oracle["var_grand"], rel=error)
    assert float(evidence.variance.mean()) == pytest.approx(oracle["E_pooled_biased_var"], rel=0.03)
    k = Moments.from_sample(instance_moments(x).mean.flatten()).k_statistics()
    k2, k3, _ = (float(Fraction(value)) for value in oracle["k_image_mean"])
    assert float(k.k2) == pytest.approx(k2, rel=0.05)
    assert float(k.k3) == pytest.approx(k3, rel=0.15)
    if positions > 1:
        assert predicted > 3 * oracle["naive_iid_var"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_instances_that_are_not_finite_are_masked(bad, shape, dtype):
    x = sample(shape, dtype)
    rest = x[[0, 2, 3, 5]]
    x[1, 0], x[4, 2].view(-1)[-1] = bad, bad
    evidence, excluded = gather_evidence(x)
    assert evidence.kept.tolist() == [True, False, True, True, False, True]
    assert (excluded, evidence.count) == (2, 4)
    torch.testing.assert_close(evidence.both, gather_evidence(rest)[0].both, rtol=1e-5, atol=1e-5)
    x[:] = bad
    assert gather_evidence(x) == (None, 6)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (3, 3, 0)])
def test_nothing_gives_no_evidence(shape):
    assert gather_evidence(torch.zeros(shape)) == (None, 0)


@pytest.mark.parametrize("size", [1e15, 1e22, 1e30])
@pytest.mark.parametrize("signs", ["one", "both"])
def test_finite_activations_give_finite_evidence(size, signs):
    x = sample((4, 3, 8, 8))
    x[1] *= size if signs == "one" else size * (1 - 2 * (torch.arange(64).reshape(8, 8) % 2))
    evidence, excluded = gather_evidence(x)
    exact = x.double().transpose(0, 1).flatten(1).var(1, correction=0)
    assert excluded == 0
    torch.testing.assert_close(evidence.variance, exact, rtol=1e-4, atol=0)


def test_merging_the_oracle():
    oracle = ORACLES["O12_pebay"]
    chunks = [torch.tensor([float(v) for v in oracle[key]]) for key in ("chunkA", "chunkB")]
    a, b = (Moments.from_sample(chunk) for chunk in chunks)
    for moments, key in ((a, "A"), (b, "B"), (a.merge(b), "merged"), (b.merge(a), "merged")):
        assert [float(m) for m in moments] == pytest.approx([float(Fraction(v)) for v in oracle[key]], rel=1e-13)
    k = a.merge(b).k_statistics()
    assert [float(k.k2), float(k.k3), float(k.k4)] == pytest.approx([oracle["k2f"], oracle["k3f"], oracle["k4f"]])


NUMBERS = st.lists(st.floats(-100, 100).filter(lambda v: abs(v) > 1e-6), min_size=1, max_size=8)


def close(one, other, scale):
    for power, (a, b) in enumerate(zip(one, other, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10 * scale ** max(power, 1))


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(NUMBERS, min_size=2, max_size=5))
def test_merging_is_associative_commutative_and_forgets_the_split(parts):
    scale = max(abs(v) for part in parts for v in part)
    moments = [Moments.from_sample(torch.tensor(part, dtype=torch.float64)) for part in parts]
    whole = Moments.from_sample(torch.tensor([v for part in parts for v in part], dtype=torch.float64))
    left, right = moments[0], moments[-1]
    for item in moments[1:]:
        left = left.merge(item)
    for item in reversed(moments[:-1]):
        right = right.merge(item)
    close(left, whole, scale)
    close(right, whole, scale)
    empty = Moments(*(torch.zeros((), dtype=torch.float64) for _ in range(5)))
    close(empty.merge(whole), whole, scale)
    close(whole.merge(empty), whole, scale)
    assert not any(bool(value.isnan()) for value in empty.merge(empty))


def test_k_statistics_need_enough_draws():
    for count, defined in ((1, 1), (2, 2), (3, 3), (4, 4)):
        k = Moments.from_sample(torch.arange(count).double() ** 2).k_statistics()
        assert [not bool(v.isnan()) for v in k] == [order < defined for order in range(4)]
