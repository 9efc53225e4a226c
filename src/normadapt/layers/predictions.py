"""From a model's output to class probabilities, where they can be taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from normadapt.errors import PredictionsError

Predictions: TypeAlias = Callable[[Any], Tensor]
"""Maps a model's output to class probabilities (n, K)."""

_SAYS_NOTHING = 0.98  # of the largest entropy


def class_probabilities(output: Any, predictions: Predictions | None, *, needed: bool = False) -> Tensor | None:
    """Class probabilities (n, K) of a model's output, or None where it gives none.

    Args:
        output: What the model returned.
        predictions: The user's map; by default the softmax of a 2-d floating tensor with at least two columns.
        needed: Whether None is not acceptable (the policy works from predictions).

    Raises:
        PredictionsError: If the user's map gives anything but probabilities (n, K), or if they are needed and
            cannot be taken from the output.
    """
    if predictions is not None:
        return _checked(predictions(output))
    if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1 and output.is_floating_point():
        return output.detach().float().softmax(1)
    if needed:
        raise PredictionsError(
            f"this policy needs class probabilities, and none can be taken from the model's output: expected a "
            f"2-d tensor (n, K) of logits, got {_described(output)}\n"
            "  -> pass predictions=function from an output to probabilities (n, K)"
        )
    return None


def _checked(probabilities: Any) -> Tensor:
    if not isinstance(probabilities, Tensor) or probabilities.dim() != 2 or probabilities.shape[1] < 2:
        raise PredictionsError(
            "predictions must return class probabilities as a tensor (n, K) with K >= 2; "
            f"got {_described(probabilities)}"
        )
    checked: Tensor = probabilities.detach().float()
    finite = checked[checked.isfinite().all(1)]
    if finite.numel() and (bool((finite < -1e-6).any()) or bool(((finite.sum(1) - 1).abs() > 1e-2).any())):
        raise PredictionsError(
            "predictions must return class probabilities; got rows that are negative or do not sum to 1 "
            f"(row sums from {finite.sum(1).min().item():.3g} to {finite.sum(1).max().item():.3g})\n"
            "  -> apply a softmax to logits"
        )
    return checked


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)} and dtype {str(output.dtype).removeprefix('torch.')}"
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of {len(output)}"
    return f"a {type(output).__name__}"


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of class probabilities (..., K), in nats (...,)."""
    nats: Tensor = torch.special.entr(probabilities.clamp_min(0.0)).sum(-1)
    return nats


def prefer_something(entropies: Tensor, classes: int) -> Tensor:
    """Whether class probabilities of such entropies (...,) prefer a class: at most 0.98 of the largest entropy."""
    return entropies <= _SAYS_NOTHING * math.log(classes)


def argmax_frequencies(probabilities: Tensor) -> tuple[Tensor, int]:
    """How often each class (K,) is the most probable one, float64, and among how many rows (n, K).

    Rows with NaN do not count, nor rows that prefer nothing, with more than 0.98 of the largest entropy: the softmax of
    scores that are no logits, such as hundreds of sigmoids.
    """
    rows = probabilities[probabilities.isfinite().all(1)]
    labels = rows[prefer_something(entropy(rows), probabilities.shape[1])].argmax(1)
    counts = torch.bincount(labels, minlength=probabilities.shape[1]).double()
    return counts / max(labels.numel(), 1), labels.numel()
