"""activity: shoulder exercises from a smartwatch, met on people whom the model has never seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normadapt.bench.models import ActivityNet, load_weights
from normadapt.bench.suites.base import Domain, Need, Split, Suite, Task, draw, package_folder
from normadapt.errors import NormadaptError

WINDOW, HOP = 100, 50  # samples at 50 Hz: two seconds, half of them new
UNSEEN: Mapping[str, tuple[int, ...]] = {
    "a": (1, 2, 3),
    "b": (4, 5, 6),
    "c": (7, 8, 9, 10),
    "d": (7, 8),
    "e": (9, 10),
    "f": (1, 2, 3, 7, 8, 9, 10),
    "g": (4, 5, 6, 7, 8, 9, 10),
}
"""Subjects whom the model of a fold has not seen."""
_DEVELOPED_ON = (7, 8, 9, 10)  # the models of the splits differ, and nobody is met in both
SOURCE_WINDOWS, SOURCE_BATCH = 2000, 100
CLEAN = "clean"
_SPLITS: Mapping[Split, tuple[str, ...]] = {"report": ("a", "b"), "dev": ("c", "d", "e", "f", "g")}
_TRAINED = 0.8  # share of each series, from its start, that training may see; the rest is the clean domain
_FILE = "data/watch_dataset.npy"


def _is_there() -> bool:
    folder = package_folder("seglearn")
    return folder is not None and (folder / _FILE).is_file()


NEED = Need("the watch data of the package seglearn", _is_there, "python -m pip install --no-deps seglearn==1.2.5")


@dataclass(frozen=True)
class Series:
    """One exercise of one person with one arm.

    Args:
        values: (T, 6): three accelerations, three angular velocities, 50 Hz.
        subject: 1 to 10.
        label: The exercise, 0 to 6.
    """

    values: NDArray[np.float32]
    subject: int
    label: int


@cache
def watch_series() -> tuple[Series, ...]:
    """The 140 series of Burns et al. (2018): ten subjects, seven exercises, both arms.

    Raises:
        NormadaptError: If the package that holds them is not installed.
    """
    folder = package_folder("seglearn")
    if folder is None or not NEED.is_there():
        raise NormadaptError(f"the suite activity needs {NEED.what}\n  -> {NEED.install}")
    # the package's own format, a pickle: as trusted as the package's code
    data = np.load(folder / _FILE, allow_pickle=True).item()
    rows = zip(data["X"], data["subject"], data["y"], strict=True)
    return tuple(Series(np.asarray(x, dtype=np.float32), int(subject), int(y)) for x, subject, y in rows)


def windows(series: Series, start: float, end: float, hop: int = HOP) -> NDArray[np.float32]:
    """The windows (n, 6, 100) that lie wholly between two shares of the series' duration."""
    first, last = round(start * len(series.values)), round(end * len(series.values))
    starts = range(first, last - WINDOW + 1, hop)
    return np.stack([series.values[i : i + WINDOW].T for i in starts])


def training_windows(fold: str, hop: int = HOP) -> tuple[Tensor, Tensor]:
    """What the model of a fold is trained on: its inputs (n, 6, 100) and labels (n,), not yet normalized."""
    return _gathered([s for s in watch_series() if s.subject not in UNSEEN[fold]], 0, _TRAINED, hop)


def clean_windows(fold: str) -> tuple[Tensor, Tensor]:
    """Later windows of the people whom the model was trained on, not yet normalized."""
    return _gathered([s for s in watch_series() if s.subject not in UNSEEN[fold]], _TRAINED, 1)


def normalized(inputs: Tensor, fold: str) -> Tensor:
    """Each channel less its training mean, over its training deviation."""
    mean, deviation = _scale(fold)
    return (inputs - mean) / deviation


@cache
def _scale(fold: str) -> tuple[Tensor, Tensor]:
    inputs, _ = training_windows(fold)
    return inputs.mean((0, 2)).unsqueeze(1), inputs.std((0, 2)).unsqueeze(1)


def _gathered(chosen: list[Series], start: float, end: float, hop: int = HOP) -> tuple[Tensor, Tensor]:
    parts = [windows(series, start, end, hop) for series in chosen]
    labels = np.concatenate([np.full(len(part), s.label) for part, s in zip(parts, chosen, strict=True)])
    return torch.from_numpy(np.concatenate(parts)), torch.from_numpy(labels.astype(np.int64))


class Activity(Suite):
    """A task per fold of subjects; its shifts are the subjects left out, real ones and never corrupted."""

    name = "activity"
    summary = "ActivityNet (4 BatchNorm1d) on exercises seen by a smartwatch (seglearn), subjects left out of training"
    needs = (NEED,)

    def _tasks(self, split: Split, seed: int) -> list[Task]:
        return [self._task(fold, split, seed) for fold in _SPLITS[split]]

    def _task(self, fold: str, split: Split, seed: int) -> Task:
        met = [subject for subject in UNSEEN[fold] if split == "report" or subject in _DEVELOPED_ON]
        names = {f"subject {subject}": subject for subject in met}

        def make(name: str) -> Domain:
            if name == CLEAN:
                inputs, labels = clean_windows(fold)
            else:
                inputs, labels = _gathered([s for s in watch_series() if s.subject == names[name]], 0, 1)
            return Domain(normalized(inputs, fold), labels)

        def source() -> list[Tensor]:
            inputs, _ = training_windows(fold)
            chosen = np.random.default_rng(draw(split, seed, "source")).permutation(len(inputs))[:SOURCE_WINDOWS]
            return list(normalized(inputs[chosen], fold).split(SOURCE_BATCH))

        model = load_weights(ActivityNet(), f"activity-{fold}")
        return Task(f"{self.name}/{fold}", model, make, clean=CLEAN, shifts=tuple(names), source=source)
