"""Answers to a stream: nothing lost, and the source's accuracy beside ours."""

import numpy as np
import pytest
import torch
from torch import nn

import normadapt as na
from normadapt.answers import answer_stream
from normadapt.errors import SpecError


def small_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    return model.eval()


def stream(batches=5, size=8, shift=2.0):
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(size, 4, generator=generator) + shift for _ in range(batches)]
    return [(x, torch.randint(0, 3, (size,), generator=generator)) for x in inputs]


class Wrapped(nn.Module):
    """A small model whose output goes through `shape`."""

    def __init__(self, shape):
        super().__init__()
        self.inner = small_model()
        self.shape = shape

    def forward(self, x):
        return self.shape(self.inner(x))


def test_outputs_predictions_and_both_accuracies(tmp_path):
    model, items = small_model(), stream()
    answers = answer_stream(na.adapt(model), items)
    twin = na.adapt(model)
    with torch.no_grad():
        outputs = torch.cat([twin(x) for x, _ in items])
        source = torch.cat([model(x) for x, _ in items])
    targets = torch.cat([y for _, y in items])
    np.testing.assert_array_equal(answers.outputs["outputs"], outputs.numpy())
    np.testing.assert_array_equal(answers.predictions, outputs.argmax(1).numpy())
    assert answers.accuracy == pytest.approx(float((outputs.argmax(1) == targets).double().mean()))
    assert answers.source_accuracy == pytest.approx(float((source.argmax(1) == targets).double().mean()))
    assert (answers.instances, answers.batches) == (40, 5)
    answers.save(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz") as saved:
        assert sorted(saved) == ["outputs", "predictions", "targets"]
        np.testing.assert_array_equal(saved["targets"], targets.numpy())


def test_without_class_targets_there_is_no_accuracy():
    items = stream()
    for given in ([x for x, _ in items], [(x, y.double()) for x, y in items]):
        answers = answer_stream(na.adapt(small_model()), given)
        assert answers.accuracy is None
        assert answers.source_accuracy is None
    assert answers.targets is not None
    assert answers.targets.dtype == np.float64


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (lambda y: {"logits": y, "note": "text", "first": y[:, 0]}, ["outputs.first", "outputs.logits"]),
        (lambda y: (y, y[:, :1]), ["outputs.0", "outputs.1"]),
        (lambda y: y.bfloat16(), ["outputs"]),
    ],
)
def test_outputs_of_any_kind_are_kept(shape, names):
    answers = answer_stream(na.adapt(Wrapped(shape)), stream())
    assert sorted(answers.outputs) == names
    assert {len(array) for array in answers.outputs.values()} == {40}
    assert (answers.predictions is None) == (names != ["outputs"])


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([], "no instance in 0 batches"),
        ([torch.zeros(0, 4)], "no instance in 1 batches"),
        ([stream()[0], torch.zeros(2, 4)], r"some have none \(batch 1"),
        ([torch.zeros(2, 4), stream()[0]], r"some have none \(batch 1"),
    ],
)
def test_data_that_cannot_be_answered(items, said):
    with pytest.raises(SpecError, match=said):
        answer_stream(na.adapt(small_model()), items)


def test_outputs_that_cannot_be_kept():
    with pytest.raises(SpecError, match="returned str"):
        answer_stream(na.adapt(Wrapped(str)), stream())
    widths = iter((3, 2, 1))
    with pytest.raises(SpecError, match=r"changes from batch to batch: \(3,\) and \(2,\)"):
        answer_stream(na.adapt(Wrapped(lambda y: y[:, : next(widths)]), policy=na.Blend()), [x for x, _ in stream()])
