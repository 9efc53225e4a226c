"""A trained model of five classes of images, its source profile, and what can happen to its inputs."""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

import normadapt as na
from models import calibrate

CLASSES, SIDE = 5, 10


@cache
def _patterns() -> Tensor:
    """What the classes look like (K, 2, side, side), smooth."""
    g = torch.Generator().manual_seed(1)
    coarse = torch.randn(CLASSES, 2, 4, 4, generator=g)
    return nn.functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")


def draws(n: int, seed: int) -> Tensor:
    """Labels (n,) in any order."""
    return torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(10_000 + seed))


def images(labels: Tensor, seed: int) -> Tensor:
    """Images (n, 2, side, side) of these classes, as the model was trained on."""
    g = torch.Generator().manual_seed(seed)
    n = len(labels)
    level = 0.15 * torch.randn(n, 2, 1, 1, generator=g)
    contrast = 1 + 0.15 * torch.randn(n, 1, 1, 1, generator=g)
    return level + contrast * (_patterns()[labels] + 1.5 * torch.randn(n, 2, SIDE, SIDE, generator=g))


def _noise(x: Tensor) -> Tensor:
    return x + 2.0 * torch.randn(x.shape, generator=torch.Generator().manual_seed(77))


SHIFTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "contrast": lambda x: 0.3 * x,
    "brightness": lambda x: x + 1.2,
    "both": lambda x: 0.4 * x - 1.0,
    "noise": _noise,
}


@cache
def trained() -> nn.Module:
    """A model of two norms, in eval mode and without gradients, that tells the classes of `images`."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, CLASSES),
    ).requires_grad_(False)
    labels = draws(2000, 1)
    x = images(labels, 1)
    calibrate(model, lambda: model(x))
    features = torch.cat((model[:-1](x), torch.ones(len(x), 1)), 1).double()
    gram = features.T @ features + 20 * torch.eye(features.shape[1], dtype=torch.float64)
    fitted = 8 * torch.linalg.solve(gram, features.T @ one_hot(labels, CLASSES).double()).float()
    model[-1].weight.copy_(fitted[:-1].T)
    model[-1].bias.copy_(fitted[-1])
    return model.eval()


@cache
def profile() -> na.SourceProfile:
    """Of `trained`, from 400 images."""
    return na.profile_source(trained(), images(draws(400, 2), 2).split(100))


def adapted_model(policy: na.Policy | None = None) -> na.AdaptedModel:
    """`trained` with its profile, having seen nothing."""
    return na.adapt(trained(), profile(), policy)


def answers(model: nn.Module, x: Tensor, n: int) -> Tensor:
    """Logits (N, K) to a stream in batches of n."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in x.split(n)])


def right(model: nn.Module, x: Tensor, labels: Tensor, n: int) -> float:
    """Share of right answers to a stream in batches of n."""
    return float((answers(model, x, n).argmax(1) == labels).float().mean())


LABELS = draws(192, 5)
X = images(LABELS, 5)
"""A stream of clean images, as far as tests need one."""
