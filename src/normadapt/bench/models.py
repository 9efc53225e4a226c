"""The project's own source models, small enough that a full benchmark takes two cores an hour.

`benchmarks/train_sources.py` trains them; their checkpoints are in `weights/`, as safetensors.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parent / "weights"


class _Block(nn.Module):
    """Two convolutions with batch norm beside a shortcut without one (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(z)) + self.shortcut(x), inplace=True)


class FashionNet(nn.Module):
    """A ResNet for grey 28 x 28 images: six basic blocks, 13 BatchNorm2d, 0.18 million parameters.

    Input (n, 1, 28, 28), grey values between 0 and 1 less `MEAN` over `DEVIATION`; output (n, 10).
    """

    MEAN, DEVIATION = 0.2860, 0.3530  # of the training pixels

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        plan = [(16, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.blocks = nn.Sequential(*(_Block(*shape) for shape in plan))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the ten classes."""
        z: Tensor = self.blocks(F.relu(self.bn(self.conv(x)), inplace=True))
        scores: Tensor = self.head(z.mean((2, 3)))
        return scores


class ActivityNet(nn.Module):
    """A 1-D CNN for windows of a wrist's accelerometer and gyroscope: four BatchNorm1d, 24,000 parameters.

    Input (n, 6, 100), each channel less its training mean over its training deviation; output (n, 7).
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (6, 32, 32, 48, 48)
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            layers += [
                nn.Conv1d(inputs, outputs, 5, 2 if i % 2 else 1, 2, bias=False),
                nn.BatchNorm1d(outputs),
                nn.ReLU(inplace=True),
            ]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 7)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the seven exercises."""
        z: Tensor = self.layers(x)
        scores: Tensor = self.head(z.mean(2))
        return scores


def load_weights(model: nn.Module, name: str) -> nn.Module:
    """`model` with the committed checkpoint `name`, in eval mode."""
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return model.eval()
