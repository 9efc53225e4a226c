"""From the moments of instances to what a profile knows of one site: scatter, classes, and the prior of shifts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.layers.policy import Source
from normadapt.layers.reference import Reference
from normadapt.weights.matrix import SitePrior


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """How source inputs are measured. docs/THEORY.md, section 8; sensitivities: docs/EXPERIMENTS.md."""

    inputs: int = 256
    """Source inputs that are rehearsed."""

    trust: float = 0.01
    """Variance, in source units, by which the moments of true source data may differ from the running statistics."""

    shift_directions: int = 24
    class_directions: int = 10
    instance_directions: int = 10
    """Leading directions of rehearsed shifts, of classes and of instances that are kept exactly."""


class Scatter(NamedTuple):
    """Scatter of instances at one site, in units of the running statistics.

    Args:
        within: Factor (2C, n) of the covariance within the classes, W = within within'.
        between: Factor (2C, k) of the covariance of the measured class means.
        noise: Share of W that is in this covariance because each mean is of few instances.
        extra: Variance (2C,) between instances that training data had and these do not; on the diagonal of B.
        classes: Class means (K, 2C); (0, 2C) where they are not known.
        class_counts: (K,).
        reference: What is believed of the source's moments.
        mean, variance: Measured moments (C,), the variance biased.
        deviation: Measured minus running moments (2C,).
        unexplained: Mean square of `deviation` beyond what the number of inputs explains.
    """

    within: Tensor
    between: Tensor
    noise: float
    extra: Tensor
    classes: Tensor
    class_counts: Tensor
    reference: Reference
    mean: Tensor
    variance: Tensor
    deviation: Tensor
    unexplained: float


def measure_scatter(
    values: Tensor,
    labels: Tensor,
    classes: int,
    source: Source,
    settings: ProfileSettings,
    *,
    from_stream: bool,
    groups: Tensor | None = None,
) -> Scatter:
    """Scatter of instances within and between their predicted classes.

    Args:
        values: Moments (2, n, C) of the instances: means and variances over positions.
        labels: Predicted classes (n,); -1 where unknown.
        classes: K; 0 where the output gives none.
        source: The site.
        settings: The numbers.
        from_stream: Whether the inputs are a stream's first ones: the reference then stays the running statistics, and
            each class that is present counts the same.
        groups: Domains (n,) of the inputs, whose differences are no scatter; None for one.
    """
    mean_i, within_i = values.double()
    n, channels = mean_i.shape
    of_source = Reference.of_running_statistics(source)
    m_s, v_s = of_source
    mean = mean_i.mean(0)
    variance = (within_i.mean(0) + (mean_i - mean).square().mean(0)).clamp_min(1e-9 * v_s)
    deviation_i = mean_i - mean
    y = torch.cat(
        (
            deviation_i / v_s.sqrt(),
            0.5 * (within_i + deviation_i.square() - variance) / torch.maximum(variance, 0.1 * v_s),
        ),
        1,
    )
    if groups is not None and bool((groups != groups[0]).any()):
        groups = groups.to(y.device)
        for k in groups.unique().tolist():
            y[groups == k] -= y[groups == k].mean(0)
    known = labels >= 0
    count = torch.bincount(labels[known], minlength=max(classes, 1)).double()
    present = count > 0
    number = int(present.sum())
    means = y.new_zeros(len(count), 2 * channels)
    means.index_add_(0, labels[known], y[known])
    means /= count.clamp_min(1).unsqueeze(1)
    if (
        classes == 0 or number > n / (2 if from_stream else 4) or not bool(known.all())
    ):  # too few of each class to tell: halves
        within = between = ((y - y.mean(0)) / (2 * max(n, 1)) ** 0.5).T
        told, counts, noise = y.new_zeros(0, 2 * channels), y.new_zeros(0), 0.0
    else:
        within = ((y - means[labels]) / max(n - number, 1) ** 0.5).T
        if from_stream:
            among = means[present]
            noise = float((1 / count[present]).mean()) * (1 - 1 / number)
            between = ((among - among.mean(0)) / number**0.5).T
        else:
            noise = (number - 1) / n
            between = (means * (count / n).sqrt().unsqueeze(1))[present].T
        told = y.new_zeros(0, 2 * channels) if from_stream else means
        counts = y.new_zeros(0) if from_stream else count.clamp_min(1)
    of_within = within.square().sum(1)
    of_between = (between.square().sum(1) - noise * of_within).clamp_min(0)
    # The running variance is within one instance plus between instances: what the training data scattered.
    natural = (1 - within_i.mean(0) / v_s).clamp(0, 1)
    missing = (natural - of_within[:channels] - of_between[:channels]).clamp_min(0)
    if from_stream:  # shifted inputs have less or more within them than the training data: that says nothing here
        missing = torch.zeros_like(missing)
    extra = torch.cat((missing, 0.5 * missing))
    of_between = of_between + extra
    deviation = torch.cat(((mean - m_s) / v_s.sqrt(), 0.5 * torch.log(torch.maximum(variance, 0.01 * v_s) / v_s)))
    explained = of_within / n + settings.trust
    share = ((deviation.square().sum() - explained.sum()) / of_between.sum().clamp_min(1e-9)).clamp(
        1 / max(number, 1), 1
    )
    believed = deviation * settings.trust / (explained + of_between * share)
    if from_stream:
        believed = torch.zeros_like(deviation)
    reference = Reference(m_s + believed[:channels] * v_s.sqrt(), v_s * torch.exp(2 * believed[channels:]))
    unexplained = float((deviation.square() - of_within / n - of_between / n).mean().clamp_min(0))
    return Scatter(within, between, noise, extra, told, counts, reference, mean, variance, deviation, unexplained)


def site_prior(scatter: Scatter, shifts: Tensor, settings: ProfileSettings) -> SitePrior:
    """The leading directions of shifts, classes and instances at a site; a diagonal for the rest.

    Args:
        scatter: Of the instances.
        shifts: Rehearsed shifts (a, 2C), less that of the unchanged inputs; (0, 2C) for none.
        settings: The numbers.
    """
    size = scatter.within.shape[0]
    of_within = scatter.within.square().sum(1)
    of_between = (scatter.between.square().sum(1) - scatter.noise * of_within).clamp_min(0) + scatter.extra
    unit = (of_within + of_between).clamp_min(1e-5).sqrt()
    rehearsed = shifts.T / max(len(shifts), 1) ** 0.5 / unit.unsqueeze(1)
    within, between = scatter.within / unit.unsqueeze(1), scatter.between / unit.unsqueeze(1)
    leading = torch.cat(
        (
            _leading(rehearsed, settings.shift_directions),
            _leading(between, settings.class_directions),
            _leading(within, settings.instance_directions),
        ),
        1,
    )
    basis = torch.linalg.qr(leading)[0][:, : min(size, leading.shape[1])].contiguous()
    own = scatter.extra / unit.square()
    freedom = (1 - basis.square().sum(1)).clamp_min(1e-9)

    def inner(factor: Tensor) -> Tensor:
        projected = basis.T @ factor
        squared: Tensor = projected @ projected.T
        return squared

    def beyond(factor: Tensor) -> Tensor:
        variance: Tensor = (factor - basis @ (basis.T @ factor)).square().sum(1) / freedom
        return variance

    channels = size // 2
    return SitePrior(
        unit=unit,
        basis=basis,
        shifts=inner(rehearsed),
        within=inner(within),
        between=_positive(inner(between) - scatter.noise * inner(within)) + (basis.T * own) @ basis,
        identity=(basis.T / unit.square()) @ basis,
        within_rest=beyond(within),
        between_rest=(beyond(between) - scatter.noise * beyond(within)).clamp_min(0) + own,
        freedom=freedom,
        location_within=of_within[:channels],
        location_between=of_between[:channels],
        classes=(scatter.classes / unit) @ basis,
        class_counts=scatter.class_counts,
    )


def _positive(covariance: Tensor) -> Tensor:
    """The nearest covariance to a symmetric matrix: without its negative directions."""
    values, vectors = torch.linalg.eigh(covariance)
    nearest: Tensor = (vectors * values.clamp_min(0)) @ vectors.T
    return nearest


def _leading(factor: Tensor, most: int) -> Tensor:
    """Left singular vectors (2C, k) of a factor (2C, m), by way of its smaller Gram matrix; k at most `most`."""
    if factor.shape[1] == 0:
        return factor
    if factor.shape[0] <= factor.shape[1]:
        values, vectors = torch.linalg.eigh(factor @ factor.T)
        chosen = vectors[:, -most:].flip(1)
        values = values[-most:].flip(0)
    else:
        values, right = torch.linalg.eigh(factor.T @ factor)
        values, right = values[-most:].flip(0), right[:, -most:].flip(1)
        chosen = factor @ right / values.clamp_min(1e-30).sqrt()
    kept = values > 1e-10 * values[0].clamp_min(1e-30)
    leading: Tensor = chosen[:, kept]
    return leading
