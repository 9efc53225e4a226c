"""From activations to evidence: what one batch says about a layer's statistics.

The instance (an image, a series) is the sampling unit: neighbouring positions of one instance are strongly
correlated, so every sampling variance is that of the n per-instance means (docs/THEORY.md, section 2).
Nothing after `instance_moments` touches the full activations again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normadapt.types import Activations, LocationScale, PerChannel, PerInstance

_CANCELLATION = 3e-5  # float32 moments keep two digits of a variance this far below the squared mean, and a margin
_BLOCK = 2**18  # numbers; a megabyte of float32 stays in a core's cache


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


class Evidence(NamedTuple):
    """What a policy sees of one batch at one site.

    Args:
        count: Number of finite instances, at least 1.
        both: Batch mean and variance (2, C), float64; `mean` and `variance` are its rows.
        scatter: Variance (C,) of the instance means, biased: the part of `variance` between instances; a single 0
            for a batch of one.
        instances: Moments of the single instances, (n, C) each.
        positions: Positions per instance (1 for a BatchNorm1d on (n, C)).
        kept: Mask of the finite instances among the rows of the activations; None when all are.
        upstream: What the policy returned as `carry` at the previous site of the same forward pass, or None.
        memory: What `Policy.answered` returned after the batch before, or None.
        arguments: The positional and keyword arguments with which the model was called, not to be changed.
        input: The activations (n, C, ...) of the finite instances, in the layer's dtype and not to be changed; only for
            a policy that `needs_input`, else None.
        pass_index: Which forward pass over this batch it is, from 0; see `Policy.passes`.
        call: How many times the site was called before in this forward pass.
    """

    count: int  # type: ignore[assignment]  # hides tuple.count
    both: LocationScale
    scatter: PerChannel
    instances: InstanceMoments
    positions: int
    kept: Tensor | None = None
    upstream: Any = None
    memory: Any = None
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {})
    input: Activations | None = None
    pass_index: int = 0
    call: int = 0

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


def gather_evidence(x: Activations, bad: Tensor | None = None) -> tuple[Evidence | None, int]:
    """Evidence of one batch at one site, and how many instances were left out as non-finite.

    Args:
        x: Activations (n, C, ...).
        bad: Mask (n,) of instances that were not finite at an earlier site, where a ReLU may since have hidden it.

    Returns:
        The evidence, or None when no finite instance is left, and the number left out.
    """
    if x.numel() == 0:
        return None, 0
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
                return None, excluded
            moments = InstanceMoments(moments.values[:, kept])
        both, scatter = _pooled(moments)
    positions = x.numel() // (x.shape[0] * x.shape[1])
    return Evidence(x.shape[0] - excluded, both, scatter, moments, positions, kept), excluded


def _pooled(moments: InstanceMoments) -> tuple[LocationScale, PerChannel]:
    """Mean and variance (2, C) of a batch and the variance of its instance means (C,), biased."""
    values = moments.values
    if values.shape[1] == 1:
        return values[:, 0], values.new_zeros(())
    both = values.mean(1)
    scatter = (values[0] - both[0]).square_().mean(0)
    both[1] += scatter
    return both, scatter
