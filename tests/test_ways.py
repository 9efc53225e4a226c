"""The ways of `Track`: what a stream keeps of the answers in each, which one they speak for, what a look costs."""

import dataclasses
import itertools
import math
import warnings
from functools import cache

import pytest
import torch
from torch import nn

import normadapt as na
from models import same
from normadapt.demo import mnist_digits, normalized, usps_net
from normadapt.doubts import Doubts
from normadapt.policies.ways import FOLLOWED, OWN, PROFILED_WAYS, SOURCE, TOGETHER, WAYS, choose_way

STREAM = "default"


def entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def test_entropies_and_means_by_hand():
    first = {"x": torch.tensor([[0.5, 0.5], [0.9, 0.1]]), "y": torch.tensor([[1.0, 0.0], [0.8, 0.2]])}
    second = {"x": torch.tensor([[0.3, 0.7]]), "y": torch.tensor([[0.6, 0.4]])}
    after = Doubts().compared(first).compared(second)
    old = 2 * math.exp(-1 / 32)
    assert after.count == pytest.approx(old + 1)
    for way, (a, b) in enumerate(zip(first.values(), second.values(), strict=True)):
        before = (entropy(a[0].tolist()) + entropy(a[1].tolist())) / 2
        now = (old * before + entropy(b[0].tolist())) / (old + 1)
        assert after.entropies[way] == pytest.approx(now, rel=1e-6)
        mean = (old * a.double().mean(0) + b[0].double()) / (old + 1)
        assert after.means[way].tolist() == pytest.approx(mean.tolist(), rel=1e-6)
        told = after.by_way()["xy"[way]]
        assert told.told == pytest.approx(entropy(mean.tolist()) - now, rel=1e-5)
        beside = (mean * (old + 1) + 2 * 0.5) / (old + 3)  # two instances that showed both classes alike
        assert told.told_smoothed == pytest.approx(entropy(beside.tolist()) - now, rel=1e-5)


def xy(first, second):
    return {"x": first, "y": second}


def test_rows_that_nobody_answers_do_not_count_and_let_older_ones_fade():
    nothing, broken = torch.full((4, 2), 0.5), torch.full((4, 2), math.nan)
    once = Doubts().compared(xy(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.8, 0.2]])))
    for answers in ([nothing, nothing], [broken, nothing], [torch.tensor([[0.9, 0.1]] * 4), broken]):
        after = once.compared(xy(*answers))
        assert (after.entropies, after.told) == (once.entropies, once.told)
        assert after.told_smoothed > once.told_smoothed  # what nobody has seen counts for more
        assert after.count == pytest.approx(math.exp(-4 / 32))
    four = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    assert once.compared(xy(nothing, four)).count == pytest.approx(4 + math.exp(-4 / 32))


def test_looks_at_nothing_for_so_long_that_the_count_has_faded_to_zero():
    known = Doubts().compared(xy(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.8, 0.2]])))
    for _ in range(30):
        known = known.compared(xy(*[torch.full((1000, 2), 0.5)] * 2))
    assert known.count == 0.0
    told = known.by_way()
    assert all(math.isfinite(number) for answers in told.values() for number in answers)
    assert told["x"].told == pytest.approx(0.0)
    assert told["x"].told_smoothed == pytest.approx(math.log(2) - told["x"].entropy)
    nothing = Doubts().compared(xy(*[torch.full((4, 2), 0.5)] * 2))
    assert (nothing.count, nothing.by_way()) == (0.0, {})


def test_an_instance_that_is_shown_again_counts_once():
    shown = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.9, 0.1], [0.90001, 0.09999], [0.9, 0.1]])
    other = torch.tensor([[0.6, 0.4], [0.2, 0.8], [0.6, 0.4], [0.6, 0.4], [0.5, 0.5]])  # the last one is another
    after = Doubts().compared(xy(shown, other))
    assert after.count == 3
    expected = Doubts().compared(xy(shown[[0, 1, 4]], other[[0, 1, 4]]))
    assert after.entropies == expected.entropies
    assert torch.equal(after.means, expected.means)


def test_the_same_confidence_in_another_class_is_another_answer():
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    after = Doubts().compared(xy(sure, sure))
    assert after.count == 2
    assert after.means.tolist() == [[0.5, 0.5]] * 2


def test_a_camera_that_stands_still_has_little_to_say_of_the_ways():
    still = torch.tensor([[0.6, 0.4]] * 16), torch.tensor([[0.99, 0.01]] * 16)
    doubts = Doubts()
    for _ in range(50):
        doubts = doubts.compared(xy(*still))
    assert doubts.count == pytest.approx(1 / (1 - math.exp(-16 / 32)))


def test_answers_that_cannot_be_compared_change_nothing():
    once = Doubts(since=3.0).compared(xy(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.8, 0.2]])))
    assert once.compared(xy(torch.ones(3, 2) / 2, torch.ones(2, 2) / 2)) == once._replace(since=0.0)
    three = torch.tensor([[0.7, 0.2, 0.1]])
    other = once.compared(xy(three, three))  # another number of classes: what was known is void
    assert other.count == 1
    assert other.means.shape == (2, 3)
    others = once.compared({"x": torch.tensor([[0.7, 0.3]]), "z": torch.tensor([[0.6, 0.4]])})
    assert (others.count, others.ways) == (1, ("x", "z"))


def test_looks_become_rare_and_a_jump_brings_them_back():
    doubts, looks = Doubts(), []
    for batch in range(1, 4097):
        doubts = doubts.passed(2, jumped=False)
        if doubts.due:
            looks.append(batch)
            doubts = doubts._replace(since=0.0)
    gaps = [b - a for a, b in itertools.pairwise(looks)]
    assert looks[:16] == list(range(1, 17))
    assert gaps == sorted(gaps)
    assert gaps[-1] == 64
    doubts = doubts._replace(since=0.0).passed(2, jumped=True)
    assert (doubts.age, doubts.met) == (129, 2)
    assert not doubts.due
    assert doubts._replace(since=9.0).due


def test_a_mixed_stream_has_met_no_domain():
    doubts = Doubts().passed(16, jumped=False).passed(16, jumped=False)
    assert doubts.met == 32
    doubts = doubts.passed(16, jumped=False, mixed=True)
    assert (doubts.age, doubts.met) == (3, 0)
    assert doubts.passed(16, jumped=False).met == 16


def doubts(count=30.0, **told):
    """Of four classes: by way the entropy of every answer, and how much of ln 4 the mean answer's entropy is."""
    ways = []
    for way in WAYS:
        h, whole = told.get(way, told[FOLLOWED])
        ways.append((h, whole))
    means = torch.stack([spread_over(whole) for _, whole in ways])
    return Doubts(count=count, ways=tuple(WAYS), entropies=tuple(h for h, _ in ways), means=means).worked_out()


def spread_over(whole):
    """Four probabilities with that entropy."""
    low, high = 0.25, 1 - 1e-12
    for _ in range(80):
        top = (low + high) / 2
        p = [top, *[(1 - top) / 3] * 3]
        low, high = (top, high) if entropy(p) > whole else (low, top)
    return torch.tensor(p, dtype=torch.float64)


@pytest.mark.parametrize(
    ("told", "way"),
    [
        ({FOLLOWED: (0.3, 1.3), OWN: (0.3, 1.3)}, OWN),  # no worse, and nothing can go wrong with them
        ({FOLLOWED: (0.3, 1.3), OWN: (0.6, 1.3)}, FOLLOWED),
        ({FOLLOWED: (0.3, 1.3), OWN: (0.3, 1.0)}, FOLLOWED),  # as sure, but of the same
        ({FOLLOWED: (0.3, 0.32), OWN: (0.3, 0.32)}, FOLLOWED),  # that tells next to nothing
        ({FOLLOWED: (0.9, 1.3), OWN: (1.2, 1.3), TOGETHER: (0.3, 1.3)}, TOGETHER),  # single instances' ruin it
        ({FOLLOWED: (0.32, 1.3), OWN: (1.2, 1.3), TOGETHER: (0.3, 1.3)}, FOLLOWED),
        ({FOLLOWED: (0.6, 1.3), OWN: (1.2, 1.3), SOURCE: (0.2, 1.3)}, SOURCE),
        ({FOLLOWED: (0.4, 1.3), OWN: (1.0, 1.3), SOURCE: (0.33, 1.2)}, FOLLOWED),  # hardly surer
        ({FOLLOWED: (0.6, 1.3), OWN: (0.6, 1.3), SOURCE: (0.01, 1.3)}, OWN),  # which tells, so that the source is lost
    ],
)
def test_which_way_the_answers_speak_for(told, way):
    assert choose_way(doubts(**told)) == way


def test_one_answer_is_not_asked_to_tell_of_all_classes():
    alone = {FOLLOWED: (0.3, 0.3), OWN: (0.3, 0.3), SOURCE: (0.1, 0.1)}
    assert choose_way(doubts(count=1.0, **alone)) == OWN
    assert choose_way(doubts(count=1.0, **alone | {OWN: (1.2, 1.2)})) == FOLLOWED  # ruined
    one = doubts(count=1.0, **alone)
    others = one._replace(ways=one.ways[:3], entropies=one.entropies[:3], means=one.means[:3]).worked_out()
    assert choose_way(others) == FOLLOWED


def test_a_first_run_of_one_class_keeps_the_source_where_instances_own_statistics_ruin_the_answers():
    run = {FOLLOWED: (0.5, 0.75), OWN: (1.3, 1.35), SOURCE: (0.05, 0.08)}  # all of one class, and the source knows it
    assert choose_way(doubts(**run)._replace(met=16.0)) == SOURCE
    more = run | {FOLLOWED: (0.5, 1.0)}
    assert choose_way(doubts(**more)._replace(met=2000.0)) == FOLLOWED  # by now a stream has shown other classes
    told = run | {OWN: (0.5, 1.2)}  # they are not what classes differ by
    assert choose_way(doubts(**told)._replace(met=16.0)) == OWN
    garbage = {FOLLOWED: (0.5, 1.3), OWN: (1.3, 1.35), SOURCE: (0.4, 0.45)}
    assert choose_way(doubts(**garbage)._replace(met=16.0)) == FOLLOWED


def test_an_old_window_is_preferred_to_instances_that_are_less_sure_alone():
    told = {FOLLOWED: (0.3, 1.3), OWN: (0.32, 1.3)}
    assert choose_way(doubts(**told)) == OWN
    assert choose_way(doubts(**told)._replace(met=16.0)) == OWN
    assert choose_way(doubts(**told)._replace(met=128.0)) == FOLLOWED  # nearly all classes are among them
    few = {FOLLOWED: (0.3, 0.7), OWN: (0.31, 0.7)}
    assert choose_way(doubts(**few)._replace(met=128.0)) == OWN  # more of one class than of all others
    assert choose_way(doubts(**few)._replace(met=5000.0)) == FOLLOWED


def test_imbalance_of_the_answers_by_hand():
    even, one = [0.25] * 4, [1.0, 0.0, 0.0, 0.0]
    half = [0.5, 0.5, 0.0, 0.0]  # 4 (1/4)^2 over (3/4)^2 + 3 (1/4)^2
    means = torch.tensor([even, one, half], dtype=torch.float64)
    known = Doubts(count=1.0, ways=("x", "y", "z"), entropies=(0.1,) * 3, means=means).worked_out()
    assert known.imbalances == pytest.approx((0.0, 1.0, 1 / 3))


def test_without_a_look_and_from_a_few_instances():
    assert choose_way(Doubts()) == FOLLOWED
    told = {FOLLOWED: (0.6, 1.3), OWN: (1.2, 1.3), SOURCE: (0.2, 1.3)}
    assert choose_way(doubts(count=1.0, **told)) == FOLLOWED


def way_of(adapted):
    """The one that the last batch was answered in."""
    (way,) = {record.way for record in adapted._streams[STREAM].records}
    return way


class Counted(nn.Module):
    """A model that counts its calls, and fails at one of them."""

    def __init__(self, model, fails_at=None):
        super().__init__()
        self.inner, self.calls, self.fails_at = model, 0, fails_at

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("out of memory")
        return self.inner(x)


@cache
def digits():
    images, labels = mnist_digits(0)
    return normalized(images[:600]), labels[:600]


def adapted_to(batches, profile=None, model=None, **settings):
    adapted = na.adapt(model or usps_net(), profile, na.Track(**settings))
    with torch.no_grad():
        return adapted, [adapted(batch) for batch in batches]


@dataclasses.dataclass(frozen=True)
class Forced(na.Track):
    """`Track` in one of its ways, whatever the model answers."""

    way: str = FOLLOWED

    def ways(self, *, profiled):
        return {self.way: ""}

    def choose(self, doubts):
        return self.way


class TakesItsOwn(na.Track):
    """`Track` that follows until it has looked, then gives instances their own statistics."""

    def choose(self, doubts):
        return OWN if doubts.count else FOLLOWED


def test_a_look_costs_two_passes_and_only_the_one_that_answered_is_remembered():
    batch = digits()[0][:15]
    adapted = na.adapt(Counted(usps_net()).eval(), policy=TakesItsOwn())
    with torch.no_grad():
        answer = adapted(batch)
    assert adapted.model.calls == 3
    assert adapted._streams[STREAM].composition.doubts.count == 15
    assert way_of(adapted) == OWN
    forced = na.adapt(Counted(usps_net()).eval(), policy=Forced(way=OWN))
    with torch.no_grad():
        assert torch.equal(forced(batch), answer)  # this very batch is answered by what it has told
    assert same(dict(adapted.state_dict()), dict(forced.state_dict()))  # and what a paused model uses, too
    for one, other in zip(adapted._streams[STREAM].records, forced._streams[STREAM].records, strict=True):
        assert (one.count, one.status) == (other.count, other.status) == (15, "tracking, per instance")
        assert torch.equal(one.state.moments, other.state.moments)
        assert torch.equal(one.state.use, other.state.use)


def test_an_answer_in_another_way_has_gradients_and_is_seen_by_observers():
    batch = digits()[0][:4]
    adapted, seen = na.adapt(Counted(usps_net().requires_grad_(True)).eval(), policy=TakesItsOwn()), []
    with adapted.observe(lambda _, shown: seen.append(shown)):
        output = adapted(batch)
    assert adapted.model.calls == 4  # two looks without graphs, and once more in the way that won
    assert way_of(adapted) == OWN
    output.sum().backward()
    assert all(p.grad is not None for p in adapted.parameters())
    assert seen[0].output is output
    assert seen[0].records is adapted._streams[STREAM].records
    assert all(moments.values.shape[1] == 4 for moments in seen[0].moments)


@dataclasses.dataclass(frozen=True)
class Followed(na.Track):
    """`Track` that looks at all ways and keeps to one; with `reads` it is told of its own classes, from 16 on."""

    reads: bool = True

    def choose(self, doubts):
        return FOLLOWED

    def reads_again(self, n):
        return super().reads_again(n) if self.reads else ""


def begun(batches, **settings):
    """An adapted model, and how often the model was called for each batch."""
    adapted, calls = na.adapt(Counted(usps_net()).eval(), policy=Followed(**settings)), []
    for batch in batches:
        with torch.no_grad():
            adapted(batch)
        calls.append(adapted.model.calls - sum(calls))
    return adapted, calls


def further_passes(batches):
    """Passes over each batch that are made to read it again."""
    (_, more), (_, less) = begun(batches), begun(batches, reads=False)
    return [a - b for a, b in zip(more, less, strict=True)]


def test_a_window_is_weighed_again_by_the_classes_of_the_batch_that_it_begins_with():
    images, labels = digits()
    varied, other = images[:64], images[64:128] * 0.2 + 2.0
    # At the beginning and after a jump. A window that was not weighed again gives instances of the second batch
    # statistics of their own, and then there is one way more to compare.
    assert further_passes([varied, varied, other, other]) == [1, -1, 1, 0]
    assert further_passes([varied[:15], varied[15:30]]) == [0, 0]  # so few tell nothing of classes
    assert further_passes([torch.full_like(varied, math.nan)]) == [0]
    (told, _), (plain, _) = begun([varied]), begun([varied], reads=False)
    for one, rest in zip(told._streams[STREAM].records, plain._streams[STREAM].records, strict=True):
        assert one.count == rest.count == 64
        assert one.state.classes.shape == (10,)
        assert one.diagnostics.noise.sum() < 0.7 * rest.diagnostics.noise.sum()
        assert one.diagnostics.weight.mean() > rest.diagnostics.weight.mean()
    same_class = torch.cat([images[labels == 1]] * 2)[:64]
    (told, _), (plain, _) = begun([same_class]), begun([same_class], reads=False)
    for one, rest in zip(told._streams[STREAM].records, plain._streams[STREAM].records, strict=True):
        assert one.diagnostics.noise.sum() > 0.9 * rest.diagnostics.noise.sum()


def test_what_a_batch_tells_of_itself_is_kept_once():
    images = digits()[0][:64]
    told, _ = begun([images])
    plain, _ = begun([images], reads=False)
    mine, theirs = (adapted._streams[STREAM] for adapted in (told, plain))
    assert mine.composition.last_count == theirs.composition.last_count
    assert mine.composition.pairs == theirs.composition.pairs == 63
    assert mine.composition.doubts.count == theirs.composition.doubts.count
    assert mine.composition.doubts.age == 1


@pytest.mark.parametrize("way", ["", "sideways"])
def test_a_choice_that_is_no_way_is_named_and_leaves_no_trace(way):
    class Lost(na.Track):
        def choose(self, doubts):
            return way if doubts.count else FOLLOWED

    adapted = na.adapt(usps_net(), policy=Lost())
    before = adapted.snapshot()
    with pytest.raises(ValueError, match=f"Lost.*must return one of its ways, 'followed', .*got '{way}'"):
        adapted(digits()[0][:16])
    assert same(before, adapted.snapshot())


def test_with_a_profile_there_are_no_instances_of_their_own_to_compare():
    batches = list(digits()[0][:64].split(16))
    profile = na.profile_source(usps_net(), batches)
    adapted, _ = adapted_to([2 * batch for batch in batches], profile)
    doubts = adapted._streams[STREAM].composition.doubts
    assert tuple(doubts.by_way()) == tuple(PROFILED_WAYS) == (FOLLOWED, TOGETHER, SOURCE)
    assert doubts.count > 32
    assert choose_way(doubts) in PROFILED_WAYS


def test_no_look_without_probabilities_or_when_told_not_to():
    batches = list(digits()[0][:64].split(16))
    for profiled, settings, output in (
        (True, {"compares": False}, lambda y: y),
        (False, {"compares": False}, lambda y: y),
        (False, {}, lambda y: {"scores": y}),
    ):
        counted = Counted(usps_net()).eval()
        counted.register_forward_hook(lambda _m, _x, y, output=output: output(y))
        profile = na.profile_source(counted, batches) if profiled else None
        counted.calls = 0
        adapted, _ = adapted_to(batches, profile, counted, **settings)
        assert adapted.model.calls == len(batches)


def test_a_look_that_fails_leaves_no_trace():
    batches = list(digits()[0][:48].split(16))
    model = Counted(usps_net()).eval()
    adapted, _ = adapted_to(batches[:2], model=model)
    before, adapted.model.fails_at = adapted.snapshot(), adapted.model.calls + 2
    with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
        adapted(batches[2])
    assert same(before, adapted.snapshot())
    buffers = {name: tensor.clone() for name, tensor in adapted.model.named_buffers()}
    adapted.restore(before)
    assert same(buffers, dict(adapted.model.named_buffers()))


def test_mixed_digits_keep_to_their_own_statistics_and_a_restart_changes_nothing():
    images = digits()[0][:480].clone()
    images[::2] *= 0.3
    images[1::2] += 0.5
    batches = list(images.split(16))
    adapted, _ = adapted_to(batches[:20])
    assert way_of(adapted) == OWN
    assert adapted._streams[STREAM].composition.doubts.met < 320  # it was found to be mixed on the way
    assert all("per instance" in site.status for site in adapted.report().sites)
    again = na.adapt(usps_net(), None, na.Track())
    again.restore(adapted.snapshot())
    with torch.no_grad():
        for batch in batches[20:]:
            assert torch.equal(adapted(batch), again(batch))
    assert same(adapted.snapshot(), again.snapshot())


def test_a_snapshot_without_what_follows_from_the_rest():
    batches = list(digits()[0][:64].split(16))
    adapted, _ = adapted_to(batches)
    kept = adapted.snapshot()
    older = {k: v for k, v in kept.items() if not any(f"|{f}|" in k for f in ("told", "told_smoothed", "imbalances"))}
    assert len(older) < len(kept)
    again = na.adapt(usps_net(), None, na.Track())
    again.restore(older)
    with torch.no_grad():
        assert torch.equal(again(batches[0]), adapted(batches[0]))
    assert same(again.snapshot(), adapted.snapshot())


def test_a_frozen_model_says_that_instances_lose_their_own_statistics():
    batches = list(digits()[0][:64].split(16))
    adapted = na.adapt(usps_net(), policy=TakesItsOwn())
    with torch.no_grad():
        adapted(batches[0])
    with pytest.warns(UserWarning, match="2 of 2 layers gave each instance statistics of its own"):
        adapted.freeze()
    plain = na.adapt(usps_net(), policy=Followed())
    with torch.no_grad():
        plain(batches[0])
    assert not any(record.status.endswith("per instance") for record in plain._streams[STREAM].records)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.freeze()


@pytest.mark.parametrize("spike", [1e4, 1e30, math.nan])
def test_a_spike_does_not_decide_for_long(spike):
    images = digits()[0]
    batches = list(images[96:576].split(16))
    spiked = [torch.full_like(images[:16], spike)] * 2
    ours, theirs = adapted_to(spiked + batches)[1], adapted_to(batches)[1]
    agree = (torch.cat(ours[-10:]).argmax(1) == torch.cat(theirs[-10:]).argmax(1)).float().mean()
    assert float(agree) > 0.95


class Signals(nn.Module):
    """Tells five classes by the level of one channel, which is most of what instances differ by."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        level = self.norm(x)[:, :1].mean(2)
        return -20 * (level - torch.linspace(-1.35, 1.35, 5)).square()


def signals(n, seed):
    """Series (n, 4, 20) of five classes, and their labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (n,), generator=g)
    x = torch.randn(n, 4, 20, generator=g)
    x[:, 0] = x[:, 0] * 0.3 + torch.linspace(-2, 2, 5)[labels].unsqueeze(1)
    return x, labels


def right(model, x, labels, n):
    with torch.no_grad():
        answers = torch.cat([model(batch) for batch in x.split(n)])
    return float((answers.argmax(1) == labels).float().mean())


@pytest.mark.parametrize(("n", "profiled"), [(1, False), (16, False), (16, True)])
def test_what_instances_show_is_not_taken_for_their_domain(n, profiled):
    model = Signals()
    x, _ = signals(2000, 0)
    model.norm.running_mean, model.norm.running_var = x.mean((0, 2)), x.var((0, 2))
    model.eval().requires_grad_(False)
    profile = na.profile_source(model, x.split(100)) if profiled else None
    x, labels = signals(400, 1)
    gain = torch.tensor([0.5, 4.0])[torch.arange(400) % 2]
    x[:, 1:] *= gain.view(-1, 1, 1)  # the other channels' gain differs from instance to instance
    alone, adapted = na.adapt(model, profile, na.Track(compares=False)), na.adapt(model, profile)
    assert right(model, x, labels, n) > 0.95
    assert right(alone, x, labels, n) < 0.7  # by its scales the stream is mixed, and every instance loses its level
    assert right(adapted, x, labels, n) > 0.95
    assert way_of(adapted) == TOGETHER


def test_another_policy_takes_over_the_statistics_at_once():
    batches = list(digits()[0][:64].split(16))
    adapted, _ = adapted_to(batches)
    stream = adapted._streams[STREAM]
    kept = stream.composition.doubts._replace(
        age=1000.0, entropies=(0.6, 0.6, 0.1, 2.2), means=torch.full((4, 10), 0.1).double()
    ).worked_out()
    adapted._streams[STREAM] = stream._replace(composition=stream.composition._replace(doubts=kept))
    with torch.no_grad():
        adapted(batches[0])
    assert {site.status for site in adapted.report().sites} <= {"source: surer", "new window"}
    assert same(dict(adapted.state_dict()), dict(usps_net().state_dict()))
    adapted.policy = na.Track(compares=False)
    with torch.no_grad():
        adapted(batches[1])
    use = [record.state.use for record in adapted._streams[STREAM].records]
    for site, source, shift in zip(adapted.sites, adapted.sources, use, strict=True):
        deviation = (source.variance + source.eps).sqrt()
        written = site.buffers()[0].double()
        assert torch.allclose(written, source.mean + shift[0] * deviation, atol=1e-4)
    assert float(use[0].abs().max()) > 0.1


def test_a_model_without_probabilities_computes_its_weights_as_seldom_as_ever():
    counted = Counted(usps_net()).eval()
    counted.register_forward_hook(lambda _m, _x, y: {"scores": y})
    adapted, _ = adapted_to([digits()[0][:16]] * 30, model=counted)
    assert adapted._streams[STREAM].records[0].state.pending > 0


class Sequenced(na.Track):
    """`Track` in two ways; the second from more than thirty compared instances on."""

    def ways(self, *, profiled):
        return {FOLLOWED: "", SOURCE: ""}

    def choose(self, doubts):
        return SOURCE if doubts.count > 30 else FOLLOWED


def test_what_a_window_has_met_is_that_of_the_pass_that_is_remembered():
    @dataclasses.dataclass(frozen=True)
    class Jumps(Sequenced):
        where: str = FOLLOWED

        def step(self, state, evidence, source):
            after, statistics = super().step(state, evidence, source)
            return after, statistics._replace(jumped=evidence.way == self.where and evidence.count == 16)

    class Keeps(Jumps):
        def remembers(self, way):
            return way

    # The last batch is passed in both, and answered in SOURCE.
    for policy, met in (
        (Jumps(where=FOLLOWED), 16),
        (Jumps(where=SOURCE), 48),
        (Keeps(where=FOLLOWED), 48),
        (Keeps(where=SOURCE), 16),
    ):
        adapted = na.adapt(usps_net(), policy=policy)
        images = digits()[0]
        with torch.no_grad():
            for batch in (images[:12], images[12:32], images[32:48]):
                adapted(batch)
        assert way_of(adapted) == SOURCE
        assert adapted._streams[STREAM].composition.doubts.met == met


def test_with_the_source_in_use_deeper_sites_learn_from_adapted_inputs_alone():
    class Unheard(na.Track):  # the predicted classes count for nothing: they differ with the way
        def step(self, state, evidence, source):
            return super().step(state, evidence._replace(composition=None), source)

    class Unadapted(Unheard):
        def choose(self, doubts):
            return SOURCE

    images = 3 * digits()[0][:160] + 1
    adapted, followed = na.adapt(usps_net(), policy=Unadapted()), na.adapt(usps_net(), policy=Unheard(compares=False))
    looked = []
    with torch.no_grad():
        for batch in images.split(8):
            before = adapted._streams[STREAM].records
            assert same(adapted(batch), usps_net()(batch))
            after = adapted._streams[STREAM]
            if after.composition.doubts.since == 0:
                looked.append(batch)
                followed(batch)
                for mine, other in zip(after.records[1:], followed._streams[STREAM].records[1:], strict=True):
                    # But for when the weights were computed last: here at every look.
                    assert torch.allclose(mine.state.moments, other.state.moments, atol=0.05)
            else:
                assert all(mine.state is kept.state for mine, kept in zip(after.records[1:], before[1:], strict=True))
            assert after.records[0].count == before[0].count + 8
    assert 16 <= len(looked) < 20
    report = adapted.report()
    assert {site.status for site in report.sites} == {"source: surer"}
    assert all(site.mean_weight == site.variance_weight == 0 for site in report.sites)
    assert report.sites[1].effective_count > 8
    assert same(dict(adapted.state_dict()), dict(usps_net().state_dict()))


def test_what_a_site_finds_mixed_is_mixed_for_the_stream():
    class Finds(Sequenced):
        def step(self, state, evidence, source):
            after, statistics = super().step(state, evidence, source)
            return after, statistics._replace(mixed=source.name == "features.1" and evidence.count == 16)

    adapted = na.adapt(usps_net(), policy=Finds())
    images = digits()[0]
    met = []
    with torch.no_grad():
        for batch in (images[:12], images[12:28], images[28:48]):
            adapted(batch)
            met.append(adapted._streams[STREAM].composition.doubts.met)
    assert met == [12, 0, 20]


def test_a_site_that_skips_a_batch_keeps_the_way_that_its_statistics_are_of():
    images = digits()[0]
    adapted = na.adapt(usps_net(), policy=Sequenced())
    source = dict(usps_net().state_dict())
    with torch.no_grad():
        adapted(images[:44])
        assert way_of(adapted) == SOURCE
        adapted.policy = Forced(way=FOLLOWED)
        adapted(torch.full_like(images[:4], math.nan))
        assert way_of(adapted) == SOURCE
        assert same(dict(adapted.state_dict()), source)
        adapted(images[44:46])  # too few for the weights to be due
    assert way_of(adapted) == FOLLOWED
    assert not same(dict(adapted.state_dict()), source)


def test_instances_that_are_not_finite_inside_are_not_compared():
    class Hides(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = usps_net()

        def forward(self, x):
            return self.inner(x).nan_to_num(0.0) + torch.eye(10)[3]  # sure enough to count

    images = digits()[0][:16].clone()
    images[5] = math.nan
    adapted = na.adapt(Hides().eval())
    with torch.no_grad():
        adapted(images)
    assert adapted._streams[STREAM].composition.doubts.count == 15


def test_an_answer_that_two_ways_share_is_not_computed_anew_for_the_second():
    weighed = []

    class Shared(na.Track):
        def ways(self, *, profiled):
            return {FOLLOWED: "", TOGETHER: FOLLOWED}

        def choose(self, doubts):
            return TOGETHER if doubts.count else FOLLOWED

        def _weigh(self, *args):
            weighed.append(args)
            return super()._weigh(*args)

    adapted = na.adapt(Counted(usps_net()).eval(), policy=Shared())
    images = digits()[0]
    with torch.no_grad():
        adapted(images[:100])
        assert adapted.model.calls == 2  # the second knew the classes
        assert way_of(adapted) == TOGETHER
        weighed.clear()
        doubts = adapted._streams[STREAM].composition.doubts
        assert doubts.ways == (FOLLOWED, TOGETHER)
        adapted.policy = Forced(way=TOGETHER)
        adapted(images[100:102])
    assert not weighed
