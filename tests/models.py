"""Small models with every kind of normalization layer, whose running statistics are right for `Case.source` data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normadapt as na


class NormRelu(nn.BatchNorm2d):
    """A subclass with its activation fused in, and a signature of its own."""

    def forward(self, input, inplace=False):  # noqa: A002
        return F.relu(super().forward(input), inplace=inplace)


class FrozenNorm(nn.Module):
    """Keeps running statistics in buffers, but is no torch batch norm (as in detection libraries)."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        scale = (self.weight * (self.running_var + self.eps).rsqrt()).view(1, -1, 1, 1)
        return x * scale + (self.bias.view(1, -1, 1, 1) - self.running_mean.view(1, -1, 1, 1) * scale)


class Twice(nn.Module):
    """One batch norm that is called twice in a forward."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.second = nn.Conv2d(6, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.norm(self.second(x))).mean((2, 3)))


class ByKeyword(nn.Module):
    """Called with keywords, calls its norm with one, and answers with a dict."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, *, image, scale=1.0):
        features = torch.relu(self.norm(input=self.conv(image)))
        return {"logits": scale * self.head(features.mean((2, 3)))}


class Pairs(nn.Module):
    """Answers with a tuple: logits and features."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        features = self.body(x).mean((2, 3))
        return self.head(features), features


class Views(nn.Module):
    """Sees several views (n, v, c, h, w) of an instance as a batch of their own, and averages."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        features = self.body(x.flatten(0, 1)).mean((2, 3))
        return self.head(features.unflatten(0, x.shape[:2]).mean(1))


def images(norm, **options):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        norm(6, **options),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(6, 8, 3),
        norm(8, **options),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def vectors(**options):
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8, **options),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(8, 8),
        nn.BatchNorm1d(8, **options),
        nn.ReLU(),
        nn.Linear(8, 4),
    )


def series():
    return nn.Sequential(
        nn.Conv1d(3, 6, 3),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Conv1d(6, 6, 3),
        nn.BatchNorm1d(6),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def volumes():
    return nn.Sequential(
        nn.Conv3d(2, 5, 3), nn.BatchNorm3d(5), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(5, 4)
    )


@dataclass(frozen=True)
class Case:
    """A kind of model and the data it is for."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[[nn.Module, Tensor], Any] = lambda model, x: model(x)
    item: Callable[[Tensor], Any] = lambda x: x

    def model(self, seed: int = 0) -> nn.Module:
        """A model in eval mode with the statistics of 256 source instances."""
        torch.manual_seed(seed)
        model = self.build()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # gains away from 1, biases away from 0
                parameter.data.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        calibrate(model, lambda: self.call(model, self.source(256, seed=100 + seed)))
        return model

    def source(self, n: int, seed: int = 0) -> Tensor:
        """Inputs (n, ...): instances differ in level and contrast, positions are noise."""
        generator = torch.Generator().manual_seed(1000 + seed)
        ones = (1,) * (len(self.shape) - 1)
        level = 0.5 * torch.randn(n, self.shape[0], *ones, generator=generator)
        contrast = 1 + 0.2 * torch.randn(n, 1, *ones, generator=generator)
        return level + contrast * torch.randn(n, *self.shape, generator=generator)

    def target(self, n: int, seed: int = 0) -> Tensor:
        """The same under a shift of level and contrast."""
        return 0.4 * self.source(n, seed=500 + seed) + 1.5

    def profile(self, seed: int = 0) -> na.SourceProfile:
        """The profile of `model(seed)` on the data that it has its statistics from."""
        return _profile(self, seed)

    def adapted(self, policy: na.Policy | None = None, seed: int = 0) -> na.AdaptedModel:
        """`model(seed)` adapted with its profile."""
        return na.adapt(self.model(seed), self.profile(seed), policy)


@cache
def _profile(case: Case, seed: int) -> na.SourceProfile:
    return na.profile_source(case.model(seed), [case.item(x) for x in case.source(256, seed=100 + seed).split(64)])


CASES = {
    "1d": Case(vectors, (6,)),
    "1d-series": Case(series, (3, 12)),
    "2d": Case(lambda: images(nn.BatchNorm2d), (3, 8, 8)),
    "2d-no-affine": Case(lambda: images(nn.BatchNorm2d, affine=False), (3, 8, 8)),
    "3d": Case(volumes, (2, 4, 4, 4)),
    "sync": Case(lambda: images(nn.SyncBatchNorm), (3, 8, 8)),
    "fused": Case(lambda: images(NormRelu), (3, 8, 8)),
    "look-alike": Case(lambda: images(FrozenNorm), (3, 8, 8)),
    "instance": Case(lambda: images(nn.InstanceNorm2d, affine=True, track_running_stats=True), (3, 8, 8)),
    "twice": Case(Twice, (3, 8, 8)),
    "keywords": Case(ByKeyword, (3, 8, 8), lambda m, x: m(image=x)["logits"], lambda x: {"image": x}),
    "tuple": Case(Pairs, (3, 8, 8), lambda m, x: m(x)[0], lambda x: (x, "label")),
}
NET = CASES["2d"]


def calibrate(model: nn.Module, run: Callable[[], Any]) -> None:
    """Give each normalization layer the mean and variance of its input, one after the other in the forward's order."""
    model.eval()
    inputs: dict[nn.Module, list[Tensor]] = {}
    handles = []
    for module in model.modules():
        if isinstance(module._buffers.get("running_mean"), Tensor):
            inputs[module] = []
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, args, kwargs: inputs[m].append([*args, *kwargs.values()][0].transpose(0, 1).flatten(1)),
                    with_kwargs=True,
                )
            )
    with torch.no_grad():
        for module in inputs:
            for seen in inputs.values():
                seen.clear()
            run()
            values = torch.cat(inputs[module], 1)
            module.running_mean.copy_(values.mean(1))
            module.running_var.copy_(values.var(1))
    for handle in handles:
        handle.remove()


def batches(x: Tensor, size: int) -> list[Tensor]:
    """The same data in batches of `size`."""
    return list(x.split(size))


def everything(model: nn.Module) -> dict[str, Any]:
    """All of a model that nobody may change: values, flags, hooks, gradients and the identity of its parameters."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
        "identity": [id(p) for p in model.parameters()],
        "dtype": [v.dtype for v in model.state_dict().values()],
        "tracking": [getattr(m, "track_running_stats", None) for m in model.modules()],
    }


def same(one: Any, other: Any) -> bool:
    """Whether two trees of tensors and plain values are equal to the bit, NaN included."""
    if isinstance(one, Tensor):
        if not isinstance(other, Tensor) or one.dtype != other.dtype or one.shape != other.shape:
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
