"""Bad input: what is wrong with the call is said, what is wrong with the data is survived."""

import copy
from functools import cache

import pytest
import torch
from torch import nn

import normadapt as na
from models import CASES, NET, everything, images, same
from normadapt.errors import NormadaptError, PredictionsError, ProfileMismatchError, UnsupportedLayerError

POLICIES = {
    "domains": na.Domains(),
    "blend": na.Blend(),
    "ema": na.baselines.EMA(),
    "batch": na.baselines.BatchStatistics(),
    "prior": na.baselines.SchneiderPrior(),
}


def run(adapted, inputs, case=NET):
    with torch.no_grad():
        return [case.call(adapted, x) for x in inputs]


def everything_is_finite(adapted):
    tensors = {**adapted.snapshot(), **adapted.state_dict()}
    return all(bool(value.double().isfinite().all()) for value in tensors.values())


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "value", "profiled"),
    [*((name, NAN, True) for name in ("1d", "1d-series", "2d", "3d", "fused", "twice")),
     ("2d", INF, True), ("2d", -INF, True), ("2d", NAN, False), ("1d", INF, False)],
)  # fmt: skip
def test_non_finite_instances_are_left_out_and_counted(name, value, profiled):
    case = CASES[name]
    profile = case.profile() if profiled else None
    adapted, twin = na.adapt(case.model(), profile), na.adapt(case.model(), profile)
    calls = 2 if name == "twice" else 1
    for i in range(3):
        good = case.target(8, seed=i)
        spoiled = torch.full_like(good[:2], value) if value != value else good[:2].clone()
        spoiled[:, 0] = value
        x = torch.cat((good[:3], spoiled, good[3:]))
        output, expected = run(adapted, [x], case)[0], run(twin, [good], case)[0]
        torch.testing.assert_close(torch.cat((output[:3], output[5:])), expected)
    ours, others = adapted.report().sites, twin.report().sites
    assert [(s.count, s.excluded) for s in ours] == [(24 * calls, 6 * calls)] * len(ours)
    assert [s.mean_weight for s in ours] == pytest.approx([s.mean_weight for s in others], rel=1e-3)
    assert "6 left out" in str(adapted.report()) or calls == 2
    assert everything_is_finite(adapted)


def test_what_was_not_finite_upstream_stays_out_downstream():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)).eval()
    profile = na.profile_source(model, [torch.randn(64, 4)])
    adapted, twin = na.adapt(model, profile), na.adapt(model, profile)
    good = torch.randn(12, 4) + 2
    bad = torch.full((4, 4), -float("inf"))  # the ReLU turns these into finite zeros
    torch.testing.assert_close(run(adapted, [torch.cat((good, bad))])[0][:12], run(twin, [good])[0])
    assert [site.count for site in adapted.report().sites] == [12, 12]


def test_a_batch_of_nothing_but_nan_is_skipped():
    adapted = NET.adapted()
    run(adapted, [NET.target(8)])
    before = dict(adapted.state_dict())
    output = run(adapted, [torch.full((3, 3, 8, 8), float("nan"))])[0]
    assert bool(output.isnan().all())
    assert same(dict(adapted.state_dict()), before)
    first = adapted.report().sites[0]
    assert (first.status, first.count, first.excluded) == ("skipped: non-finite input", 8, 3)


SPIKES = {
    "all 1e30": lambda x: x * 1e30,
    "one 1e30": lambda x: torch.cat((x[:-1], x[-1:] * 1e30)),
    "one of both signs": lambda x: torch.cat((x[:-1], torch.randn_like(x[-1:]) * 1e22)),
    "constant 1e30": lambda x: torch.full_like(x, 1e30),
    "1e4": lambda x: x * 1e4,
    "1e100": lambda x: x * 1e100,  # infinite in float32
    "one 1e12": lambda x: torch.cat((x[:-1], x[-1:] * 1e12)),
    "nan": lambda x: x * float("nan"),
    "inf": lambda x: x * float("inf"),
    "empty": lambda x: x[:0],
}


@cache
def profile_in(dtype):
    return na.profile_source(NET.model().to(dtype), [NET.source(128).to(dtype)])


ROUGH = ("one 1e30", "one of both signs", "1e100", "nan")


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("policy", "spike", "dtype"),
    [*(("domains", spike, torch.float32) for spike in SPIKES),
     *(("domains", spike, torch.float64) for spike in ROUGH),
     *((policy, spike, torch.float32) for policy in POLICIES if policy != "domains" for spike in ROUGH)],
)  # fmt: skip
def test_the_state_stays_finite_for_ever(policy, spike, dtype, first):
    adapted = na.adapt(NET.model().to(dtype), profile_in(dtype), POLICIES[policy])
    source = NET.source(16, seed=5).to(dtype)
    spiked = SPIKES[spike](source)
    for x in (spiked, source) if first else (source, spiked, source, spiked, spiked):
        run(adapted, [x])
        assert everything_is_finite(adapted)
    assert bool(torch.stack(run(adapted, [source, source])).isfinite().all())


@pytest.mark.parametrize(
    ("profiled", "when", "spike"),
    [*((True, "later", spike) for spike in SPIKES), (True, "first", "one of both signs"), (True, "first", "nan"),
     (False, "later", "one 1e30")],
)  # fmt: skip
def test_a_spike_does_not_outlast_itself(profiled, when, spike):
    """Two absurd batches, then a target: 320 instances later the answers are those of a model that saw only that."""
    further = 0.0 if profiled else 1.0  # where nobody told what is usual, only what is far away is a jump for certain
    profile = NET.profile() if profiled else None
    adapted, healthy = na.adapt(NET.model(), profile), na.adapt(NET.model(), profile)
    if when == "later":
        for model in (adapted, healthy):
            run(model, [NET.source(16, seed=i) for i in range(5)])
    run(adapted, [SPIKES[spike](NET.source(16, seed=i)) for i in (6, 7)])
    for model in (adapted, healthy):
        run(model, [NET.target(32, seed=i) + further for i in range(10)])
    ours, theirs = (torch.cat(run(model, [NET.target(64, seed=30) + further])) for model in (adapted, healthy))
    assert float((ours - theirs).abs().max()) < 0.2 * float(theirs.std())


@pytest.mark.parametrize(
    ("name", "profiled"),  # torch's own cannot do empty ones at an instance norm
    [*((name, True) for name in CASES if name != "instance"), ("2d", False), ("twice", False)],
)
def test_empty_batches_and_single_instances_from_the_first_call(name, profiled):
    case = CASES[name]
    model = case.model()
    profile = case.profile() if profiled else None
    adapted = na.adapt(model, profile)
    assert run(adapted, [case.source(0)], case)[0].shape == (0, 4)
    assert {site.status for site in adapted.report().sites} == {"skipped: empty batch"}
    assert same(dict(adapted.state_dict()), dict(model.state_dict()))
    adapted.reset()
    outputs = run(adapted, [case.target(1, seed=i) for i in range(4)] + [case.source(0)], case)
    assert all(bool(y.isfinite().all()) for y in outputs)
    assert adapted.report().sites[0].count == (8 if name == "twice" else 4)
    assert everything_is_finite(adapted)


class Fragile(nn.Module):
    """Fails behind its first layer when told to."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.fail = NET.model()[:6], NET.model()[6:], None

    def forward(self, x):
        x = self.first(x)
        if self.fail is not None:
            raise self.fail
        return self.second(x)


@cache
def fragile_profile():
    return na.profile_source(Fragile().eval(), [NET.source(64)])


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_failing_forward_leaves_no_trace(policy, error):
    adapted = na.adapt(Fragile().eval(), fragile_profile(), POLICIES[policy])
    run(adapted, [NET.target(8)])
    snapshot, state = adapted.snapshot(), {k: v.clone() for k, v in adapted.state_dict().items()}
    raw = {k: v.clone() for k, v in adapted.model.state_dict().items()}
    adapted.model.fail = error
    contexts = (adapted.paused, adapted.as_source, lambda: adapted.stream("default"))
    for context in contexts:
        with pytest.raises(type(error)), context():
            run(adapted, [NET.source(8)])
        assert same(dict(adapted.model.state_dict()), raw)
        assert same(adapted.snapshot(), snapshot)
        assert same(dict(adapted.state_dict()), state)
    with pytest.raises((RuntimeError, ValueError)):
        run(adapted, [torch.zeros(4, 7, 8, 8)])  # the wrong number of channels
    assert same(adapted.snapshot(), snapshot)


@pytest.mark.parametrize("verb", [na.adapt, lambda m: na.recalibrate(m, [NET.source(8)])])
def test_layers_that_cannot_be_adapted_are_named_with_a_remedy(verb):
    model = images(nn.BatchNorm2d, track_running_stats=False)
    before = everything(model)
    with pytest.raises(UnsupportedLayerError) as told:
        verb(model)
    for part in ("1: track_running_stats=False", "5: track_running_stats=False", "profile_source(model, loader)"):
        assert part in str(told.value)
    for other, said in (
        (nn.Linear(3, 4), "no normalization layer"),
        (nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4)), "GroupNorm, LayerNorm"),
        (nn.Sequential(nn.LazyBatchNorm2d()), "0: not initialized yet -> call the model once"),
    ):
        with pytest.raises(UnsupportedLayerError, match=said):
            verb(other)
    assert same(everything(model), before)


def test_a_profile_of_another_model_is_refused_by_both_names():
    profile = na.profile_source(NET.model(), [NET.source(16)])
    changed = copy.deepcopy(NET.model())
    changed[1].running_mean[0] += 1
    for other in (changed, CASES["1d"].model(), CASES["twice"].model()):
        before = everything(other)
        for verb in (na.adapt, lambda m, p: na.recalibrate(m, [NET.source(8)], p)):
            with pytest.raises(ProfileMismatchError) as told:
                verb(other, profile)
            assert "Sequential (" + profile.fingerprint[:12] in str(told.value)
            assert f"the model given is {type(other).__name__} (" in str(told.value)
            assert "profile_source" in str(told.value)
        assert same(everything(other), before)


class Needy(na.Blend):
    """Blend, for a test that says it cannot work without classes."""

    needs_predictions = True


@pytest.mark.parametrize(
    ("predictions", "said"),
    [
        (None, "a tuple of 2"),
        (lambda output: output[0].argmax(1), r"a tensor of shape \(8,\) and dtype int64"),
        (lambda output: output[0], "do not sum to 1"),
        (lambda output: "cat", "a str"),
        (lambda output: output[7], "out of range"),
    ],
)
def test_predictions_that_are_none_change_nothing(predictions, said):
    case = CASES["tuple"]
    good = [lambda output: output[0].softmax(1)]
    adapted = na.adapt(case.model(), policy=Needy(), predictions=lambda output: good[0](output))
    run(adapted, [case.target(8)])
    before = adapted.snapshot()
    if predictions is None:
        adapted = case.adapted(Needy())
        before = adapted.snapshot()
    else:
        good[0] = predictions
    with pytest.raises(IndexError if "range" in said else PredictionsError, match=said):
        run(adapted, [case.target(8, seed=1)])
    assert same(adapted.snapshot(), before)
    assert run(case.adapted(), [case.target(8)])[0][0].shape == (8, 4)  # the default does without


class Gives(na.Policy):
    """A user's policy that gives what it is told, at the second layer."""

    def __init__(self, answer):
        self.answer = answer

    def step(self, state, evidence, source):
        if source.name == "1":
            return state, na.Statistics(evidence.mean, evidence.variance)
        return state, self.answer(evidence)


WRONG = {
    "shape": lambda e: na.Statistics(e.mean[:-1], e.variance[:-1]),
    "scalar": lambda e: na.Statistics(e.mean.mean(), e.variance.mean()),
    "instances": lambda e: na.Statistics(e.mean, e.variance, (e.mean, e.variance)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_policy_with_wrong_shapes_is_told_and_nothing_changes(wrong):
    adapted = NET.adapted(Gives(WRONG[wrong]))
    before = adapted.snapshot()
    with pytest.raises(ValueError, match=r"Gives.*'5'"):
        run(adapted, [NET.target(8)])
    assert same(adapted.snapshot(), before)


NONSENSE = {
    "nan": lambda e: na.Statistics(e.mean * float("nan"), e.variance),
    "inf": lambda e: na.Statistics(e.mean, e.variance + float("inf")),
    "negative variance": lambda e: na.Statistics(e.mean, -e.variance),
    "nan instances": lambda e: na.Statistics(
        e.mean, e.variance, (e.instances.mean * float("nan"), e.instances.variance)
    ),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_a_policy_with_nonsense_is_skipped(nonsense):
    adapted = NET.adapted(Gives(NONSENSE[nonsense]))
    assert bool(run(adapted, [NET.target(8)])[0].isfinite().all())
    first, second = adapted.report().sites
    assert first.status == "adapted"
    assert second.status == "skipped: non-finite statistics"
    assert everything_is_finite(adapted)


def test_errors_are_of_one_family():
    assert issubclass(NormadaptError, ValueError)
    assert {UnsupportedLayerError, ProfileMismatchError, PredictionsError} <= set(NormadaptError.__subclasses__())


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: na.adapt(NET.model(), na.Domains()), "got Domains -> pass a policy by name: policy=..."),
        (lambda: na.adapt(NET.model(), "p.safetensors"), "got str -> read a file with SourceProfile.load"),
        (lambda: na.adapt(NET.model().state_dict()), "needs a torch.nn.Module, got OrderedDict"),
        (lambda: na.profile_source(len, [NET.source(4)]), "needs a torch.nn.Module, got builtin"),
        (
            lambda: na.profile_source(NET.model(), NET.source(4)),
            r"got one tensor of shape \(4, 3, 8, 8\) -> pass a list",
        ),
        (lambda: na.recalibrate(NET.model(), NET.source(4)), "pass a list"),
        (lambda: na.recalibrate(NET.model(), 3), "needs an iterable of batches, got int"),
        (lambda: NET.adapted().restore(None), "needs what snapshot.. returned"),
    ],
)
def test_arguments_of_another_type_are_named(call, said):
    with pytest.raises(TypeError, match=said):
        call()


@pytest.mark.parametrize(
    "answer", [na.Statistics(torch.zeros(6), torch.ones(6)), ((), (torch.zeros(6), torch.ones(6)))]
)
def test_a_policy_that_returns_something_else_is_told(answer):
    class Slip(na.Policy):
        def step(self, state, evidence, source):
            return answer

    adapted = NET.adapted(Slip())
    with pytest.raises(TypeError, match=r"Slip.step\(\) must return a pair .* for '1'"):
        run(adapted, [NET.source(4)])


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 16, 16), (16,), (2, 4, 16, 16)])
def test_a_shape_that_the_layer_refuses_is_refused_in_its_own_words(shape):
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    adapted = na.adapt(model)
    before = adapted.snapshot()
    with pytest.raises((ValueError, RuntimeError)) as plain:
        model(torch.ones(shape))
    with pytest.raises(type(plain.value)) as ours:
        adapted(torch.ones(shape))
    assert str(ours.value) == str(plain.value)
    assert same(before, adapted.snapshot())
