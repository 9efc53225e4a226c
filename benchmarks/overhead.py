"""What adapting costs: time and memory of a forward pass beside the plain model's, one thread, one process.

    python benchmarks/overhead.py [--rounds 40]

A ResNet-18 with a 3x3 stem on 32x32 inputs (20 BatchNorm2d, 11 million parameters). Every round calls the plain model
and each contender once, in an order that is shuffled anew; what is printed is the median over rounds of the time
divided by the plain model's of the same round, with the quartiles. Contenders have seen 1,100 single images before:
of a stream so long one batch in 64 is passed in other ways, too, while the first 16 all are (after a jump one in
eight); that costs 2 to 5 % on average, which medians do not show. Peak memory is counted from the tensors that a
forward pass allocates, so it does not depend on the allocator.
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
TARGETS = {64: 1.05, 16: 1.15, 1: 1.6}


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
    """ResNet-18 for 32x32 inputs, running statistics measured on the benchmark's own source data."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(width, outputs, stride), Block(outputs, outputs, 1)]
        width = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
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
    """The adapted model after so many batches of one image like the source's that it seldom looks at other ways."""
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


def measure(n: int, rounds: int, model: nn.Module, profiled: na.AdaptedModel, unprofiled: na.AdaptedModel) -> None:
    """Print the table of one batch size; the adapted models are settled, and are not changed."""
    contenders: dict[str, Callable[[Tensor], Any]] = {
        "Track, profile, settled": copy.deepcopy(profiled),
        "Track, profile, following": following(copy.deepcopy(profiled)),
        "Track, no profile, settled": copy.deepcopy(unprofiled),
        "Track, no profile, following": following(copy.deepcopy(unprofiled)),
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
    activation = n * 64 * 32 * 32 * 4
    print(
        f"\nn = {n}: plain eval {1e3 * statistics.median(times['plain']):.1f} ms, peak {plain / 2**20:.1f} MiB "
        f"(the largest activation is {activation / 2**20:.2f} MiB); target {TARGETS[n]:.2f} x"
    )
    for name, forward in contenders.items():
        ratios = sorted(a / b for a, b in zip(times[name], times["plain"], strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4)
        extra = peak_bytes(forward, x) - plain
        print(f"  {name:30} {middle:5.2f} x  (quartiles {low:.2f} to {high:.2f})   peak {extra / 2**20:+7.3f} MiB")


def main() -> None:
    """Print all three batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40, help="rounds at n = 64; more at 16 and 1")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = resnet18()
    profile = na.profile_source(model, [images(50) for _ in range(10)])
    print(f"ResNet-18, 32x32, {len(profile.sites)} batch norms, torch {torch.__version__}, one thread")
    profiled, unprofiled = settled(na.adapt(model, profile)), settled(na.adapt(model))
    for n, share in ROUNDS.items():
        measure(n, round(arguments.rounds * share), model, profiled, unprofiled)


if __name__ == "__main__":
    main()
