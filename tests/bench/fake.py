"""A suite that is made in a moment: two classes of noise images, shifted by brightness and contrast."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from normadapt.bench.suites.base import Domain, Need, Split, Suite, Task, draw

SHIFTS = {"bright": (1.0, 1.5), "faint": (0.3, 0.0), "bright-low": (1.0, 0.7)}


def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            layer.weight.data.uniform_(0.5, 1.5)
    net.train()
    images, _ = data("clean", 600, 1)
    for part in images.split(100):
        net(part)
    return net.eval()


def data(name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pattern = torch.eye(3).repeat_interleave(22, 1)[:, :64].view(3, 1, 8, 8)
    images = pattern[labels] + 0.7 * torch.randn((count, 1, 8, 8), generator=generator)
    scale, offset = SHIFTS.get(name, (1.0, 0.0))
    return images * scale + offset, labels


class FakeTask(Task):
    def correct(self, output: Tensor, labels: Tensor) -> Tensor:
        return output.argmax(1) % 3 == labels


class Fake(Suite):
    name: ClassVar[str] = "fake"
    summary: ClassVar[str] = "noise in three classes"
    count: ClassVar[int] = 120
    profiled: ClassVar[bool] = True

    def _tasks(self, split: Split, seed: int) -> list[Task]:
        def make(name: str) -> Domain:
            return Domain(*data(name, self.count, draw(split, seed, name)))

        def source() -> list[Tensor]:
            return list(data("clean", 200, 7)[0].split(100))

        ramps = {"bright": ("bright-low", "bright"), "faint": ("faint",)}
        net = model()
        fitted = net(data("clean", 300, 3)[0])
        targets = nn.functional.one_hot(data("clean", 300, 3)[1], 3).float()
        features = net[:-1](data("clean", 300, 3)[0]).detach()
        net[-1].weight.data = torch.linalg.lstsq(features, targets - targets.mean(0)).solution.T.contiguous()
        net[-1].bias.data = torch.zeros(3)
        del fitted
        return [
            FakeTask(f"{self.name}/{i}", net, make, clean="clean", shifts=("bright", "faint"),
                     ramps=ramps if i == 0 else None, negative=self.negative, source=source if self.profiled else None)
            for i in range(2)
        ]  # fmt: skip


class Absent(Fake):
    name = "absent"
    needs = (Need("something", lambda: False, "python -m pip install something"),)


class Control(Fake):
    name = "control"
    negative = True
    profiled = False
