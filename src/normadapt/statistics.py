"""From activations to evidence: what one batch says about a layer's statistics.

The instance (an image, a series) is the sampling unit: neighbouring positions of one instance are strongly
correlated, so every sampling variance is that of the n per-instance means (THEORY section 2).
Nothing after `instance_moments` touches the full activations again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normadapt.doubts import Doubts
from normadapt.predictions import argmax_frequencies, imbalance
from normadapt.shapes import Activations, LocationScale, PerChannel, PerClass, PerInstance

_CANCELLATION = 3e-5  # float32 moments keep two digits of a variance this far below the squared mean, and a margin
_BLOCK = 2**18  # numbers; a megabyte of float32 stays in a core's cache
_DECAY = 0.9  # of the running average behind `Composition.effective_count`, per batch


class InstanceMoments(NamedTuple):
    """Mean and (biased) variance over the positions of each instance and channel.

    Args:
        values: (2, n, C) float64: row 0 the means, row 1 the variances; these are exactly 0 when there is one position,
            and below 0 by rounding at the most.
    """

    values: Tensor

    @property
    def mean(self) -> PerInstance:
        """Means (n, C)."""
        return self.values[0]

    @property
    def variance(self) -> PerInstance:
        """Variances (n, C) within the instances."""
        return self.values[1]


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
        doubts: How the model answers under each of the policy's ways.
    """

    last: PerClass | None = None
    last_count: float = 0.0
    agreement: float = 0.0
    pairs: float = 0.0
    reference: PerClass | None = None
    chance: float = 0.0
    correlation: float = 0.0
    doubts: Doubts = Doubts()

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
        return Composition(frequencies, float(n), agreement, pairs, reference, chance, correlation, self.doubts)

    def effective_count(self, count: int) -> float:
        r"""Number of independent draws that `count` instances of a batch are worth for between-class variance.

        $$ n_\mathrm{eff} = \frac{n}{1 + (n - 1)\rho}, \qquad
           \rho = \Big(\frac{a - \sum_k \pi_k^2}{1 - \sum_k \pi_k^2}\Big)_+ $$

        with a the chance that two instances of a batch share their predicted class.
        """
        return count / (1 + (count - 1) * self.correlation)

    def pooled(self, classes: PerClass, count: float) -> tuple[PerClass, float]:
        """Class frequencies of a window of `count` instances with the last batch in it, and their imbalance.

        The imbalance is the squared distance from the source's frequencies over what a single class has on average.

        Args:
            classes: Frequencies (K,) of the window before; empty while unknown.
            count: Instances in the window, the last batch included.
        """
        if self.last is None or self.reference is None or count <= 0:
            return classes, 1.0 if classes.numel() else 0.0
        frequencies = self.last
        if classes.numel() == frequencies.numel():
            frequencies = torch.lerp(classes, frequencies, min(1.0, self.last_count / count))
        return frequencies, self.imbalance(frequencies)

    def imbalance(self, frequencies: PerClass) -> float:
        """Squared distance of class frequencies (K,) from the source's, over what a single class has on average.

        1 where the source's are unknown.
        """
        if self.reference is None:
            return 1.0
        return imbalance(frequencies, self.reference, self.chance)


class Evidence(NamedTuple):
    """What a policy sees of one batch at one site.

    Args:
        count: Number of finite instances, at least 1.
        both: Batch mean and variance (2, C), float64; `mean` and `variance` are its rows.
        scatter: Variance (C,) of the instance means, biased: the part of `variance` between instances; a single 0
            for a batch of one.
        instances: Moments of the single instances, (n, C) each.
        positions: Positions per instance (1 for a BatchNorm1d on (n, C)).
        composition: Predicted classes of the stream so far; None when the model's output gives no probabilities.
        upstream: What the policy returned as `carry` at the previous site of the same forward pass, or None.
        input: The activations (n, C, ...) of the finite instances, in the layer's dtype and not to be changed; only for
            a policy that `needs_input`, else None.
        pass_index: Which forward pass over this batch it is, from 0; see `Policy.passes`.
        way: Which of the policy's ways the batch is to be normalized in, see `Policy.ways`; "" where it has none.
        turned: Whether the batch before was normalized in another way: `Statistics` cannot leave what is in use.
        told: `composition` with the batch's own predicted classes, where it is passed once more to know them, or None.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count
    both: LocationScale
    scatter: PerChannel
    instances: InstanceMoments
    positions: int
    composition: Composition | None = None
    upstream: Any = None
    input: Activations | None = None
    pass_index: int = 0
    way: str = ""
    turned: bool = False
    told: Composition | None = None

    @property
    def mean(self) -> PerChannel:
        """Batch mean (C,)."""
        return self.both[0]

    @property
    def variance(self) -> PerChannel:
        """Batch variance (C,) over instances and positions, biased (divided by their number)."""
        return self.both[1]


def instance_moments(x: Activations) -> InstanceMoments:
    """Mean and variance of every instance and channel, without a copy of the activations.

    Two reductions in float32 (float64 input stays float64), then (n, C) algebra in float64. Where a mean is large
    against the spread float32 sums of squares lose the variance: see `exact_instance_moments`.

    Args:
        x: Activations (n, C) or (n, C, ...), any floating dtype, n >= 1 and at least one position.

    Returns:
        Moments (n, C) in float64; non-finite for instances that hold NaN or Inf.
    """
    if x.dim() == 2:
        mean = x.double()
        return InstanceMoments(torch.stack((mean, torch.zeros_like(mean))))
    dims = tuple(range(2, x.dim()))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() < 4 * _BLOCK:
        mean, norm = x.mean(dims, dtype=dtype), torch.linalg.vector_norm(x, dim=dims, dtype=dtype)
    else:  # in pieces, so that the second reduction finds in the cache what the first has read
        pieces = x.split(max(1, _BLOCK * x.shape[0] // x.numel()))
        pairs = [(p.mean(dims, dtype=dtype), torch.linalg.vector_norm(p, dim=dims, dtype=dtype)) for p in pieces]
        mean, norm = torch.cat([m for m, _ in pairs]), torch.cat([s for _, s in pairs])
    variance = norm.square_().mul_(x.shape[0] * x.shape[1] / x.numel()).addcmul_(mean, mean, value=-1)
    return InstanceMoments(torch.stack((mean, variance)).double())


def exact_instance_moments(x: Activations, centre: PerChannel) -> InstanceMoments:
    """The same moments about `centre` (C,), one instance at a time in float64: for means far from 0."""
    shift = torch.nan_to_num(centre, posinf=0.0, neginf=0.0).unsqueeze(1)
    moved = (instance.flatten(1).double() - shift for instance in x)
    pairs = [(m.mean(1), m.var(1, correction=0)) for m in moved]
    mean = torch.stack([m for m, _ in pairs]) + shift.view(1, -1)
    return InstanceMoments(torch.stack((mean, torch.stack([v for _, v in pairs]))))


def finite_instances(moments: InstanceMoments) -> Tensor | None:
    """Mask (n,) of the instances whose moments are all finite; None when every one is (the usual case)."""
    if math.isfinite(float(moments.values.sum())):
        return None
    return moments.values.isfinite().all(2).all(0)


def gather_evidence(
    x: Activations, composition: Composition | None = None, upstream: Any = None, bad: Tensor | None = None
) -> tuple[Evidence | None, Tensor | None, int]:
    """Evidence of one batch at one site, and which instances were left out as non-finite.

    Args:
        x: Activations (n, C, ...).
        composition: Handed through to the evidence.
        upstream: Handed through to the evidence.
        bad: Mask (n,) of instances that were not finite at an earlier site, where a ReLU may since have hidden it.

    Returns:
        The evidence, or None when no finite instance is left; the mask (n,) of the instances in it, None when all
        are; and the number left out.
    """
    if x.numel() == 0:
        return None, None, 0
    moments = instance_moments(x)
    both, scatter = _pooled(moments)
    mean, variance = both.unbind()
    kept, excluded = None, 0
    # Two numbers tell the usual case from NaN, Inf, overflow and cancellation.
    least, largest = torch.addcmul(variance, mean, mean, value=-_CANCELLATION).aminmax()
    usual = float(least) >= 0 and math.isfinite(float(largest))
    known = bad is not None and bad.shape[0] == x.shape[0]
    if not usual or known:
        if not usual and x.dim() > 2:
            moments = exact_instance_moments(x, moments.mean.nan_to_num(0.0, 0.0, 0.0).mean(0))
        kept = finite_instances(moments)
        if known and bad is not None:
            kept = ~bad if kept is None else kept & ~bad
        if kept is not None:
            excluded = x.shape[0] - int(kept.sum())
            if excluded == x.shape[0]:
                return None, kept, excluded
            moments = InstanceMoments(moments.values[:, kept])
        both, scatter = _pooled(moments)
    positions = x.numel() // (x.shape[0] * x.shape[1])
    return Evidence(x.shape[0] - excluded, both, scatter, moments, positions, composition, upstream), kept, excluded


def _pooled(moments: InstanceMoments) -> tuple[LocationScale, PerChannel]:
    """Mean and variance (2, C) of a batch and the variance of its instance means (C,), biased."""
    values = moments.values
    if values.shape[1] == 1:
        return values[:, 0], values.new_zeros(())
    both = values.mean(1)
    scatter = (values[0] - both[0]).square_().mean(0)
    both[1] += scatter
    return both, scatter
