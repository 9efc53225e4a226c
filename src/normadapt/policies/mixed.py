"""Batches whose instances come from different domains: each instance gets its own statistics."""

from __future__ import annotations

from torch import Tensor

from normadapt.asymptotics.quadratic import tail_is_below
from normadapt.policies.base import Source, standardize, unstandardize
from normadapt.shapes import LocationScale, PerInstance
from normadapt.spread import Spread
from normadapt.statistics import Evidence


def instance_statistics(
    evidence: Evidence, use: LocationScale, spread: Spread, source: Source, probability: float
) -> tuple[PerInstance, PerInstance] | None:
    r"""Means and variances (n, C) for each instance of a batch, or None when one domain explains it.

    The scatter H of the instances' locations within the batch is tested against what the source's instances scatter;
    the excess over it is the variance between domains, and shrinks each instance towards the statistics in use:

    $$ \lambda_c = \frac{A}{A + \tau_c^2}, \qquad A = \frac{(H - \mathrm{tr}\,S)_+}{\sum_c w_c} $$

    and then likewise the half-log-variances about those locations.

    Args:
        evidence: A batch of n >= 3 instances.
        use: The statistics in use (2, C), as differences from the source in output units.
        spread: Scatter of one source instance.
        source: The site's source.
        probability: Tail probability of H below which the batch counts as mixed.
    """
    n = evidence.count
    weight, sum_weight, units = source.channel_weight, source.sum_weight[0], source.aligned or source.units
    (expected, square), (expected_scale, square_scale) = spread.instance
    scatter = float((evidence.scatter * units.precision) @ weight) * n / (n - 1)
    mixed_location = tail_is_below(scatter, expected, square / (n - 1), probability)
    own: Tensor | float = 0.0
    rest, ratios = standardize(evidence.instances.values, units).unbind()
    rest -= use[0]
    if mixed_location:
        prior = (scatter - expected) / sum_weight
        own = rest * (prior / (prior + spread.location))
        rest -= own
    logs = ratios.addcmul_(rest, rest).clamp_min_(1e-12).log_()  # twice the half-log-variances
    scatter = float((logs - logs.mean(0)).square_().sum(0) @ weight) / (4 * (n - 1))
    mixed_scale = tail_is_below(scatter, expected_scale, square_scale / (n - 1), probability)
    if not (mixed_location or mixed_scale):
        return None
    own_scale: Tensor | float = 0.0
    if mixed_scale:
        prior = (scatter - expected_scale) / sum_weight
        own_scale = (logs / 2 - use[1]) * (prior / (prior + spread.total[1]))
    return unstandardize((use[0] + own).expand_as(logs), (use[1] + own_scale).expand_as(logs), source, units)
