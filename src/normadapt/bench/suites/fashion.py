"""fashion-c: the project's own ResNet on Fashion-MNIST under the corruptions of ImageNet-C."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normadapt.bench.models import FashionNet, load_weights
from normadapt.bench.suites.base import Domain, Need, Split, Suite, Task, draw
from normadapt.bench.suites.imagenet_c import COMMON, EXTRA, NEED, SEVERITIES, corrupted, installed_version
from normadapt.errors import NormadaptError

INSTALL_IMAGES = "apt-get install dataset-fashion-mnist"
IMAGES = 2000
"""Test images per domain; `report` and `dev` take theirs from different halves of the test set."""
SOURCE_IMAGES, SOURCE_BATCH = 2000, 100
CLEAN = "clean"
_HALVES = 0  # seed of the cut of the test set, the same for every user's seed
_FILES = {"train": "train-{}-ubyte.gz", "test": "t10k-{}-ubyte.gz"}


def fashion_folder() -> Path | None:
    """The folder that Debian's dataset-fashion-mnist installs, searched for in XDG_DATA_DIRS; None if not there."""
    folders = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    for folder in folders.split(":"):
        found = Path(folder) / "datasets" / "fashion-mnist"
        if (found / _FILES["test"].format("images-idx3")).is_file():
            return found
    return None


def fashion_images(part: Literal["train", "test"]) -> tuple[NDArray[np.uint8], Tensor]:
    """The images (M, 28, 28) and labels (M,) int64 of Fashion-MNIST, in the data set's order.

    Raises:
        NormadaptError: If they are not installed.
    """
    folder = fashion_folder()
    if folder is None:
        raise NormadaptError(f"the images of Fashion-MNIST are not there\n  -> {INSTALL_IMAGES}")
    # IDX: a head of 4 bytes per number, one for the kind and one per dimension, then the bytes
    images = _idx(folder / _FILES[part].format("images-idx3"), 16).reshape(-1, 28, 28)
    labels = _idx(folder / _FILES[part].format("labels-idx1"), 8)
    return images, torch.from_numpy(labels.astype(np.int64))


def _idx(path: Path, head: int) -> NDArray[np.uint8]:
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=head)


def fashion_inputs(images: NDArray[np.uint8]) -> Tensor:
    """The model's inputs (n, 1, 28, 28) from grey images (n, 28, 28)."""
    grey = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).unsqueeze(1) / 255
    return (grey - FashionNet.MEAN) / FashionNet.DEVIATION


class FashionC(Suite):
    """Two tasks, at severity 3 and 5; `report` meets the fifteen common corruptions, `dev` the four extra ones."""

    name = "fashion-c"
    summary = "FashionNet (13 BatchNorm2d) on Fashion-MNIST under the corruptions of ImageNet-C, severity 3 and 5"
    needs = (Need("Fashion-MNIST", lambda: fashion_folder() is not None, INSTALL_IMAGES), NEED)

    def _tasks(self, split: Split, seed: int) -> list[Task]:
        images, labels = fashion_images("test")
        chosen = chosen_images(len(images), split, seed)
        return [self._task(severity, images[chosen], labels[chosen], split, seed) for severity in (3, 5)]

    def _task(self, severity: int, images: NDArray[np.uint8], labels: Tensor, split: Split, seed: int) -> Task:
        shifts = COMMON if split == "report" else EXTRA

        def make(name: str) -> Domain:
            if name == CLEAN:
                return Domain(fashion_inputs(images), labels)
            changed = self._kept(images, *_corruption(name, severity), split, seed)
            return Domain(fashion_inputs(changed), labels)

        return Task(
            f"{self.name}/{severity}",
            load_weights(FashionNet(), "fashion"),
            make,
            clean=CLEAN,
            shifts=shifts,
            ramps={name: (*(f"{name}/{step}" for step in SEVERITIES if step < severity), name) for name in shifts},
            source=lambda: _source(split, seed),
        )

    def ahead(self, task: Task, names: Sequence[str], split: Split, seed: int) -> list[Callable[[], object]]:
        """The corrupted images that are not there yet."""
        usual = int(task.name.rpartition("/")[2])
        wanted = [_corruption(name, usual) for name in names if name != CLEAN]
        missing = [one for one in wanted if not self._file(*one, split, seed).is_file()]
        return [partial(self._make, *one, split, seed) for one in missing]

    def _make(self, corruption: str, severity: int, split: Split, seed: int) -> None:
        images, _ = fashion_images("test")
        self._kept(images[chosen_images(len(images), split, seed)], corruption, severity, split, seed)

    def _file(self, corruption: str, severity: int, split: Split, seed: int) -> Path:
        return self.cache / f"{self.name}-{installed_version()}" / f"{split}-{seed}" / f"{corruption}-{severity}.npy"

    def _kept(
        self, images: NDArray[np.uint8], corruption: str, severity: int, split: Split, seed: int
    ) -> NDArray[np.uint8]:
        """The corrupted images, made once: both tasks, all methods and all processes read the same file."""
        path = self._file(corruption, severity, split, seed)
        if not path.is_file():
            made = corrupted(images, corruption, severity, draw(split, seed, corruption, severity))
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.npy")  # another process may be at it: whoever is last wins
            np.save(part, made)
            part.replace(path)
        kept: NDArray[np.uint8] = np.load(path, mmap_mode="r")
        return kept


def _corruption(domain: str, usual: int) -> tuple[str, int]:
    """Name and severity of a domain's corruption; the task's `usual` one where the name has none."""
    corruption, _, severity = domain.partition("/")
    return corruption, int(severity or usual)


def chosen_images(count: int, split: Split, seed: int) -> NDArray[np.int64]:
    """Positions of the test images of a split: a draw from one half of them for `report`, from the other for `dev`."""
    order = np.random.default_rng(_HALVES).permutation(count)
    half = order[: count // 2] if split == "report" else order[count // 2 :]
    return np.random.default_rng(draw(split, seed, "images")).permutation(half)[:IMAGES]


def _source(split: Split, seed: int) -> list[Tensor]:
    images, _ = fashion_images("train")
    chosen = np.random.default_rng(draw(split, seed, "source")).permutation(len(images))[:SOURCE_IMAGES]
    return list(fashion_inputs(images[chosen]).split(SOURCE_BATCH))
