"""How sure a report is: intervals of weights and the parts of the risk."""

import math

import pytest
import torch
from torch import nn

import normadapt as na
from models import NET
from normadapt.asymptotics import edgeworth
from normadapt.asymptotics.cumulants import Moments
from normadapt.layers.policy import Diagnostics
from normadapt.reports.confidence import risk_parts, weight_interval

CHANNELS = 3


def source():
    layer = nn.BatchNorm1d(CHANNELS).double().eval()
    layer.weight.data = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    return na.adapt(layer)._hooks[0].source


def told(**changes):
    """Diagnostics of 30 instances whose projections are exponential: skewed."""
    generator = torch.Generator().manual_seed(0)
    projections = torch.empty(2, 30, dtype=torch.float64).exponential_(generator=generator)
    total = 1 + 4 + 0.25
    noise = torch.full((2, CHANNELS), 0.03, dtype=torch.float64)
    squared, expected = (3.0, 0.4), (0.03 * total, 0.03 * total)
    prior = [(s - e) / total for s, e in zip(squared, expected, strict=True)]
    weight = torch.stack([torch.full((CHANNELS,), p / (p + 0.03), dtype=torch.float64) for p in prior])
    values = Diagnostics(
        30.0,
        tuple(s - e for s, e in zip(squared, expected, strict=True)),
        squared,
        tuple((e, 0.01) for e in expected),
        weight,
        "tracking",
        noise,
        projections,
    )
    return values._replace(**changes)


def test_the_interval_is_that_of_the_studentized_length_of_the_shift():
    found = weight_interval(told(), 0, source())
    k = Moments.from_sample(told().projections[0]).k_statistics()
    cumulants = edgeworth.studentized(edgeworth.Group(1.0, 30.0, k.k2, k.k3, k.k4), finite_sample=True)
    quantiles = edgeworth.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), cumulants)
    ends = sorted((math.sqrt(3.0) - quantiles * math.sqrt(float(k.k2) / 30)).tolist())
    expected = []
    for end in ends:
        prior = max(max(end, 0) ** 2 - 0.03 * 5.25, 0) / 5.25
        expected.append(prior / (prior + 0.03))
    assert found == pytest.approx(expected, rel=1e-9)
    assert found.low < float(told().weight[0, 0]) < found.high


def test_skewness_makes_the_interval_lopsided():
    mirrored = told(projections=-told().projections)
    one, other = weight_interval(told(), 0, source()), weight_interval(mirrored, 0, source())
    assert one.low != pytest.approx(other.low, abs=0.005)


def test_no_interval_from_too_little():
    assert weight_interval(told(projections=None), 0, source()) is None
    assert weight_interval(told(projections=told().projections[:, :7]), 0, source()) is None
    assert weight_interval(told(effective_count=1.5), 0, source()) is None
    assert weight_interval(told(projections=torch.ones(2, 30, dtype=torch.float64)), 0, source()) is None


def test_a_weight_held_at_the_source_is_in_its_interval():
    found = weight_interval(told(weight=(0.0, 0.0)), 0, source())
    assert found.low == 0.0
    assert found.high > 0.9


def test_the_parts_of_the_risk_by_hand():
    found, w = risk_parts(told(), source()), torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64)
    bias = variance = skewness = 0.0
    for row in (0, 1):
        weight, excess = told().weight[row], told().shift[row]
        bias += float(((1 - weight) ** 2 * w).sum() * excess / 5.25)
        variance += float((weight**2 * w).sum() * 0.03)
        k3 = float(Moments.from_sample(told().projections[row]).k_statistics().k3)
        skewness -= 2 * float(weight[0]) ** 2 * k3 / (math.sqrt(excess) * 30**2)
    assert found == pytest.approx((bias / CHANNELS, variance / CHANNELS, skewness / CHANNELS), rel=1e-9)


def test_the_source_kept_risks_the_shift_and_no_variance():
    found = risk_parts(told(weight=(0.0, 0.0), noise=None), source())
    assert found.bias_squared == pytest.approx(sum(told().shift) / CHANNELS)
    assert found.variance == found.skewness == 0.0


@pytest.mark.parametrize("policy", [na.Domains(), na.Blend(), na.Blend(criterion="output"), na.Blend(criterion="tail")])
@pytest.mark.parametrize("n", [1, 16])
def test_reports_hold_intervals_about_their_weights(policy, n):
    model = NET.model()
    adapted = na.adapt(model, NET.profile(), policy)
    with torch.no_grad():
        for i in range(64 // n):
            adapted(NET.target(n, seed=i))
    report = adapted.report()
    plain = report.to_dict()
    for site, values in zip(report.sites, plain["sites"], strict=True):
        assert site.risk.bias_squared >= 0
        assert site.risk.variance >= 0
        assert values["risk"] == site.risk._asdict()
        assert (site.shift_interval is None) == isinstance(policy, na.Blend)
        if site.shift_interval is not None:
            assert 0 <= site.shift_interval.low <= site.shift_interval.high
            assert site.shift <= site.shift_interval.high
            assert values["shift_interval"] == site.shift_interval._asdict()
        if n == 1 or isinstance(policy, na.Domains):  # one batch of one, and no projections of the window, tell none
            assert site.mean_weight_interval is None
            continue
        for weight, interval in (
            (site.mean_weight, site.mean_weight_interval),
            (site.variance_weight, site.variance_weight_interval),
        ):
            assert 0 <= interval.low <= weight + 1e-12
            assert weight <= interval.high + 1e-12 <= 1 + 1e-9
    assert type(report).from_dict(plain) == report
    last = report.sites[-1]
    told = last.mean_weight_interval is not None or last.shift_interval is not None
    assert ("(" in str(report).splitlines()[-1]) == told


def test_the_interval_covers_the_weight_of_the_true_shift():
    """Skewed instances, a true shift of 0.5: the weight that the truth would give lies inside about 95 times in 100."""
    layer = nn.BatchNorm1d(8).double().eval()
    generator = torch.Generator().manual_seed(0)

    def draws(n, shift=0.0):
        return torch.empty(n, 8, dtype=torch.float64).exponential_(generator=generator) - 1 + shift

    profile = na.profile_source(layer, [draws(4000)], rehearsals={})
    inside, runs, n = 0, 200, 40
    for _ in range(runs):
        adapted = na.adapt(layer, profile, na.Blend(), predictions=lambda output: torch.full((len(output), 2), 0.5))
        adapted(draws(n, 0.5))
        low, high = adapted.report().sites[0].mean_weight_interval
        inside += low <= 0.25 / (0.25 + 1 / n) <= high
    assert inside / runs > 0.88
