"""From pairs of outputs to what the guards look at: plain lists of floats by guard, one number an item.

What leaves here is measured, not judged: classes, confidences, scores. `Watch` makes bounded signals of them, because
that takes memory. A guard that compares needs two rows, the adapted model's under its name and the source's under
`name/source`. numpy on small arrays, not torch: at a batch of one an operation of torch costs as much as a whole guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from normadapt.adapted._adapt import AdaptedModel
from normadapt.layers.predictions import Predictions, class_probabilities
from normadapt.pilot.guards import (
    ClassConcentration,
    ConfidenceCollapse,
    Disagreement,
    Guard,
    LabelledError,
    Latency,
    NonFinite,
    Score,
    VarianceRatio,
)
from normadapt.pilot.rows import bad_rows, count_rows, tensors

Signals = dict[str, list[float]]


def source_key(name: str) -> str:
    """The key of the source model's row beside the adapted model's."""
    return f"{name}/source"


class Answers(NamedTuple):
    """Predicted class and its probability for each item; the probability is NaN where an output is not finite."""

    classes: list[int]
    confidences: list[float]


def answers(output: Any, predictions: Predictions | None = None) -> Answers | None:
    """Classes and confidences of a model's output, or None where it gives no class probabilities.

    Args:
        output: Logits (n, K), or whatever `predictions` understands.
        predictions: Maps an output to class probabilities (n, K).
    """
    if predictions is None and isinstance(output, Tensor):
        return _of_logits(_numbers(output)) if _are_logits(output) else None
    probabilities = class_probabilities(output, predictions)
    if probabilities is None:
        return None
    numbers = probabilities.cpu().numpy()
    return Answers(numbers.argmax(1).tolist(), numbers.max(1).tolist())


def _are_logits(output: Any) -> bool:
    return isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1 and output.is_floating_point()


def _numbers(logits: Tensor) -> Any:
    return (logits if logits.dtype is torch.float32 else logits.float()).numpy(force=True)


def _of_logits(logits: Any) -> Answers:
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.add.reduce(np.exp(logits - np.maximum.reduce(logits, axis=1, keepdims=True)), axis=1)
        return Answers(logits.argmax(1).tolist(), (1 / total).tolist())


def _of_both(ours: Any, theirs: Any, predictions: Predictions | None) -> tuple[Answers | None, Answers | None]:
    """Answers of both outputs, in one go where they are logits."""
    if predictions is None and _are_logits(ours) and _are_logits(theirs) and ours.shape[1] == theirs.shape[1]:
        both, count = _of_logits(np.concatenate((_numbers(ours), _numbers(theirs)))), len(ours)
        return (
            Answers(both.classes[:count], both.confidences[:count]),
            Answers(both.classes[count:], both.confidences[count:]),
        )
    return answers(ours, predictions), None if theirs is None else answers(theirs, predictions)


def signals(
    guards: Sequence[Guard],
    source_output: Any,
    adapted_output: Any,
    inputs: Any = None,
    *,
    predictions: Predictions | None = None,
    seconds: float | None = None,
    variance: tuple[float, float] | None = None,
) -> Signals:
    """What the guards need to know of one request.

    Args:
        guards: The guards in use.
        source_output: The source model's output for these items; None where it was not asked. Guards that compare then
            have nothing to say.
        adapted_output: The adapted model's output for the same items, rows in the same order.
        inputs: The inputs, for `Score`.
        predictions: Maps an output to class probabilities (n, K); default: logits (n, K). Outputs that give none leave
            the guards on classes and confidence without signals, and `Watch.blind` names them after the shadow phase.
        seconds: How long the request took, for `Latency`.
        variance: Least and largest ratio of variances from `variance_ratio`, for `VarianceRatio`.

    Returns:
        Rows by key, for `Watch.learn` and `Watch.update`. An item whose source output is not finite is left out of the
        comparisons; one whose adapted output alone is not finite is as bad as can be.

    Example:
        >>> source, adapted = torch.tensor([[9.0, 0.0], [0.1, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> signals([Disagreement()], source, adapted)  # the source is not confident of its second answer
        {'disagreement': [1.0]}
    """
    rows: Signals = {}
    ours, theirs = _of_both(adapted_output, source_output, predictions)
    pairs = None if ours is None or theirs is None else _pairs(ours, theirs)
    for guard in guards:
        if isinstance(guard, _COMPARING):
            if pairs is not None:
                _compare(guard, pairs, rows)
        elif isinstance(guard, Score):
            rows.update(_scores(guard, source_output, adapted_output, inputs))
        elif isinstance(guard, NonFinite):
            both = _Outputs(adapted_output, source_output, ours, theirs, inputs, predictions is None)
            rows.update(_non_finite(guard, both))
        elif isinstance(guard, Latency):
            rows[guard.name] = [] if seconds is None else [float(seconds)]
        elif isinstance(guard, VarianceRatio):
            rows[guard.name] = [] if variance is None else [float(end) for end in variance]
    return rows


_COMPARING = (Disagreement, ClassConcentration, ConfidenceCollapse)

_Pair = tuple[int, int, float, float]
"""One item's classes, of the adapted model and of the source, and their confidences."""


def _pairs(ours: Answers, theirs: Answers) -> list[_Pair]:
    """Items that can be compared: where the source's output is finite."""
    if len(ours.classes) != len(theirs.classes):
        raise ValueError(
            f"the two outputs must be of the same items; got {len(ours.classes)} of the adapted model and "
            f"{len(theirs.classes)} of the source -> pass only the rows that both answered"
        )
    rows = zip(ours.classes, theirs.classes, ours.confidences, theirs.confidences, strict=True)
    return [row for row in rows if row[3] == row[3]]


def _compare(guard: Guard, pairs: list[_Pair], rows: Signals) -> None:
    """Add the rows of one guard. An adapted confidence of NaN is an output that is not finite."""
    name = guard.name
    if isinstance(guard, Disagreement):
        confident = guard.confident
        rows[name] = [float(a != s or sure != sure) for a, s, sure, other in pairs if other >= confident]
    elif isinstance(guard, ClassConcentration):
        finite = [pair for pair in pairs if pair[2] == pair[2]]
        rows[name] = [float(pair[0]) for pair in finite]
        rows[source_key(name)] = [float(pair[1]) for pair in finite]
    elif isinstance(guard, ConfidenceCollapse):
        rows[name] = [sure for _, _, sure, _ in pairs]
        rows[source_key(name)] = [other for _, _, _, other in pairs]


def _scores(guard: Score, source_output: Any, adapted_output: Any, inputs: Any) -> Signals:
    function = guard.resolve()
    if not guard.paired:
        return {guard.name: _bounded(guard, function(adapted_output, inputs))}
    if source_output is None:
        return {}
    ours = _bounded(guard, function(adapted_output, inputs))
    theirs = _bounded(guard, function(source_output, inputs))
    if len(ours) != len(theirs):
        raise ValueError(
            f"score {guard.name!r} gave {len(ours)} numbers for one output and {len(theirs)} for the other"
        )
    return {guard.name: [(1 + a - s) / 2 for a, s in zip(ours, theirs, strict=True)]}


def _bounded(guard: Score, values: Any) -> list[float]:
    """Scores as numbers in [0, 1]; NaN is the worst."""
    array = values.detach().double().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=float)
    if array.ndim != 1:
        raise ValueError(
            f"score {guard.name!r} must give one number for each item, shape (n,); got shape {array.shape} -> for "
            "a loss, pass reduction='none'"
        )
    listed: list[float] = np.clip(np.where(np.isnan(array), 1.0, array), 0.0, 1.0).tolist()
    return listed


class _Outputs(NamedTuple):
    """Outputs of both models, with what is known of them already."""

    adapted: Any
    source: Any
    ours: Answers | None
    theirs: Answers | None
    inputs: Any
    plain: bool  # whether logits are all of an output that is a matrix


def _non_finite(guard: NonFinite, both: _Outputs) -> Signals:
    """Items that are bad by adapting; with `own_only` beside them those for which the source is no better."""
    count = len(both.ours.classes) if both.ours is not None else _count(both.adapted, both.inputs)
    bad = _bad_rows(both.ours, both.adapted, count, plain=both.plain)
    if not guard.own_only or both.source is None or not any(bad):
        return {guard.name: [float(b) for b in bad]}
    theirs = _bad_rows(both.theirs, both.source, count, plain=both.plain)
    shared = [b and other for b, other in zip(bad, theirs, strict=True)]
    return {
        guard.name: [float(b and not other) for b, other in zip(bad, shared, strict=True)],
        source_key(guard.name): [float(other) for other in shared],
    }


def _bad_rows(known: Answers | None, output: Any, count: int, *, plain: bool) -> list[bool]:
    """Which items are not finite: in their probabilities, where there are any, or in any part of the output.

    Minus infinity is a masked class where the probabilities are known and finite, and a fault elsewhere.
    """
    if known is None or len(known.confidences) != count:
        return bad_rows(output, count)
    bad = [sure != sure for sure in known.confidences]
    if plain and _are_logits(output):
        return bad  # the probabilities say all of it
    return [a or b for a, b in zip(bad, bad_rows(output, count, masked=True), strict=True)]


def _count(output: Any, inputs: Any) -> int:
    """Items of an output without probabilities: as many as inputs, entries of a list, or rows of its first tensor."""
    for rows in (count_rows((inputs,), {}), len(output) if isinstance(output, list) else None):
        if rows is not None and rows != 0:
            return rows
    return next((len(part) for part in tensors(output) if part.ndim > 0), 0)


def labelled_signals(guards: Sequence[Guard], adapted_wrong: Sequence[bool], source_wrong: Sequence[bool]) -> Signals:
    """What `LabelledError` needs, when labels have arrived for items that both models answered.

    Example:
        >>> labelled_signals([LabelledError()], [True, False], [False, False])
        {'labelled_error': [1.0, 0.5]}
    """
    row = [(1 + int(a) - int(s)) / 2 for a, s in zip(adapted_wrong, source_wrong, strict=True)]
    return {guard.name: list(row) for guard in guards if isinstance(guard, LabelledError)}


_SOURCE_VARIANCES: WeakKeyDictionary[AdaptedModel, tuple[Tensor, Tensor]] = WeakKeyDictionary()


def variance_ratio(adapted: AdaptedModel) -> tuple[float, float]:
    """Least and largest ratio, over all channels of all sites, of the variance in use to the source's.

    Both with the layer's eps, so that a dead channel counts as 1. NaN in a variance gives NaN, which trips the guard.
    """
    hooks = adapted._hooks
    buffers = [hook.site.buffers()[1] for hook in hooks]
    in_use = torch.cat([v for v in buffers if v is not None]).detach().double()
    known = _SOURCE_VARIANCES.get(adapted)
    if known is None or known[0].device != in_use.device or known[0].shape != in_use.shape:
        eps = torch.cat([torch.full_like(hook.source.variance, hook.source.eps) for hook in hooks]).to(in_use)
        known = eps, torch.cat([hook.source.variance for hook in hooks]).to(in_use) + eps
        _SOURCE_VARIANCES[adapted] = known
    ratio = (in_use + known[0]) / known[1]
    low, high = torch.aminmax(ratio)
    return float(low), float(high)
