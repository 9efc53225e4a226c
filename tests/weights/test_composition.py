"""How many draws of a class a batch is worth to `Blend`, from the predictions within batches."""

import pytest
import torch

from normadapt.layers.predictions import argmax_frequencies
from normadapt.weights.composition import Composition


def test_effective_count_by_hand():
    assert Composition().effective_count(8) == 8
    one = torch.eye(4)[[1] * 8]
    mixed = torch.eye(4)[[0, 0, 1, 1, 2, 2, 3, 3]]
    after = Composition().update(one)
    assert after.effective_count(8) == pytest.approx(1.0)  # one class: a single draw
    both = after.update(mixed)
    agreement = (0.9 * 7 + 8 * 0.25 - 1) / (0.9 * 7 + 7)
    rho = (agreement - 0.25) / 0.75
    assert both.effective_count(8) == pytest.approx(8 / (1 + 7 * rho))
    assert Composition().update(mixed).effective_count(8) == 8
    assert Composition().update(torch.full((3, 4), float("nan"))).last is None


def test_classes_that_the_source_has_often_are_no_correlation():
    source = torch.tensor([0.1, 0.7, 0.1, 0.1], dtype=torch.float64)
    often = torch.eye(4)[[1, 1, 1, 1, 1, 1, 1, 0, 2, 3]]
    assert Composition(reference=source).update(often).effective_count(10) > 9
    assert Composition().update(often).effective_count(10) < 3


def test_rows_that_prefer_nothing_are_no_predictions():
    scores = torch.rand(8, 360, generator=torch.Generator().manual_seed(0))  # sigmoids, taken for logits
    frequencies, count = argmax_frequencies(scores.softmax(1))
    assert count == 0
    assert not frequencies.any()
    assert Composition().update(scores.softmax(1)).last is None
    frequencies, count = argmax_frequencies(torch.tensor([[0.5, 0.5], [0.8, 0.2], [float("nan"), 0.0], [0.0, 1.0]]))
    assert (frequencies.tolist(), count) == ([0.5, 0.5], 2)
