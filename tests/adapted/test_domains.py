"""`Domains` on whole streams: what a user of the default policy may rely on, with a source profile."""

import copy
import io
import threading

import pytest
import torch

import normadapt as na
from models import CASES, Views, calibrate, same
from worlds import CLASSES, LABELS, SHIFTS, X, adapted_model, answers, draws, images, right, trained

SIZES = (1, 4, 16, 64)


def stream(n):
    """Clean images and their labels, fewer where each is a batch."""
    return (X[:96], LABELS[:96]) if n == 1 else (X, LABELS)


def accuracy_of_source(x, labels):
    return right(trained(), x, labels, 64)


# -- clean and shifted streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_source_data_keep_the_source(n):
    x, _ = stream(n)
    source = answers(trained(), x, n)
    adapted = adapted_model()
    ours = answers(adapted, x, n)
    assert float((ours.argmax(1) == source.argmax(1)).float().mean()) >= 0.985
    assert adapted.domains[0].seen > 0.95 * len(x)
    assert adapted.domains[0].shift < 0.05


@pytest.mark.parametrize(("shift", "n"), [*((s, 16) for s in SHIFTS), *(("both", n) for n in (1, 4, 64)), ("noise", 1)])
def test_shifted_data_are_answered_like_clean_ones(shift, n):
    x, _ = stream(n)
    moved, clean = SHIFTS[shift](x), answers(trained(), x, 64).argmax(1)
    source, ours = (float((a.argmax(1) == clean).float().mean()) for a in (
        answers(trained(), moved, n), answers(adapted_model(), moved, n)
    ))  # fmt: skip
    # What is lost in noise, no statistics bring back.
    assert ours >= source - 0.01 if shift == "noise" else ours > source + 0.6 * (1 - source)


def test_the_size_of_the_batches_hardly_matters():
    moved = SHIFTS["both"](X[:128])
    reached = [right(adapted_model(), moved, LABELS[:128], n) for n in SIZES]
    assert max(reached) - min(reached) < 0.03


@pytest.mark.parametrize("n", [1, 16])
def test_in_a_mixed_stream_every_instance_has_its_own_domains_statistics(n):
    domain = torch.randint(3, (len(X),), generator=torch.Generator().manual_seed(1))
    kinds = (lambda x: x, SHIFTS["contrast"], SHIFTS["brightness"])
    moved = torch.stack([kinds[k](x) for x, k in zip(X, domain.tolist(), strict=True)])
    adapted = adapted_model()
    ours, clean = right(adapted, moved, LABELS, n), accuracy_of_source(X, LABELS)
    assert accuracy_of_source(moved, LABELS) < clean - 0.1
    assert ours > clean - 0.04
    if n > 1:
        together = right(na.adapt(trained(), policy=na.baselines.BatchStatistics()), moved, LABELS, n)
        assert ours > together + 0.05
        assert any(site.status.endswith("per instance") for site in adapted.report().sites)


@pytest.mark.parametrize("n", [1, 16])
def test_what_comes_in_turn_is_found_and_what_comes_back_is_known(n):
    parts = (X[:64], SHIFTS["both"](X[64:128]), X[128:160], SHIFTS["both"](X[160:]))
    adapted, present = adapted_model(), []
    for part in parts:
        answers(adapted, part, n)
        present.append(adapted.domain.number)
    assert present[0] == present[2] == 0
    assert present[1] == present[3] != 0
    found = next(d for d in adapted.domains if d.number == present[1])
    assert 60 <= found.since <= 70
    assert found.last == 192
    assert found.seen >= 90


def in_runs(n, seed):
    g = torch.Generator().manual_seed(20_000 + seed)
    lengths = torch.randint(10, 31, (n // 10 + 1,), generator=g)
    return torch.randint(CLASSES, lengths.shape, generator=g).repeat_interleave(lengths)[:n]


@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("kind", ["runs", "one class"])
def test_classes_that_do_not_come_in_turn_are_no_shift(n, kind):
    """Runs of one class, or nine in ten of one class: clean, the source is kept; shifted, the shift is mended."""
    g = torch.Generator().manual_seed(3)
    mostly = torch.where(torch.rand(200, generator=g) < 0.9, 2, torch.randint(CLASSES, (200,), generator=g))
    labels = in_runs(200, 3) if kind == "runs" else mostly
    labels = labels[: 100 if n == 1 else 200]
    x = images(labels, 11)
    source = accuracy_of_source(x, labels)
    assert right(adapted_model(), x, labels, n) >= source - 0.015
    moved = SHIFTS["contrast"](x)
    of_source, ours = accuracy_of_source(moved, labels), right(adapted_model(), moved, labels, n)
    assert ours > of_source + 0.5 * (source - of_source)


@pytest.mark.parametrize("shift", [0.5, 1.2])
def test_a_model_that_predicts_one_class_for_everything_still_adapts(shift):
    def always(output):
        return torch.nn.functional.one_hot(torch.zeros(len(output), dtype=torch.long), CLASSES).float()

    source = na.profile_source(trained(), images(draws(400, 2), 2).split(100), predictions=always)
    adapted = na.adapt(trained(), source, predictions=always)
    answers(adapted, X + shift, 16)
    with torch.no_grad():
        moved = trained()[0](X + shift).mean((0, 2, 3)) - trained()[1].running_mean
    used = adapted.state_dict()["1.running_mean"] - trained()[1].running_mean
    assert float(used @ moved / (moved @ moved)) > 0.6


# -- what no instance may do -------------------------------------------------------------------------------------------


def hot(x):
    """One pixel a million times as bright as all others."""
    y = x.clone()
    y[..., 3, 4] = 1e6
    return y


ABSURD = {
    "hot pixel": hot,
    "times 1e6": lambda x: 1e6 * x,
    "black": torch.zeros_like,
    "white": lambda x: torch.full_like(x, 30.0),
    "nan": lambda x: x * float("nan"),
    "inf": lambda x: x + float("inf"),
}


@pytest.mark.parametrize("kind", ABSURD)
@pytest.mark.parametrize("together", [False, True])
def test_an_absurd_instance_changes_nobody_elses_answer(kind, together):
    moved = SHIFTS["contrast"](X[:96])
    spoiled, plain = adapted_model(), adapted_model()
    absurd, ours, theirs = ABSURD[kind](X[:1]), [], []
    for k, batch in enumerate(moved.split(8)):
        theirs.append(answers(plain, batch, 8))
        if k % 2 == 0 and together:
            ours.append(answers(spoiled, torch.cat((batch[:3], absurd, batch[3:])), 9)[[0, 1, 2, 4, 5, 6, 7, 8]])
        else:
            ours.append(answers(spoiled, batch, 8))
            if k % 2 == 0:
                answers(spoiled, absurd, 1)
    torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=1e-3, atol=1e-3)
    assert all(bool(value.double().isfinite().all()) for value in spoiled.snapshot().values())
    assert [d.seen for d in spoiled.domains] == [d.seen for d in plain.domains]


def test_poisoned_instances_in_a_clean_stream_cost_clean_ones_nothing():
    """One in twenty is another kind of image altogether."""
    g = torch.Generator().manual_seed(9)
    x, poisoned = X.clone(), torch.rand(len(X), generator=g) < 0.05
    x[poisoned] = 3 * torch.randn(int(poisoned.sum()), *X.shape[1:], generator=g).sign()
    source = answers(trained(), x, 16).argmax(1)[~poisoned]
    ours = answers(adapted_model(), x, 16).argmax(1)[~poisoned]
    assert float((ours == source).float().mean()) > 0.985


@pytest.mark.parametrize("n", [1, 16])
def test_a_frame_repeated_three_hundred_times_counts_as_one(n):
    frame, other = SHIFTS["both"](X[:1]), SHIFTS["both"](X[1:17])
    still, once = adapted_model(), adapted_model()
    for adapted, times in ((still, 300), (once, 1)):
        answers(adapted, frame.expand(times, -1, -1, -1), n)
    mine, theirs = (windows(adapted) for adapted in (still, once))
    assert mine.keys() == theirs.keys()
    for key, (count, sums) in mine.items():
        assert count == theirs[key][0]
        torch.testing.assert_close(sums, theirs[key][1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answers(still, other, 4), answers(once, other, 4), rtol=1e-3, atol=1e-3)


def windows(adapted):
    """Count and sums of every window, by domain and site."""
    bank = adapted._streams["default"].memory.bank
    return {
        (d.number, k): (window.count, window.sums)
        for d in bank.domains
        for k, window in enumerate(d.windows)
        if window.count
    }


def test_windows_hold_all_that_came_whatever_the_batches():
    moved, found = SHIFTS["contrast"](X[:96]), []
    for n in (1, 8, 96):
        adapted = adapted_model()
        answers(adapted, moved, n)
        found.append({key: value for key, value in windows(adapted).items() if key[1] == 0})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, (count, sums) in other.items():
            assert count == found[0][key][0]
            torch.testing.assert_close(sums, found[0][key][1], rtol=1e-5, atol=1e-5)


# -- layers of other kinds ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 8])
def test_a_layer_that_is_called_twice_is_one_site_and_clean_data_keep_the_source(n):
    case = CASES["twice"]
    model = case.model()
    calibrate_twice(model, case)
    source_profile = na.profile_source(model, case.source(256, seed=100).split(64))
    adapted, x = na.adapt(model, source_profile), case.source(120, seed=3)
    source, ours = answers(model, x, n), answers(adapted, x, n)
    assert float((ours - source).abs().mean()) < 0.1 * float(source.std())
    assert {count for count, _ in windows(adapted).values()} == {120}


def calibrate_twice(model, case):
    calibrate(model, lambda: model(case.source(512, seed=200)))


@pytest.mark.parametrize("mixed", [False, True])
def test_rows_that_are_folded_into_the_batch_are_of_one_instance(mixed):
    torch.manual_seed(0)
    model = Views().eval()
    g = torch.Generator().manual_seed(1)

    def draw(n):
        return 0.4 * torch.randn(n, 1, 3, 1, 1, generator=g) + torch.randn(n, 4, 3, 8, 8, generator=g)

    calibrate(model, lambda: model(draw(256)))
    adapted = na.adapt(model, na.profile_source(model, draw(256).split(64)))
    x = draw(64)
    moved = x.clone()
    moved[::2] = 0.3 * x[::2] + 1 if mixed else x[::2]
    ours, source, clean = answers(adapted, moved, 8), answers(model, moved, 8), answers(model, x, 8)
    assert adapted.report().sites[0].count == 256  # rows
    assert sum(d.seen for d in adapted.domains) == 64  # instances
    if mixed:
        assert float((ours[32:] - clean[32:]).abs().mean()) < 0.6 * float((source[32:] - clean[32:]).abs().mean())
    else:
        assert float((ours - source).abs().mean()) < 0.1 * float(source.std())
    broken = x[:8].clone()
    broken[2, 1] = float("nan")  # one view of one instance
    rest = answers(adapted, broken, 8)[[0, 1, 3, 4, 5, 6, 7]]
    assert bool(rest.isfinite().all())
    assert all(bool(value.double().isfinite().all()) for value in adapted.snapshot().values())


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "n"), [("deepcopy", 16), ("torch.save", 16), ("snapshot", 16), ("snapshot", 1)])
def test_a_restart_in_mid_stream_changes_nothing(how, n):
    x = torch.cat((X[:32], SHIFTS["both"](X[32:64]), X[64:96], SHIFTS["both"](X[96:128])))
    adapted = adapted_model()
    answers(adapted, x[:48], n)
    adapted.name_domain(adapted.domain.number, "night")
    if how == "deepcopy":
        twin = copy.deepcopy(adapted)
    else:
        file = io.BytesIO()
        torch.save(adapted if how == "torch.save" else adapted.snapshot(), file)
        file.seek(0)
        twin = torch.load(file, weights_only=how == "snapshot")
        if how == "snapshot":
            state, twin = twin, adapted_model()
            twin.restore(state)
    assert twin.domains == adapted.domains
    assert str(twin.report()) == str(adapted.report())
    assert same(answers(twin, x[48:], n), answers(adapted, x[48:], n))
    assert same(twin.snapshot(), adapted.snapshot())
    assert [d.name for d in twin.domains][1] == "night"


def test_a_failing_pass_leaves_no_trace_of_a_new_domain():
    adapted = adapted_model()
    answers(adapted, X[:32], 16)
    before, known = adapted.snapshot(), adapted.domains
    handle = adapted.model[6].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers(adapted, SHIFTS["both"](X[32:48]), 16)
    handle.remove()
    assert same(adapted.snapshot(), before)
    assert adapted.domains == known


def test_streams_in_threads_keep_their_domains_apart():
    kinds = {"day": lambda x: x, **SHIFTS}
    adapted, barrier, failures = adapted_model(), threading.Barrier(len(kinds)), []

    def work(name):
        barrier.wait()
        try:
            for batch in kinds[name](X[:64]).split(8):
                with adapted.stream(name), torch.no_grad():
                    adapted(batch)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not failures
    for name in kinds:
        alone = adapted_model()
        answers(alone, kinds[name](X[:64]), 8)
        with adapted.stream(name):
            assert adapted.domains == alone.domains
            assert same(dict(adapted.state_dict()), dict(alone.state_dict()))


# -- what a user is told, and may do -----------------------------------------------------------------------------------


def met():
    """An adapted model that has met the source and a domain of low contrast, and is in the latter."""
    adapted = adapted_model()
    answers(adapted, torch.cat((X[:64], SHIFTS["contrast"](X[64:128]))), 16)
    return adapted


def test_domains_in_a_users_words():
    adapted = met()
    source, dim = adapted.domains
    assert (source.name, source.is_source, source.is_present) == ("source", True, False)
    assert (dim.is_source, dim.is_present) == (False, True)
    assert adapted.domain == dim
    assert source.seen + dim.seen == 128
    assert source.look == "as the source"
    assert dim.look.startswith("contrast 0.3")
    assert "gain 0.25" in dim.resembles
    assert source.shift < 0.05 < 0.3 < dim.shift
    assert 0 <= source.sure < 0.5 < dim.sure <= 1
    for part in (dim.look, "gain 0.25", "64 seen"):
        assert part in str(dim)
        assert part in str(adapted.report())
    assert type(dim).from_dict(dim.to_dict()) == dim
    assert adapted.report().domains == adapted.domains


def test_before_the_first_batch_and_for_another_policy():
    fresh = adapted_model()
    assert fresh.domains == ()
    assert fresh.domain is None
    other = adapted_model(na.Blend())
    answers(other, X[:16], 16)
    assert other.domains == ()
    assert other.domain is None
    with pytest.raises(KeyError, match="no domain 0"):
        other.name_domain(0, "day")


def test_a_named_domain_keeps_its_name():
    adapted = met()
    adapted.name_domain(1, "dusk")
    answers(adapted, torch.cat((X[:16], SHIFTS["contrast"](X[:16]))), 16)
    assert (adapted.domain.number, adapted.domain.name) == (1, "dusk")
    adapted.name_domain("dusk", "dawn")
    assert adapted.domain.name == "dawn"
    adapted.name_domain(0, "day")
    for wrong, error in (("day", ValueError), ("", ValueError), ("  ", ValueError), (3, ValueError)):
        with pytest.raises(error):
            adapted.name_domain(1, wrong)
    with pytest.raises(KeyError, match="no domain 'noon' in this stream; there are 'day', 'dawn'"):
        adapted.name_domain("noon", "x")
    with adapted.stream("other"):
        assert "dawn" not in [d.name for d in adapted.domains]


def test_a_domain_goes_by_the_name_that_is_shown():
    adapted = met()
    for shown in adapted.domains:
        frozen = adapted.freeze(domain=shown.name)
        assert same(dict(frozen.state_dict()), dict(adapted.freeze(domain=shown.number).state_dict()))


def test_a_forgotten_domain_is_met_anew():
    adapted = met()
    adapted.forget_domain(1)
    assert [d.number for d in adapted.domains] == [0]
    with pytest.raises(KeyError):
        adapted.forget_domain(1)
    again = answers(adapted, SHIFTS["contrast"](X[:32]), 16)
    assert adapted.domain.number == 2
    fresh = adapted_model()
    answers(fresh, X[:64], 16)
    torch.testing.assert_close(again, answers(fresh, SHIFTS["contrast"](X[:32]), 16), rtol=0.1, atol=0.3)
    adapted.forget_domain(0)
    assert adapted.domains[0].is_source
    assert adapted.domains[0].seen == 0
    answers(adapted, X[:16], 16)
    assert adapted.domain.number == 0


def test_freezing_a_domain_bakes_in_its_own_statistics():
    adapted, x = met(), X[128:]
    present, source, dim = adapted.freeze(), adapted.freeze(domain=0), adapted.freeze(domain=1)
    assert same(dict(present.state_dict()), dict(dim.state_dict()))
    clean = accuracy_of_source(x, LABELS[128:])
    assert right(source, x, LABELS[128:], 64) > clean - 0.02
    assert right(dim, SHIFTS["contrast"](x), LABELS[128:], 64) > clean - 0.03
    assert right(source, SHIFTS["contrast"](x), LABELS[128:], 64) < clean - 0.1
    with pytest.raises(KeyError, match="no domain 7"):
        adapted.freeze(domain=7)
    with adapted.paused():  # and freezing changed nothing
        torch.testing.assert_close(answers(adapted, x, 64), answers(present, x, 64), rtol=0, atol=0)


def test_freezing_a_domain_without_evidence_gives_the_source():
    adapted = adapted_model()
    answers(adapted, SHIFTS["contrast"](X), 16)
    assert adapted.domains[0].seen == 0
    assert same(answers(adapted.freeze(domain=0), X, 64), answers(trained(), X, 64))


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("n", [1, 16])
def test_no_statistic_weighs_more_than_the_largest_weight_allowed(weight, n):
    moved = SHIFTS["brightness"](X[: 40 if n == 1 else 96])
    free, held = adapted_model(), adapted_model(na.Domains(max_weight=weight))
    for adapted in (free, held):
        answers(adapted, moved, n)
    layer = trained()[1]
    ours, all_of_it = (a.state_dict()["1.running_mean"] - layer.running_mean for a in (held, free))
    torch.testing.assert_close(ours, weight * all_of_it, rtol=0.05, atol=0.02)
    if weight == 0:
        assert same(answers(held, moved, n), answers(trained(), moved, n))
        assert held.domain.number != 0  # and yet it is recognized


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_recognizes_the_same(dtype):
    x = torch.cat((X[:48], SHIFTS["contrast"](X[48:96])))
    half, full = adapted_model().to(dtype), adapted_model()
    ours, theirs = answers(half, x.to(dtype), 16).float(), answers(full, x, 16)
    assert [d.number for d in half.domains] == [d.number for d in full.domains]
    assert float((ours.argmax(1) == theirs.argmax(1)).float().mean()) > 0.96
