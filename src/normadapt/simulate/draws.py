"""The laws that the data come from, all with mean 0 and variance 1, and the statistics of many small samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

_BLOCK = 4_000_000  # draws held in memory at once


@dataclass(frozen=True)
class Law:
    """A law with mean 0 and variance 1.

    Args:
        name: For legends.
        skewness: Its third cumulant.
        excess_kurtosis: Its fourth.
        draw: Draws of a shape, float64.
        gamma_shape: Shape a of the gamma law that it is (shifted and scaled), None if it is none.
    """

    name: str
    skewness: float
    excess_kurtosis: float
    draw: Callable[[tuple[int, ...], Generator], Tensor]
    gamma_shape: float | None = None


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _exponential(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)


def gamma(degrees: int, name: str | None = None) -> Law:
    """The standardized gamma law of shape degrees/2, a sum of that many squared normals: skewness sqrt(8/degrees)."""
    shape = degrees / 2

    def draw(size: tuple[int, ...], generator: Generator) -> Tensor:
        total = torch.zeros(size, dtype=torch.float64)
        for _ in range(degrees // 2):
            total += _exponential(size, generator)
        if degrees % 2:
            total += 0.5 * _normal(size, generator).square_()
        return total.sub_(shape).div_(math.sqrt(shape))

    return Law(name or f"gamma({shape:g})", 2 / math.sqrt(shape), 6 / shape, draw, shape)


_LOG_SIGMA = 0.6
_W = math.exp(_LOG_SIGMA**2)


def _lognormal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    x = _normal(shape, generator).mul_(_LOG_SIGMA).exp_()
    return x.sub_(math.sqrt(_W)).div_(math.sqrt(_W * (_W - 1)))


def _student(shape: tuple[int, ...], generator: Generator) -> Tensor:
    squares = _exponential(shape, generator) + _exponential(shape, generator)
    squares = 2 * squares + _normal(shape, generator).square_()
    return _normal(shape, generator) / (squares / 5).sqrt() * math.sqrt(3 / 5)


_SHARE, _WIDE = 0.1, 5.0  # a tenth of the draws is five times as wide
_CONTAMINATED = 1 - _SHARE + _SHARE * _WIDE**2


def _contaminated(shape: tuple[int, ...], generator: Generator) -> Tensor:
    wide = torch.rand(shape, generator=generator) < _SHARE
    return _normal(shape, generator) * torch.where(wide, _WIDE, 1.0).double() / math.sqrt(_CONTAMINATED)


_CHANCE = 0.2


def _bernoulli(shape: tuple[int, ...], generator: Generator) -> Tensor:
    hit = torch.rand(shape, generator=generator) < _CHANCE
    return (hit.double() - _CHANCE) / math.sqrt(_CHANCE * (1 - _CHANCE))


NORMAL = Law("normal", 0.0, 0.0, _normal)
EXPONENTIAL = gamma(2, "exponential")
LOGNORMAL = Law("lognormal(0.6)", (_W + 2) * math.sqrt(_W - 1), _W**4 + 2 * _W**3 + 3 * _W**2 - 6, _lognormal)
STUDENT = Law("Student t(5)", 0.0, 6.0, _student)
CONTAMINATED = Law(
    "contaminated",
    0.0,
    3 * (1 - _SHARE + _SHARE * _WIDE**4) / _CONTAMINATED**2 - 3,
    _contaminated,
)
BERNOULLI = Law(
    "Bernoulli(0.2)",
    (1 - 2 * _CHANCE) / math.sqrt(_CHANCE * (1 - _CHANCE)),
    1 / (_CHANCE * (1 - _CHANCE)) - 6,
    _bernoulli,
)
LAWS: Mapping[str, Law] = {
    law.name: law for law in (NORMAL, EXPONENTIAL, gamma(8), LOGNORMAL, STUDENT, CONTAMINATED, BERNOULLI)
}


class Statistics(NamedTuple):
    """Mean, unbiased variance, third and fourth k-statistic of many samples, each of the shape asked for."""

    mean: Tensor
    variance: Tensor
    k3: Tensor
    k4: Tensor


def statistics(law: Law, count: int, shape: tuple[int, ...], generator: Generator) -> Statistics:
    """Statistics of samples of `count` draws, at least 4, as many of them as `shape` says."""
    samples = math.prod(shape)
    step = max(1, _BLOCK // count)
    parts = [_of_block(law, count, min(step, samples - begin), generator) for begin in range(0, samples, step)]
    return Statistics(*(torch.cat(column).reshape(shape) for column in zip(*parts, strict=True)))


def _of_block(law: Law, count: int, samples: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = count
    x = law.draw((n, samples), generator)
    mean = x.mean(0)
    x -= mean
    square = x * x
    m2, m3, m4 = square.mean(0), (square * x).mean(0), square.square_().mean(0)
    k3 = m3 * (n * n / ((n - 1) * (n - 2)))
    k4 = ((n + 1) * m4 - 3 * (n - 1) * m2 * m2) * (n * n / ((n - 1) * (n - 2) * (n - 3)))
    return mean, m2 * (n / (n - 1)), k3, k4
