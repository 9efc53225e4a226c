"""How many draws of a class a stream is worth, from the model's own answers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.types import PerClass

_UNSEEN = 32.0  # instances of the source that a domain's mean prediction is shrunk by
_PSEUDO = (0.6, 1.2)  # pairs that say "correlated", of those in all, before any was seen
_MOST = 0.97  # correlation of neighbours at most


class ClassDraws(NamedTuple):
    """What the model answered in one domain.

    Args:
        count: Instances.
        total: Sum of their class probabilities (K,), float64.
        squares: Sum of p_b . p_b.
        pairs: Pairs of neighbours in the domain.
        together: Sum of p_b . p_{b-1} over these.
        last: Class probabilities of the last instance (K,).
    """

    count: float  # type: ignore[assignment]  # hides tuple.count
    total: PerClass
    squares: float
    pairs: float
    together: float
    last: PerClass

    @property
    def mean(self) -> PerClass:
        """Mean class probabilities (K,)."""
        return self.total / self.count


def after(before: ClassDraws | None, probabilities: Tensor) -> ClassDraws:
    """What is known after these answers (m, K), in their order, m at least 1."""
    p = probabilities.double()
    neighbours = p if before is None else torch.cat((before.last.unsqueeze(0), p))
    together = float((neighbours[1:] * neighbours[:-1]).sum())
    squares = float((p * p).sum())
    pairs = float(len(neighbours) - 1)
    if before is None:
        return ClassDraws(float(len(p)), p.sum(0), squares, pairs, together, p[-1])
    return ClassDraws(
        before.count + len(p),
        before.total + p.sum(0),
        before.squares + squares,
        before.pairs + pairs,
        before.together + together,
        p[-1],
    )


class Draws(NamedTuple):
    """What the answers of all domains say together.

    Args:
        run: Instances that are worth one draw of a class, M.
        imbalance: Of the predicted classes against the source's, between 0 and 1.
    """

    run: float
    imbalance: float


FIRST = Draws(3.0, 0.0)
"""What is assumed before any answer."""


def draws_of(answers: Iterable[ClassDraws | None], frequencies: PerClass) -> Draws:
    r"""Correlation of neighbouring answers and imbalance of the classes, pooled over domains.

    $$ \rho = \frac{\overline{p_b \cdot p_{b-1}} - \bar p \cdot \bar p}{\overline{p_b \cdot p_b} - \bar p \cdot \bar p},
       \quad M = \frac{1 + \rho}{1 - \rho}, \qquad
       I = \frac{|\bar p - \pi|^2 - \text{sampling}}{1 - |\pi|^2} $$

    with $\bar p$ the domain's mean answer, shrunk towards the source's frequencies $\pi$ by 32 instances in the first.

    Args:
        answers: Of each domain.
        frequencies: How often the source has each class (K,).
    """
    numerator = denominator = raw = seen = 0.0
    chance = float(frequencies @ frequencies)
    for one in answers:
        if one is None:
            continue
        mean = one.mean
        square = float(mean @ mean)
        difference = mean - frequencies
        raw += one.count * (float(difference @ difference) - (one.squares / one.count - square) / one.count)
        seen += one.count
        if one.pairs:
            shrunk = (one.total + _UNSEEN * frequencies) / (one.count + _UNSEEN)
            base = float(shrunk @ shrunk)
            both = one.together / one.pairs
            numerator += one.pairs * (both - base)
            denominator += one.pairs * (max(one.squares / one.count, both) - base)
    if seen == 0:
        return FIRST
    rho = min(max((numerator + _PSEUDO[0]) / (denominator + _PSEUDO[1]), 0.0), _MOST)
    imbalance = min(1.0, max(raw / (seen * max(1 - chance, 1e-12)), 1e-4))
    return Draws((1 + rho) / (1 - rho), imbalance)
