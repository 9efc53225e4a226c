"""Nothing shares memory with what others may write: the source stays exact, and a stream its own."""

import copy

import pytest
import torch
from torch import nn

import normadapt as na
from models import CASES, NET, same
from worlds import SHIFTS, X, adapted_model, answers, trained

STREAM = SHIFTS["contrast"](X[:64])


def norms(model):
    return [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), torch.Tensor)]


def reset(adapted):
    for layer in norms(adapted):
        layer.reset_running_stats()


def write_into_state_dict(adapted):
    for name, value in adapted.state_dict().items():
        if "running" in name:  # parameters are shared with the original, as they should be
            value.fill_(7.0)


def broadcast(adapted):
    """As DistributedDataParallel does before a forward: another rank's buffers, copied over this one's."""
    for name, buffer in adapted.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.full_like(buffer, 3.0 if "var" in name else -5.0))


def average(adapted):
    """As averaging of weights does, with another model's."""
    for buffer in adapted.buffers():
        if buffer.is_floating_point():
            buffer.mul_(0.5).add_(1.0)


def behind_autograds_back(adapted):
    for buffer in adapted.buffers():
        buffer.data.copy_(torch.full_like(buffer, 9))


WRITERS = (reset, write_into_state_dict, broadcast, average, behind_autograds_back)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("when", ["before", "between", "inside"])
def test_whatever_is_written_into_the_layers_the_source_answers_as_the_original(write, when):
    weights = {k: v.clone() for k, v in trained().state_dict().items()}
    source = answers(trained(), X, 64)
    adapted = adapted_model()
    if when == "before":
        write(adapted)
    answers(adapted, STREAM, 16)
    if when == "between":
        write(adapted)
    with adapted.as_source():
        if when == "inside":
            write(adapted)
        assert same(answers(adapted, X, 64), source)
    assert same(dict(trained().state_dict()), weights)


@pytest.mark.parametrize("write", [reset, broadcast, average, write_into_state_dict])
def test_whatever_is_written_into_the_layers_the_stream_goes_on_as_it_was(write):
    disturbed, plain = adapted_model(), adapted_model()
    for batch in STREAM.split(8):
        write(disturbed)
        assert same(answers(disturbed, batch, 8), answers(plain, batch, 8))
    write(disturbed)
    with disturbed.paused(), plain.paused():
        assert same(answers(disturbed, X, 64), answers(plain, X, 64))
    write(disturbed)
    assert same(disturbed.snapshot(), plain.snapshot())


def test_what_a_user_got_does_not_follow_and_is_not_followed():
    """Snapshots, frozen models and held states are one moment's; writing into them changes nothing here."""
    adapted = adapted_model()
    answers(adapted, STREAM, 16)
    snapshot, frozen, held = adapted.snapshot(), adapted.freeze(), adapted.hold()
    kept = copy.deepcopy(snapshot), copy.deepcopy(dict(frozen.state_dict()))
    answers(adapted, X, 16)
    assert same(snapshot, kept[0])
    assert same(dict(frozen.state_dict()), kept[1])
    after = adapted.snapshot()
    for value in snapshot.values():
        value.zero_()
    for layer in norms(frozen):
        layer.reset_running_stats()
    assert same(adapted.snapshot(), after)
    adapted.rewind(held)
    assert same(adapted.snapshot(), kept[0])


def test_a_restored_stream_shares_nothing_with_its_snapshot():
    adapted = adapted_model()
    answers(adapted, STREAM, 16)
    state = adapted.snapshot()
    twin = adapted_model()
    twin.restore(state)
    for value in state.values():
        value.zero_()
    assert same(answers(twin, X, 16), answers(adapted, X, 16))


def test_the_input_may_be_overwritten_after_the_call():
    ours, theirs = adapted_model(), adapted_model()
    buffer = torch.empty(16, *STREAM.shape[1:])
    for batch in STREAM.split(16):
        buffer.copy_(batch)
        one = answers(ours, buffer, 16)
        buffer.fill_(1e9)
        assert same(one, answers(theirs, batch, 16))
    assert same(ours.snapshot(), theirs.snapshot())


def test_two_streams_and_two_models_share_no_state():
    one, other = adapted_model(), adapted_model()
    answers(one, STREAM, 16)
    assert other.domains == ()
    with one.stream("second"):
        answers(one, X[:16], 16)
        assert [d.number for d in one.domains if d.seen] == [0]
    assert same(answers(other, STREAM, 16), answers(adapted_model(), STREAM, 16))


@pytest.mark.parametrize("name", ["2d", "look-alike", "instance", "sync"])
def test_every_kind_of_layer_is_safe_from_what_is_written_into_it(name):
    case = CASES[name]
    model = case.model()
    source, adapted = case.call(model, case.source(8)), case.adapted()
    with torch.no_grad():
        case.call(adapted, case.target(16))
        for layer in norms(adapted):
            layer.running_mean.fill_(100.0)
            layer.running_var.zero_()
        with adapted.as_source():
            assert torch.equal(case.call(adapted, case.source(8)), source)
    assert same(dict(model.state_dict()), dict(case.model().state_dict()))


def test_a_profile_is_shared_and_never_written_to():
    model = NET.model()
    profile = na.profile_source(model, [NET.source(64)])
    kept = {name: {k: v.clone() for k, v in site.tensors().items()} for name, site in profile.sites.items()}
    one, other = na.adapt(model, profile), na.adapt(model, profile)
    with torch.no_grad():
        for i in range(10):
            one(NET.target(8, seed=i)), other(NET.source(8, seed=i))
    assert same({name: site.tensors() for name, site in profile.sites.items()}, kept)


def test_weights_that_change_between_batches_are_used_at_once():
    """Parameters are shared with the original: what trains it trains the adapted model."""
    model = copy.deepcopy(trained())
    adapted = na.adapt(model)
    with torch.no_grad(), adapted.as_source():
        model[-1].bias += 5
        assert torch.equal(adapted(X[:4]), model(X[:4]))
        assert isinstance(adapted.model[-1], nn.Linear)
