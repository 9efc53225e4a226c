"""The matrix weight of a window of evidence at one site: how much of a shift is believed, direction by direction.

A shift has 2C coordinates: locations (m - m_ref)/sd_ref, then half-log-variances (1/2) log(v/v_ref). Their covariances
between and within classes have off-diagonal blocks Cov(location, scale): third cumulants. So skewness enters every
weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.layers.reference import Reference
from normadapt.types import PerChannel, PerClass


@dataclass(frozen=True, slots=True)
class WeightSettings:
    """How evidence is weighed. docs/THEORY.md, section 8; sensitivities: docs/EXPERIMENTS.md."""

    priors: tuple[tuple[float, float], ...] = (
        (0.0, 0.0),
        (0.0, 0.03),
        (0.0, 0.3),
        (1.0, 0.003),
        (1.0, 0.03),
        (1.0, 0.3),
        (0.1, 0.003),
        (4.0, 0.1),
    )
    """Hypotheses (s, A) on how large shifts are: their covariance is s S + A I. The first is "no shift"."""

    shares: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 0.8)
    """Hypotheses on f, the inverse number of class draws that a window is worth; 1/N is one more."""

    no_shift: float = 0.3
    """Prior probability of "no shift" in a domain that is not the source's."""

    source_is_source: float = 1 - 1e-8
    """The same in the domain that is taken for the source's."""

    believed: float = 0.1
    """Prior probability that the predicted classes are right, so that they foretell part of an observed shift."""

    tempering: float = 0.5
    """Power of the likelihoods: instances are not Gaussian."""


_DRAWS_WIDTH, _DRAWS_FLOOR = 0.7, 0.05  # of the log-normal prior of f about what the predictions say, and beside it
_MISSED = 0.1  # share of the classes' scatter that is left where the predicted classes foretell a shift
_SMALLEST = 1e-8  # a variance below this part of the source's counts as that
_SMALL = 1e-4  # variance of every coordinate that no evidence takes away, in natural units
_REST = 40.0  # dimensions that the coordinates beyond the leading directions count for in likelihoods


class SitePrior(NamedTuple):
    """What a profile knows of shifts and of scatter at one site. All float64; r leading directions, K classes.

    Args:
        unit: Natural standard deviation of each coordinate (2C,): the others are in these units.
        basis: Orthonormal leading directions of shifts, classes and instances (2C, r).
        shifts, within, between: Covariances (r, r) of rehearsed shifts, of instances within their classes and of
            classes, along these directions.
        identity: Covariance (r, r) of a shift with variance 1 in every coordinate before division by `unit`.
        within_rest, between_rest: Variances (2C,) beyond the leading directions, a degree of freedom.
        freedom: Share of each coordinate beyond the leading directions (2C,); sums to 2C - r.
        location_within, location_between: Variances (C,) of the locations, not divided by `unit`.
        classes: Class means (K, r) along the directions; (0, r) where they are not known.
        class_counts: Instances behind each class mean (K,).
    """

    unit: Tensor
    basis: Tensor
    shifts: Tensor
    within: Tensor
    between: Tensor
    identity: Tensor
    within_rest: Tensor
    between_rest: Tensor
    freedom: Tensor
    location_within: PerChannel
    location_between: PerChannel
    classes: Tensor
    class_counts: PerClass


class Reading(NamedTuple):
    """What is known of a window's classes from the model's own predictions.

    Args:
        draws: Where the prior of f is centred: inverse number of class draws that the window is worth.
        classes: Mean predicted class probabilities less the source's (K,), or None.
        squares: sum_k p_k^2/n_k of these mean probabilities p; 0 without.
    """

    draws: float
    classes: PerClass | None = None
    squares: float = 0.0


class Weighed(NamedTuple):
    """A window's shift after weighing.

    Args:
        shift: Posterior mean (2C,), in units of the reference.
        observed: The shift that was observed (2C,), at the most probable f.
        no_shift: Posterior probability of "no shift" (a tensor of one number).
        draws: The most probable f (a tensor of one number).
    """

    shift: Tensor
    observed: Tensor
    no_shift: Tensor
    draws: Tensor


def observed_shifts(
    mean: PerChannel, second: PerChannel, count: float, shares: Tensor, prior: SitePrior, reference: Reference
) -> Tensor:
    """A window's observed shift (F, 2C) from the reference, under each share f (F,).

    The mean square of the window's mean is high by its variance, which is added back: W/N + B f.
    """
    scatter = prior.location_within / count + prior.location_between * shares.unsqueeze(1)
    variance = (second - mean * mean) / (1 - scatter.clamp(max=0.5))
    variance = torch.maximum(variance, _SMALLEST * reference.variance)
    location = ((mean - reference.mean) / reference.variance.sqrt()).expand_as(variance)
    return torch.cat((location, 0.5 * torch.log(variance / reference.variance)), 1)


def shares_of(count: float, draws: float, settings: WeightSettings) -> tuple[list[float], list[float]]:
    """Hypotheses on f for a window of `count` instances, and their log prior about `draws`."""
    shares = sorted({1 / count} | {f for f in settings.shares if f > 1.5 / count})
    weights = [math.exp(-0.5 * (math.log(f / draws) / _DRAWS_WIDTH) ** 2) + _DRAWS_FLOOR for f in shares]
    total = sum(weights)
    return shares, [math.log(weight / total) for weight in weights]


def weigh(
    mean: PerChannel,
    second: PerChannel,
    count: float,
    prior: SitePrior,
    reference: Reference,
    reading: Reading,
    no_shift: float,
    settings: WeightSettings,
) -> Weighed:
    r"""Posterior mean of a window's shift.

    $$ \hat u = \sum_h p_h\, P_h (P_h + R_h)^{-1} d_h, \qquad P = s S + A I, \quad R = W/N + B f $$

    The sum runs over (s, A), over f, and over whether the predicted classes foretell part of the observed shift d; the
    hypotheses h have the probabilities $p_h \propto \pi_h\, N(d_h; 0, P_h + R_h)^{1/2}$. With one channel, B = 0 and
    one hypothesis this is the weight $\delta^2/(\delta^2 + \tau^2/n)$.

    Args:
        mean: First moments of the window (C,), the mean over its instances.
        second: Second moments (C,), likewise.
        count: Independent instances in the window, N.
        prior: What the profile knows of the site.
        reference: Where shifts are measured from.
        reading: What the predictions say of the window's classes.
        no_shift: Prior probability of "no shift".
        settings: The hypotheses.

    Returns:
        The shift, with what else was found on the way. Never NaN: what is not finite in the evidence is no shift.

    References:
        The scalar weight: Kimura (2025), arXiv 2505.16257. Its matrix form is this project's (docs/THEORY.md, 8).
    """
    like = prior.shifts
    shares, log_shares = shares_of(count, reading.draws, settings)
    f = like.new_tensor(shares)
    y = observed_shifts(mean, second, count, f, prior, reference) / prior.unit  # (F, 2C)
    y = torch.nan_to_num(y, 0.0, 1e6, -1e6)
    inner = y @ prior.basis  # (F, r)
    beyond = y - inner @ prior.basis.T  # (F, 2C)

    tells = reading.classes is not None and prior.classes.shape[0] == reading.classes.shape[0] and settings.believed > 0
    believed = settings.believed if tells else 0.0
    of_within = like.new_tensor([1 / count, 1 / count + reading.squares] if tells else [1 / count])  # (G,)
    of_between = torch.stack((f, f * _MISSED)) if tells else f.unsqueeze(0)  # (G, F)
    along = inner.unsqueeze(0)
    if tells and reading.classes is not None:
        along = torch.stack((inner, inner - reading.classes @ prior.classes))  # (G, F, r)

    r = like.shape[0]
    noise = of_within.view(-1, 1, 1, 1) * prior.within + of_between.unsqueeze(-1).unsqueeze(-1) * prior.between
    noise = noise + _SMALL * torch.eye(r, dtype=like.dtype, device=like.device)  # (G, F, r, r)
    sizes = like.new_tensor(settings.priors)  # (H, 2)
    shift = sizes[:, 0].view(-1, 1, 1) * prior.shifts + sizes[:, 1].view(-1, 1, 1) * prior.identity  # (H, r, r)
    factor, _ = torch.linalg.cholesky_ex(noise.unsqueeze(2) + shift)  # (G, F, H, r, r)
    z = torch.linalg.solve_triangular(factor, along[:, :, None, :, None], upper=False)
    fit = z.square().sum((-2, -1)) + 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    rest = min(1.0, _REST / max(2 * prior.location_within.shape[0] - r, 1))
    noise_rest = of_within.view(-1, 1, 1) * prior.within_rest + of_between.unsqueeze(-1) * prior.between_rest + _SMALL
    shift_rest = sizes[:, 1:] / prior.unit.square()  # (H, 2C)
    total = noise_rest.unsqueeze(2) + shift_rest  # (G, F, H, 2C)
    squared = beyond.square().unsqueeze(1)  # (F, 1, 2C)
    fit = fit + rest * ((squared / total).sum(-1) + total.log() @ prior.freedom)

    first = like.new_tensor(
        [math.log(no_shift)] + [math.log1p(-no_shift) - math.log(len(sizes) - 1)] * (len(sizes) - 1)
    )
    readings = like.new_tensor([math.log1p(-believed), math.log(believed)] if tells else [0.0])
    logs = (
        -0.5 * settings.tempering * fit + readings.view(-1, 1, 1) + like.new_tensor(log_shares).view(1, -1, 1) + first
    )
    probability = torch.softmax(logs.nan_to_num(-torch.inf, -torch.inf, -torch.inf).flatten(), 0).view_as(logs)
    probability = probability.nan_to_num(0.0)

    solved = torch.linalg.solve_triangular(factor.mT, z, upper=True).squeeze(-1)  # (G, F, H, r)
    per_prior = (probability.unsqueeze(-1) * solved).sum((0, 1))  # (H, r)
    weight = (probability.unsqueeze(-1) * (shift_rest / total)).sum((0, 2))  # (F, 2C)
    posterior = prior.basis @ torch.einsum("hij,hj->i", shift, per_prior) + (weight * beyond).sum(0)
    best = probability.sum((0, 2)).argmax()
    return Weighed(
        (posterior * prior.unit).nan_to_num(0.0, 0.0, 0.0), y[best] * prior.unit, probability[..., 0].sum(), f[best]
    )
