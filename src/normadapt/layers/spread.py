"""How much a batch's location and scale scatter around the truth when nothing has changed.

Everything is in the units in which a layer's output feels it: locations over sqrt(v_s + eps), scales as
half-log-variances, channels weighted by w = gamma^2 (docs/THEORY.md, section 6, iii). The scatter of the instance means
is split into a part between classes and a part within them, because a batch may hold few classes but many instances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.types import LocationScale, Pair, PerChannel


class Spread(NamedTuple):
    """Variance of one instance's location and half-log-variance, and the traces for tests on a whole layer.

    Args:
        between: Between-class part (2, C) of the variance across instances.
        within: Within-class part (2, C), at least 1e-9: a layer of constant channels must not divide by zero.
        total: Their sum (2, C).
        location: Row 0 of `total` (C,).
        trace_between: sum_c w_c between, as (location, scale).
        trace_within: sum_c w_c within.
        square_between: tr(B B), B = between-class covariance of sqrt(w) times the instances' values.
        square_cross: tr(B W).
        square_within: tr(W W).
        instance: First two cumulants of sum_c w_c e_c^2 for one instance, for location and for scale.
        weighted_between: sum_c w_c^2 between: tr(B diag(w)).
        weighted_within: sum_c w_c^2 within.
    """

    between: LocationScale
    within: LocationScale
    total: LocationScale
    location: PerChannel
    trace_between: Pair
    trace_within: Pair
    square_between: Pair
    square_cross: Pair
    square_within: Pair
    instance: tuple[Pair, Pair]
    weighted_between: Pair
    weighted_within: Pair

    @classmethod
    def from_parts(cls, between: LocationScale, within: LocationScale, weight: PerChannel, squares: Tensor) -> Spread:
        """A spread from its variances (2, C), channel weights (C,) and squared traces (2, 3): BB, BW, WW."""
        within = within.clamp_min(1e-9)
        both = torch.stack((between @ weight, within @ weight, between @ weight**2, within @ weight**2))
        trace_b, trace_w, weighted_b, weighted_w = (tuple(row) for row in both.tolist())
        bb, bw, ww = (tuple(row) for row in squares.T.tolist())
        total = between + within
        first, second = ((trace_b[i] + trace_w[i], 2 * (bb[i] + 2 * bw[i] + ww[i])) for i in (0, 1))
        return cls(
            between, within, total, total[0], trace_b, trace_w, bb, bw, ww, (first, second), weighted_b, weighted_w
        )

    @classmethod
    def from_unsplit(
        cls, between: LocationScale, within: LocationScale, weight: PerChannel, degrees_of_freedom: Tensor
    ) -> Spread:
        """A spread whose parts (2, C) share the degrees of freedom (2,) of their sum, the only ones known."""
        b, w = between @ weight, within @ weight
        squares = torch.stack((b * b, b * w, w * w), 1) / degrees_of_freedom.unsqueeze(1)
        return cls.from_parts(between, within, weight, squares)

    def to(self, device: torch.device) -> Spread:
        """The same spread with its tensors on `device`."""
        total = self.total.to(device)
        return self._replace(
            between=self.between.to(device), within=self.within.to(device), total=total, location=total[0]
        )

    def sampling_variance(self, between: float, within: float) -> LocationScale:
        """Variance (2, C) of an average with these inverse effective counts of classes and of instances."""
        return torch.add(self.within * within, self.between, alpha=between)

    def cumulants(self, between: float, within: float, known: Pair, sum_weight: Pair) -> tuple[Pair, Pair]:
        r"""First two cumulants of Q = sum_c w_c e_c^2 for an average measured against uncertain statistics.

        $$ k_1 = \mathrm{tr}\,S, \quad k_2 = 2\,\mathrm{tr}\,S^2, \quad
           S = f_B B + f_W W + P\,\mathrm{diag}(w) $$

        Args:
            between: f_B, inverse effective count of class draws.
            within: f_W, inverse effective count of instances.
            known: P, variance of the statistics it is compared with, as (location, scale).
            sum_weight: sum of w and of w^2.

        Returns:
            (k1, k2) of locations, and of scales.
        """
        bb, bw, ww = between * between, 2 * between * within, within * within
        first, second = (
            (
                tb * between + tw * within + p * sum_weight[0],
                2 * (sb * bb + sc * bw + sw * ww + 2 * p * (wb * between + wd * within) + p * p * sum_weight[1]),
            )
            for tb, tw, sb, sc, sw, wb, wd, p in zip(
                self.trace_between,
                self.trace_within,
                self.square_between,
                self.square_cross,
                self.square_within,
                self.weighted_between,
                self.weighted_within,
                known,
                strict=True,
            )
        )
        return first, second
