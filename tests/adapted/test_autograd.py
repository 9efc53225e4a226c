"""Gradients, inference mode, precision and memory formats through an adapted model."""

import pytest
import torch
from torch import nn

import normadapt as na
from models import CASES, NET, same


@pytest.mark.parametrize("profiled", [False, True])
def test_gradients_reach_the_shared_parameters_by_value(profiled):
    original = NET.model()
    adapted = na.adapt(original, na.profile_source(original, [NET.source(64)]) if profiled else None)
    x = NET.target(8).requires_grad_()
    adapted(x).square().sum().backward()
    ours = [p.grad.clone() for p in original.parameters()], x.grad.clone()
    original.zero_grad()
    x.grad = None
    adapted.freeze()(x).square().sum().backward()
    torch.testing.assert_close(ours, ([p.grad for p in original.parameters()], x.grad))


def test_several_forwards_before_one_backward():
    original = NET.model()
    adapted = na.adapt(original, NET.profile())
    frozen, total = [], torch.zeros(())
    for i in range(3):
        total = total + adapted(NET.target(8, seed=i)).square().sum()
        frozen.append(adapted.freeze())
    with adapted.as_source():
        total = total + adapted(NET.target(8)).sum()
    adapted.reset()
    total.backward()
    gradient = original[0].weight.grad.clone()
    original.zero_grad()
    for i, model in enumerate(frozen):
        model(NET.target(8, seed=i)).square().sum().backward()
    original(NET.target(8)).sum().backward()
    torch.testing.assert_close(gradient, original[0].weight.grad)


def test_training_a_parameter_goes_on_between_batches():
    original = NET.model()
    adapted = na.adapt(original, NET.profile())
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    weight = original[9].weight.detach().clone()
    for i in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(adapted(NET.target(8, seed=i)), torch.arange(8) % 4).backward()
        optimizer.step()
    assert not torch.equal(original[9].weight, weight)


@pytest.mark.parametrize("policy", [na.Domains(), na.Blend(), na.baselines.EMA()])
@pytest.mark.parametrize("double", [False, True])
def test_inference_mode_and_gradients_take_turns(policy, double):
    dtype = torch.float64 if double else torch.float32
    model = CASES["1d"].model().to(dtype)
    adapted = na.adapt(model, na.profile_source(model, [CASES["1d"].source(64).to(dtype)]), policy)
    data = [CASES["1d"].target(8, seed=i).to(dtype) for i in range(4)]
    with torch.inference_mode():
        adapted(data[0])
        adapted.reset()
        with adapted.stream("new"):
            adapted(data[1])
        state = adapted.snapshot()
        adapted.restore(state)
        adapted(data[2])
    with adapted.paused():
        adapted(data[3]).sum().backward()
    adapted(data[3]).sum().backward()
    with adapted.as_source():
        adapted(data[3]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("inside", ["adapt", "restore", "load"])
def test_inference_mode_around_anything_is_no_trap(inside):
    model = NET.model()
    adapted = na.adapt(model, NET.profile())
    with torch.no_grad():
        adapted(NET.target(8))
    with torch.inference_mode():
        if inside == "adapt":
            adapted = na.adapt(model, NET.profile())
            adapted(NET.target(8))
        elif inside == "restore":
            adapted.restore(adapted.snapshot())
        else:
            adapted.load_state_dict(adapted.state_dict())
    for context in (adapted.paused(), adapted.as_source(), adapted.stream("default")):
        with context:
            adapted(NET.target(8)).sum().backward()


def test_channels_last_is_kept_and_gives_the_same():
    plain, model = NET.adapted(), NET.model().to(memory_format=torch.channels_last)
    part = nn.Sequential(*model[:6])
    adapted = na.adapt(part, na.profile_source(part, [NET.source(64)]))
    whole = na.adapt(model, NET.profile())
    with torch.no_grad():
        for i in range(3):
            x = NET.target(8, seed=i)
            y = adapted(x.to(memory_format=torch.channels_last))
            torch.testing.assert_close(whole(x.to(memory_format=torch.channels_last)), plain(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


def dtypes_of_memory(adapted):
    """Of all that a stream remembers, but for the statistics that a layer is given."""
    kept = {k: v for k, v in adapted.snapshot().items() if "|memory|" in k and v.is_floating_point()}
    given = {k: v for k, v in kept.items() if "|ready|" in k}
    assert {v.dtype for v in given.values()} == {adapted.sources[0].original[0].dtype}
    return {v.dtype for k, v in kept.items() if k not in given}


@pytest.mark.parametrize(
    ("name", "dtype", "profiled"),
    [*((name, torch.float16, True) for name in ("1d", "1d-series", "2d", "3d", "fused", "twice")),
     *((name, torch.bfloat16, False) for name in ("1d", "2d", "3d")), ("2d", torch.bfloat16, True)],
)  # fmt: skip
def test_half_precision_activations(name, dtype, profiled):
    case = CASES[name]
    profile = case.profile() if profiled else None
    adapted = na.adapt(case.model(), profile).to(dtype) if profiled else na.adapt(case.model().to(dtype))
    reference = na.adapt(case.model(), profile)
    with torch.no_grad():
        # Without a profile one rounded prediction among the first few instances says much about the classes.
        for i in range(3 if profiled else 6):
            x = case.target(8, seed=i)
            output = case.call(adapted, x.to(dtype))
            expected = case.call(reference, x)
    assert output.dtype == dtype
    with torch.no_grad():
        source = case.call(case.model(), x)
    error = (output.float() - expected).abs().mean()  # rounding may decide a gate, so not element by element
    assert float(error) < 0.01 + 0.2 * float((source - expected).abs().mean())
    assert dtypes_of_memory(adapted) == {torch.float64}


def test_autocast():
    adapted, reference = NET.adapted(), NET.adapted()
    with torch.no_grad():
        for i in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                output = adapted(NET.target(8, seed=i))
            expected = reference(NET.target(8, seed=i))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16), adapted.paused():
        assert torch.equal(adapted(NET.source(4)), adapted.freeze()(NET.source(4)))


def test_large_activations_fit_a_narrow_layer():
    model = nn.BatchNorm2d(3).half().eval()
    adapted = na.adapt(model, policy=na.baselines.BatchStatistics())
    x = (torch.randn(4, 3, 8, 8) * 2000).half()  # variance 4e6, more than a half can say
    output = adapted(x)
    assert bool(output.isfinite().all())
    assert same(dict(adapted.state_dict())["running_var"], torch.full((3,), 65504.0).half())
