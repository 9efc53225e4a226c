"""Rehearsals: what they do to inputs of every rank, and how a profile uses a user's own."""

import pytest
import torch

import normadapt as na
from models import CASES, NET
from normadapt.profiles.rehearsals import rehearsals_for
from normadapt.profiles.site_prior import ProfileSettings

SHAPES = {2: (8, 6), 3: (8, 3, 12), 4: (8, 3, 8, 8), 5: (8, 2, 5, 5, 6)}


def sample(rank, seed=0, dtype=torch.float32):
    return torch.randn(SHAPES[rank], generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_shape_and_dtype_stay_and_the_input_is_not_written_to(rank, dtype):
    x = sample(rank, dtype=dtype)
    before = x.clone()
    for name, change in rehearsals_for(rank).items():
        moved = change(x)
        assert (moved.shape, moved.dtype) == (x.shape, dtype), name
        assert bool(moved.isfinite().all()), name
        assert float((moved - x).abs().max()) > 0.05, name
        assert torch.equal(x, before), name


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 3, 2), (2, 1, 1, 1), (2, 1, 2, 9), (2, 1, 1, 2, 2)])
def test_small_inputs_are_rehearsed_too(shape):
    for change in rehearsals_for(len(shape)).values():
        assert change(torch.randn(shape)).shape == shape


@pytest.mark.parametrize("rank", SHAPES)
def test_names_say_what_happens(rank):
    x = sample(rank)
    every = rehearsals_for(rank)
    torch.testing.assert_close(every["gain 0.5"](x), 0.5 * x)
    torch.testing.assert_close(every["offset -1"](x), x - 1)
    bright, dark = (float(every[f"low contrast, {kind} 0.25"](x).mean()) for kind in ("bright", "dark"))
    assert bright > 0.5
    assert dark < -0.2
    noise = every["noise 0.7"](x) - x
    assert float(noise.std()) == pytest.approx(0.7, rel=0.25)
    if rank >= 3:
        assert float(every["blur 5"](x).var()) < float(every["blur 3"](x).var()) < 0.6 * float(x.var())
        assert float(every["sharp"](x).var()) > 1.3 * float(x.var())
        shaded = every["shade across"](x) - x
        assert torch.allclose(shaded[..., 0], torch.tensor(-1.0))
        assert torch.allclose(shaded[..., -1], torch.tensor(1.0), atol=1e-5)


def test_a_new_profile_rehearses_with_the_same_noise():
    x = sample(4)
    assert all(torch.equal(rehearsals_for(4)[name](x), rehearsals_for(4)[name](x)) for name in rehearsals_for(4))


@pytest.mark.parametrize("name", ["1d", "1d-series", "2d", "3d"])
def test_the_default_is_that_of_the_inputs_dimensions(name):
    case = CASES[name]
    profile = case.profile()
    assert profile.rehearsals == tuple(rehearsals_for(len(case.shape) + 1))
    assert profile.places.known.shape[0] == len(profile.rehearsals)
    assert profile.looks.shape[0] == 1 + len(profile.rehearsals)


def test_a_users_own_changes_act_on_standardized_inputs_and_leave_the_rest_out():
    seen = []

    def dim(x):
        seen.append(x)
        return 0.5 * x

    x = 40 + 7 * NET.source(60)
    model = NET.model()
    with pytest.warns(UserWarning, match="unlike what the model was trained on"):
        profile = na.profile_source(model, x.split(30), rehearsals={"dim": dim})
    assert profile.rehearsals == ("dim",)
    standard = torch.cat(seen)
    assert standard.shape == x.shape
    assert standard.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(standard.std((0, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)


def test_the_rehearsed_shift_is_that_of_the_changed_inputs():
    """One change, one covariance of rank 1: where the first layer's moments go to."""
    model, x = NET.model(), NET.source(256, seed=100)
    profile = na.profile_source(model, [x], rehearsals={"lighter": lambda x: x + 1})
    site = profile.sites["1"]
    with torch.no_grad():
        deviation = x.double().std((0, 2, 3), correction=0).float()
        before, after = model[0](x).double(), model[0](x + deviation.view(1, 3, 1, 1)).double()
    moved = (after - before).mean((0, 2, 3)) / site.reference.variance.sqrt()
    factor = site.prior.basis * site.prior.unit.unsqueeze(1)
    covariance = factor @ site.prior.shifts @ factor.T
    torch.testing.assert_close(covariance[:6, :6], torch.outer(moved, moved), rtol=1e-3, atol=1e-5)
    assert float(covariance[6:, 6:].abs().max()) < 1e-6  # an offset changes no scale


@pytest.mark.parametrize("wrong", [lambda x: x[:-1], lambda x: x[..., :-1], lambda x: x.mean(), lambda x: None])
def test_a_change_of_shape_is_refused_with_what_was_got(wrong):
    with pytest.raises(ValueError, match=r"must return a tensor of the same shape \(16, 3, 8, 8\); got"):
        na.profile_source(NET.model(), [NET.source(16)], rehearsals={"wrong": wrong})


def test_no_rehearsals_is_a_profile_as_well():
    profile = na.profile_source(NET.model(), [NET.source(64)], rehearsals={})
    assert profile.rehearsals == ()
    adapted = na.adapt(NET.model(), profile)
    for i in range(6):
        assert bool(adapted(NET.target(16, seed=i)).isfinite().all())
    assert adapted.domain is not None


def test_only_the_first_inputs_are_rehearsed_and_all_are_measured():
    lengths = []

    def count(x):
        lengths.append(len(x))
        return 2 * x

    x = NET.source(100)
    profile = na.profile_source(NET.model(), x.split(16), rehearsals={"twice": count}, settings=ProfileSettings(40))
    assert lengths == [16, 16, 8]
    assert profile.count == 100
