"""Snapshots: everything that adapting changed, back again in full or not at all."""

import pytest
import safetensors.torch
import torch

import normadapt as na
from models import CASES, NET, same
from normadapt.errors import SnapshotError


def run(adapted, inputs, case=NET):
    with torch.no_grad():
        return [case.call(adapted, x) for x in inputs]


class Forgetful(na.Policy):
    """A user's policy without `init`, whose state is a dict that first is empty."""

    def step(self, state, evidence, source):
        seen = (state["seen"] if state else 0.0) + evidence.count
        mean = state["mean"] if state else source.mean
        mean = mean + evidence.count / seen * (evidence.mean - mean)
        return {"seen": seen, "mean": mean}, na.Statistics(mean, source.variance)


POLICIES = {
    "domains": na.Domains(),
    "blend": na.Blend(),
    "ema": na.baselines.EMA(),
    "prior": na.baselines.SchneiderPrior(),
    "batch": na.baselines.BatchStatistics(),
    "source": na.baselines.Source(),
    "users": Forgetful(),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("through", ["memory", "safetensors"])
def test_the_future_is_the_same_after_a_round_trip(policy, through):
    case = CASES["2d"]
    adapted = case.adapted(POLICIES[policy])
    run(adapted, [case.target(8), case.target(8, seed=1)])
    with adapted.stream("other camera"):
        run(adapted, [case.source(1)])
    state = adapted.snapshot()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    kept = {key: value.clone() for key, value in state.items()}
    future = [case.target(8, seed=2), case.source(8, seed=3), case.target(1, seed=4)]
    answers = run(adapted, future)
    assert same(state, kept)  # the snapshot does not follow the model
    if through == "safetensors":
        state = safetensors.torch.load(safetensors.torch.save(state))
    fresh = case.adapted(POLICIES[policy])
    fresh.restore(state)
    assert fresh.streams == ("default", "other camera")
    assert same(run(fresh, future), answers)
    assert str(fresh.report()) == str(adapted.report())
    assert same(fresh.snapshot(), adapted.snapshot())


def test_a_profiled_model_goes_on_alike():
    profile = na.profile_source(NET.model(), [NET.source(64)])
    adapted, fresh = na.adapt(NET.model(), profile), na.adapt(NET.model(), profile)
    run(adapted, [NET.target(8)])
    fresh.restore(adapted.snapshot())
    assert same(run(fresh, [NET.target(8, seed=1)]), run(adapted, [NET.target(8, seed=1)]))


def spoiled(state, ending, change):
    """The snapshot with one entry changed; None takes it away."""
    key = next(key for key in state if key.endswith(ending))
    rest = {k: v for k, v in state.items() if k != key}
    return rest if change is None else {**rest, key: change(state[key])}


WINDOW = "memory|bank|domains|1|windows|0|"
BROKEN = {
    "empty": lambda s: {},
    "statistics gone": lambda s: spoiled(s, "site|1|buffers|0", None),
    "sums gone": lambda s: spoiled(s, WINDOW + "sums", None),
    "a domain's place gone": lambda s: spoiled(s, "domains|1|place", None),
    "memory gone": lambda s: {k: v for k, v in s.items() if "|memory" not in k},
    "nan in statistics": lambda s: spoiled(s, "buffers|1", lambda t: t * float("nan")),
    "nan in memory": lambda s: spoiled(s, WINDOW + "sums", lambda t: t * float("nan")),
    "infinite number in memory": lambda s: spoiled(s, "domains|1|count#", lambda t: t * float("inf")),
    "negative variance": lambda s: spoiled(s, "buffers|1", lambda t: -t),
    "other shape of statistics": lambda s: spoiled(s, "buffers|0", lambda t: t[:-1]),
    "last site gone": lambda s: {k: v for k, v in s.items() if "|site|5" not in k},
    "an older version": lambda s: spoiled(s, "format#", lambda t: t - 1),
}
BROKEN_STATE = {
    "state gone": lambda s: spoiled(s, "state|mean", None),
    "nan in state": lambda s: spoiled(s, "state|mean", lambda t: t * float("nan")),
    "other shape of state": lambda s: spoiled(s, "state|mean", lambda t: t[:-1]),
}


def refuses(adapted, how):
    run(adapted, [NET.target(8)])
    broken = how(adapted.snapshot())
    run(adapted, [NET.target(8, seed=1)])
    before, statistics = adapted.snapshot(), {k: v.clone() for k, v in adapted.state_dict().items()}
    with pytest.raises(SnapshotError):
        adapted.restore(broken)
    assert same(adapted.snapshot(), before)
    assert same(dict(adapted.state_dict()), statistics)


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_snapshot_is_refused_and_nothing_changes(how):
    refuses(NET.adapted(), BROKEN[how])


@pytest.mark.parametrize("how", BROKEN_STATE)
def test_a_broken_state_of_a_site_is_refused_and_nothing_changes(how):
    refuses(NET.adapted(na.baselines.EMA()), BROKEN_STATE[how])


def test_a_snapshot_of_an_older_version_is_refused_with_the_remedy():
    adapted = NET.adapted()
    old = spoiled(adapted.snapshot(), "format#", lambda t: t - 1)
    with pytest.raises(SnapshotError, match="begin anew"):
        adapted.restore(old)
    with pytest.raises(SnapshotError, match="begin anew"):
        adapted.restore({k: v for k, v in old.items() if k != "format#"})


def test_snapshots_of_others_are_refused():
    adapted = NET.adapted()
    before = adapted.snapshot()
    other = na.adapt(NET.model(seed=1))
    with pytest.raises(SnapshotError) as told:
        adapted.restore(other.snapshot())
    assert str(adapted.fingerprint) in str(told.value)
    assert str(other.fingerprint) in str(told.value)
    with pytest.raises(SnapshotError, match="taken under EMA, this model runs Domains"):
        adapted.restore(NET.adapted(na.baselines.EMA()).snapshot())
    assert same(adapted.snapshot(), before)


def test_a_snapshot_that_needs_the_profile_is_refused_without_it():
    profiled = na.adapt(NET.model(), na.profile_source(NET.model(), [NET.source(64)]))
    run(profiled, [NET.target(8)])
    adapted = na.adapt(NET.model())
    before = adapted.snapshot()
    with pytest.raises(SnapshotError, match="profile"):
        adapted.restore(profiled.snapshot())
    assert same(adapted.snapshot(), before)


def test_a_state_that_cannot_be_kept_is_named():
    class Odd(na.Policy):
        def step(self, state, evidence, source):
            return {"what": object()}, na.Statistics(source.mean, source.variance)

    adapted = NET.adapted(Odd())
    run(adapted, [NET.source(4)])
    with pytest.raises(SnapshotError, match="holds a object"):
        adapted.snapshot()


def test_what_is_held_comes_back_whatever_happened_since():
    case = CASES["2d"]
    adapted = case.adapted()
    run(adapted, [case.target(8)])
    held, kept = adapted.hold(), adapted.snapshot()
    run(adapted, [case.target(8, seed=1) * 30])
    with adapted.stream("other"):
        run(adapted, [case.source(4)])
    assert not same(adapted.snapshot(), kept)
    adapted.rewind(held)
    assert same(adapted.snapshot(), kept)
    run(adapted, [case.target(8, seed=2)])
    adapted.rewind(held)  # it can be used again
    assert same(adapted.snapshot(), kept)
    other = CASES["1d"].adapted()
    with pytest.raises(SnapshotError, match="another model"):
        other.rewind(held)
