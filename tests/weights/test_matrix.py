"""The matrix weight: against the same formula with full matrices, at its limits, and what it does to shifts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normadapt.layers.reference import Reference
from normadapt.profiles.site_prior import ProfileSettings, Scatter, site_prior
from normadapt.weights.matrix import Reading, SitePrior, WeightSettings, observed_shifts, shares_of, weigh

FLAT = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLAT)


def unit_reference(channels):
    return Reference(torch.zeros(channels, dtype=FLAT), torch.ones(channels, dtype=FLAT))


def made(channels, *, within, between, extra, shifts, classes=None, counts=None, noise=0.0, ranks=(24, 10, 10)):
    """A prior from factors (2C, m) of the covariances and rehearsed shifts (a, 2C)."""
    size = 2 * channels
    classes = torch.zeros(0, size, dtype=FLAT) if classes is None else classes
    counts = torch.zeros(0, dtype=FLAT) if counts is None else counts
    zero = torch.zeros(channels, dtype=FLAT)
    scatter = Scatter(within, between, noise, extra, classes, counts, unit_reference(channels), zero, zero, zero, 0.0)
    return site_prior(scatter, shifts, ProfileSettings(256, 0.01, *ranks))


CHANNELS, CLASSES = 3, 4
FACTORS = {
    "within": 0.2 * randn(6, 40, seed=1),
    "between": 0.3 * randn(6, CLASSES, seed=2),
    "extra": torch.tensor([0.0, 0.05, 0.1, 0.0, 0.02, 0.0], dtype=FLAT),
    "shifts": 0.5 * randn(12, 6, seed=3),
    "classes": 0.6 * randn(CLASSES, 6, seed=4),
    "counts": torch.tensor([10.0, 20.0, 5.0, 5.0], dtype=FLAT),
}


ALIKE = {**FACTORS, "between": torch.zeros(6, 1, dtype=FLAT), "extra": torch.zeros(6, dtype=FLAT)}  # classes


def window(seed, shift=0.5):
    """Mean and mean square (C,) of a window."""
    mean = shift * randn(CHANNELS, seed=10 + seed)
    return mean, mean.square() + (shift * randn(CHANNELS, seed=20 + seed)).exp()


def dense(mean, second, count, prior, reading, no_shift, settings):
    """The formula of `weigh` in words: every hypothesis with full matrices, one after the other."""
    S = FACTORS["shifts"].T @ FACTORS["shifts"] / len(FACTORS["shifts"])
    W = FACTORS["within"] @ FACTORS["within"].T
    B = FACTORS["between"] @ FACTORS["between"].T + torch.diag(FACTORS["extra"])
    unit = torch.diag((W + B).diagonal())
    readings = [(torch.zeros(6, dtype=FLAT), 0.0, 1.0, 1.0)]
    if reading.classes is not None:
        foretold = reading.classes @ FACTORS["classes"]
        readings = [
            (readings[0][0], 0.0, 1.0, 1 - settings.believed),
            (foretold, reading.squares, 0.1, settings.believed),
        ]
    logs, shifts = [], []
    for f, log_f in zip(*shares_of(count, reading.draws, settings), strict=True):
        variance = (second - mean**2) / (1 - (W.diagonal()[:3] / count + B.diagonal()[:3] * f).clamp(max=0.5))
        d = torch.cat((mean, 0.5 * variance.log()))
        for foretold, squares, missed, belief in readings:
            R = W * (1 / count + squares) + B * f * missed + 1e-4 * unit
            for j, (s, A) in enumerate(settings.priors):
                P = s * S + A * torch.eye(6, dtype=FLAT)
                rest = no_shift if j == 0 else (1 - no_shift) / (len(settings.priors) - 1)
                normal = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=FLAT), P + R)
                logs.append(settings.tempering * normal.log_prob(d - foretold) + math.log(belief * rest) + log_f)
                shifts.append(P @ torch.linalg.inv(P + R) @ (d - foretold))
    return torch.softmax(torch.stack(logs), 0) @ torch.stack(shifts)


@pytest.mark.parametrize("count", [1.0, 7.0, 200.0])
@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("shift", [0.05, 0.8])
def test_the_weight_is_that_of_full_matrices(count, told, shift):
    prior, use = made(CHANNELS, **FACTORS), WeightSettings()
    classes = torch.tensor([0.5, -0.2, -0.2, -0.1], dtype=FLAT)
    reading = Reading(0.2, classes, 0.03) if told else Reading(0.2)
    mean, second = window(0, shift)
    found = weigh(mean, second, count, prior, unit_reference(CHANNELS), reading, 0.3, use)
    expected = dense(mean, second, count, prior, reading, 0.3, use)
    torch.testing.assert_close(found.shift, expected, rtol=1e-5, atol=1e-7)


def test_few_leading_directions_are_nearly_as_good_as_all():
    """What stands out is kept exactly; beyond it one variance a coordinate stands for the rest."""
    channels = 40
    loud = randn(2 * channels, 3, seed=5)
    factors = {
        "within": torch.cat((loud, 0.1 * randn(2 * channels, 200, seed=6)), 1),
        "between": torch.cat((randn(2 * channels, 2, seed=7), 0.05 * randn(2 * channels, 5, seed=8)), 1),
        "extra": torch.zeros(2 * channels, dtype=FLAT),
        "shifts": randn(6, 2 * channels, seed=9),
    }
    full, few = made(channels, **factors, ranks=(80, 80, 80)), made(channels, **factors, ranks=(6, 2, 3))
    assert few.basis.shape[1] == 11
    errors = {"full": 0.0, "few": 0.0, "observed": 0.0}
    for seed in range(20):
        truth = factors["shifts"].T @ randn(6, seed=200 + seed) / 6**0.5
        noise = (factors["within"] @ randn(203, seed=300 + seed)) / 30**0.5 + 0.2 * factors["between"] @ randn(
            7, seed=400 + seed
        )
        mean, scale = (truth + noise).view(2, -1)
        for name, prior in (("full", full), ("few", few)):
            found = weigh(
                mean,
                mean**2 + (2 * scale).exp(),
                30.0,
                prior,
                unit_reference(channels),
                Reading(0.04),
                0.3,
                WeightSettings(),
            )
            errors[name] += float((found.shift - truth).square().sum())
        errors["observed"] += float((found.observed - truth).square().sum())
    assert errors["few"] < 1.5 * errors["full"] < 0.5 * errors["observed"]


def scalar(within, between=0.0):
    """One channel, whose location and scale have nothing to do with one another."""
    eye = torch.eye(2, dtype=FLAT)
    none = torch.zeros(2, dtype=FLAT)
    one = torch.tensor([within], dtype=FLAT), torch.tensor([between], dtype=FLAT)
    return SitePrior(
        none + 1, eye, 0 * eye, within * eye, between * eye, eye, none, none, none, *one, torch.zeros(0, 2, dtype=FLAT),
        torch.zeros(0, dtype=FLAT),
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(within=st.floats(0.05, 4), count=st.integers(1, 500), size=st.floats(0.05, 2), mean=st.floats(-2, 2))
def test_one_channel_and_one_hypothesis_give_the_papers_weight(within, count, size, mean):
    """delta^2/(delta^2 + tau^2/n), with 1e-4 of noise that no evidence takes away."""
    m = torch.tensor([mean], dtype=FLAT)
    use = WeightSettings(priors=((0.0, 0.0), (0.0, size)), shares=())
    found = weigh(m, m**2 + 1, float(count), scalar(within), unit_reference(1), Reading(1.0), 1e-300, use)
    assert float(found.shift[0]) == pytest.approx(size / (size + within / count + 1e-4) * mean, rel=1e-9, abs=1e-12)


def test_with_ever_more_instances_the_observed_shift_is_believed():
    prior, (mean, second) = made(CHANNELS, **ALIKE), window(1)
    distances = []
    for count in (1.0, 100.0, 1e4, 1e7):
        found = weigh(mean, second, count, prior, unit_reference(CHANNELS), Reading(1 / count), 0.3, WeightSettings())
        truth = torch.cat((mean, 0.5 * (second - mean**2).log()))
        distances.append(float((found.shift - truth).norm() / truth.norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.01


def drawn(covariance, count, seed):
    """A window's moments whose observed shift has this covariance (2C, 2C) and nothing else."""
    d = torch.linalg.cholesky(covariance) @ randn(6, seed=seed)
    return d[:3], d[:3] ** 2 + (2 * d[3:]).exp()


def test_noise_is_hardly_followed():
    prior, count = made(CHANNELS, **FACTORS), 10.0
    W = FACTORS["within"] @ FACTORS["within"].T
    B = FACTORS["between"] @ FACTORS["between"].T + torch.diag(FACTORS["extra"])
    followed = observed = 0.0
    for seed in range(40):
        mean, second = drawn(W / count + 0.1 * B, count, 100 + seed)
        found = weigh(mean, second, count, prior, unit_reference(CHANNELS), Reading(0.1), 0.3, WeightSettings())
        followed, observed = (
            followed + float(found.shift.square().sum()),
            observed + float(found.observed.square().sum()),
        )
    assert followed < 0.15 * observed


def one_direction():
    """Classes lie apart along one direction of four coordinates alone; instances scatter little."""
    b = torch.tensor([[0.7], [0.7], [0.0], [0.0]], dtype=FLAT)
    return b[:, 0] / b.norm(), {
        "within": 0.05 * torch.eye(4, dtype=FLAT),
        "between": b,
        "extra": torch.zeros(4, dtype=FLAT),
        "shifts": torch.zeros(0, 4, dtype=FLAT),
    }


def test_a_run_of_one_class_is_no_shift_and_what_lies_across_is_followed():
    b, factors = one_direction()
    prior = made(2, **factors)
    across = torch.tensor([0.7, -0.7], dtype=FLAT) / 0.98**0.5
    mean = b[:2] + across
    found = weigh(mean, mean**2 + 1, 30.0, prior, unit_reference(2), Reading(1.0), 0.3, WeightSettings()).shift
    assert abs(float(found[:2] @ b[:2])) < 0.4
    assert float(found[:2] @ across) > 0.9
    # The same window, each of whose instances is of a class drawn anew, has shifted along b as well.
    found = weigh(mean, mean**2 + 1, 30.0, prior, unit_reference(2), Reading(1 / 30), 0.3, WeightSettings()).shift
    assert float(found[:2] @ b[:2]) > 0.8


def test_what_the_predicted_classes_foretell_is_no_shift():
    b, factors = one_direction()
    classes = torch.stack((b, -b)) * 0.98**0.5
    prior = made(2, **factors, classes=classes, counts=torch.tensor([50.0, 50.0], dtype=FLAT))
    mean = 0.8 * classes[0, :2]
    shifts = {}
    for name, told in {"nothing": None, "that class": [0.4, -0.4], "the other": [-0.4, 0.4]}.items():
        reading = Reading(1 / 50, None if told is None else torch.tensor(told, dtype=FLAT), 0.02)
        found = weigh(mean, mean**2 + 1, 50.0, prior, unit_reference(2), reading, 0.3, WeightSettings())
        shifts[name] = float(found.shift[:2] @ b[:2])
    assert abs(shifts["that class"]) < 0.35 * shifts["nothing"]
    assert shifts["the other"] > 0.9 * shifts["nothing"]  # the likelihood decides, not the prediction


def test_certain_of_no_shift_little_evidence_moves_nothing_and_much_does():
    prior, (mean, second) = made(CHANNELS, **ALIKE), window(2, 0.2)
    sure = WeightSettings().source_is_source
    little, much = (
        weigh(mean, second, n, prior, unit_reference(CHANNELS), Reading(1 / n), sure, WeightSettings())
        for n in (2.0, 4e4)
    )
    assert float(little.no_shift) > 0.99
    assert float(little.shift.norm()) < 0.01 * float(little.observed.norm())
    assert float(much.no_shift) < 0.01


EVIL = [math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-300, 0.0]


@pytest.mark.parametrize("mean", EVIL)
@pytest.mark.parametrize("second", EVIL)
def test_whatever_the_evidence_the_shift_is_a_number(mean, second):
    m, q = window(3)
    m[1], q[2], q[0] = mean, second, second
    reading = Reading(0.1, torch.tensor([0.5, -0.2, -0.2, -0.1], dtype=FLAT), 0.03)
    prior = made(CHANNELS, **FACTORS)
    for count in (1.0, 1e6):
        found = weigh(m, q, count, prior, unit_reference(CHANNELS), reading, 0.3, WeightSettings())
        assert all(bool(part.isfinite().all()) for part in found)
        assert 0 <= float(found.no_shift) <= 1
    for part in Reference(m.nan_to_num(), torch.ones(3, dtype=FLAT)).shift_of(m.nan_to_num(), q.nan_to_num()):
        assert math.isfinite(float(part))


def test_what_means_of_few_instances_scatter_is_not_taken_for_the_classes():
    within, between = FACTORS["within"], FACTORS["between"]
    prior = made(
        CHANNELS, within=within, between=between, extra=0 * FACTORS["extra"], shifts=FACTORS["shifts"], noise=0.1
    )
    factor = prior.basis * prior.unit.unsqueeze(1)
    values, vectors = torch.linalg.eigh(
        (between @ between.T - 0.1 * within @ within.T) / torch.outer(prior.unit, prior.unit)
    )
    expected = (vectors * values.clamp_min(0)) @ vectors.T * torch.outer(prior.unit, prior.unit)
    torch.testing.assert_close(factor @ prior.between @ factor.T, expected, rtol=1e-6, atol=1e-8)


def test_the_mean_square_of_a_mean_is_added_back():
    """Windows of N draws of a class mean: their observed scale is on average that of all."""
    g = torch.Generator().manual_seed(0)
    prior = scalar(0.1, 0.3)
    scales = []
    for _ in range(3000):
        level = 0.3**0.5 * torch.randn(1, generator=g, dtype=FLAT)  # one class in a window of 8
        x = level + 0.1**0.5 * torch.randn(8, generator=g, dtype=FLAT)
        q = (x.square() + 0.6).mean()
        found = observed_shifts(x.mean()[None], q[None], 8.0, torch.ones(1, dtype=FLAT), prior, unit_reference(1))
        scales.append((2 * found[0, 1]).exp())
    assert float(torch.stack(scales).mean()) == pytest.approx(1.0, abs=0.02)
