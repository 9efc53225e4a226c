"""What every rule of `normadapt.baselines` keeps: any batch, streams apart, snapshots, no trace of a failure."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import normadapt as na
from models import CASES, same
from normadapt import baselines
from normadapt.baselines import BBN, BDN, DUA, EMA, IABN, RBN, TBR, TEMA, AlphaBN, SchneiderPrior, UnMixTNS

RULES = {name: getattr(baselines, name)() for name in baselines.__all__}
STATEFUL = ["EMA", "RBN", "DUA", "TBR", "TEMA", "UnMixTNS", "BBN", "BDN"]
KINDS = ["1d", "1d-series", "2d", "2d-no-affine", "3d", "sync", "look-alike", "twice"]


def run(adapted, inputs):
    with torch.no_grad():
        return [adapted(x) for x in inputs]


def test_the_rules_are_all_there():
    assert len(RULES) == 16
    for rule in RULES.values():
        assert isinstance(rule, na.Policy)
        assert dataclasses.is_dataclass(rule)
        with pytest.raises(dataclasses.FrozenInstanceError):
            rule.new = 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_at_any_layer(rule, kind):
    case, policy = CASES[kind], RULES[rule]
    model = case.model()
    adapted = na.adapt(model, policy=policy)
    inputs = [case.target(1), case.target(0), case.target(7, seed=1), case.source(1)]
    outputs = run(adapted, inputs)
    assert all(bool(y.isfinite().all()) for y in outputs)
    assert [len(y) for y in outputs] == [1, 0, 7, 1]
    calls = 2 if kind == "twice" else 1
    assert {site.count for site in adapted.report().sites} == {9 * calls}
    adapted.reset()
    assert same(run(adapted, inputs), outputs)
    with torch.inference_mode():
        adapted.reset()
        assert same(run(adapted, inputs), outputs)


@pytest.mark.parametrize("rule", RULES)
def test_an_empty_batch_changes_nothing(rule):
    case = CASES["2d"]
    adapted = na.adapt(case.model(), policy=RULES[rule])
    run(adapted, [case.target(4)])
    before = [record.state for record in adapted._streams["default"].records]
    run(adapted, [case.target(0)])
    assert same([record.state for record in adapted._streams["default"].records], before)


@pytest.mark.parametrize("rule", STATEFUL)
@pytest.mark.parametrize("kind", ["1d", "2d"])
def test_streams_stay_apart_and_snapshots_bring_them_back(rule, kind):
    case = CASES[kind]
    model = case.model()
    left, right = [case.target(5, seed=i) for i in range(3)], [case.source(5, seed=i) for i in range(3)]
    alone = [run(na.adapt(model, policy=RULES[rule]), inputs) for inputs in (left, right)]
    assert not same(alone[0][2], run(na.adapt(model, policy=RULES[rule]), left[2:])[0])  # it remembers
    adapted = na.adapt(model, policy=RULES[rule])
    outputs, state = ([], []), None
    for i in range(3):
        for name, inputs, answers in (("left", left, outputs[0]), ("right", right, outputs[1])):
            with adapted.stream(name):
                answers += run(adapted, inputs[i : i + 1])
        if i == 1:
            state = adapted.snapshot()
    assert same(list(outputs), alone)
    fresh = na.adapt(model, policy=RULES[rule])
    fresh.restore(state)
    for name, inputs, answers in (("left", left, alone[0]), ("right", right, alone[1])):
        with fresh.stream(name):
            assert same(run(fresh, inputs[2:]), answers[2:])


@pytest.mark.parametrize("rule", RULES)
def test_a_failed_forward_leaves_no_trace(rule):
    case = CASES["2d"]
    adapted = na.adapt(case.model(), policy=RULES[rule])
    run(adapted, [case.target(4)])
    before, twin = adapted.snapshot(), copy.deepcopy(adapted)

    def fail(*_):
        raise RuntimeError("out of memory")

    calls = {"left": RULES[rule].passes}

    def fail_last(*_):  # in the last of a policy's passes
        calls["left"] -= 1
        if not calls["left"]:
            raise RuntimeError("out of memory")

    for hook in (fail, fail_last):
        handle = adapted.model[-1].register_forward_hook(hook)
        with pytest.raises(RuntimeError, match="out of memory"):
            run(adapted, [case.target(4, seed=1)])
        handle.remove()
        assert same(adapted.snapshot(), before)
    assert same(run(adapted, [case.target(3)]), run(twin, [case.target(3)]))


@pytest.mark.parametrize("rule", RULES)
def test_an_instance_that_is_not_finite_is_left_out(rule):
    case = CASES["2d"]
    model = case.model()
    x = case.target(4)
    bad = torch.cat((x[:2], torch.full_like(x[:1], float("nan")), x[2:]))
    with_it, without = na.adapt(model, policy=RULES[rule]), na.adapt(model, policy=RULES[rule])
    output = run(with_it, [bad])[0]
    torch.testing.assert_close(output[[0, 1, 3, 4]], run(without, [x])[0], rtol=1e-5, atol=1e-5)
    assert [site.excluded for site in with_it.report().sites] == [1] * len(with_it.report().sites)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: EMA(1.1),
        lambda: SchneiderPrior(-1),
        lambda: AlphaBN(-0.1),
        lambda: AlphaBN(float("nan")),
        lambda: RBN(2.0),
        lambda: TBR(1.5),
        lambda: TBR(-0.5),
        lambda: DUA(p0=-0.1),
        lambda: DUA(p0=0.9, zeta=0.2),
        lambda: DUA(zeta=-0.01),
        lambda: DUA(omega=1.2),
        lambda: IABN(-1),
        lambda: IABN(float("inf")),
        lambda: UnMixTNS(components=1),
        lambda: UnMixTNS(components=16.0),
        lambda: UnMixTNS(temperature=0.0),
        lambda: UnMixTNS(momentum=1.5),
        lambda: UnMixTNS(seed=-1),
        lambda: TEMA(momentum=1.5),
        lambda: TEMA(decay=-0.1),
        lambda: BBN(eta=1.5),
        lambda: BDN(eta=-0.1),
        lambda: BDN(most=0),
    ],
)
def test_hyper_parameters_are_checked(wrong):
    with pytest.raises(ValueError, match="must "):
        wrong()


class Watching(na.Policy):
    """Keeps a note of what it was given."""

    needs_input = True
    passes = 3

    def __init__(self):
        self.seen, self.answers = [], []

    def init(self, source):
        return {"index": source.site_index, "step": 0}

    def step(self, state, evidence, source):
        self.seen.append((source.site_index, source.site_count, evidence.pass_index, tuple(evidence.input.shape)))
        assert evidence.upstream == (source.site_index - 1 if source.site_index else None)
        moved = {**state, "step": state["step"] + 1}
        return moved, na.Statistics(source.mean, source.variance, carry=source.site_index)

    def answered(self, states, answer):
        self.answers.append((answer.pass_index, answer.carry, answer.memory, [(s["index"], s["step"]) for s in states]))
        return [{**s, "step": s["step"] + 10} for s in states], answer.pass_index


def test_a_policy_of_several_passes_sees_all_sites_between_them():
    policy = Watching()
    adapted = na.adapt(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).eval(), policy=policy)
    adapted(torch.tensor([[1.0, 2.0], [3.0, float("nan")], [5.0, 6.0]]))
    assert policy.seen == [(site, 2, turn, (2, 2)) for turn in range(3) for site in range(2)]
    steps = [[(0, 1), (1, 1)], [(0, 12), (1, 12)], [(0, 23), (1, 23)]]
    assert policy.answers == [(turn, 1, turn - 1 if turn else None, steps[turn]) for turn in range(3)]
    assert [r.state["step"] for r in adapted._streams["default"].records] == [33, 33]
    assert [(s.count, s.excluded) for s in adapted.report().sites] == [(2, 1), (2, 1)]


def test_answered_must_keep_the_sites():
    class Forgetful(Watching):
        def answered(self, states, answer):
            return states[:1], None

    adapted = na.adapt(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).eval(), policy=Forgetful())
    with pytest.raises(ValueError, match=r"answered\(\) must return one state for each of the 2 sites; got 1"):
        adapted(torch.zeros(2, 2))


def test_the_input_is_given_only_to_those_who_ask():
    class Plain(na.Policy):
        def step(self, state, evidence, source):
            assert evidence.input is None
            assert evidence.pass_index == 0
            return state, na.Statistics(source.mean, source.variance)

    na.adapt(nn.BatchNorm1d(2).eval(), policy=Plain())(torch.zeros(2, 2))


def test_gradients_flow_through_the_last_pass():
    case = CASES["2d"]
    x = case.target(3).requires_grad_()
    na.adapt(case.model(), policy=TEMA())(x).sum().backward()
    assert bool(x.grad.isfinite().all())
    assert float(x.grad.abs().sum()) > 0


def test_every_pass_begins_with_all_instances():
    """An instance that turns NaN on the way is left out from there on, in each pass anew."""

    class Breaks(nn.Module):
        def forward(self, x):
            return torch.where(x > 5, float("nan"), x)

    policy = Watching()
    na.adapt(nn.Sequential(nn.BatchNorm1d(2), Breaks(), nn.BatchNorm1d(2)).eval(), policy=policy)(
        torch.tensor([[1.0, 2.0], [3.0, 9.0], [5.0, 1.0]])
    )
    assert [shape for *_, shape in policy.seen] == [(3, 2), (2, 2)] * 3
