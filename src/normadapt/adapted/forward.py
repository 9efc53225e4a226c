"""One batch of a stream: passed through the model, answered, and what the stream becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from normadapt.adapted.streams import Pass, Stream, install
from normadapt.layers.hooks import SiteHook, outside_autograd
from normadapt.layers.policy import Policy
from normadapt.layers.predictions import Predictions, class_probabilities


class Answered(NamedTuple):
    """A model's answer to a batch.

    Args:
        stream: What the stream becomes if the answer is taken.
        running: The pass that led to it.
        output: What the model returned.
        probabilities: Class probabilities (n, K) of it, finite instances alone; None where it gives none.
    """

    stream: Stream
    running: Pass
    output: Any
    probabilities: Tensor | None


def answer(
    call: Callable[[], Any],
    hooks: list[SiteHook],
    policy: Policy,
    predictions: Predictions | None,
    stream: Stream,
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
    *,
    watched: bool,
) -> Answered:
    """Answer one batch of a stream; nothing of the stream changes.

    Args:
        call: The model, called with the batch.
        hooks: One per site.
        policy: How evidence becomes statistics.
        predictions: Maps an output to class probabilities, or None for the default.
        stream: What is known before the batch.
        arguments: Those with which the model is called.
        watched: Whether the instances' moments are kept, for observers.
    """
    install(hooks, stream.records)  # a site that skips the batch is not to keep another stream's
    running = Pass(policy, stream, arguments, watched=watched)
    sources = [hook.source for hook in hooks]
    for index in range(policy.passes):
        last = index == policy.passes - 1
        try:
            for hook in hooks:
                hook.current = running
            if last:
                output = call()
            else:
                with outside_autograd():
                    output = call()
        finally:
            for hook in hooks:
                hook.current = None
        with outside_autograd():
            probabilities = class_probabilities(output, predictions, needed=policy.needs_predictions)
            bad = running.bad
            if probabilities is not None and bad is not None and bad.shape[0] == probabilities.shape[0]:
                probabilities = probabilities[~bad]
            running.answered(probabilities, sources)
    return Answered(Stream(running.records, running.memory), running, output, probabilities)
