"""Offline recalibration: self-consistent, independent of the split, and an ordinary module in the end."""

import logging
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import normadapt as na
from models import CASES, NET, batches, calibrate, everything, images, same
from normadapt.errors import NormadaptError


def statistics(model):
    return {k: v for k, v in model.state_dict().items() if "running" in k}


def far(one, other):
    one, other = statistics(one), statistics(other)
    return max(float((one[k] - other[k]).abs().max()) for k in one)


@pytest.mark.parametrize("name", ["1d", "2d", "3d", "look-alike", "twice", "keywords"])
@pytest.mark.parametrize("profiled", [False, True])
def test_the_split_does_not_matter(name, profiled):
    case = CASES[name]
    model, x = case.model(), case.target(128)
    x[17, 0] = float("nan")
    profile = case.profile() if profiled else None
    whole = na.recalibrate(model, [case.item(x)], profile)
    assert whole.recalibration.excluded in (1, 2)
    for size in (1, 64) if name == "2d" else (7,):
        split = na.recalibrate(model, [case.item(b) for b in batches(x, size)], profile)
        assert far(split, whole) < 1e-5
        torch.testing.assert_close(
            case.call(split, case.target(8)), case.call(whole, case.target(8)), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", ["1d", "2d", "fused", "sync"])
def test_the_result_is_self_consistent_and_near_the_full_batch(name):
    case = CASES[name]
    model, x = case.model(), case.target(1500)
    result = na.recalibrate(model, batches(x, 250))
    outcome = result.recalibration
    assert outcome.converged
    assert outcome.last_change <= 1e-5
    assert (outcome.count, outcome.excluded, outcome.tracked) == (1500, 0, False)
    assert 2 <= outcome.passes <= 4
    further = na.recalibrate(model, batches(x, 250), tolerance=0.0, max_passes=outcome.passes + 5)
    assert far(further, result) < 1e-5
    exact = case.model()
    calibrate(exact, lambda: case.call(exact, x))
    source = far(model, exact)
    assert source > 0.3
    assert far(result, exact) < 0.02 * source


def test_source_data_leave_the_source():
    model = NET.model()
    result = na.recalibrate(model, [NET.source(64, seed=3)], na.profile_source(model, [NET.source(256)]))
    with torch.no_grad():
        x = NET.source(64, seed=4)
        assert float((result(x) - model(x)).abs().max()) < 0.1 * float(model(x).std())


def test_the_result_is_an_ordinary_module_and_the_model_as_before():
    model = NET.model().train()
    before = everything(model)
    result = na.recalibrate(model, [NET.target(64)])
    assert same(everything(model), before)
    assert type(result) is nn.Sequential
    assert list(result.state_dict()) == list(model.state_dict())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in result.modules())
    assert not any(m.training for m in result.modules())
    assert [id(p) for p in result.parameters()] == [id(p) for p in model.parameters()]
    fresh = NET.model(seed=1)
    fresh.load_state_dict(result.state_dict())
    torch.testing.assert_close(fresh(NET.target(8)), result(NET.target(8)))
    again = na.adapt(result)  # and can be adapted in turn
    with again.as_source():
        assert torch.equal(again(NET.target(8)), result(NET.target(8)))


@pytest.mark.parametrize("passes", [1, 2, 100])
def test_a_layer_without_statistics_is_recalibrated_as_one_with(passes):
    torch.manual_seed(0)
    bare = images(nn.BatchNorm2d, track_running_stats=False).eval()
    profile = na.profile_source(bare, [NET.source(256)], rehearsals={})
    keeps = images(nn.BatchNorm2d).eval()
    keeps.load_state_dict(bare.state_dict(), strict=False)
    for name in ("1", "5"):
        keeps[int(name)].running_mean.copy_(profile.sites[name].mean)
        keeps[int(name)].running_var.copy_(profile.sites[name].variance)
    x = NET.target(128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = na.recalibrate(bare, batches(x, 2), profile, max_passes=passes)
        theirs = na.recalibrate(
            keeps, [x], na.profile_source(keeps, [NET.source(256)], rehearsals={}), max_passes=passes
        )
    for key, value in statistics(theirs).items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("make", [iter, lambda items: (x for x in items), lambda items: map(torch.clone, items)])
def test_a_loader_that_can_be_read_once_gets_one_tracked_pass(make):
    model, x = NET.model(), NET.target(256)
    told = []
    with pytest.warns(UserWarning, match="iterated only once") as caught:
        result = na.recalibrate(model, make(batches(x, 32)), NET.profile(), progress=told.append)
    assert caught[0].filename == __file__
    outcome = result.recalibration
    assert outcome.tracked
    assert not outcome.converged
    assert (outcome.passes, outcome.count) == (1, 256)
    assert [(p.pass_index, p.batches, p.instances) for p in told][-1] == (1, 8, 256)
    adapted = na.adapt(model, NET.profile())
    with torch.no_grad():
        for batch in batches(x, 32):
            adapted(batch)
    assert same(dict(result.state_dict()), dict(adapted.freeze().state_dict()))


def test_progress_passes_and_log(caplog):
    told, x = [], NET.target(96)
    with caplog.at_level(logging.INFO, logger="normadapt"):
        result = na.recalibrate(NET.model(), DataLoader(TensorDataset(x), batch_size=32), progress=told.append)
    passes = result.recalibration.passes
    assert [(p.pass_index, p.batches, p.instances) for p in told] == [
        (i + 1, b + 1, 32 * (b + 1)) for i in range(passes) for b in range(3)
    ]
    assert told[0].last_change is None
    assert told[3].last_change > 0.1
    assert result.recalibration.last_change <= 1e-5 < told[-1].last_change
    assert f"pass {passes}, 96 instances" in caplog.text


def test_too_few_passes_warn():
    with pytest.warns(UserWarning, match="stopped after 1 passes with a change of"):
        result = na.recalibrate(NET.model(), [NET.target(64)], max_passes=1)
    assert not result.recalibration.converged
    assert result.recalibration.last_change > 0.1


class Once:
    """Says nothing of it, but gives its data only the first time."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        items, self.items = self.items, []
        return iter(items)


def test_errors():
    model = NET.model()
    before = everything(model)
    for loader, said in (
        ([], "gave none"),
        ([torch.zeros(0, 3, 8, 8)], "gave none"),
        ([torch.full((2, 3, 8, 8), float("nan"))], "2 were left out as non-finite"),
        (Once([NET.target(8)]), "the second time it was iterated"),
        (["text"], "yielded str"),
    ):
        with pytest.raises((NormadaptError, TypeError), match=said):
            na.recalibrate(model, loader)
    with pytest.warns(UserWarning, match="only once"), pytest.raises(NormadaptError, match="gave none"):
        na.recalibrate(model, iter([]))
    for wrong in ({"tolerance": -1.0}, {"tolerance": math.nan}, {"max_passes": 0}):
        with pytest.raises(ValueError, match="must be at least"):
            na.recalibrate(model, [NET.target(8)], **wrong)
    assert same(everything(model), before)


@pytest.mark.parametrize("shift", [0.3, 2.0])
def test_the_optimum_by_hand(shift):
    layer = nn.BatchNorm1d(4).double().eval()
    layer.weight.data.copy_(torch.tensor([2.0, 1.0, 0.5, 0.1]))
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(n, 4, 5, generator=generator, dtype=torch.float64) for n in (300, 12))
    source += 0.5 * torch.randn(300, 4, 1, generator=generator, dtype=torch.float64)
    target = target * 1.5 + shift
    profile = na.profile_source(layer, [source])
    result = na.recalibrate(layer, target.split(5), profile)
    one, w = 1 + layer.eps, layer.weight.detach() ** 2
    total = profile.sites[""].between + profile.sites[""].within
    variance = target.var((0, 2), correction=0)
    d = torch.stack((target.mean((0, 2)) / one**0.5, ((variance + layer.eps) / one + total[0] / 12).log() / 2))
    excess = ((d**2 - total / 12) @ w / w.sum()).clamp_min(0).unsqueeze(1)
    use = excess / (excess + total / 12) * d
    torch.testing.assert_close(result.running_mean, use[0] * one**0.5)
    torch.testing.assert_close(result.running_var, one * (2 * use[1]).exp() - layer.eps)
