"""The corruptions in plain torch."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from normadapt.bench.corruptions import CORRUPTIONS, SEVERITIES

STEPS = [(name, severity) for name in CORRUPTIONS for severity in SEVERITIES]


@pytest.fixture(params=[16, 32], ids=["16", "32"])
def images(request: pytest.FixtureRequest) -> Tensor:
    """Smooth grey pictures with both black and white in them."""
    side = request.param
    place = torch.linspace(0, 1, side)
    turn = torch.arange(12.0).view(-1, 1, 1, 1)
    return ((torch.sin(9 * place.view(1, 1, -1, 1) + turn) * torch.cos(7 * place.view(1, 1, 1, -1) - turn)) + 1) / 2


@pytest.mark.parametrize(("name", "severity"), STEPS)
def test_images_stay_images(images: Tensor, name: str, severity: int) -> None:
    before = images.clone()
    changed = CORRUPTIONS[name](images, severity, 5)
    assert changed.shape == images.shape
    assert changed.dtype == images.dtype
    assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severity_grows(images: Tensor, name: str) -> None:
    distance = [float((CORRUPTIONS[name](images, s, 5) - images).square().mean()) for s in SEVERITIES]
    assert distance[0] > 1e-5
    assert all(low < high for low, high in pairwise(distance))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides(images: Tensor, name: str) -> None:
    change = CORRUPTIONS[name]
    torch.manual_seed(1)
    first = change(images, 3, 5)
    torch.manual_seed(2)
    assert torch.equal(first, change(images, 3, 5))
    drawn = name in {"noise", "salt", "shade"}
    assert torch.equal(first, change(images, 3, 6)) is not drawn


def test_shade_differs_between_images() -> None:
    light = CORRUPTIONS["shade"](torch.zeros(4, 1, 16, 16), 5, 0)
    assert float(light.max()) <= 0.5 + 1e-6
    assert all(not torch.allclose(light[i], light[0]) for i in range(1, 4))


def test_pixelate_makes_cells() -> None:
    image = torch.rand((1, 1, 16, 16), generator=torch.Generator().manual_seed(0))
    changed = CORRUPTIONS["pixelate"](image, 4, 0)  # 8 per side: squares of 2 x 2
    torch.testing.assert_close(changed[..., ::2, ::2], changed[..., 1::2, 1::2])
    torch.testing.assert_close(changed[0, 0, 0, 0], image[0, 0, :2, :2].mean())
