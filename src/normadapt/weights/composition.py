"""What a model's own predictions say about the classes of a stream: how many draws of a class a batch is worth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.layers.predictions import argmax_frequencies
from normadapt.types import PerClass

_DECAY = 0.9  # of the running average behind `Composition.effective_count`, per batch


class Composition(NamedTuple):
    """What the model's own predictions said about the classes of a stream so far.

    A batch of one class is not n independent draws: this keeps the running agreement of the predictions
    within batches, from which `effective_count` follows, and the last batch's class frequencies, which a
    policy can only use one batch later (they are not known before the batch's forward pass ends).

    Args:
        last: Class frequencies predicted for the previous batch (K,), or None before the first one.
        last_count: Number of instances behind `last`.
        agreement: Decaying sum of n sum_k p_k^2 - 1 over batches.
        pairs: Decaying sum of n - 1 over batches.
        reference: Class frequencies of the source (K,); None stands for uniform.
        chance: Probability that two independent source instances share their class, sum_k pi_k^2.
        correlation: How much more often two instances of a batch share their predicted class, in [0, 1].
    """

    last: PerClass | None = None
    last_count: float = 0.0
    agreement: float = 0.0
    pairs: float = 0.0
    reference: PerClass | None = None
    chance: float = 0.0
    correlation: float = 0.0

    def update(self, probabilities: Tensor) -> Composition:
        """The composition after a batch with these class probabilities (n, K); rows with NaN do not count."""
        frequencies, n = argmax_frequencies(probabilities)
        if n == 0:
            return self._replace(last=None, last_count=0.0)
        reference = self.reference
        if reference is None or reference.numel() != frequencies.numel():
            reference = torch.full_like(frequencies, 1 / frequencies.numel())
        chance = float(reference @ reference)
        agreement = _DECAY * self.agreement + n * float(frequencies @ frequencies) - 1
        pairs = _DECAY * self.pairs + n - 1
        excess = (agreement / pairs - chance) / max(1 - chance, 1e-12) if pairs > 0 else 0.0
        correlation = min(max(excess, 0.0), 1.0)
        return Composition(frequencies, float(n), agreement, pairs, reference, chance, correlation)

    def effective_count(self, count: int) -> float:
        r"""Number of independent draws that `count` instances of a batch are worth for between-class variance.

        $$ n_\mathrm{eff} = \frac{n}{1 + (n - 1)\rho}, \qquad
           \rho = \Big(\frac{a - \sum_k \pi_k^2}{1 - \sum_k \pi_k^2}\Big)_+ $$

        with a the chance that two instances of a batch share their predicted class.
        """
        return count / (1 + (count - 1) * self.correlation)
