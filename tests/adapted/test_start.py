"""Without source data: a stream's own first inputs are measured and rehearsed, at the price of one pass a batch."""

import warnings

import pytest
import torch
from torch import nn

import normadapt as na
from models import CASES, NET, same
from normadapt.errors import NormadaptError
from worlds import CLASSES, LABELS, SHIFTS, X, answers, draws, images, right, trained

LONG = draws(320, 15)


def fresh():
    return na.adapt(trained())


@pytest.mark.parametrize("n", [1, 5, 15])
def test_until_sixteen_inputs_are_seen_the_source_answers(n):
    adapted = fresh()
    x = SHIFTS["both"](X[:15])
    assert same(answers(adapted, x, n), answers(trained(), x, n))
    assert same(dict(adapted.state_dict()), dict(trained().state_dict()))
    assert f"{15 // n * n} of 64 first inputs seen; the source answers" in str(adapted.report())


@pytest.mark.parametrize("n", [4, 16, 64])
def test_shifted_from_the_first_input_on_it_is_mended_and_meanwhile_costs_nothing(n):
    x, labels = SHIFTS["both"](images(LONG, 15)), LONG
    adapted = fresh()
    ours = answers(adapted, x, n).argmax(1) == labels
    source = answers(trained(), x, 64).argmax(1) == labels
    assert float(ours[:64].float().mean()) >= float(source[:64].float().mean()) - 0.02
    assert float(ours[192:].float().mean()) > float(source[192:].float().mean()) + 0.3
    assert not any(d.is_source for d in adapted.domains)


@pytest.mark.xfail(reason="these 64 clean inputs are taken for several domains: 13 are found, 3 points lost")
@pytest.mark.parametrize("n", [4, 16])
def test_clean_from_the_first_input_on_the_source_is_hardly_left(n):
    labels, x = LONG, images(LONG, 15)
    source, ours = right(trained(), x, labels, n), right(fresh(), x, labels, n)
    assert ours > source - 0.02


def test_a_stream_that_is_mixed_from_its_first_input_on():
    kinds = (lambda x: x, SHIFTS["contrast"], SHIFTS["brightness"])
    domain = torch.arange(320) % 3
    x = torch.stack([kinds[k](image) for image, k in zip(images(LONG, 15), domain.tolist(), strict=True)])
    adapted = fresh()
    ours = answers(adapted, x, 16).argmax(1) == LONG
    source = answers(trained(), x, 16).argmax(1) == LONG
    assert float(ours[128:].float().mean()) > float(source[128:].float().mean()) + 0.05


@pytest.mark.parametrize("n", [1, 3, 16, 100])
def test_no_answer_waits_for_more_than_one_further_pass_of_its_own_size(n):
    adapted, rows = fresh(), []
    adapted.model[0].register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    for batch in images(LONG[: max(8 * n, 24)], 15).split(n):
        rows.clear()
        answers(adapted, batch, n)
        assert rows[-1] == len(batch)
        assert len(rows) <= 2
        assert sum(rows[:-1]) <= len(batch)


def test_in_the_end_one_pass_a_batch():
    adapted, rows = fresh(), []
    many = images(draws(1600, 16), 16)
    answers(adapted, many, 100)
    adapted.model[0].register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    answers(adapted, X[:64], 16)
    assert rows == [16] * 4
    assert "Rehearsed on the stream's own first 64 inputs, which were taken for one domain" in str(adapted.report())


def test_rehearsing_at_once_needs_no_start():
    x = SHIFTS["both"](images(LONG, 15))
    adapted = fresh()
    adapted.rehearse(x[:96].split(32))
    before = [site.count for site in adapted.report().sites]
    ours = answers(adapted, x[96:], 16).argmax(1) == LONG[96:]
    assert before == [0, 0]  # rehearsed inputs are no evidence
    assert float(ours.float().mean()) > 0.8
    assert "Rehearsed on the stream's own first 96 inputs" in str(adapted.report())


def test_rehearsing_is_refused_where_it_makes_no_sense():
    with pytest.raises(NormadaptError, match="at least 16 finite instances; the loader gave 9"):
        fresh().rehearse([X[:9]])
    with pytest.raises(TypeError, match="pass a list"):
        fresh().rehearse(X)
    for adapted in (na.adapt(trained(), policy=na.Blend()), NET.adapted()):
        with pytest.raises(NormadaptError, match="without a source profile"):
            adapted.rehearse([X])


def test_streams_start_for_themselves_and_begin_anew_after_a_reset():
    adapted = fresh()
    for name, shift in (("dim", "contrast"), ("bright", "brightness")):
        with adapted.stream(name):
            answers(adapted, SHIFTS[shift](X[:96]), 16)
    alone = fresh()
    answers(alone, SHIFTS["brightness"](X[:96]), 16)
    with adapted.stream("bright"):
        assert same(dict(adapted.state_dict()), dict(alone.state_dict()))
        adapted.reset("bright")
    with adapted.stream("bright"):
        x = SHIFTS["contrast"](X[:15])
        assert same(answers(adapted, x, 15), answers(trained(), x, 15))
    with adapted.stream("dim"):
        answers(adapted, SHIFTS["contrast"](X[96:112]), 16)
        assert adapted.report().sites[0].count == 112


@pytest.mark.parametrize("seen", [8, 40, 320])
def test_a_restart_in_mid_start_goes_on_like_a_copy(seen):
    adapted = fresh()
    answers(adapted, SHIFTS["both"](images(LONG, 15))[:seen], 8)
    state = adapted.snapshot()
    twin = fresh()
    twin.restore(state)
    assert same(twin.snapshot(), state)
    assert same(dict(twin.state_dict()), dict(adapted.state_dict()))
    with twin.paused(), adapted.paused():
        assert same(answers(twin, X, 64), answers(adapted, X, 64))


@pytest.mark.parametrize("name", ["1d", "1d-series", "2d", "3d", "twice", "keywords"])
def test_every_kind_of_model_starts(name):
    case = CASES[name]
    model = case.model()
    adapted = na.adapt(model)
    with torch.no_grad():
        for i in range(15):
            assert bool(case.call(adapted, case.target(16, seed=i)).isfinite().all())
        x = case.target(64, seed=99)
        with adapted.paused():
            ours = case.call(adapted, x)
        source = case.call(model, x)
        exact = case.call(na.recalibrate(model, [case.item(case.target(512, seed=50))]), x)
    assert float((ours - exact).abs().mean()) < 0.6 * float((source - exact).abs().mean())


def test_broken_instances_among_the_first_are_left_out():
    plain, spoiled = fresh(), fresh()
    x = SHIFTS["both"](X[:96])
    broken = torch.full((1, *X.shape[1:]), float("nan"))
    for batch in x.split(8):
        answers(plain, batch, 8)
        answers(spoiled, torch.cat((batch, broken)), 9)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(spoiled.state_dict()[key], value, rtol=1e-3, atol=1e-3)


class Fails(nn.Module):
    """A model that fails when it is told to."""

    def __init__(self):
        super().__init__()
        self.inner, self.fails = trained(), False

    def forward(self, x):
        y = self.inner(x)
        if self.fails:
            raise RuntimeError("out of memory")
        return y


def test_a_pass_that_fails_counts_no_input_twice():
    adapted, plain = na.adapt(Fails().eval()), na.adapt(Fails().eval())
    x = SHIFTS["both"](X)
    for k, batch in enumerate(x.split(16)):
        if k % 3 == 1:
            adapted.model.fails = True
            with pytest.raises(RuntimeError, match="out of memory"):
                answers(adapted, batch, 16)
            adapted.model.fails = False
        assert same(answers(adapted, batch, 16), answers(plain, batch, 16))


@pytest.mark.xfail(reason="87 for 93 %: without source data a run of one class is taken for the domain's mean")
def test_a_first_stretch_of_one_class_that_is_clean_keeps_the_source():
    labels = torch.cat((torch.full((80,), 2), draws(160, 21) % CLASSES))
    x = images(labels, 21)
    source, ours = right(trained(), x, labels, 8), right(fresh(), x, labels, 8)
    assert ours > source - 0.02


def test_nothing_is_said_aloud():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answers(fresh(), X[: len(LABELS)], 32)
