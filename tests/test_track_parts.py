"""The parts of `Track` by hand: measured correlation, statistics per instance, the learned spread."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from class_runs import CHANNELS, centres, draws, in_runs
from normadapt.policies import Track
from normadapt.layers.policy import Source, units_about
from normadapt.policies.correlation import Correlation
from normadapt.policies.mixed import Found, Scatter, Window, split_instances
from normadapt.policies.spread_learner import LearnedSpread, Limits
from normadapt.profiles.spread import Spread
from normadapt.layers.moments import gather_evidence

CENTRES = centres(torch.float64)
WEIGHT = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)


def levels(labels, seed):
    """Locations (n, C) of unit variance, 0.6 of it between classes."""
    noise = torch.randn(len(labels), CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.6**0.5 * CENTRES[labels] + 0.4**0.5 * noise


def measured(x, n, memory=1000.0):
    """The correlation of a stream (N, C), pooled as `Track` pools it."""
    w = torch.ones(CHANNELS, dtype=torch.float64)
    mean, count, correlation = x[:n].mean(0), float(n), Correlation(torch.zeros_like(w))
    for batch in x[n:].split(n):
        correlation = correlation.update(batch.mean(0) - mean, n, count, float(CHANNELS), w, memory)
        count = min(count, memory - n) + n
        mean = mean + (batch.mean(0) - mean) * n / count
    return correlation


def test_correlation_by_hand():
    weight, one, memory = [2.0, 0.5], 3.0, 50.0
    correlation = Correlation(torch.zeros(2, dtype=torch.float64))
    recent, variance, stretches, excess, seen = [0.0, 0.0], 0.0, 0.0, 0.0, 10.0
    assert correlation.length == 20
    for n, distance in ((4, [0.5, -1.0]), (1, [2.0, 0.1]), (100, [-0.3, 0.4])):
        a = 1 - math.exp(-n / 32)
        recent = [(1 - a) * r + a * d for r, d in zip(recent, distance, strict=True)]
        variance = (1 - a) ** 2 * variance + a**2 / n
        q = sum(w * r * r for w, r in zip(weight, recent, strict=True)) / (one * (variance + 1 / seen))
        k, fade = min(1.0, n / 64), math.exp(-n / memory)
        stretches, excess = fade * stretches + k, fade * excess + k * q
        d, w = torch.tensor(distance, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64)
        correlation = correlation.update(d, n, seen, one, w, memory)
        assert correlation.recent.tolist() == pytest.approx(recent)
        assert correlation[1:] == pytest.approx((variance, stretches, excess))
        assert correlation.length == pytest.approx((20 * 8 + excess) / (8 + stretches))
        seen += n
    assert Correlation(torch.zeros(2), 0.1, 1000.0, 0.0).length == 1


def test_correlation_of_independent_draws_and_of_runs():
    ratios = [(c := measured(levels(draws(4000, s), s), 8)).excess / c.stretches for s in range(8)]
    assert sum(ratios) / 8 == pytest.approx(1, abs=0.2)
    assert 1 <= measured(levels(draws(60_000, 9), 9), 32, memory=1e6).length < 1.4
    # A memory of 1,000 forgets as fast as it learns: 15.6 stretches beside the prior's 8.
    assert measured(levels(draws(4000, 1), 1), 8).length == pytest.approx((160 + 15.6) / 23.6, rel=0.1)
    for seed in range(3):
        x = levels(in_runs(4000, seed), seed)
        lengths = {n: measured(x, n).length for n in (1, 8, 32)}
        assert min(lengths.values()) > 10
        assert max(lengths.values()) < 1.25 * min(lengths.values())
        assert measured(x, 8, memory=1e6).length > 5  # where the prior says nothing any more


def test_an_absurd_batch_counts_thirty_fold_at_most_and_a_jump_keeps_what_is_known():
    w = torch.ones(2, dtype=torch.float64)
    before = Correlation(torch.zeros(2, dtype=torch.float64), 0.02, 3.0, 5.0)
    absurd = before.update(1e12 * w, 8, 100.0, 1.0, w, 1000.0)
    assert absurd.excess == pytest.approx(math.exp(-8 / 1000) * 5 + 30 * 8 / 64)
    after = absurd.interrupted()
    assert (after.stretches, after.excess) == (absurd.stretches, absurd.excess)
    assert not after.recent.any()
    assert after.variance == 0


def source(spread=None, index=0, count=1, eps=1e-3):
    """A site whose units are not those of its statistics."""
    mean = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    variance = torch.tensor([4.0, 0.25, 1.0, 2.0], dtype=torch.float64)
    sums, units = (float(WEIGHT.sum()), float((WEIGHT**2).sum())), units_about(mean, variance, mean, variance, eps)
    share = WEIGHT / WEIGHT.sum()
    return Source("", mean, variance, eps, WEIGHT, share, sums, spread, None, units, None, index, count)


def evidence(location, seed=0, contrast=1.0, positions=25):
    """A batch at standardized locations (n, C) with noise over positions."""
    at = source()
    noise = torch.randn(*location.shape, positions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    root = (at.variance + at.eps).sqrt().view(1, -1, 1)
    return gather_evidence((location.unsqueeze(2) + contrast * noise) * root + at.mean.view(1, -1, 1))[0]


def standardized(batch, at):
    """Locations and variance ratios (n, C) by plain numpy."""
    mean, variance = batch.instances.values.numpy()
    scale = at.variance.numpy() + at.eps
    return (mean - at.mean.numpy()) / np.sqrt(scale), (variance + at.eps) / scale


def known_spread(location, scale=0.5):
    total = torch.tensor([[location], [scale]], dtype=torch.float64).expand(2, 4)
    return Spread.from_unsplit(0.5 * total, 0.5 * total, WEIGHT, torch.tensor([4.0, 4.0], dtype=torch.float64))


def split_stream(x, n, spread, memory=1000.0, use=None):
    """`split_instances` over a stream (N, C) of locations; yields what it gave for every batch."""
    site, count, mean = source(spread), 0.0, torch.zeros(4, dtype=torch.float64)
    scatter = Scatter.empty(site)
    for seed, part in enumerate(x.split(n)):
        batch, kept = evidence(part, seed), min(count, max(memory - n, 0.0))
        window = Window(kept, kept / count if kept else 0.0, mean)
        use_now = torch.stack((mean, torch.zeros_like(mean))) if use is None else use
        scatter, own = split_instances(scatter, window, batch, use_now, spread, site, 1e-3)
        count = kept + n
        mean = mean + (torch.as_tensor(standardized(batch, site)[0]).mean(0) - mean) * n / count
        yield batch, scatter, own


@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("memory", [1000.0, 40.0])
def test_pooled_scatter_is_that_of_all_instances_at_once(n, memory):
    """Whatever the batch size; an instance fades by (memory - n)/memory with each batch once the memory is full."""
    x = 0.4 * torch.randn(96, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    use = torch.tensor([[0.1] * 4, [0.05] * 4], dtype=torch.float64)
    values, weights, count = [], np.zeros(0), 0.0
    for batch, scatter, own in split_stream(x, n, known_spread(1.0, 5.0), memory, use):
        kept = min(count, memory - n)
        weights, count = np.append(weights * (kept / count if count else 0.0), np.ones(n)), kept + n
        location, ratio = standardized(batch, source())
        values.append(np.stack((location, np.log(ratio + (location - 0.1) ** 2) / 2)))
        assert own is None
        assert scatter.excess == (0.0, 0.0)
    every = np.concatenate(values, 1)
    mean = (every * weights[:, None]).sum(1) / weights.sum()
    expected = ((every - mean[:, None]) ** 2 * weights[:, None]).sum(1) @ WEIGHT.numpy()
    assert scatter.squares == pytest.approx(tuple(expected))
    assert scatter.half.numpy() == pytest.approx(mean[1])


@pytest.mark.parametrize("n", [1, 4, 16])
def test_two_domains_are_split_and_each_instance_comes_nearer_to_its_own(n):
    domain = torch.randint(2, (96, 1), generator=torch.Generator().manual_seed(5)) * 2.0 - 1
    truth = (1.2 * domain).double().expand(96, 4)
    x = truth + 0.3 * torch.randn(96, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    site, nearer, last = source(), [], None
    for (_, scatter, own), target in zip(split_stream(x, n, known_spread(0.13)), truth.split(n), strict=True):
        last = own
        if own is None:
            continue
        assert scatter.excess[0] > 0
        location = (own[0] - site.mean) / (site.variance + site.eps).sqrt()
        nearer.append(float((location - target).square().mean()) < 0.4)  # the common location is 1.2 away
    assert last is not None
    assert scatter.excess[0] == pytest.approx(1.44, rel=0.25)
    assert sum(nearer) >= 0.9 * len(nearer)
    assert len(nearer) >= 0.8 * 96 / n


def mean_of(site, location):
    return site.mean.numpy() + np.sqrt(site.variance.numpy() + site.eps) * location


def test_shrinkage_of_an_instance_by_hand():
    site, use = source(), torch.tensor([[0.2] * 4, [0.1] * 4], dtype=torch.float64)
    # The locations' scatter is in excess, the scales' is not.
    batch = evidence(torch.tensor([[2.0], [-2.0], [1.5], [-1.0]], dtype=torch.float64).expand(4, 4))
    location, ratio = standardized(batch, site)
    empty, w = Scatter.empty(site), WEIGHT.numpy()
    window = Window(0.0, 0.0, torch.zeros(4, dtype=torch.float64))
    scatter, own = split_instances(empty, window, batch, use, known_spread(0.25), site, 1e-3)
    a = (((location - location.mean(0)) ** 2).sum(0) @ w / 3 - 0.25 * w.sum()) / w.sum()
    assert scatter.excess == (pytest.approx(a), 0.0)
    scale = site.variance.numpy() + site.eps
    assert own[0].numpy() == pytest.approx(mean_of(site, 0.2 + a / (a + 0.25) * (location - 0.2)))
    assert own[1].numpy() == pytest.approx(np.broadcast_to(scale * np.exp(0.2) - site.eps, (4, 4)))
    # Now the scales' too, about each instance's own location.
    scatter, own = split_instances(empty, window, batch, use, known_spread(0.25, 0.001), site, 1e-3)
    rest = (location - 0.2) * (1 - a / (a + 0.25))
    half = np.log(ratio + rest**2) / 2
    b = (((half - half.mean(0)) ** 2).sum(0) @ w / 3 - 0.001 * w.sum()) / w.sum()
    assert scatter.excess == pytest.approx((a, b))
    assert own[1].numpy() == pytest.approx(scale * np.exp(2 * (0.1 + b / (b + 0.001) * (half - 0.1))) - site.eps)
    # The scales' alone.
    scatter, own = split_instances(empty, window, batch, use, known_spread(9.0, 0.001), site, 1e-3)
    assert scatter.excess[0] == 0 < scatter.excess[1]
    assert own[0].numpy() == pytest.approx(np.broadcast_to(mean_of(site, 0.2), (4, 4)))
    pair = evidence(torch.tensor([[9.0], [-9.0]], dtype=torch.float64).expand(2, 4))
    few = split_instances(empty, window, pair, use, known_spread(0.25), site, 1e-3)
    assert few[1] is None  # two instances say nothing of scatter
    assert few[0].excess == (0.0, 0.0)


@pytest.mark.parametrize("most", [1.0, 0.25])
def test_an_instance_has_at_least_its_share_whatever_explains_the_window(most):
    site, use = source(), torch.tensor([[0.2] * 4, [0.1] * 4], dtype=torch.float64)
    batch = evidence(torch.tensor([[2.0], [-2.0], [1.5], [-1.0]], dtype=torch.float64).expand(4, 4))
    location, ratio = standardized(batch, site)
    window, scale = Window(0.0, 0.0, torch.zeros(4, dtype=torch.float64)), site.variance.numpy() + site.eps
    for spread in (known_spread(9.0, 5.0), known_spread(0.25, 5.0), known_spread(0.1, 0.001)):
        given = Scatter.empty(site), window, batch, use, spread, site, 1e-3, most
        found, _ = split_instances(*given)
        same, own = split_instances(*given, None, 0.7)
        assert same.squares == found.squares
        assert same.excess == found.excess
        assert torch.equal(same.half, found.half)
        natural = spread.total[:, 0].tolist()
        shares = [min(most, max(0.7, a / (a + b))) for a, b in zip(found.excess, natural, strict=True)]
        assert own[0].numpy() == pytest.approx(mean_of(site, 0.2 + shares[0] * (location - 0.2)))
        half = np.log(ratio + ((location - 0.2) * (1 - shares[0])) ** 2) / 2
        variance = scale * np.exp(2 * (0.1 + shares[1] * (half - 0.1))) - site.eps
        assert own[1].numpy() == pytest.approx(variance)
    assert shares == [most, most] if most < 1 else min(shares) > 0.7


def learn(learned, batch, at, window=None, memory=1000.0, **more):
    return learned.learn(batch, window, (batch.variance + at.eps) / (at.variance + at.eps), at, memory, **more)


def test_learned_spread_by_hand():
    at = source(index=0, count=20)
    prior, total_weight = LearnedSpread.empty(at), float(WEIGHT.sum())
    assert prior.spread.total.numpy() == pytest.approx(np.full((2, 4), 0.1))
    assert prior.one == pytest.approx(0.1 * total_weight)
    for k1, k2 in prior.spread.instance:
        assert 2 * k1**2 / k2 == pytest.approx(2)  # degrees of freedom
    x = 0.3 * torch.randn(9, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    batch = evidence(x)
    learned = learn(prior, batch, at)
    location, ratio = standardized(batch, at)
    deviation = location - location.mean(0)
    influence = ((ratio + deviation**2) / (ratio + deviation**2).mean(0) - 1) / 2
    variance = np.stack(((deviation**2).sum(0), (influence**2).sum(0))) / 8
    assert learned.total.numpy() == pytest.approx(variance)
    shrunk = (variance * 8 + 0.1 * 4) / 12  # the prior is worth 4
    within = float(ratio.mean(0) @ WEIGHT.numpy()) / total_weight
    assert (learned.inner, learned.met) == (pytest.approx(within, rel=0.01), 9)
    assert learned.natural == pytest.approx(max(0.0, 1 - within), abs=0.01)
    level = shrunk @ WEIGHT.numpy() / total_weight
    differ = max(0.0, min(0.3, level[0] / (level[0] + learned.inner)) - 0.1)
    most = max(1.0, learned.inner) * (0.1 + max(1.5 * learned.natural, 2 * differ))
    cap = np.minimum(1, most / level)[:, None]
    alike = (float(learned.total[0] @ at.share) * 8 + 0.1 * max(0.02, learned.inner) * 2) / 10
    unseen = max(0.02, min(learned.natural, 4 * alike / (alike + max(0.02, learned.inner))))
    share = np.array([[min(1.0, 0.35 + 1.2 * unseen)], [0.6]])
    assert learned.spread.within.numpy() == pytest.approx((1 - share) * shrunk * cap)
    assert learned.one == pytest.approx(float(shrunk[0] @ WEIGHT.numpy()))
    assert learn(learned, evidence(1e4 * x), at, jumped=True) is learned  # a broken sensor teaches nothing
    far = learn(learned, evidence(20 * x), at, jumped=True).total[0] @ WEIGHT
    # A batch counts 14.5 times what was expected of it at most: 9 instances on 8 degrees of freedom
    bound = float(learned.total[0] @ WEIGHT) + 14.5 * 9 / 8 * float(learned.spread.total[0] @ WEIGHT)
    assert float(far) == pytest.approx(bound / 2)
    alone = learn(prior, evidence(x[:1]), at)  # a single instance says nothing of the scatter, but what it has within
    assert (alone.count, alone.met) == (0, 1)
    assert alone.inner == pytest.approx(float(standardized(evidence(x[:1]), at)[1][0] @ WEIGHT.numpy()) / 5, rel=0.01)


def test_the_learned_spread_is_measured_about_the_window():
    class Before(NamedTuple):
        count: float
        moments: torch.Tensor

    at, x = source(), torch.full((1, 4), 0.2, dtype=torch.float64)
    mean, second = torch.full((4,), 0.5, dtype=torch.float64), torch.full((4,), 1.45, dtype=torch.float64)
    batch = evidence(x)
    learned = learn(LearnedSpread.empty(at), batch, at, Before(8.0, torch.stack((mean, second))))
    location, ratio = standardized(batch, at)
    expected = (location - 0.5) ** 2, (((ratio + (location - 0.5) ** 2) / 1.2 - 1) / 2) ** 2
    assert learned.total.numpy() == pytest.approx(np.concatenate(expected))
    # About the mean of seven others it scatters 8/7 of what it does about the truth; a batch has a mean of its own.
    few = Before(7.0, torch.stack((mean, second)))
    alone = learn(LearnedSpread.empty(at), batch, at, few)
    assert alone.count == 1
    assert alone.total.numpy() == pytest.approx(7 / 8 * np.concatenate(expected))
    pair = evidence(torch.cat((x, -x)))
    theirs = learn(LearnedSpread.empty(at), pair, at)
    assert torch.equal(learn(LearnedSpread.empty(at), pair, at, few).total, theirs.total)
    known = learned._replace(count=8.0)
    assert learn(known, batch, at, Before(8.0, torch.stack((mean, second)))) == known._replace(unseen=1.0)
    assert learn(known, batch, at, Before(8.0, torch.stack((mean, second))), jumped=True).count == 9
    late = learn(known._replace(unseen=31.0), batch, at, Before(8.0, torch.stack((mean, second))))
    assert (late.count, late.unseen) == (9, 0)


@pytest.mark.parametrize("stretches", [0.0, 3.0])
@pytest.mark.parametrize("contrast", [0.95, 0.6])
def test_what_lies_between_classes_is_what_no_instance_has_within_until_it_was_seen(stretches, contrast):
    x = 0.1 * torch.randn(9, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    at = source()
    learned = learn(LearnedSpread.empty(at), evidence(x, contrast=contrast), at, stretches=stretches)
    natural = 1 - learned.inner
    assert natural == pytest.approx(1 - contrast**2 * 24 / 25, abs=0.06)
    # Instances of one class scatter so much; the classes lie apart four times that, in units of their contrast.
    alike = (float(learned.total[0] @ at.share) * 8 + 0.1 * learned.inner * 2) / 10
    unseen = min(natural, 4 * alike / (alike + learned.inner))
    # Where instances differ most, they differ by their class.
    share = np.array([[min(1.0, 0.35 + 1.2 * unseen)], [0.6]])
    own = share * (learned.total.numpy() * 8 + 0.1 * 4) / 12  # not capped: 0.1 is always allowed
    between = np.maximum(own, (own * stretches + 2 * share * unseen) / (stretches + 2))
    assert learned.spread.between.numpy() == pytest.approx(between)
    assert learned.spread.within.numpy() == pytest.approx(own * (1 - share) / share)
    assert (between > 4 * own).any() == (contrast < 0.9 and stretches == 0)


@pytest.mark.parametrize("n", [8, 100])
@pytest.mark.parametrize(("within", "before"), [(0.1, 1.0), (1.0, 0.1), (1.0, 0.15), (1.0, 1.0)])
def test_learned_spread_learns_and_is_capped_by_what_is_natural(n, within, before):
    at = source(index=3, count=20)
    learned = LearnedSpread.empty(at)
    for seed in range(3200 // n):
        g = torch.Generator().manual_seed(seed)
        level = 0.9**0.5 * torch.randn(n, 4, generator=g, dtype=torch.float64)
        contrast = within**0.5 * (0.3 * torch.randn(n, 1, 1, generator=g, dtype=torch.float64)).exp()
        learned = learn(learned, evidence(level, seed, contrast, 400), at, memory=400.0, apart=before)
    ones = learned.one / float(WEIGHT.sum())
    location, _ = (learned.spread.total @ at.share).tolist()
    assert learned.count == 400
    assert ones == pytest.approx(0.95, rel=0.15)  # without a cap
    assert learned.natural == pytest.approx(max(0.0, 1 - within * math.exp(2 * 0.3**2)), abs=0.05)
    if within == 1.0:  # more than v_s in all: a higher gain, and instances of several domains, if inputs are alike
        assert location == pytest.approx(max(1.0, learned.inner) * (0.1 + 2 * (min(before, 0.3) - 0.1)), rel=1e-6)
    else:
        assert location == pytest.approx(ones, rel=0.02)  # and the part between classes that few stretches have shown


def test_signals_with_a_higher_gain_do_not_begin_a_new_window_again_and_again():
    at, policy = source(), Track()
    g = torch.Generator().manual_seed(5)
    x = torch.randn(160, 4, generator=g, dtype=torch.float64)  # scatter 1 about the source, and within them twice v_s
    state, windows = policy.init(at), 0
    for seed, one in enumerate(x.split(1)):
        state, statistics = policy.step(state, evidence(one, seed, 2**0.5), at)
        windows += statistics.diagnostics is not None and statistics.diagnostics.status == "new window"
    assert windows <= 3
    assert state.count > 100
    assert float(state.use[0].abs().max()) < 0.4  # what one of them would move it by is 1


def limited(x, n, contrasts=None, limits=None):
    """Without a profile: what `split_instances` finds in a stream (N, C) of locations."""
    site, count, mean = source(known_spread(0.3, 0.2)), 0.0, torch.zeros(4, dtype=torch.float64)
    scatter, found = Scatter.empty(site), []
    contrasts = torch.ones(len(x)) if contrasts is None else contrasts
    for seed, (part, contrast) in enumerate(zip(x.split(n), contrasts.double().split(n), strict=True)):
        batch = evidence(part, seed, contrast.view(-1, 1, 1))
        window, use = Window(count, 1.0 if count else 0.0, mean), torch.stack((mean, torch.zeros_like(mean)))
        scatter, own = split_instances(scatter, window, batch, use, site.spread, site, 1e-3, 1.0, limits)
        mean = mean + (torch.as_tensor(standardized(batch, site)[0]).mean(0) - mean) * n / (count + n)
        count += n
        found.append((scatter, own))
    return found


LIMITS = Limits(usual=(0.1, 0.05), most=0.4, together=0.06, nearly=1.0)


@pytest.mark.parametrize("n", [1, 16])
def test_scales_that_vary_together_show_a_mixed_stream_and_channels_that_vary_alone_do_not(n):
    g = torch.Generator().manual_seed(3)
    x = 0.5 * torch.randn(192, 4, generator=g, dtype=torch.float64)  # 0.25: above the usual, below the most
    same = limited(x, n, limits=LIMITS)
    assert not any(scatter.mixed or own is not None for scatter, own in same)
    contrasts = torch.where(torch.rand(192, generator=g) < 0.5, 0.4, 1.6)
    split = limited(x, n, contrasts, LIMITS)
    assert split[-1][0].mixed
    assert split[-1][1] is not None
    # Once it is known, both excesses are over the usual: half-log contrasts of +-ln 2 around their mean.
    location, scale = split[-1][0].excess
    assert location == pytest.approx(0.29 - 0.1, abs=0.06)  # 0.25 and what 25 positions leave
    assert scale == pytest.approx(math.log(2) ** 2 - 0.05, rel=0.25)
    assert limited(x, n, contrasts, LIMITS._replace(together=1.0))[-1][1] is None


@pytest.mark.parametrize("n", [1, 8])
def test_what_varies_together_is_pooled_over_batches(n):
    x = 0.2 * torch.randn(48, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    contrasts = 0.5 + torch.rand(48, generator=torch.Generator().manual_seed(5))
    site, halves = source(known_spread(0.3, 0.2)), []
    use = torch.zeros(2, 4, dtype=torch.float64)
    scatter, count = Scatter.empty(site), 0.0
    for seed, (part, contrast) in enumerate(zip(x.split(n), contrasts.double().split(n), strict=True)):
        batch = evidence(part, seed, contrast.view(-1, 1, 1))
        window = Window(count, 1.0 if count else 0.0, torch.zeros(4, dtype=torch.float64))
        scatter, _ = split_instances(
            scatter, window, batch, use, site.spread, site, 1e-3, 1.0, LIMITS._replace(together=9.0)
        )
        location, ratio = standardized(batch, site)
        halves.append(np.log(ratio + location**2) / 2 @ WEIGHT.numpy() / 5)
        count += n
    average = np.concatenate(halves)
    assert scatter.together == pytest.approx(((average - average.mean()) ** 2).sum())


@pytest.mark.parametrize("gain", [1.0, 1.6, 3.0])
def test_a_higher_gain_is_no_mixture(gain):
    g = torch.Generator().manual_seed(3)
    at, x = source(index=3, count=20), gain * 0.4 * torch.randn(256, 4, generator=g, dtype=torch.float64)
    contrast = gain * 0.9 * (0.2 * torch.randn(256, 1, 1, generator=g, dtype=torch.float64)).exp()
    learned = learn(LearnedSpread.empty(at), evidence(x, contrast=contrast), at)
    found = limited(x, 16, contrast.flatten(), learned.limits(1.0))
    assert not any(scatter.mixed or own is not None for scatter, own in found)
    images, signals = learned.limits(0.1), learned.limits(0.3)  # the latter's inputs differ by themselves
    assert images.most == pytest.approx(max(1.0, learned.inner) * (0.3 + 1.5 * learned.natural))
    assert signals.most == pytest.approx(max(1.0, learned.inner) * (0.3 + max(0.4, 1.5 * learned.natural)))
    assert signals.together == pytest.approx(0.09 + max(0.1, 1.5 * learned.natural))
    assert learned.limits(0.9) == signals  # more than that is of the domains
    assert learned.apart(at) == pytest.approx(0.17 / (0.17 + 0.81), abs=0.06)  # whatever the gain


@pytest.mark.parametrize("n", [1, 16])
def test_where_instances_are_alike_a_site_splits_for_itself_before_the_stream_counts_as_mixed(n):
    g = torch.Generator().manual_seed(3)
    x = 0.5 * torch.randn(192, 4, generator=g, dtype=torch.float64)  # 0.25: above 0.3 times the most, below the most
    scatter, own = limited(x, n, limits=LIMITS._replace(nearly=0.3))[-1]
    assert own is not None
    assert scatter.unlike
    assert not scatter.mixed  # so the sites behind are told nothing
    assert scatter.excess[0] == pytest.approx(0.29 - 0.1, abs=0.06)
    scatter, own = limited(0.3 * x, n, limits=LIMITS._replace(nearly=0.3))[-1]
    assert own is None
    assert not scatter.unlike


def test_images_that_hardly_differ_are_alike_and_signals_are_not():
    at = source(index=3, count=20)
    still = LearnedSpread.empty(at)
    assert still._replace(inner=0.95, met=50.0).limits(0.05).nearly == 0.3
    assert still._replace(inner=0.8, met=50.0).limits(0.05).nearly == 1.0
    assert still._replace(inner=0.95, met=50.0).limits(0.15).nearly == 1.0  # their inputs differ by themselves


def test_sites_behind_one_that_found_the_stream_mixed_need_not_find_it_out():
    g = torch.Generator().manual_seed(3)
    site, use = source(known_spread(0.3, 0.2)), torch.zeros(2, 4, dtype=torch.float64)
    batch = evidence(0.5 * torch.randn(64, 4, generator=g, dtype=torch.float64))
    window = Window(0.0, 0.0, use[0])
    for told, expected in ((None, False), (Found(False, 0.3), False), (Found(True, 0.3), True)):
        told_batch = batch._replace(upstream=told)
        scatter, own = split_instances(
            Scatter.empty(site), window, told_batch, use, site.spread, site, 1e-3, 1.0, LIMITS
        )
        assert (own is not None) == expected
        assert not scatter.mixed
