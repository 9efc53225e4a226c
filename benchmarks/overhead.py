"""What adapting costs: time and memory of a forward pass beside the plain model's, one thread, one process.

    python benchmarks/overhead.py [--model resnet18] [--rounds 40]

A ResNet-18 with a 3x3 stem on 32x32 inputs (20 BatchNorm2d, 11 million parameters), or a MobileNetV2 of full width with
the same stem (52 BatchNorm2d, 2.2 million). Every round calls the plain model and each contender once, in an order that
is shuffled anew; what is printed is the median over rounds of the time divided by the plain model's of the same round,
with the quartiles, and the slowest call beside the contender's median. Settled contenders have seen 1,100 single images
before; "first 16" begins anew every 16 calls. Peak memory is counted from the tensors that a forward pass allocates, so
it does not depend on the allocator.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normadapt as na

ROUNDS = {64: 1.0, 16: 2.0, 1: 6.0}  # rounds at each batch size, relative to --rounds
SETTLING = 1100
TARGETS = {64: (1.03, 1.15), 16: (1.05, 1.3), 1: (1.15, 2.0)}  # settled, first 16 batches
FIRST = 16


class Block(nn.Module):
    """Two 3x3 convolutions with batch norms and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h/stride, w/stride)."""
        inside = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (inside + self.shortcut(x)).relu()


def resnet18() -> nn.Module:
    """ResNet-18 for 32x32 inputs."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(width, outputs, stride), Block(outputs, outputs, 1)]
        width = outputs
    return measured(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)))


class Inverted(nn.Module):
    """A narrow block of MobileNetV2: widened, filtered channel by channel and narrowed again."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int) -> None:
        super().__init__()
        inner = inputs * factor
        wide = [nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()] if factor > 1 else []
        self.layers = nn.Sequential(
            *wide,
            *(nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()),
            *(nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.same = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, outputs, h/stride, w/stride)."""
        narrow: Tensor = self.layers(x)
        return x + narrow if self.same else narrow


def mobilenetv2() -> nn.Module:
    """MobileNetV2 for 32x32 inputs, which it halves three times."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    width = 32
    for factor, outputs, count, stride in (
        *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
        for i in range(count):
            layers.append(Inverted(width, outputs, stride if i == 0 else 1, factor))
            width = outputs
    layers += [nn.Conv2d(width, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
    return measured(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 10)))


def measured(model: nn.Module) -> nn.Module:
    """The model in eval mode, with running statistics of the benchmark's own source data."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the exact mean over these batches
    with torch.no_grad():
        for _ in range(10):
            model(images(64))
    return model.eval()


def images(count: int) -> Tensor:
    """Smooth random images (count, 3, 32, 32) that differ in contrast and brightness as photographs do."""
    coarse = torch.randn(count, 3, 8, 8)
    smooth = nn.functional.interpolate(coarse, size=32, mode="bilinear")
    return smooth * (0.8 + 0.4 * torch.rand(count, 1, 1, 1)) + 0.2 * torch.randn(count, 1, 1, 1)


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """The model with F.batch_norm(training=True) in every layer, as most test-time adaptation has it."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    return model


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of live tensors that operations under it have allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note the storages that it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(forward: Callable[[Tensor], Any], x: Tensor) -> int:
    """Most bytes alive at once during a forward pass, the input not counted."""
    with torch.no_grad(), PeakMemory() as memory:
        forward(x)
    return memory.peak


def settled(adapted: na.AdaptedModel) -> na.AdaptedModel:
    """The adapted model after so many batches of one image like the source's."""
    with torch.no_grad():
        for _ in range(SETTLING):
            adapted(images(1))
    return adapted


def following(adapted: na.AdaptedModel) -> Callable[[Tensor], Any]:
    """The settled model while the contrast of its inputs changes: every twentieth call it jumps."""
    calls = 0

    def forward(x: Tensor) -> Any:
        nonlocal calls
        calls += 1
        return adapted(x if calls // 20 % 2 else x * 0.3 + 0.5)

    return forward


def beginning(adapted: na.AdaptedModel) -> Callable[[Tensor], Any]:
    """The model as it was made, again and again after 16 calls, each time on inputs of another contrast."""
    calls = 0

    def forward(x: Tensor) -> Any:
        nonlocal calls
        if calls % FIRST == 0:
            adapted.reset()
        calls += 1
        return adapted(x if calls // FIRST % 2 else x * 0.3 + 0.5)

    return forward


def measure(n: int, rounds: int, model: nn.Module, profile: na.SourceProfile, models: list[na.AdaptedModel]) -> None:
    """Print the table of one batch size; the adapted models, with the profile and without, are settled."""
    profiled, unprofiled = models
    contenders: dict[str, Callable[[Tensor], Any]] = {
        "profile, settled": copy.deepcopy(profiled),
        "profile, following": following(copy.deepcopy(profiled)),
        "profile, first 16": beginning(na.adapt(model, profile)),
        "no profile, settled": copy.deepcopy(unprofiled),
        "no profile, following": following(copy.deepcopy(unprofiled)),
        "F.batch_norm(training=True)": with_batch_statistics(model),
    }
    times: dict[str, list[float]] = {name: [] for name in ("plain", *contenders)}
    order = ["plain", *contenders]
    shuffle = random.Random(0)
    with torch.no_grad():
        for turn in range(rounds + 2):
            x = images(n)
            shuffle.shuffle(order)
            for name in order:
                forward = model if name == "plain" else contenders[name]
                start = time.perf_counter()
                forward(x)
                if turn >= 2:
                    times[name].append(time.perf_counter() - start)
    x = images(n)
    plain = peak_bytes(model, x)
    settled_target, first_target = TARGETS[n]
    print(
        f"\nn = {n}: plain eval {1e3 * statistics.median(times['plain']):.1f} ms, peak {plain / 2**20:.1f} MiB; "
        f"targets {settled_target:.2f} x settled, {first_target:.2f} x first 16, slowest at most twice the median"
    )
    for name, forward in contenders.items():
        ratios = [a / b for a, b in zip(times[name], times["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        slowest = max(times[name]) / statistics.median(times[name])
        extra = peak_bytes(forward, x) - plain
        print(
            f"  {name:28} {middle:5.2f} x  (quartiles {low:.2f} to {high:.2f})  slowest {slowest:4.1f} x its median  "
            f"peak {extra / 2**20:+7.3f} MiB"
        )


def main() -> None:
    """Print all three batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("resnet18", "mobilenetv2"), default="resnet18")
    parser.add_argument("--rounds", type=int, default=40, help="rounds at n = 64; more at 16 and 1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = {"resnet18": resnet18, "mobilenetv2": mobilenetv2}[arguments.model]()
    profile = na.profile_source(model, [images(50) for _ in range(10)])
    print(f"{arguments.model}, 32x32, {len(profile.sites)} batch norms, torch {torch.__version__}, one thread")
    models = [settled(na.adapt(model, profile)), settled(na.adapt(model))]
    for n, share in ROUNDS.items():
        measure(n, round(arguments.rounds * share), model, profile, models)


if __name__ == "__main__":
    main()
