"""`Track` on whole streams: runs of one class, mixed domains, predictions that say nothing, restarts, long runs."""

import io
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

import normadapt as na
from class_runs import CHANNELS, CLASSES, centres, draws, in_runs
from models import CASES, calibrate, same
from normadapt.baselines import BatchStatistics
from normadapt.bench.ablations import NoCorrelation
from normadapt.policies import track
from normadapt.layers.policy import are_below
from normadapt.policies.spread_learner import shrink_to_prior
from normadapt.layers.moments import gather_evidence

CENTRES = centres(torch.float32)
LAYERS_ALONE = na.Track(compares=False)  # this model answers as well where instances are not split


def photos(labels, seed, shift=0.0):
    """Images (n, C, 3, 3) whose levels scatter 0.25, 60 % of it between classes, under unit noise."""
    g = torch.Generator().manual_seed(seed)
    level = 0.6**0.5 * CENTRES[labels] + 0.4**0.5 * torch.randn(len(labels), CHANNELS, generator=g)
    return 0.5 * level[:, :, None, None] + torch.randn(len(labels), CHANNELS, 3, 3, generator=g) + shift


@cache
def trained():
    """A model of two norms that tells most of the classes, and its profile."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(CHANNELS),
        nn.Conv2d(CHANNELS, 12, 1),
        nn.BatchNorm2d(12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    ).requires_grad_(False)
    labels = draws(4000, 1)
    x = photos(labels, 1)
    calibrate(model, lambda: model(x))
    features = torch.cat((model[:-1](x), torch.ones(len(x), 1)), 1)
    fitted = torch.linalg.lstsq(features, one_hot(labels, CLASSES).float()).solution * 10
    model[-1].weight.copy_(fitted[:-1].T)
    model[-1].bias.copy_(fitted[-1])
    assert float((model(x).argmax(1) == labels).float().mean()) > 0.5
    return model, na.profile_source(model, [photos(draws(1000, 2), 2)])


def adapted_to(x, n, *, profiled, policy=None, **more):
    """The adapted model after a stream, and the location (C,) in its first norm after every batch."""
    model, profile = trained()
    adapted, used = na.adapt(model, profile if profiled else None, policy, **more), []
    for batch in x.split(n):
        adapted(batch)
        used.append(adapted.state_dict()["0.running_mean"].clone())
    return adapted, torch.stack(used)


def mixed(n, seed=7, apart=0.8):
    """Images of two domains in any order."""
    domain = torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return photos(draws(n, seed), seed, apart * domain.view(-1, 1, 1, 1))


def always_the_first(output):
    return one_hot(torch.zeros(len(output), dtype=torch.long), CLASSES).float()


@pytest.mark.parametrize("shift", [0.25, 0.6])
def test_a_model_that_predicts_one_class_for_everything_still_adapts(shift):
    x = photos(draws(400, 5), 5, shift)
    reached = adapted_to(x, 8, profiled=True, predictions=always_the_first)[1][-1].mean()
    assert float(reached) == pytest.approx(shift, abs=0.25 * shift)
    # The measured correlation does it: predictions alone would keep the source's statistics for ever.
    held = adapted_to(x, 8, profiled=True, policy=NoCorrelation(), predictions=always_the_first)[1][-1].mean()
    assert abs(float(held)) < 0.1 * shift


@pytest.mark.parametrize("profiled", [False, True])
def test_clean_runs_of_one_class_keep_the_statistics_near_the_source(profiled):
    centre = trained()[0][0].running_mean
    ours, theirs = [], []
    for seed in (3, 4):
        x = photos(in_runs(800, seed), seed)
        theirs.append((adapted_to(x, 8, profiled=profiled, policy=BatchStatistics())[1] - centre).square().mean())
        ours.append((adapted_to(x, 8, profiled=profiled)[1] - centre).square().mean())
        alone = adapted_to(x[:200], 1, profiled=profiled)[1]
        ours.append((alone - centre).square().mean())
    assert max(ours) < 0.15 * min(theirs)


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_a_mixed_stream_is_normalized_one_by_one(n, profiled):
    # Without a profile it takes more to know that a stream is mixed: more instances, or domains farther apart.
    x = mixed(96 if profiled else 192, apart=0.8 if profiled else 1.2)
    model, profile = trained()
    adapted = na.adapt(model, profile if profiled else None, LAYERS_ALONE)
    alike = na.adapt(model, profile if profiled else None, na.Track(mixed_probability=1e-300, compares=False))
    statuses, shown = [], {}
    layer = adapted.model[0]
    layer.register_forward_hook(lambda *io: shown.update(output=io[-1].mean((0, 2, 3))))
    alike.model[0].register_forward_hook(lambda *io: shown.update(common=io[-1].mean((0, 2, 3))))
    distances = []
    for batch in x.split(n):
        adapted(batch), alike(batch)
        statuses.append(adapted.report().sites[0].status)
        assert "instance" not in alike.report().sites[0].status
        distances.append([float(shown[key].square().mean()) for key in ("output", "common")])
    late = len(statuses) - 88 // n
    assert sum("per instance" in status for status in statuses[late:]) > 0.8 * (len(statuses) - late)
    own, common = torch.tensor(distances[late:]).mean(0).tolist()
    assert own < 0.7 * common  # both domains come nearer to the source's output
    # what a paused model uses lies between the domains
    assert float(adapted.state_dict()["0.running_mean"].mean()) == pytest.approx(0, abs=0.4)


@pytest.mark.parametrize("n", [1, 4])
def test_one_domain_is_not_split(n):
    model, profile = trained()
    for shift in (0.0, 1.0):
        adapted, split = na.adapt(model, profile), []
        for batch in photos(draws(96, 6), 6, shift).split(n):
            adapted(batch)
            split += ["instance" in site.status for site in adapted.report().sites]
        assert sum(split) < 0.05 * len(split)


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("n", [1, 4])
def test_a_restart_in_mid_stream_changes_nothing(n, profiled):
    model, profile = trained()
    profile = profile if profiled else None
    batches = mixed(120, apart=0.8 if profiled else 1.2).split(n)
    half = len(batches) // 2
    adapted = na.adapt(model, profile, LAYERS_ALONE)
    for batch in batches[:half]:
        adapted(batch)
    assert "per instance" in adapted.report().sites[0].status
    state = adapted.snapshot()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    expected = [adapted(batch) for batch in batches[half:]]
    after = adapted.snapshot()
    adapted.restore(state)
    assert same([adapted(batch) for batch in batches[half:]], expected)
    restarted = na.adapt(model, profile, LAYERS_ALONE)
    restarted.restore(torch.load(file))
    assert same([restarted(batch) for batch in batches[half:]], expected)
    assert same(restarted.snapshot(), after)
    fresh = na.adapt(model, profile, LAYERS_ALONE)
    assert not same([fresh(batch) for batch in batches[half:]], expected)


@pytest.mark.parametrize("profiled", [False, True])
def test_two_thousand_batches_of_the_source(profiled):
    model = trained()[0][:1]
    profile = na.profile_source(model, [photos(draws(2000, 2), 2)]) if profiled else None
    adapted, sizes, away = na.adapt(model, profile), set(), []
    for i, batch in enumerate(photos(draws(4000, 11), 11).split(2)):
        adapted(batch)
        if i % 200 == 199:
            sizes.add(tuple((key, tuple(value.shape)) for key, value in adapted.snapshot().items()))
            state = adapted.state_dict()
            away.append(float((state["0.running_mean"] - model[0].running_mean).square().mean()))
            away.append(float((state["0.running_var"] / model[0].running_var).log().square().mean()))
    assert len(sizes) == 1
    assert max(away) < 0.01
    assert adapted.report().sites[0].count == 4000


def test_the_scatter_of_a_stream_does_not_depend_on_its_batches():
    x, found = photos(draws(160, 8), 8), []
    for n in (1, 4, 16):
        state = adapted_to(x, n, profiled=False)[0].snapshot()
        place = "stream|0|site|0|state|"
        assert float(state[place + "count#"]) == 160
        found.append([float(state[place + "scatter|squares|0#"]), float(state[place + "moments"][0].sum())])
    layer = trained()[0][0]
    values = (x.double().mean((2, 3)) - layer.running_mean.double()) / (layer.running_var.double() + layer.eps).sqrt()
    expected = [float((values - values.mean(0)).square().sum()), float(values.mean(0).sum())]
    assert found == [pytest.approx(expected, rel=1e-5)] * 3


def test_a_jump_forgets_the_window_but_not_how_the_stream_is_correlated():
    x = photos(draws(80, 12), 12)
    place = "stream|0|site|0|state|"
    before = adapted_to(x, 8, profiled=True)[0].snapshot()
    adapted, _ = adapted_to(torch.cat((x, x[:8] + 3)), 8, profiled=True)
    after = adapted.snapshot()
    assert adapted.report().sites[0].status.startswith("new window")
    assert (float(before[place + "count#"]), float(after[place + "count#"])) == (80, 8)
    for key in ("stretches", "excess"):
        assert before[place + f"correlation|{key}#"] == after[place + f"correlation|{key}#"] > 0
    assert float(after[place + "correlation|variance#"]) == 0
    assert not after[place + "correlation|recent"].any()
    assert before[place + "classes"].sum() == pytest.approx(1)
    assert after[place + "classes"].numel() == 0
    assert after[place + "projections"].shape == (2, 8)


class Told(nn.Module):
    """A layer in a model whose output gives no class probabilities."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x):
        return {"features": self.bn(x)}


def test_a_shift_that_one_draw_of_classes_could_be_is_no_jump_with_every_batch():
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(10, 16, 1, 1, generator=g)

    def draw(n):
        return centres[torch.randint(10, (n,), generator=g)] + torch.randn(n, 16, 4, 4, generator=g)

    source = draw(4000)
    model = Told().eval()
    model.bn.running_mean, model.bn.running_var = source.mean((0, 2, 3)), source.var((0, 2, 3))
    adapted = na.adapt(model)
    shift = 2 * torch.linspace(-1, 1, 16).view(1, 16, 1, 1)
    with torch.no_grad():
        for _ in range(40):
            adapted(draw(16) + shift)
    (site,) = adapted.report().sites
    assert site.status == "tracking"
    assert adapted._streams["default"].records[0].state.count >= 480  # of 640


def test_a_layer_that_scatters_much_by_nature_is_not_taken_for_correlated():
    case = CASES["1d"]  # one position: its instances' locations are all of its variance, above what counts as natural
    model = case.model()
    calibrate(model, lambda: model(case.source(4000, seed=7)))
    for profile in (None, na.profile_source(model, [case.source(1000, seed=8)])):
        adapted = na.adapt(model, profile)
        with torch.no_grad():
            for batch in case.source(1600, seed=9).split(8):
                adapted(batch)
        state = adapted.snapshot()
        stretches, excess = (float(state[f"stream|0|site|1|state|correlation|{k}#"]) for k in ("stretches", "excess"))
        assert 0.5 < excess / stretches < 1.6


def alone_at(index, count, x, n):
    """The last state and statistics of `Track` alone at a site of a deep network, without a profile."""
    layer = trained()[0][0]
    source = na.adapt(nn.Sequential(layer))._hooks[0].source._replace(site_index=index, site_count=count)
    state, given = na.Track().init(source), None
    for batch in x.split(n):
        state, given = na.Track().step(state, gather_evidence(batch)[0], source)
    return source, state, given


def test_the_stretches_that_were_seen_outweigh_what_might_lie_between_the_classes():
    alike = photos(torch.zeros(8, dtype=torch.long), 14)  # a run of one class
    early = alone_at(19, 20, alike, 8)[1].spread
    late = alone_at(19, 20, photos(draws(400, 14), 14), 8)[1].spread
    assert early.natural == pytest.approx(0.2, abs=0.1)
    assert float(early.spread.between[0].mean()) > 0.12
    seen = float(shrink_to_prior(late.total, late.count)[0].mean())
    assert float(late.spread.between[0].mean()) == pytest.approx((0.35 + 1.2 * 0.2) * seen, rel=0.2)


def test_instances_are_shrunk_towards_the_statistics_that_the_batch_itself_gave():
    source, state, given = alone_at(0, 20, mixed(16, apart=3.0) + 4, 16)
    excess, root = state.scatter.excess[0], (source.variance + source.eps).sqrt()
    assert excess > 0
    assert float(state.use[0].min()) > 0.5
    x = (mixed(16, apart=3.0) + 4).double().mean((2, 3))
    usual = state.spread.limits(1.0).usual[0] * float(source.channel_weight.sum())
    natural = min(1.0, usual / state.spread.spread.instance[0][0]) * state.spread.spread.location
    weight = excess / (excess + natural)
    common = source.mean + state.use[0] * root
    torch.testing.assert_close(given.instances[0], common + weight * (x - common), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("profiled", "jump", "levels"),
    [(True, 5e-7, {5e-7, 0.01}), (False, 5e-7, {5e-7, 0.01**0.25}), (False, 1e-12, {1e-12, 0.01**0.25})],
)
def test_with_a_learned_scatter_a_shift_counts_sooner(profiled, jump, levels, monkeypatch):
    asked = set()

    def spy(squared, cumulants, probability):
        asked.add(probability)
        return are_below(squared, cumulants, probability)

    monkeypatch.setattr(track, "are_below", spy)
    adapted_to(photos(draws(24, 15), 15), 8, profiled=profiled, policy=na.Track(jump_probability=jump))
    assert asked == levels


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("n", [1, 16])
def test_no_statistic_weighs_more_than_the_largest_weight_allowed(n, profiled):
    x = photos(draws(400, 5), 5, shift=2.0)
    free, _ = adapted_to(x, n, profiled=profiled)
    half, used = adapted_to(x, n, profiled=profiled, policy=na.Track(max_weight=0.5))
    none, kept = adapted_to(x, n, profiled=profiled, policy=na.Track(max_weight=0.0))
    assert max(s.mean_weight for s in free.report().sites) > 0.9
    assert 0.45 < max(s.mean_weight for s in half.report().sites) <= 0.5
    model, _ = trained()
    shift = (used[-1] - model[0].running_mean).abs().mean()
    assert 0.8 < float(shift) < 1.2  # half of the way
    assert torch.equal(kept[-1], model[0].running_mean)
    assert same(none(x[:n]), model(x[:n]))


def test_a_ceiling_is_no_reason_to_jump():
    x = photos(draws(400, 5), 5, shift=2.0)
    statuses = []
    model, profile = trained()
    adapted = na.adapt(model, profile, na.Track(max_weight=0.2))
    for batch in x.split(16):
        adapted(batch)
        statuses.append([site.status for site in adapted.report().sites])
    assert not any(status == "new window" for row in statuses[2:] for status in row)
    assert all(site.count == 400 for site in adapted.report().sites)
    assert float(adapted.snapshot()["stream|0|site|0|state|count#"]) > 300


def test_the_largest_weight_holds_for_single_instances_too():
    x = photos(draws(400, 6), 6)
    x[::2] += 3.0
    model, _ = trained()
    with torch.no_grad():
        answers = {
            w: adapted_to(x, 16, profiled=True, policy=na.Track(max_weight=w, compares=False))[0](x[:16])
            for w in (0.0, 0.2, 1.0)
        }
    assert same(answers[0.0], model(x[:16]))
    far = {w: float((a - answers[0.0]).square().mean()) for w, a in answers.items()}
    assert 0 < far[0.2] < far[1.0]


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan")])
def test_the_largest_weight_is_a_share(wrong):
    with pytest.raises(ValueError, match="max_weight"):
        na.Track(max_weight=wrong)
