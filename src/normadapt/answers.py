"""What a model answered on a stream, with what it would have answered unadapted where targets allow to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normadapt.adapted._adapt import AdaptedModel
from normadapt.errors import SpecError
from normadapt.layers.batches import batch_length, run_model
from normadapt.specs import split_targets

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Answers:
    """The answers to one pass over a stream of N instances.

    Args:
        outputs: What the model returned, by name; a single tensor is called "outputs". Each has N rows.
        predictions: The most probable class (N,) where the model returns one tensor (n, K); else None.
        targets: As the data gave them (N, ...), or None.
        instances: Number of instances, N.
        batches: Number of batches.
        accuracy: Share of predictions equal to the targets; None unless both are class numbers.
        source_accuracy: The same for the source model on the same data.
    """

    outputs: Mapping[str, Array]
    predictions: Array | None
    targets: Array | None
    instances: int
    batches: int
    accuracy: float | None
    source_accuracy: float | None

    def save(self, path: Path) -> None:
        """Write outputs, predictions and targets as one npz file."""
        arrays = dict(self.outputs)
        if self.predictions is not None:
            arrays["predictions"] = self.predictions
        if self.targets is not None:
            arrays["targets"] = self.targets
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def answer_stream(
    adapted: AdaptedModel, items: Iterable[Any], progress: Callable[[int, int], None] | None = None
) -> Answers:
    """Run an adapted model over a stream, in order, once.

    The source model answers every batch too where there are class targets, just before the adapted one.

    Args:
        adapted: The model.
        items: Batches: inputs or (inputs, targets).
        progress: Called after each batch with the number of batches and of instances so far.

    Raises:
        SpecError: If there is no instance, if only some batches have targets, or if the shape of the outputs
            changes from batch to batch.
    """
    outputs: dict[str, list[Array]] = {}
    predicted: list[Array] = []
    targets: list[Array] = []
    instances = batches = right = source_right = 0
    comparable = True
    with torch.no_grad():
        for item in items:
            inputs, wanted = split_targets(item)
            if batches and (wanted is None) == bool(targets):
                raise SpecError(f"DATA: some batches have targets and some have none (batch {batches} is the first)")
            classes = wanted is not None and wanted.dim() == 1 and not wanted.is_floating_point()
            source = None
            if classes and comparable:
                with adapted.as_source():
                    source = _predictions(run_model(adapted, inputs))
            output = run_model(adapted, inputs)
            _append(outputs, _named(output), batches)
            prediction = _predictions(output)
            if prediction is not None:
                predicted.append(prediction.numpy())
            if wanted is not None:
                targets.append(wanted.cpu().numpy())
            comparable = comparable and classes and prediction is not None
            if comparable and wanted is not None and prediction is not None and source is not None:
                right += int((prediction == wanted.cpu()).sum())
                source_right += int((source == wanted.cpu()).sum())
            batches += 1
            instances += batch_length(inputs)
            if progress is not None:
                progress(batches, instances)
    if instances == 0:
        raise SpecError(
            f"DATA gave no instance in {batches} batches; expected at least one\n  -> check the paths in it"
        )
    return Answers(
        {name: np.concatenate(parts) for name, parts in outputs.items()},
        np.concatenate(predicted) if predicted else None,
        np.concatenate(targets) if targets else None,
        instances,
        batches,
        right / instances if comparable else None,
        source_right / instances if comparable else None,
    )


def _named(output: Any) -> dict[str, Tensor]:
    """The tensors of an output: "outputs" for one alone, "outputs.<key or index>" for those in a dict or tuple."""
    if isinstance(output, Tensor):
        return {"outputs": output}
    entries = output.items() if isinstance(output, Mapping) else enumerate(output) if _is_sequence(output) else ()
    named = {f"outputs.{key}": value for key, value in entries if isinstance(value, Tensor)}
    if not named:
        raise SpecError(f"MODEL returned {type(output).__name__}; expected a tensor, or a dict or tuple of tensors")
    return named


def _is_sequence(output: Any) -> bool:
    return isinstance(output, (tuple, list))


def _append(outputs: dict[str, list[Array]], named: Mapping[str, Tensor], batch: int) -> None:
    for name, value in named.items():
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:  # numpy has no such type
            value = value.float()
        parts = outputs.setdefault(name, [])
        if parts and parts[0].shape[1:] != value.shape[1:]:
            shapes = f"{tuple(parts[0].shape[1:])} and {tuple(value.shape[1:])}"
            raise SpecError(f"MODEL: the shape of {name} changes from batch to batch: {shapes} (batch {batch})")
        parts.append(value.numpy())


def _predictions(output: Any) -> Tensor | None:
    if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1 and output.is_floating_point():
        return output.argmax(1).cpu()
    return None
