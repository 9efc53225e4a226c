"""Named tensor shapes, so that a signature says what a tensor holds.

All are `torch.Tensor`; the names document, they do not check. Statistics are float64 unless a
docstring says otherwise.
"""

from typing import TypeAlias

from torch import Tensor

Activations: TypeAlias = Tensor
"""(n, C) or (n, C, ...): instances, channels, positions; any floating dtype."""

PerChannel: TypeAlias = Tensor
"""(C,): one number per channel."""

PerInstance: TypeAlias = Tensor
"""(n, C): one number per instance and channel."""

LocationScale: TypeAlias = Tensor
"""(2, C): row 0 about locations, row 1 about half-log-variances."""

PerClass: TypeAlias = Tensor
"""(K,): one number per class."""

Pair: TypeAlias = tuple[float, float]
"""A number about locations and one about half-log-variances."""

Buffers: TypeAlias = tuple[Tensor, Tensor]
"""A running_mean and running_var (C,), in the layer's own dtype."""
