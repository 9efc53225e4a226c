"""What blended weights are best for: the output, the tail, and a robust location."""

import pytest
import torch

import normadapt as na
from models import CASES, NET
from normadapt.asymptotics import m_estimation
from normadapt.asymptotics.safety import tail_safe
from normadapt.layers.moments import gather_evidence
from normadapt.layers.policy import standardize
from normadapt.weights.criteria import for_output, for_tail
from normadapt.weights.robust import with_huber_location


def batch(values):
    evidence, _ = gather_evidence(values)
    return evidence


def source_of(channels):
    adapted = na.adapt(torch.nn.BatchNorm1d(channels).double().eval())
    return adapted._hooks[0].source


def skewed(n, channels, sign, seed=0):
    """Instances (n, C) with mean 1, variance 1 and skewness 2 * sign."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(n, channels, dtype=torch.float64).exponential_(generator=generator)
    return 1 + sign * (draws - 1)


@pytest.mark.parametrize("sign", [-1, 1])
def test_output_weights_move_with_the_skewness_as_the_formula_says(sign):
    n, channels = 64, 400
    source = source_of(channels)  # mean 0, variance 1: the shift is +1, so a = m_s - m* = -1
    x = skewed(n, channels, sign)
    evidence = batch(x)
    observed = standardize(evidence.both, source.units)
    shift = torch.stack((observed[0], (observed[1] + 1 / n).log() / 2))
    noise = torch.full_like(shift, 1 / n)
    weights = torch.full_like(shift, 0.98)
    moved = for_output(weights, shift, noise, evidence, source.units)
    assert torch.equal(moved[1], weights[1])
    # a = -1, rho = 1, g = 2 sign, n = 64: (a^2 + a g/n)/(a^2 + (1 + 2 a g)/n) against a^2/(a^2 + 1/n)
    a, g = -1.0, 2.0 * sign
    expected = (a * a + a * g / n) / (a * a + (1 + 2 * a * g) / n) - a * a / (a * a + 1 / n)
    assert float((moved[0] - weights[0]).mean()) == pytest.approx(max(min(expected, 0.02), -0.98), abs=0.008)
    assert float((moved[0] - weights[0]).mean()) * expected > 0


def test_output_weights_are_the_mse_ones_without_skewness_or_with_few_instances():
    source = source_of(3)
    x = torch.cat((torch.randn(20, 3, dtype=torch.float64),) * 1)
    x = torch.cat((x, 2 * x.mean(0) - x))  # symmetric about its mean: no third moment
    evidence = batch(x + 1)
    shift = torch.stack((evidence.mean, torch.zeros(3, dtype=torch.float64)))
    weights, noise = torch.full_like(shift, 0.9), torch.full_like(shift, 0.02)
    torch.testing.assert_close(for_output(weights, shift, noise, evidence, source.units), weights)
    few = batch(skewed(7, 3, 1))
    assert for_output(weights, shift, noise, few, source.units) is weights


def test_tail_weights_are_the_smaller_of_mse_and_safe():
    source = source_of(4)
    evidence = batch(torch.randn(6, 4, dtype=torch.float64))
    shift = torch.tensor([[0.0, 0.1, 1.0, 3.0], [0.0, 0.0, 0.5, 1.0]], dtype=torch.float64)
    noise, weights = torch.full_like(shift, 1 / 6), torch.full_like(shift, 0.8)
    lowered = for_tail(weights, shift, noise, evidence, source.units, 0.1, 0.05)
    safe = tail_safe(0.8**0.5 * shift.abs(), noise, 0.1, 0.05, count=6.0)
    torch.testing.assert_close(lowered, torch.minimum(weights, safe))
    assert float(lowered[0, 0]) < 0.2 < float(lowered[0, 3])  # no shift to gain: careful; a large one: not
    free = for_tail(weights, shift, noise, evidence, source.units, 10.0, 0.05)
    torch.testing.assert_close(free, weights)


@pytest.mark.parametrize("criterion", ["output", "tail"])
@pytest.mark.parametrize("pooling", ["channel", "layer", "model"])
@pytest.mark.parametrize("profiled", [False, True])
def test_every_criterion_adapts_and_keeps_its_weights_in_bounds(criterion, pooling, profiled):
    model = NET.model()
    profile = NET.profile() if profiled else None
    adapted = na.adapt(model, profile, na.Blend(criterion=criterion, pooling=pooling))
    with torch.no_grad():
        for n in (1, 3, 16, 64):
            assert bool(adapted(NET.target(n)).isfinite().all())
            for site in adapted.report().sites:
                assert 0 <= site.mean_weight <= 1
                assert 0 <= site.variance_weight <= 1
    assert adapted.report().sites[0].mean_weight > 0.5


def test_a_smaller_tolerance_never_gives_a_larger_weight():
    weights = []
    for tolerance in (0.01, 0.1, 1.0):
        adapted = NET.adapted(na.Blend(criterion="tail", tolerance=tolerance))
        adapted(NET.target(3))
        weights.append(adapted.report().sites[0].mean_weight)
    assert weights == sorted(weights)
    assert weights[0] < weights[-1]


def test_an_outlier_hardly_moves_a_robust_location():
    case = CASES["1d"]
    x = case.target(16)
    spoiled = x.clone()
    spoiled[0] += 300
    answers = {}
    for name, p in (("robust", na.Blend(location="huber")), ("mean", na.Blend())):
        adapted, clean = case.adapted(p), case.adapted(p)
        adapted(spoiled), clean(x)
        difference = adapted.state_dict()["1.running_mean"] - clean.state_dict()["1.running_mean"]
        answers[name] = float(difference.abs().max())
    assert answers["robust"] < 0.2 * answers["mean"]


def test_the_robust_location_is_hubers_step_from_the_median():
    x = skewed(40, 3, 1) * torch.tensor([1.0, 10.0, 0.1]) + 5
    x[0] += 100
    found = with_huber_location(batch(x))
    median = x.median(0).values
    unit = 1.4826 * (x - median).abs().median(0).values
    sample = (x - median) / unit
    psi = m_estimation.Huber(1.345)
    step = m_estimation.one_step(psi, sample, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found.mean, median + unit * (step - m_estimation.bias(psi, sample) / 40))
    torch.testing.assert_close(found.variance, batch(x).variance)
    few = batch(x[:4])
    assert with_huber_location(few) is few
    constant = batch(torch.ones(9, 2))
    torch.testing.assert_close(with_huber_location(constant).mean, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"criterion": "best"}, "criterion must be one of 'mse', 'output', 'tail'; got 'best'"),
        ({"tolerance": -1.0}, "tolerance must be at least 0"),
        ({"probability": 0.0}, "probability must lie between 0 and 1"),
        ({"location": "median"}, "location must be one of 'mean', 'huber'; got 'median'"),
    ],
)
def test_arguments_are_checked(arguments, said):
    with pytest.raises(ValueError, match=said):
        na.Blend(**arguments)
