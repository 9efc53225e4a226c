"""How large a shift is believed to be: by a fine integral, at its limits, and handed from site to site."""

import math

import numpy as np
import pytest
import torch

from normadapt.policies import Track
from normadapt.layers.policy import Source, units_about
from normadapt.policies.belief import UNTOLD, believe
from normadapt.policies.correlation import Correlation
from normadapt.policies.mixed import Found, Window
from normadapt.layers.predictions import argmax_frequencies
from normadapt.profiles.spread import Spread
from normadapt.layers.moments import Composition, gather_evidence

SUM = 5.0
NOISE = ((0.4, 0.06), (0.3, 0.05))  # k1, k2 of locations and of scales


def integral(q, k1, k2, low, high):
    """Expected weight and likelihood of Q with A log-uniform on [low, high], at 20,000 points."""
    a = np.exp((np.arange(20_000) + 0.5) / 20_000 * math.log(high / low)) * low * SUM
    mean, variance = k1 + a, k2 * (1 + 2 * a / k1)
    shape, scale = mean**2 / variance, variance / mean
    log = (shape - 1) * math.log(q) - q / scale - shape * np.log(scale) - np.array([math.lgamma(s) for s in shape])
    density = np.exp(log)
    return float((density * a / mean).sum() / density.sum()), float(density.mean())


@pytest.mark.parametrize("squared", [(0.2, 0.15), (0.4, 0.3), (1.0, 0.3), (3.0, 1.0), (12.0, 5.0)])
def test_the_expected_weight_is_that_of_a_fine_integral(squared):
    rows = [
        [integral(q, *k, *limits) for limits in ((0.002, 0.03), (0.03, 3.0))]
        for q, k in zip(squared, NOISE, strict=True)
    ]
    told = sum(math.log((1 + real[1] / trivial[1]) / 2) for trivial, real in rows) / 2
    odds = max(-6.0, min(6.0, 0.5 + max(-4.0, min(4.0, told))))
    believed = believe(squared, NOISE, SUM, 0.5)
    assert believed.odds == pytest.approx(odds, abs=0.1)
    for a, (k1, _), (trivial, real) in zip(believed.shift, NOISE, rows, strict=True):
        p = real[1] / (real[1] + trivial[1]) / (1 + math.exp(-odds))
        assert a / (a + k1 / SUM) == pytest.approx(p * real[0] + (1 - p) * trivial[0], abs=0.02)


def test_noise_is_no_shift_and_a_long_way_is_one():
    small, odds = believe((0.4, 0.3), NOISE, SUM, UNTOLD)
    assert odds < UNTOLD
    assert all(a / (a + k1 / SUM) < 0.35 for a, (k1, _) in zip(small, NOISE, strict=True))
    large = believe((40.0, 10.0), NOISE, SUM, UNTOLD)
    assert large.odds == pytest.approx(UNTOLD + 4)  # no site tells more
    assert large.shift[0] / (large.shift[0] + 0.4 / SUM) > 0.97
    assert believe((40.0, 10.0), NOISE, SUM, large.odds).odds == 6  # and no stream is surer
    far = believe((1e9, 1e9), NOISE, SUM, UNTOLD)
    assert 0.99 < far.shift[0] / (far.shift[0] + 0.4 / SUM) < 1  # doubt is left, and is worth less than a per cent
    shifts = [believe((q, 0.3), NOISE, SUM, 0.0).shift[0] for q in (0.1, 0.5, 1.0, 2.0, 5.0, 20.0, 100.0)]
    assert shifts == sorted(shifts)


def test_odds_of_the_sites_before_decide_where_this_one_cannot():
    shifts = [believe((1.0, 0.5), NOISE, SUM, odds).shift for odds in (-6.0, 0.0, 6.0)]
    assert shifts[0][0] < shifts[1][0] < shifts[2][0]
    assert shifts[2][0] > 3 * shifts[0][0]


def test_limits_of_the_numbers():
    assert believe((0.0, 0.0), NOISE, SUM, 1.5) == ((0.0, 0.0), 1.5)
    exact = believe((2.0, 0.0), ((0.0, 0.0), (0.0, 0.0)), SUM, 0.5)  # no noise: what is seen is the shift
    assert exact == ((2.0 / SUM, 0.0), 0.5)
    for squared in ((1e-300, 1e-300), (1e60, 1e60)):
        believed = believe(squared, ((0.4, 0.0), (0.3, 1e-30)), SUM, 0.0)
        assert all(math.isfinite(number) and number >= 0 for number in believed.shift)


def site(index, *, profiled=True):
    """A site of four channels in the units of its statistics, with a profile or without."""
    ones, zeros = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    spread = Spread.from_unsplit(
        torch.full((2, 4), 0.2, dtype=torch.float64),
        torch.full((2, 4), 0.1, dtype=torch.float64),
        ones,
        torch.full((2,), 2.0, dtype=torch.float64),
    )
    units = units_about(zeros, ones, zeros, ones, 0.0)
    known = spread if profiled else None
    return Source(f"s{index}", zeros, ones, 0.0, ones, ones / 4, (4.0, 4.0), known, None, units, None, index, 2)


def batch(shift, upstream=None, n=32):
    """Instances at `shift`, scattered as the source's."""
    g = torch.Generator().manual_seed(0)
    x = shift + 0.3**0.5 * torch.randn(n, 4, 1, generator=g, dtype=torch.float64)
    x = x + torch.randn(n, 4, 49, generator=g, dtype=torch.float64)
    return gather_evidence(x)[0]._replace(upstream=upstream)


def test_track_hands_the_odds_on_and_follows_a_doubtful_shift_only_behind_a_clear_one():
    policy = Track(significance=0.5)
    outcomes = {}
    for name, shift in (("clear", 2.0), ("none", 0.0)):
        first, second = site(0), site(1)
        state, statistics = policy.step(policy.init(first), batch(shift), first)
        assert statistics.carry.odds == state.odds
        outcomes[name] = policy.step(policy.init(second), batch(0.9, statistics.carry), second)
    assert outcomes["clear"][0].odds > outcomes["none"][0].odds
    clear, none = (float(outcomes[name][1].mean.mean()) for name in ("clear", "none"))
    assert clear > 1.1 * none > 0
    # What a site told stays its own while its weights are not computed again.
    one = site(0)
    state, _ = policy.step(policy.init(one), batch(2.0), one)
    again, statistics = policy.step(state, batch(2.0, n=1), one)
    assert again.pending == 1
    assert statistics.carry.odds == again.odds == state.odds


def test_without_anything_before_it_a_site_begins_untold():
    assert Found() == Found(False, 1.0, UNTOLD)
    one = site(0)
    assert Track().init(one).odds == UNTOLD


def between(felt_length, frequencies, n=32, count=32.0, felt_weighs=0.5):
    """f_B with a correlation of that length and weight and those predicted class frequencies in window and batch."""
    frequencies = torch.tensor(frequencies, dtype=torch.float64)
    composition = Composition().update(torch.eye(4)[frequencies.argmax().reshape(1)])
    composition = composition._replace(last=frequencies, last_count=float(n), correlation=0.0)
    classes, imbalance = composition.pooled(frequencies, count)
    correlation = Correlation(torch.zeros(4), 0.0, 1e12, felt_length * 1e12)
    window = Window(count, 1.0, torch.zeros(4, dtype=torch.float64))
    return Track()._between_classes(composition, classes, imbalance, correlation, window, n, felt_weighs)


def test_the_bound_is_the_geometric_mean_where_the_predicted_classes_are_balanced():
    said = 0.5**2 / 32  # a balanced window; the batch's own part
    assert between(16.0, [0.25] * 4) == pytest.approx(math.sqrt(16 / 64 * max(said, 1 / 64)))
    assert between(16.0, [1.0, 0.0, 0.0, 0.0]) == pytest.approx(16 / 64)
    assert between(1.0, [1.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 64)  # never above what is felt


def test_a_correlation_that_is_mostly_its_prior_counts_less_beside_predicted_classes():
    balanced = [0.25] * 4
    felt, said = 16 / 64, 1 / 64
    assert between(16.0, balanced, felt_weighs=0.125) == pytest.approx(felt**0.125 * said**0.875)
    # Predicted classes that are no more balanced than it says change nothing.
    assert between(16.0, [1.0, 0.0, 0.0, 0.0], felt_weighs=0.125) == pytest.approx(felt)
    measured = [Correlation(torch.zeros(4), 0.0, stretches).is_measured for stretches in (0.0, 7.9, 8.0, 12.0)]
    assert measured == [False, False, True, True]


@pytest.mark.parametrize("profiled", [False, True])
def test_only_without_a_profile_does_the_prior_count_less(profiled):
    asked = []

    class Asked(Track):
        def _between_classes(self, *arguments):
            asked.append(arguments[-1])
            return super()._between_classes(*arguments)

    one, policy = site(0, profiled=profiled), Asked()
    state = policy.init(one)
    for _ in range(40):
        state, _ = policy.step(state, batch(0.0, n=32), one)
    assert asked == sorted(asked)
    assert (asked[0], asked[-1]) == ((0.5, 0.5) if profiled else (0.125, 0.5))


def test_rows_that_prefer_nothing_are_no_predictions():
    scores = torch.rand(8, 360, generator=torch.Generator().manual_seed(0))  # sigmoids, taken for logits
    frequencies, count = argmax_frequencies(scores.softmax(1))
    assert count == 0
    assert not frequencies.any()
    assert Composition().update(scores.softmax(1)).last is None
    frequencies, count = argmax_frequencies(torch.tensor([[0.5, 0.5], [0.8, 0.2], [float("nan"), 0.0], [0.0, 1.0]]))
    assert (frequencies.tolist(), count) == ([0.5, 0.5], 2)
