"""A batch's location when some of its instances are outliers: Huber's one-step M-estimate over the instance means."""

from __future__ import annotations

import torch

from normadapt.asymptotics import m_estimation
from normadapt.layers.moments import Evidence

_THRESHOLD = 1.345  # standard deviations: 95 % efficient for normal instances (Huber 1964)
_LEAST_INSTANCES = 5
_MAD = 1.4826  # makes the median absolute deviation the standard deviation of normal draws

LOCATIONS = ("mean", "huber")


def check_location(location: str) -> None:
    """Raise `ValueError` unless `location` is one of `LOCATIONS`."""
    if location not in LOCATIONS:
        raise ValueError(f"location must be one of {', '.join(map(repr, LOCATIONS))}; got {location!r}")


def with_huber_location(evidence: Evidence) -> Evidence:
    r"""The evidence with its batch mean replaced by a robust location of the instance means.

    One Newton step of Huber's equation from the median, in units of the median absolute deviation, with its
    second-order bias removed:

    $$ n\,\mathrm{bias} = \frac{\mathrm{Cov}(\psi, \psi')}{a^2} + \frac{E\psi''\,\mathrm{Var}\,\psi}{2a^3},
       \qquad a = -E\psi' $$

    Args:
        evidence: A batch; fewer than five instances are left as they are.

    References:
        Huber (1964), Ann. Math. Statist. 35(1), 73-101; as M-estimation: Kimura (2025), arXiv 2505.16257, claim 3.
    """
    if evidence.count < _LEAST_INSTANCES:
        return evidence
    means = evidence.instances.mean
    start = means.median(0).values
    deviation = _MAD * (means - start).abs().median(0).values
    usable = deviation > 0
    unit = torch.where(usable, deviation, torch.ones_like(deviation))
    sample = (means - start) / unit
    psi = m_estimation.Huber(_THRESHOLD)
    step = m_estimation.one_step(psi, sample, torch.zeros_like(start))
    step = step - m_estimation.bias(psi, sample) / evidence.count
    location = torch.where(usable & step.isfinite(), start + unit * step, evidence.mean)
    return evidence._replace(both=torch.stack((location, evidence.variance)))
