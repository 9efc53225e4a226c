"""One test for each defect found in other libraries (their names in the comments): none may appear here."""

import pytest
import torch

import normadapt as na
from models import CASES, NET, everything, same


def accuracy_like_distance(adapted, model, case=NET):
    """Distance of the second-last answer from the source model's: 0 if nothing has adapted."""
    x = case.target(16, seed=9)
    with torch.no_grad():
        return float((case.call(adapted, x) - case.call(model, x)).abs().max())


@pytest.mark.parametrize("name", ["1d", "1d-series", "2d", "3d"])
def test_eval_does_not_silently_bring_the_source_back(name):
    # tent's Norm after .eval() is the source model, and it skips BatchNorm1d and 3d
    case = CASES[name]
    model = case.model()
    adapted, twin = na.adapt(model, case.profile()).eval(), na.adapt(model, case.profile()).train()
    assert accuracy_like_distance(adapted, model, case) > 0.005
    assert accuracy_like_distance(twin, model, case) == accuracy_like_distance(adapted.reset() or adapted, model, case)


@pytest.mark.parametrize("policy", [na.Domains(), na.Blend(), na.baselines.SchneiderPrior(), na.baselines.EMA()])
def test_an_adapted_state_dict_loads_into_the_source(policy):
    # AlphaBN: 80 missing and 160 unexpected keys
    adapted, source = NET.adapted(policy), NET.model()
    with torch.no_grad():
        adapted(NET.target(16))
    keys = source.load_state_dict(adapted.state_dict(), strict=True)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    with adapted.paused(), torch.no_grad():
        assert torch.equal(source(NET.target(8)), adapted(NET.target(8)))


def test_what_is_mixed_with_is_the_source_and_not_zero_and_one():
    # AlphaBN after .eval() mixes with (0, 1)
    policy = na.baselines.SchneiderPrior(prior=1e12)
    model = NET.model()
    assert float(model[1].running_mean.abs().max()) > 0.1
    adapted = na.adapt(model.train(), policy=policy).eval()
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(NET.target(16)), model(NET.target(16)))


def test_in_eval_the_batch_under_test_counts_at_once():
    # torch-ttt's TentEngine in eval never uses test statistics
    model = NET.model()
    adapted = na.adapt(model, policy=na.baselines.BatchStatistics()).eval()
    x = NET.target(16)
    with torch.no_grad():
        adapted(x)
        seen = model[0](x)
    torch.testing.assert_close(adapted.state_dict()["1.running_mean"], seen.mean((0, 2, 3)))
    torch.testing.assert_close(adapted.state_dict()["1.running_var"], seen.var((0, 2, 3), correction=0))


def test_adaptation_outlasts_the_call():
    # torch-ttt drops its adaptation after each call
    adapted = NET.adapted()
    with torch.no_grad():
        for i in range(4):
            adapted(NET.target(16, seed=i))
        kept = {k: v.clone() for k, v in adapted.state_dict().items()}
        adapted(NET.target(16, seed=4))
    assert float((kept["1.running_mean"] - NET.model()[1].running_mean).abs().max()) > 0.1
    assert adapted.report().sites[0].count == 80


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_runs_with_and_without_gradients(context):
    # torch-ttt raises under no_grad
    adapted, reference = NET.adapted(), NET.adapted()
    with context():
        ours = adapted(NET.target(16)).detach().clone()
    with torch.no_grad():
        assert torch.equal(ours, reference(NET.target(16)))


@pytest.mark.parametrize("policy", [na.Domains(), na.Blend(), na.baselines.BatchStatistics(), na.baselines.EMA()])
def test_a_batch_of_one_in_train_mode(policy):
    # torch's BatchNorm1d raises at batch size 1 in train mode
    model = CASES["1d"].model().train()
    adapted = na.adapt(model, CASES["1d"].profile(), policy).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(CASES["1d"].target(1))
    with torch.no_grad():
        assert bool(adapted(CASES["1d"].target(1)).isfinite().all())


def test_recalibrating_starts_from_the_source_and_leaves_the_model_alone():
    # update_bn wipes the source statistics first and puts the whole model, dropout included, into train mode
    model = NET.model()
    before, modes = everything(model), []
    model[3].register_forward_hook(lambda module, args, output: modes.append((module.training, args[0], output)))
    model[1].register_forward_pre_hook(lambda module, args: modes.append((module.training, module.running_mean)))

    def interrupted():
        yield NET.target(16)
        raise OSError("the disk went away")

    class Broken:
        def __iter__(self):
            return interrupted()

    with pytest.raises(OSError, match="disk"):
        na.recalibrate(model, Broken())
    assert {entry[0] for entry in modes} == {False}
    assert torch.equal(modes[0][1], before["state"]["1.running_mean"])
    assert torch.equal(modes[1][1], modes[1][2])  # nothing was dropped
    model[3]._forward_hooks.clear()
    model[1]._forward_pre_hooks.clear()
    assert same(everything(model), before)


def test_one_pass_over_the_data_is_enough():
    # fvcore's precise_bn and update_bn need a pass of their own before the first answer
    model, truth = NET.model(), NET.model()
    x = NET.target(512)
    adapted = na.adapt(model, NET.profile())
    visits = []
    with torch.no_grad():
        for index, batch in enumerate(x.split(16)):
            visits.append(index)
            adapted(batch)
        with adapted.paused():
            ours = adapted(NET.target(64, seed=1))
        exact = na.recalibrate(truth, [x])(NET.target(64, seed=1))
        source = truth(NET.target(64, seed=1))
    assert visits == list(range(32))
    assert float((ours - exact).abs().mean()) < 0.25 * float((source - exact).abs().mean())


def test_a_long_run_does_not_collapse():
    # what their users report most: collapse after long runs
    model = NET.model()
    adapted = na.adapt(model, NET.profile())
    with torch.no_grad():
        for i in range(200):
            adapted(NET.source(8, seed=i))
        with adapted.paused():
            ours, source = adapted(NET.source(64, seed=999)), model(NET.source(64, seed=999))
    assert float((ours - source).abs().mean()) < 0.1 * float(source.std())
