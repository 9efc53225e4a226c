"""The source profile: what is in it, that splits do not matter, that it fits one model only."""

import copy
import dataclasses
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import normadapt as na
from models import CASES, NET, Views, everything, same, vectors
from normadapt.errors import NormadaptError, PredictionsError, ProfileMismatchError
from normadapt.profiles.site_prior import ProfileSettings
from normadapt.profiles.source_profile import SiteProfile

FIELDS = ("mean", "variance", "between", "within", "squares")


def agree(one, other, rtol=1e-6):
    assert (one.count, one.excluded, list(one.sites)) == (other.count, other.excluded, list(other.sites))
    torch.testing.assert_close(one.class_frequencies, other.class_frequencies)
    for name, site in one.sites.items():
        for field in FIELDS:
            a, b = getattr(site, field), getattr(other.sites[name], field)
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()), msg=f"{name} {field}")


@pytest.mark.parametrize("name", CASES)
def test_save_and_load(name, tmp_path):
    case = CASES[name]
    model = case.model().train()
    before = everything(model)
    profile = na.profile_source(model, [case.item(x) for x in case.source(64).split(16)])
    assert same(everything(model), before)
    profile.save(tmp_path / "p.safetensors")
    loaded = na.SourceProfile.load(str(tmp_path / "p.safetensors"))
    assert all(same(loaded.sites[n].tensors(), site.tensors()) for n, site in profile.sites.items())
    assert same(tuple(loaded.places), tuple(profile.places))
    plain = {key: value for key, value in vars(profile).items() if key not in ("sites", "places")}
    assert same({key: vars(loaded)[key] for key in plain}, plain)
    assert (loaded.count, loaded.fingerprint, loaded.model_name) == (64, profile.fingerprint, type(model).__name__)
    assert same(loaded.class_frequencies, profile.class_frequencies)
    assert list(loaded.sites) == list(profile.sites)
    adapted, twin = na.adapt(model, loaded), na.adapt(model, profile)
    assert torch.equal(case.call(adapted, case.target(8)), case.call(twin, case.target(8)))


def test_a_file_that_is_no_profile(tmp_path):
    with pytest.raises(FileNotFoundError, match="no source profile at"):
        na.SourceProfile.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    profile = na.profile_source(NET.model(), [NET.source(16)])
    profile.sites["1"].mean[0] = float("nan")
    profile.save(tmp_path / "nan")
    for name, said in (
        ("text", "is not a source profile"),
        ("other", "expected format"),
        ("nan", "non-finite.*1.mean"),
    ):
        with pytest.raises(ProfileMismatchError, match=said):
            na.SourceProfile.load(tmp_path / name)


def test_another_model_is_refused_naming_both(tmp_path):
    model = NET.model()
    na.profile_source(model, [NET.source(16)]).save(tmp_path / "p")
    profile = na.SourceProfile.load(tmp_path / "p")
    profile.check(copy.deepcopy(model).train())
    for change in (lambda m: m[9].weight.data.add_(1), lambda m: m[5].running_var.mul_(2)):
        other = copy.deepcopy(model)
        change(other)
        with pytest.raises(ProfileMismatchError, match=r"measured on Sequential \(\w+\), the model given is Seq\w+ \("):
            profile.check(other)


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("name", ["1d", "2d", "3d", "look-alike", "twice"])
def test_the_split_into_batches_does_not_matter(name, size):
    case = CASES[name]
    x = case.source(150)
    x[40, 0] = float("nan")
    agree(*(na.profile_source(case.model(), items, rehearsals={}) for items in (x.split(size), [x])))


@pytest.mark.parametrize("size", [1, 7])
def test_the_split_does_not_matter_where_no_statistics_are_kept(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = NET.source(150)
    halves = {
        "rehearsals": {},
        "predictions": lambda y: torch.full((len(y), 2), 0.5),
    }  # answers depend on the batch; classes must not
    agree(na.profile_source(model, x.split(size), **halves), na.profile_source(model, [x], **halves))


def test_loader_items_of_every_kind():
    x, y = NET.source(32).split(16), torch.zeros(16)
    plain = na.profile_source(NET.model(), x)
    for items in ([(b, y) for b in x], [[b, y, "name"] for b in x], iter(x), (b for b in x), [{"input": b} for b in x]):
        agree(na.profile_source(NET.model(), items), plain, rtol=0)
    keywords = CASES["keywords"]
    for items in ([{"image": b} for b in x], [({"image": b}, y) for b in x]):
        assert na.profile_source(keywords.model(), items).count == 32
    for wrong, said in (("text", "yielded str"), ((), "empty tuple"), (3, "yielded int")):
        with pytest.raises(TypeError, match=said):
            na.profile_source(NET.model(), [wrong])


def test_count_classes_and_progress():
    x, told = NET.source(90), []
    profile = na.profile_source(
        NET.model(),
        x.split(40),
        rehearsals={"dim": lambda x: 0.5 * x},
        progress=told.append,
        settings=ProfileSettings(64),
    )
    with torch.no_grad():
        frequencies = NET.model()(x).softmax(1).double().mean(0)
    torch.testing.assert_close(profile.class_frequencies, frequencies)
    assert profile.count == 90
    steps = [(p.stage, p.done, p.passes, p.batches, p.instances) for p in told]
    assert steps[:3] == [("source inputs", 0, None, n + 1, seen) for n, seen in enumerate((40, 80, 90))]
    # Of these 64 are rehearsed: as they are, and changed.
    assert steps[3:] == [
        (stage, done, 3, n + 1, seen)
        for done, stage in ((1, "unchanged"), (2, "dim"))
        for n, seen in enumerate((40, 64))
    ]
    assert na.profile_source(CASES["twice"].model(), [x]).count == 90  # instances, not calls


def test_predictions_for_other_outputs():
    case, x = CASES["tuple"], CASES["tuple"].source(64)
    profile = na.profile_source(case.model(), [x], predictions=lambda output: output[0].softmax(1))
    with torch.no_grad():
        probabilities = case.model()(x)[0].softmax(1).double()
    torch.testing.assert_close(profile.class_frequencies, probabilities.mean(0))
    with pytest.raises(PredictionsError, match="do not sum to 1"):
        na.profile_source(case.model(), [x], predictions=lambda output: output[0])


@pytest.mark.parametrize("items", [[], [torch.zeros(0, 3, 8, 8)], [torch.full((4, 3, 8, 8), float("nan"))]])
def test_too_little_data(items):
    with pytest.raises(NormadaptError, match="at least two finite source instances"):
        na.profile_source(NET.model(), items)


def explained(site: SiteProfile, x: torch.Tensor, norm: nn.Module):
    """By plain torch: variance of the instances' locations and half-log-variances at a layer's input (n, C, ...)."""
    flat, v_s = x.double().flatten(2), norm.running_var.double() + norm.eps
    means, inside = flat.mean(2), flat.var(2, correction=0)
    psi = inside + (means - site.mean) ** 2
    total = torch.stack(((means / v_s.sqrt()).var(0), (psi / (2 * site.variance)).var(0)))
    # The running variance is within one instance plus between instances: what training data scattered more.
    missing = (1 - inside.mean(0) / v_s - total[0]).clamp_min(0)
    return total + torch.stack((missing, 0.5 * missing))


@pytest.mark.parametrize("seed", [0, 1])
def test_between_and_within_make_the_total(seed):
    model, x = NET.model(seed), NET.source(600, seed=seed)
    profile = na.profile_source(model, x.split(100), rehearsals={})
    with torch.no_grad():
        for name, index in (("1", 1), ("5", 5)):
            site, seen = profile.sites[name], model[:index](x)
            total = explained(site, seen, model[index])
            torch.testing.assert_close(site.between + site.within, total, rtol=0.02, atol=1e-3)
            torch.testing.assert_close(site.mean, seen.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(site.variance, seen.double().var((0, 2, 3)), rtol=2e-3, atol=1e-6)


def test_the_split_and_the_traces_are_those_of_the_true_covariances():
    generator = torch.Generator().manual_seed(0)
    channels, classes, n = 5, 3, 12_000
    centres = 2 * torch.randn(classes, channels, generator=generator, dtype=torch.float64)
    root = 0.15 * torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (n,), generator=generator)
    x = centres[labels] + torch.randn(n, channels, generator=generator, dtype=torch.float64) @ root.T

    model = nn.Sequential(nn.BatchNorm1d(channels), nn.Identity()).double().eval()
    model[0].weight.data = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.1], dtype=torch.float64)
    model[0].running_mean.copy_(x.mean(0))
    model[0].running_var.copy_(x.var(0))

    def nearest(output):
        moved = (output - model[0].bias) / model[0].weight * (x.var(0) + model[0].eps).sqrt() + x.mean(0)
        return nn.functional.one_hot(torch.cdist(moved.detach(), centres).argmin(1), classes).double()

    site = na.profile_source(model, x.split(4000), predictions=nearest, rehearsals={}).sites["0"]
    deviation = (x.var(0) + model[0].eps).sqrt()
    grand = centres[labels].mean(0)
    between = ((centres - grand) / deviation).T @ ((centres - grand) / deviation) / classes
    within = (root / deviation.unsqueeze(1)) @ (root / deviation.unsqueeze(1)).T
    torch.testing.assert_close(site.between[0], between.diagonal(), rtol=0.05, atol=2e-3)
    torch.testing.assert_close(site.within[0], within.diagonal(), rtol=0.05, atol=2e-3)
    weight = model[0].weight.detach()
    b, w = (weight.unsqueeze(1) * matrix * weight for matrix in (between, within))
    traces = torch.stack([(b @ b).trace(), (b @ w).trace(), (w @ w).trace()])
    torch.testing.assert_close(site.squares[0], traces, rtol=0.08, atol=2e-3)


def test_classes_that_mean_nothing_have_nothing_between_them():
    """Ten random classes of four instances each scatter by themselves: that part is taken off."""
    torch.manual_seed(0)
    n, classes = 40, 10
    layer = nn.BatchNorm1d(200).double().eval()
    layer.running_var *= 1e-3  # what training data scattered more is added: here nothing
    labels = nn.functional.one_hot(torch.arange(n) % classes, classes).double()
    x = torch.randn(n, 200).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        site = na.profile_source(layer, [x], predictions=lambda y: labels, rehearsals={}).sites[""]
    noise = (classes - 1) / n
    assert float(site.prior.location_between.mean()) < 0.6 * noise * float(site.prior.location_within.mean())


def test_a_layer_without_statistics_works_with_a_profile():
    torch.manual_seed(0)
    model = vectors(track_running_stats=False).eval()
    case = CASES["1d"]
    adapted = na.adapt(model, na.profile_source(model, case.source(256).split(64)))
    assert list(adapted.state_dict()) == list(model.state_dict())
    output = adapted(case.target(1))
    assert bool(output.isfinite().all())
    assert model[1].running_mean is None
    with adapted.as_source():
        assert torch.equal(adapted(case.target(8)), model(case.target(8)))
    frozen = adapted.freeze()
    with adapted.paused():
        assert torch.equal(adapted(case.target(1)), frozen(case.target(1)))


def test_instances_that_are_not_finite_are_left_out_counted_and_change_nothing():
    x = NET.source(60)
    spoiled = torch.cat((x[:20], torch.full((1, 3, 8, 8), float("nan")), x[20:40], x[:2] * float("inf"), x[40:]))
    ours, plain = (na.profile_source(NET.model(), [items], rehearsals={}) for items in (spoiled, x))
    assert (ours.excluded, ours.count) == (3, 60)
    agree(dataclasses.replace(ours, excluded=0), plain)
    torch.testing.assert_close(ours.places.centre, plain.places.centre)
    every = [na.profile_source(NET.model(), items) for items in ([spoiled], [x])]
    torch.testing.assert_close(every[0].places.known, every[1].places.known, rtol=1e-3, atol=1e-3)


def test_a_file_of_the_version_before_is_refused_with_the_remedy(tmp_path):
    save_file({"1|mean": torch.zeros(6)}, tmp_path / "old", metadata={"format": "normadapt source profile 1"})
    with pytest.raises(
        ProfileMismatchError, match=r"got 'normadapt source profile 1'\n  -> measure one .*profile_source"
    ):
        na.SourceProfile.load(tmp_path / "old")


def test_a_damaged_file_is_refused(tmp_path):
    profile = NET.profile()
    profile.save(tmp_path / "good")
    with safe_open(str(tmp_path / "good"), framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    for key in ("1|prior.basis", "|places.scatter", "|looks"):
        rest = {name: value for name, value in tensors.items() if name != key}
        save_file(rest, tmp_path / "bad", metadata=metadata)
        with pytest.raises(ProfileMismatchError, match="is damaged"):
            na.SourceProfile.load(tmp_path / "bad")


def test_inputs_unlike_the_training_data_are_told_and_the_running_statistics_believed():
    model = NET.model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alike = na.profile_source(model, [NET.source(256, seed=100)], rehearsals={})
    with pytest.warns(UserWarning, match="unlike what the model was trained on") as caught:
        unlike = na.profile_source(model, [NET.target(256)], rehearsals={})
    assert caught[0].filename == __file__
    assert alike.unlikeness < 0.05 < 0.15 < unlike.unlikeness
    site, layer = unlike.sites["1"], model[1]
    moved, away = ((m - layer.running_mean).norm() for m in (site.reference.mean, site.mean))
    assert float(moved) < 0.25 * float(away)


def test_a_few_of_the_training_data_are_believed_only_as_far_as_they_reach():
    """The more of them, the nearer is the reference to their moments."""
    model = NET.model()
    model[1].running_mean += 0.1 * (model[1].running_var + 1e-5).sqrt()
    shares = []
    for n, seeds in ((8, 8), (512, 1)):
        believed = measured = torch.zeros(6, dtype=torch.float64)
        for seed in range(seeds):
            site = na.profile_source(model, [NET.source(n, seed=3 + seed)], rehearsals={}).sites["1"]
            believed = believed + site.reference.mean - model[1].running_mean
            measured = measured + site.mean - model[1].running_mean
        shares.append(float(believed @ measured / (measured @ measured)))
    assert 0 < shares[0] < 0.8 * shares[1] < 0.8


def test_rows_that_are_folded_into_the_batch_are_measured_by_instance():
    views = Views().eval()
    x = torch.randn(40, 4, 3, 8, 8) + 0.5 * torch.randn(40, 1, 1, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        profile = na.profile_source(views, x.split(10))
    site = profile.sites["body.1"]
    assert (profile.count, site.count) == (40, 40)
    with torch.no_grad():
        seen = views.body[0](x.flatten(0, 1)).double().unflatten(0, (40, 4)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(site.mean, seen.mean((0, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        site.variance, seen.transpose(0, 1).flatten(1).var(1, correction=0), rtol=1e-4, atol=1e-6
    )


def test_where_the_output_gives_no_classes_clusters_of_features_stand_for_them():
    case = CASES["tuple"]
    profile = case.profile()
    assert profile.class_frequencies.numel() == profile.clusters.shape[0]
    if profile.clusters.shape[0]:
        assert profile.class_frequencies.sum() == pytest.approx(1)
        assert profile.clusters.shape[1] == 6
    assert NET.profile().clusters.numel() == 0
