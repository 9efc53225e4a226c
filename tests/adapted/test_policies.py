"""The contract that every policy keeps at every kind of site, and each rule against its formula by hand."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normadapt as na
from models import CASES, same
from normadapt.baselines import EMA, BatchStatistics, SchneiderPrior, Source


class Halfway(na.Policy):
    """A user's policy: ten lines, a dict as state."""

    def init(self, source):
        return {"mean": source.mean, "batches": 0}

    def step(self, state, evidence, source):
        mean = (state["mean"] + evidence.mean) / 2
        return {"mean": mean, "batches": state["batches"] + 1}, na.Statistics(mean, source.variance)


POLICIES = {
    "domains": na.Domains(),
    "channel": na.Blend(pooling="channel"),
    "layer": na.Blend(pooling="layer"),
    "model": na.Blend(pooling="model"),
    "source": Source(),
    "batch": BatchStatistics(),
    "prior": SchneiderPrior(),
    "ema": EMA(),
    "users": Halfway(),
}


def run(adapted, inputs, case):
    with torch.no_grad():
        return [case.call(adapted, x) for x in inputs]


@pytest.mark.parametrize(
    ("policy", "name"),
    [*(("domains", name) for name in CASES if name != "keywords"),
     *((policy, name) for policy in POLICIES if policy != "domains" for name in ("1d", "2d", "instance", "tuple"))],
)  # fmt: skip
def test_every_policy_at_every_site(policy, name):
    case = CASES[name]
    model, rule = case.model(), POLICIES[policy]
    adapted = na.adapt(model, case.profile(), rule)
    inputs = [case.target(1), case.target(8), case.source(5), case.target(1, seed=2)]
    outputs = run(adapted, inputs[:2], case)
    state, twin = adapted.snapshot(), copy.deepcopy(adapted)
    rest = run(adapted, inputs[2:], case)
    assert all(bool(y.isfinite().all()) for y in outputs + rest)
    assert same(run(twin.train(), inputs[2:], case), rest)
    adapted.restore(state)
    assert same(run(adapted.eval(), inputs[2:], case), rest)
    adapted.reset()
    assert same(run(adapted, inputs, case), outputs + rest)
    assert {site.count for site in adapted.report().sites} == {15 * (2 if name == "twice" else 1)}
    assert all(v.dtype == torch.float64 for k, v in state.items() if "|state|" in k and v.is_floating_point())
    double = copy.deepcopy(twin).double()
    torch.testing.assert_close(
        run(double, [inputs[1].double()], case)[0].float(), run(twin, inputs[1:2], case)[0], rtol=1e-3, atol=1e-3
    )
    if policy == "source":
        assert same(rest, run(model, inputs[2:], case))


M_S, V_S, GAMMA = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.25]), torch.tensor([2.0, 0.5])


def norm(eps=1e-5, dtype=torch.float64):
    layer = nn.BatchNorm2d(2, eps=eps).to(dtype).eval()
    layer.running_mean.copy_(M_S)
    layer.running_var.copy_(V_S)
    layer.weight.data.copy_(GAMMA)
    return layer


def data(n, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(n, 2, 1, 1, generator=generator, dtype=torch.float64) * 0.4
    x = level + torch.randn(n, 2, 3, 3, generator=generator, dtype=torch.float64) * 0.9
    return x * V_S.double().sqrt().view(1, 2, 1, 1) + M_S.double().view(1, 2, 1, 1) + shift


def in_use(adapted):
    state = adapted.state_dict()
    return state["running_mean"].clone(), state["running_var"].clone()


def assert_uses(adapted, mean, variance):
    torch.testing.assert_close(in_use(adapted), (mean, variance), rtol=1e-9, atol=1e-12)


def batch_moments(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)


def test_baselines_by_hand():
    first, second = data(4, shift=1.0), data(6, seed=1, shift=2.0)
    (m1, v1), (m2, v2) = batch_moments(first), batch_moments(second)
    m_s, v_s = M_S.double(), V_S.double()

    adapted = na.adapt(norm(), policy=BatchStatistics())
    output = adapted(first)
    assert_uses(adapted, m1, v1)
    torch.testing.assert_close(output, nn.functional.batch_norm(first, None, None, norm().weight, norm().bias, True))

    adapted = na.adapt(norm(), policy=SchneiderPrior(prior=12))
    adapted(first)
    weight = 4 / (12 + 4)
    unbiased = first.var((0, 2, 3), correction=1)
    assert_uses(adapted, (1 - weight) * m_s + weight * m1, (1 - weight) * v_s + weight * unbiased)
    adapted(second)  # no memory
    weight, unbiased = 6 / 18, second.var((0, 2, 3), correction=1)
    assert_uses(adapted, (1 - weight) * m_s + weight * m2, (1 - weight) * v_s + weight * unbiased)

    adapted = na.adapt(norm(), policy=EMA(momentum=0.3))
    adapted(first)
    mean, variance = 0.7 * m_s + 0.3 * m1, 0.7 * v_s + 0.3 * v1
    assert_uses(adapted, mean, variance)
    adapted(second)
    assert_uses(adapted, 0.7 * mean + 0.3 * m2, 0.7 * variance + 0.3 * v2)

    adapted = na.adapt(norm(), policy=Source())
    assert torch.equal(adapted(first), norm()(first))
    assert SchneiderPrior().prior == 16
    assert EMA().momentum == 0.1


@pytest.mark.parametrize("wrong", [lambda: EMA(1.1), lambda: EMA(-0.1), lambda: SchneiderPrior(-1),
                                   lambda: na.Blend(pooling="pixel"), lambda: na.Blend(criterion="mae"),
                                   lambda: na.Domains(max_weight=-0.1),
                                   lambda: na.Domains(max_weight=math.nan)])  # fmt: skip
def test_hyper_parameters_are_checked(wrong):
    with pytest.raises(ValueError, match="must "):
        wrong()


def observed(layer, profile, x):
    """By hand: the shift d (2, C), its sampling variance R, the channel weights w; THEORY sections 2 and 6."""
    site, n = profile.sites[""], len(x)
    mean, variance = batch_moments(x)
    tau = site.between + site.within
    scale = V_S.double() + layer.eps
    shift = torch.stack(((mean - M_S) / scale.sqrt(), ((variance + layer.eps) / scale + tau[0] / n).log() / 2))
    return shift, tau / n, GAMMA.double() ** 2


def applied(layer, use):
    scale = V_S.double() + layer.eps
    return M_S + use[0] * scale.sqrt(), scale * (2 * use[1]).exp() - layer.eps


@pytest.mark.parametrize("pooling", ["channel", "layer"])
@pytest.mark.parametrize("shift", [0.0, 0.2, 1.0])
def test_blend_by_hand(pooling, shift):
    layer, x = norm(), data(6, seed=3, shift=shift)
    profile = na.profile_source(layer, [data(200, seed=9)], rehearsals={})
    adapted = na.adapt(layer, profile, na.Blend(pooling=pooling))
    adapted(x)
    d, r, w = observed(layer, profile, x)
    if pooling == "channel":
        weight = (1 - r / d**2).clamp_min(0)
    else:
        weight = (1 - (r @ w) / (d**2 @ w)).clamp_min(0).unsqueeze(1)
    assert_uses(adapted, *applied(layer, weight * d))
    site = adapted.report().sites[0]
    averages = (weight.expand(2, 2) @ w / w.sum()).tolist()
    assert [site.mean_weight, site.variance_weight] == pytest.approx(averages)


def test_blend_over_the_model_by_hand():
    layers = nn.Sequential(norm(), norm())
    profile = na.profile_source(layers, [data(200, seed=9)], rehearsals={})
    x = data(6, seed=3, shift=0.5)
    adapted = na.adapt(layers, profile, na.Blend(pooling="model"))
    adapted(x)
    squares = noise = torch.zeros(2, dtype=torch.float64)
    for index in (0, 1):
        site = copy.deepcopy(profile)
        site.sites[""] = site.sites[str(index)]
        d, r, w = observed(layers[index], site, x)
        squares, noise = squares + d**2 @ w, noise + r @ w
        mean, variance = applied(layers[index], (1 - noise / squares).clamp_min(0).unsqueeze(1) * d)
        state = adapted.state_dict()
        torch.testing.assert_close(state[f"{index}.running_mean"], mean)
        torch.testing.assert_close(state[f"{index}.running_var"], variance)
        scale = GAMMA.double() / (variance + layers[index].eps).sqrt()
        x = (x - mean.view(1, 2, 1, 1)) * scale.view(1, 2, 1, 1)


def equivariant(policy, scale, offset, *, profiled=False):
    here = norm(eps=1e-14)
    there = copy.deepcopy(here)
    there.running_mean.mul_(scale).add_(offset)
    there.running_var.mul_(scale**2)
    profiles = [None, None]
    if profiled:
        source = data(100, seed=9)
        profiles = [na.profile_source(here, [source]), na.profile_source(there, [source * scale + offset])]
    ours, theirs = na.adapt(here, profiles[0], policy), na.adapt(there, profiles[1], policy)
    for i, shift in enumerate((0.0, 0.0, 1.5, 1.5, 0.0)):
        x = data(6, seed=i, shift=shift)
        torch.testing.assert_close(theirs(x * scale + offset), ours(x), rtol=1e-6, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(scale=st.floats(0.01, 100), offset=st.floats(-100, 100))
@pytest.mark.parametrize("policy", [na.Blend(), na.Blend(pooling="channel"), EMA(), SchneiderPrior()])
def test_affine_equivariance(policy, scale, offset):
    """Other units of the activations, other units of the statistics, the same output."""
    equivariant(policy, scale, offset)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 100.0), (0.01, 0.0), (100.0, -3.0)])
def test_affine_equivariance_with_a_profile(scale, offset):
    equivariant(na.Domains(), scale, offset, profiled=True)
