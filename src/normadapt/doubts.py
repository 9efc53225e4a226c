"""How a model answers the same instances under each of a policy's ways to normalize them.

Some batches are passed through the model in every way before they are answered; only the pass that led to the answer
is remembered. Answers to the same instances are compared, so it does not matter how hard they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.predictions import entropy, imbalance, prefer_something

_EACH = 16  # batches at first, each of which is passed through in every way
_SELDOM = 64  # batches from one look to the next in the long run; until then a sixteenth of those that have passed
_AFTER_A_JUMP = 128  # batches that count as passed then, at most
_MEMORY = 32.0  # instances looked at after which older answers have faded
_UNMET = 2.0  # instances of all classes alike, beside those looked at


class Answers(NamedTuple):
    """How a model answered under one way.

    Args:
        entropy: Mean entropy of the class probabilities, in nats.
        told: How much an answer tells about the class: the entropy of the mean probabilities less the mean entropy.
        told_smoothed: The same, counting two instances more that show all classes alike, which nobody has seen: a few
            cannot tell of many classes.
        imbalance: Of the mean probabilities: 0 for uniform ones, 1 for a single class.
    """

    entropy: float
    told: float
    told_smoothed: float
    imbalance: float


class Doubts(NamedTuple):
    """What a stream knows of its policy's ways.

    Args:
        age: Batches so far; fewer after a jump.
        since: Batches since the last look.
        met: Instances of one domain: since the last jump, and since the stream was last found to be mixed.
        count: Instances compared; older ones fade.
        ways: Names of the ways that were compared, in the order of the next; empty before the first look.
        entropies: Mean entropy under each of them.
        means: Mean class probabilities (ways, K); None before the first look.
        told, told_smoothed, imbalances: What follows from these under each of them, see `Answers`: worked out when
            the ways are compared, since one is chosen before every batch.
    """

    age: float = 0.0
    since: float = 0.0
    met: float = 0.0
    count: float = 0.0  # type: ignore[assignment]  # hides tuple.count
    ways: tuple[str, ...] = ()
    entropies: tuple[float, ...] = ()
    means: Tensor | None = None
    told: tuple[float, ...] = ()
    told_smoothed: tuple[float, ...] = ()
    imbalances: tuple[float, ...] = ()

    def passed(self, n: int, *, jumped: bool, mixed: bool = False) -> Doubts:
        """The same after a batch of n."""
        age, met = (min(self.age, float(_AFTER_A_JUMP)), 0.0) if jumped else (self.age, self.met)
        return self._replace(age=age + 1, since=self.since + 1, met=0.0 if mixed else met + n)

    @property
    def due(self) -> bool:
        """Whether the batch that has just passed is one to compare on."""
        return self.age <= _EACH or self.since >= min(self.age / _EACH, _SELDOM)

    def compared(self, answers: Mapping[str, Tensor | None]) -> Doubts:
        """The same with a batch's class probabilities (n, K) under each way.

        An instance counts where all are finite and at least one way prefers something, and once only: a camera that
        stands still, or is blank, shows the model nothing by showing it again. Answers of different shapes cannot be
        compared, and change nothing; where other ways or classes were compared before, that is void.
        """
        known = [answer.double().clamp_min(0.0) for answer in answers.values() if answer is not None]
        if len(known) < len(answers) or len({answer.shape for answer in known}) > 1:
            return self._replace(since=0.0)
        probabilities = torch.stack(known)
        entropies = entropy(probabilities)
        counts = entropies.isfinite().all(0) & prefer_something(entropies.amin(0), probabilities.shape[2])
        counts &= _first_of_its_kind(entropies, probabilities.argmax(2))
        n, faded = int(counts.sum()), self.count * math.exp(-len(counts) / _MEMORY)
        if n == 0:
            return self._replace(since=0.0, count=faded).worked_out()
        unsure, mean, count = entropies[:, counts].mean(1), probabilities[:, counts].mean(1), float(n)
        ways = tuple(answers)
        if self.means is not None and self.means.shape == mean.shape and self.ways == ways:
            count += faded
            unsure = torch.lerp(unsure.new_tensor(self.entropies), unsure, n / count)
            mean = torch.lerp(self.means, mean, n / count)
        after = self._replace(since=0.0, count=count, ways=ways, entropies=tuple(unsure.tolist()), means=mean)
        return after.worked_out()

    def worked_out(self) -> Doubts:
        """The same with what follows from `entropies`, `means` and `count`."""
        if self.means is None:
            return self
        even = 1 / self.means.shape[1]
        unmet = _UNMET / (_UNMET + self.count)  # the count of those looked at may have faded to 0
        beside = torch.lerp(self.means, self.means.new_full((), even), unmet)
        told, told_smoothed = (
            entropy(torch.stack((self.means, beside))) - self.means.new_tensor(self.entropies)
        ).tolist()
        return self._replace(
            told=tuple(told),
            told_smoothed=tuple(told_smoothed),
            imbalances=tuple(imbalance(mean, even, even) for mean in self.means),
        )

    def by_way(self) -> dict[str, Answers]:
        """The answers under each of the ways that were compared; none before the first look."""
        known = self if len(self.told) == len(self.ways) else self.worked_out()  # in a snapshot of before it was kept
        answers = map(Answers, known.entropies, known.told, known.told_smoothed, known.imbalances)
        return dict(zip(known.ways, answers, strict=True))


def _first_of_its_kind(entropies: Tensor, labels: Tensor) -> Tensor:
    """Which instances (n,) are answered unlike all before: entropy (to 0.001) or label differ in a way (ways, n)."""
    digits = entropies.clamp_min(1e-30).log().mul_(1000.0).round_()
    kinds = zip(*torch.cat((digits, labels.to(digits.dtype))).tolist(), strict=True)
    first: dict[tuple[float, ...], int] = {}
    alone = [first.setdefault(kind, index) == index for index, kind in enumerate(kinds)]
    return torch.tensor(alone, dtype=torch.bool, device=entropies.device)
