"""Moments that merge exactly, and the k-statistics (unbiased cumulants) they give."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KStatistics(NamedTuple):
    """Unbiased estimates of the first four cumulants; NaN where the count does not suffice."""

    k1: Tensor
    k2: Tensor
    k3: Tensor
    k4: Tensor


class Moments(NamedTuple):
    r"""Count, mean and sums of central powers, $M_r = \sum_i (x_i - \bar x)^r$, per channel.

    Merging is exact (Pebay 2008; Chan, Golub and LeVeque 1983), so splitting a sample and merging
    its parts in any order gives the moments of the whole up to rounding.

    Args:
        count: Number of draws, scalar float64 or broadcastable with the others.
        mean: Sample mean (...,), float64.
        m2: Sum of squared deviations (...,).
        m3: Sum of cubed deviations (...,).
        m4: Sum of fourth powers of deviations (...,).

    Example:
        >>> x = torch.arange(6, dtype=torch.float64)
        >>> whole = Moments.from_sample(x)
        >>> parts = Moments.from_sample(x[:2]).merge(Moments.from_sample(x[2:]))
        >>> torch.allclose(whole.m4, parts.m4)
        True

    References:
        Pebay (2008), Sandia report SAND2008-6212.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    mean: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor

    @classmethod
    def from_sample(cls, x: Tensor, dim: int = 0) -> Moments:
        """Moments of `x` along `dim`, two passes in float64.

        Args:
            x: Sample, any real dtype; `dim` must not be empty.
            dim: The dimension that holds the draws.

        Raises:
            ValueError: If there is no draw along `dim`.
        """
        if x.shape[dim] == 0:
            raise ValueError(f"from_sample() needs at least one draw along dim={dim}; got shape {tuple(x.shape)}")
        x = x.double()
        mean = x.mean(dim)
        centred = x - mean.unsqueeze(dim)
        square = centred * centred
        count = torch.tensor(float(x.shape[dim]), dtype=torch.float64, device=x.device)
        return cls(count, mean, square.sum(dim), (square * centred).sum(dim), (square * square).sum(dim))

    def merge(self, other: Moments) -> Moments:
        r"""Moments of the two samples together.

        $$ M_2 = M_2^A + M_2^B + D^2 n_A n_B / n, \quad D = \bar x_B - \bar x_A $$

        and likewise for the third and fourth powers (THEORY section 10). A side with count 0 is neutral.
        """
        na, nb = self.count, other.count
        n = na + nb
        safe = torch.where(n > 0, n, torch.ones_like(n))  # two empty sides merge to an empty one, not to NaN
        d = other.mean - self.mean
        fa, fb = na / safe, nb / safe
        d2 = d * d
        m2 = self.m2 + other.m2 + d2 * na * fb
        m3 = self.m3 + other.m3 + d2 * d * na * fb * (fa - fb) + 3 * d * (fa * other.m2 - fb * self.m2)
        m4 = (
            self.m4
            + other.m4
            + d2 * d2 * na * fb * (fa * fa - fa * fb + fb * fb)
            + 6 * d2 * (fa * fa * other.m2 + fb * fb * self.m2)
            + 4 * d * (fa * other.m3 - fb * self.m3)
        )
        return Moments(n, self.mean + d * fb, m2, m3, m4)

    def k_statistics(self) -> KStatistics:
        r"""Unbiased estimates of the cumulants (Fisher's k-statistics).

        $$ k_3 = \frac{n M_3}{(n-1)(n-2)}, \qquad
           k_4 = \frac{n^2 [(n+1) m_4 - 3 (n-1) m_2^2]}{(n-1)(n-2)(n-3)}, \quad m_r = M_r / n $$

        Returns:
            k1..k4, each with the shape of `mean`; k_r is NaN where the count is below r.
        """
        n = self.count
        nan = torch.full_like(self.mean, torch.nan)

        def needs(order: int, value: Tensor) -> Tensor:
            return torch.where(n >= order, value, nan)

        k2 = self.m2 / (n - 1)
        k3 = n * self.m3 / ((n - 1) * (n - 2))
        k4 = n * ((n + 1) * self.m4 - 3 * (n - 1) / n * self.m2 * self.m2) / ((n - 1) * (n - 2) * (n - 3))
        return KStatistics(needs(1, self.mean), needs(2, k2), needs(3, k3), needs(4, k4))
