"""Who looks on sees every adapting pass, and changes nothing."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import normadapt as na
from normadapt.adapted.observation import Seen


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()


def batch(n: int = 8) -> Tensor:
    return torch.randn(n, 1, 8, 8)


def test_an_observer_sees_each_adapting_pass_and_no_other() -> None:
    adapted, seen = na.adapt(model(), policy=na.Blend()), []
    handle = adapted.observe(lambda stream, what: seen.append((stream, what)))
    output = adapted(batch())
    with adapted.paused():
        adapted(batch())
    with adapted.as_source():
        adapted(batch())
    with adapted.stream("left"):
        adapted(batch(5))
    handle.remove()
    handle.remove()
    adapted(batch())
    assert [stream for stream, _ in seen] == ["default", "left"]
    first: Seen = seen[0][1]
    assert first.output is output
    assert first.records[0].count == 8
    assert first.moments[0] is not None
    assert first.moments[0].mean.shape == (8, 4)
    torch.testing.assert_close(first.probabilities, output.detach().softmax(1))
    assert 0 < first.seconds < 60


def test_observers_change_no_answer_and_what_they_raise_is_counted() -> None:
    plain, watched = na.adapt(model(), policy=na.Blend()), na.adapt(model(), policy=na.Blend())
    handles = [watched.observe(_fail), watched.observe(lambda *_: None)]
    for _ in range(3):
        x = batch()
        assert torch.equal(plain(x), watched(x))
    assert [handle.failures for handle in handles] == [3, 0]
    assert isinstance(handles[0].error, ZeroDivisionError)


def _fail(*_: object) -> None:
    raise ZeroDivisionError


def test_a_pass_that_fails_is_not_shown() -> None:
    adapted, seen = na.adapt(model(), policy=na.Blend()), []
    adapted.observe(lambda *what: seen.append(what))
    with pytest.raises(RuntimeError):
        adapted(torch.randn(2, 1, 9, 9))  # too large for the last layer
    assert seen == []


def test_copies_have_no_observers() -> None:
    adapted, seen = na.adapt(model(), policy=na.Blend()), []
    adapted.observe(lambda *what: seen.append(what))
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        other(batch())
    assert seen == []


def test_observing_needs_something_to_call() -> None:
    with pytest.raises(TypeError, match="call with"):
        na.adapt(model(), policy=na.Blend()).observe(3)  # type: ignore[arg-type]
