"""Cumulant generating functions of laws known from data: four cumulants, or a sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normadapt.asymptotics.arguments import Real, as_doubles, require, require_non_negative
from normadapt.asymptotics.cancellation import expm1_minus
from normadapt.asymptotics.generating import CGF, Range


class CumulantCGF(CGF):
    r"""Generating function cut off after four cumulants, $K(t) = k_1 t + k_2 t^2/2 + k_3 t^3/6 + k_4 t^4/24$.

    Convex everywhere if and only if k4 >= 0 and k3^2 <= 2 k2 k4; elsewhere `domain` holds the t, and `reach` the
    points, up to which it is convex. Points beyond are clamped and flagged.

    Args:
        k1: Mean (...,).
        k2: Variance (...,), not negative; 0 is a constant, whose points are flagged.
        k3: Third cumulant (...,).
        k4: Fourth cumulant (...,).

    Raises:
        ValueError: If k2 is negative, something is NaN, or the shapes do not broadcast.

    Example:
        >>> uniform = CumulantCGF(0.0, 1 / 12, 0.0, -1 / 120)
        >>> bool(uniform.is_convex), uniform.domain[1].item(), uniform.reach[1].item()
        (False, 4.4721359549..., 0.24845199749...)

    References:
        Easton and Ronchetti (1986), JASA 81(394), 420-430; Wang (1992), Statist. Probab. Lett. 15(1), 1-4, who damps
        the last two terms where this class reports the reach.
    """

    is_truncated = True

    def __init__(self, k1: Real, k2: Real, k3: Real, k4: Real) -> None:
        self.k1, self.k2, self.k3, self.k4 = torch.broadcast_tensors(*as_doubles(k1=k1, k2=k2, k3=k3, k4=k4))
        require_non_negative(k2=self.k2)

    @property
    def is_convex(self) -> Tensor:
        """Whether K'' is positive for all t, (...,) bool."""
        convex: Tensor = (self.k4 >= 0) & (self.k3 * self.k3 <= 2 * self.k2 * self.k4)
        return convex

    def cumulants(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The four cumulants, and 0 for the fifth."""
        return self.k1, self.k2, self.k3, self.k4, torch.zeros_like(self.k1)

    def centred(self, t: Tensor, order: int) -> tuple[Tensor, ...]:
        """K(t) - mean t and its derivatives."""
        k2, k3, k4 = self.k2, self.k3, self.k4
        values = [t * t * (k2 / 2 + t * (k3 / 6 + t * k4 / 24))]
        if order >= 1:
            values += [t * (k2 + t * (k3 / 2 + t * k4 / 6)), k2 + t * (k3 + t * k4 / 2), k3 + t * k4, k4 + 0 * t]
        return tuple(values[: order + 1])

    @property
    def domain(self) -> Range:
        """Between the zeros of K'' nearest to 0."""
        k2, k3, k4 = (k.detach() for k in (self.k2, self.k3, self.k4))
        discriminant = k3 * k3 - 2 * k2 * k4
        real = ~self.is_convex & (discriminant >= 0)
        stable = -(k3 + torch.where(k3 < 0, -1.0, 1.0) * discriminant.clamp_min(0).sqrt())
        roots = [torch.where(real & (d != 0), n / d, torch.inf) for n, d in ((stable, k4), (2 * k2, stable))]
        high = torch.minimum(*(torch.where(root > 0, root, torch.inf) for root in roots))
        low = torch.maximum(*(torch.where(root < 0, root, -torch.inf) for root in roots))
        return low, high

    @property
    def reach(self) -> Range:
        """K' at the ends of the domain."""
        k1 = self.k1.detach()
        low, high = (
            torch.where(end.isinf(), end, k1 + self.centred(torch.where(end.isinf(), 0.0, end), 1)[1].detach())
            for end in self.domain
        )
        return low, high


class EmpiricalCGF(CGF):
    r"""Law of one draw from a sample, $K(t) = \log \tfrac1n \sum_i e^{t x_i}$.

    The bootstrap of the sample's mean is `WeightedMeans([(1, n, EmpiricalCGF(sample))])`. A saddlepoint exists only
    strictly between the smallest and the largest draw: a point elsewhere is clamped and flagged, no error, since
    the sample's hull is not the law's support.

    Args:
        sample: Draws (n, ...), along the first dimension, one law per remaining position.

    Raises:
        ValueError: If there is no draw, or one is NaN or infinite.

    Example:
        >>> sample = torch.tensor([9.6, 10.4, 13.0, 15.0, 16.6, 17.2, 17.3, 21.8, 24.0, 33.8], dtype=torch.float64)
        >>> EmpiricalCGF(sample).variance.item()
        46.532...

    References:
        Davison and Hinkley (1988), Biometrika 75(3), 417-431.
    """

    def __init__(self, sample: Tensor) -> None:
        (draws,) = as_doubles(sample=sample)
        if draws.ndim == 0 or draws.shape[0] == 0:
            raise ValueError(
                f"sample needs at least one draw along its first dimension; got shape {tuple(draws.shape)}"
            )
        require("sample", draws, draws.isfinite(), "must be finite")
        mean = draws.mean(0)
        self._mean = mean + (draws - mean).mean(0)
        self._centred = draws - self._mean
        self._ends = (draws.detach().amin(0), draws.detach().amax(0))

    def cumulants(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first five cumulants, divisor n."""
        y = self._centred
        square = y * y
        m2, m3, m4, m5 = square.mean(0), (square * y).mean(0), (square * square).mean(0), (square * square * y).mean(0)
        return self._mean, m2, m3, m4 - 3 * m2 * m2, m5 - 10 * m3 * m2

    def centred(self, t: Tensor, order: int) -> tuple[Tensor, ...]:
        """K(t) - mean t and its derivatives."""
        channels = self._centred.shape[1:]
        y = self._centred.reshape(-1, *(1 for _ in range(t.ndim - len(channels))), *channels)
        z = t.unsqueeze(0) * y
        small = z.abs().amax(0) < 1
        inner = torch.where(small, z, 0.0)
        growth = torch.log1p(expm1_minus(inner).mean(0))
        values = [torch.where(small, growth, torch.logsumexp(z, 0) - math.log(y.shape[0]))]
        if order >= 1:
            weights = torch.softmax(z, 0)
            tilted = (weights * y).sum(0)
            # the draws are centred, so their plain mean may be taken off: near 0 the sum itself cancels
            near = (y * torch.expm1(inner)).mean(0) / torch.exp(inner).mean(0)
            values.append(torch.where(small, near, tilted))
            d = y - tilted
            square = d * d
            m2, m3 = (weights * square).sum(0), (weights * square * d).sum(0)
            values += [m2, m3, (weights * square * square).sum(0) - 3 * m2 * m2]
        return tuple(values[: order + 1])

    @property
    def reach(self) -> Range:
        """From the smallest to the largest draw."""
        return self._ends
