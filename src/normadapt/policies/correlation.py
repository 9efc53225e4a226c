"""How many instances of a stream are worth one independent draw, measured from the layer's own statistics.

In runs of one class, or while a camera looks at one thing, neighbouring instances are alike, and the mean of a window
scatters more than its number of instances says. A moving average over the stream shows by how much, whatever the model
predicts: its squared distance from the window's mean is compared with what independent instances would give.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from normadapt.shapes import PerChannel

_SPAN = 32.0  # instances that the moving average reaches over: about a run of one class
_PRIOR_LENGTH = 20.0  # instances that count as one draw in a stream never seen before
_PRIOR_STRETCHES = 8.0  # independent stretches of the moving average that this prior is worth
_BOUND = 30.0  # times its expectation counts one look at most: an undetected change of domain is no correlation


class Correlation(NamedTuple):
    r"""The comparison at one site: how much more a moving average z of the locations scatters than it should.

    $$ \ell = \frac{\ell_0 k_0 + \sum_t k_t q_t}{k_0 + \sum_t k_t}, \qquad
       q_t = \frac{\sum_c w_c z_c^2}{\mathrm{tr}\,S\,(v_t + 1/N)} $$

    with tr S the scatter of one instance, v_t the variance of z for independent instances in units of one, N the
    window's instances and k_t = n/64 the independent stretches that a batch of n adds.

    Args:
        recent: z (C,), of the batches' distances from the window, in output units.
        variance: v.
        stretches: Sum of k, fading with the policy's memory.
        excess: Sum of k q.
    """

    recent: PerChannel
    variance: float = 0.0
    stretches: float = 0.0
    excess: float = 0.0

    @property
    def length(self) -> float:
        """Instances that count as one independent draw between classes, at least 1."""
        weighed = _PRIOR_LENGTH * _PRIOR_STRETCHES + self.excess
        return max(1.0, weighed / (_PRIOR_STRETCHES + self.stretches))

    @property
    def is_measured(self) -> bool:
        """Whether the stream has told at least as much of it as the prior is worth."""
        return self.stretches >= _PRIOR_STRETCHES

    def update(
        self, distance: PerChannel, n: int, count: float, one: float, weight: PerChannel, memory: float
    ) -> Correlation:
        """The comparison after a batch.

        Args:
            distance: The batch's mean minus the window's before it (C,), in output units.
            n: Instances in the batch.
            count: Instances in the window before it, N.
            one: tr S, the scatter of one instance of the stream: sum_c w_c times its variance.
            weight: gamma^2 (C,).
            memory: Instances after which old ones have faded.
        """
        step = -math.expm1(-n / _SPAN)
        recent = torch.lerp(self.recent, distance, step)
        variance = (1 - step) ** 2 * self.variance + step * step / n
        expected = max(one, 1e-12) * (variance + 1 / count)
        ratio = min(float(recent.square() @ weight) / expected, _BOUND)
        stretches = min(1.0, n / (2 * _SPAN))
        fade = math.exp(-n / memory)
        return Correlation(recent, variance, fade * self.stretches + stretches, fade * self.excess + stretches * ratio)

    def interrupted(self) -> Correlation:
        """The same knowledge at the beginning of a new window."""
        return self._replace(recent=torch.zeros_like(self.recent), variance=0.0)
