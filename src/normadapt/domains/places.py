"""Where an input lies among the rehearsed domains: linear discriminants of what it looks like and of the first site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from normadapt.domains.clusters import spherical_clusters


@dataclass(frozen=True, slots=True)
class PlaceSettings:
    """How domains are told apart by single inputs. docs/THEORY.md, section 8; sensitivities: docs/EXPERIMENTS.md."""

    directions: int = 14
    """Linear discriminants in use."""

    ridge: float = 0.05
    """Share of each feature's own variance that is added to the pooled scatter before it is inverted."""

    hidden: float = 14.0
    """Rehearsals that stand out less than this from the scatter of a stream's first inputs (mean square, natural units)
    say that these inputs are of several domains."""

    widened: float = 3.0
    """Factor on the scatter of a stream's first inputs where they are of one domain: more is to come."""


_SQUASH = 3.0  # natural deviations up to which features count linearly
_BEST = 3  # directions in which rehearsals must stand out
_TURNS = 3  # rounds of finding the domains among a stream's first inputs


class Places(NamedTuple):
    """Linear discriminants in which the natural scatter within a domain is 1 and the source lies at 0. All float64.

    Args:
        centre, deviation: Of each feature in the source (p,).
        middle: Mean of the squashed features (p,).
        discriminants: (p, r).
        scatter: Prior variance (r,) of a new domain's place, natural scatter included.
        classes: Covariance (r, r) of the classes' places.
        known: Places (a, r) of the rehearsed domains.
    """

    centre: Tensor
    deviation: Tensor
    middle: Tensor
    discriminants: Tensor
    scatter: Tensor
    classes: Tensor
    known: Tensor

    def of(self, features: Tensor) -> Tensor:
        """Places (n, r) of instances with these features (n, p)."""
        features = features[
            :, : self.centre.numel()
        ]  # what an input looks like stands before the moments at the first site
        return (_squash(features, self.centre, self.deviation) - self.middle) @ self.discriminants


class Measured(NamedTuple):
    """Places with what they were measured from.

    Args:
        places: The discriminants.
        several: Whether the inputs were found to be of several domains.
        groups: Domain (n,) of each input; all the same where there is one.
    """

    places: Places
    several: bool
    groups: Tensor


def measure_places(
    own: Tensor,
    rehearsed: list[Tensor],
    labels: Tensor,
    frequencies: Tensor,
    settings: PlaceSettings,
    *,
    from_stream: bool = False,
) -> Measured:
    """Discriminants between rehearsed domains, relative to the scatter within them.

    Args:
        own: Features (n, p) of unchanged inputs.
        rehearsed: Features of changed inputs, one tensor (m, p) a rehearsal; row i is of input i.
        labels: Predicted classes (n,) of the inputs; -1 where unknown.
        frequencies: How often each class occurs (K,); (0,) where there are none.
        settings: The numbers.
        from_stream: Whether the inputs are the first ones of a stream, and may be of any number of domains.
    """
    group = torch.zeros(len(own), dtype=torch.long)
    several = False
    for turn in range(_TURNS):
        deviations, degrees = _within(own, group)
        centre = own.mean(0)
        deviation = (deviations.square().sum(0) / degrees).clamp_min(1e-6).sqrt()
        squashed = _squash(own, centre, deviation)
        changed = [_squash(features, centre, deviation) for features in rehearsed]
        middle = squashed.mean(0)
        scatter = own.new_zeros(own.shape[1], own.shape[1])
        for features in (squashed, *changed):
            deviations, degrees = _within(features, group[: len(features)])
            scatter += deviations.T @ deviations / degrees
        scatter /= 1 + len(changed)
        scatter += settings.ridge * torch.diag(scatter.diagonal().clamp_min(1e-6))
        shifts = [features.mean(0) - squashed[: len(features)].mean(0) for features in changed]
        if int(group.max()) > 0:
            shifts += [squashed[group == k].mean(0) - middle for k in range(int(group.max()) + 1)]
        moves = torch.stack(shifts) if shifts else own.new_zeros(1, own.shape[1])
        inverse = torch.linalg.inv(torch.linalg.cholesky(scatter))
        values, vectors = torch.linalg.eigh(inverse @ (moves.T @ moves / len(moves)) @ inverse.T)
        stand_out = values[-_BEST:].clamp_min(1e-9).log().mean().exp()
        several = from_stream and (turn > 0 or bool(stand_out < settings.hidden))
        if from_stream and not several:
            values, inverse = values / settings.widened, inverse / settings.widened**0.5
        count = min(settings.directions, len(values))
        spread = values[-count:].flip(0).clamp_min(0) + 1
        discriminants = inverse.T @ vectors[:, -count:].flip(1)
        own_places = (squashed - middle) @ discriminants
        if not several or turn == _TURNS - 1:
            break
        group = torch.from_numpy(spherical_clusters(own_places.numpy()))
    inside, _ = _within(own_places, group)
    classes = own.new_zeros(count, count)
    for k in range(len(frequencies)):
        chosen = inside[labels == k]
        if len(chosen):
            mean = chosen.mean(0)
            classes += frequencies[k] * torch.outer(mean, mean)
    known = (
        torch.stack([(features - middle).mean(0) @ discriminants for features in changed])
        if changed
        else own.new_zeros(0, count)
    )
    return Measured(Places(centre, deviation, middle, discriminants, spread, classes, known), several, group)


def _squash(features: Tensor, centre: Tensor, deviation: Tensor) -> Tensor:
    """Logarithmic beyond three natural deviations: far domains scatter more."""
    return _SQUASH * torch.asinh((features - centre) / deviation / _SQUASH)


def _within(features: Tensor, group: Tensor) -> tuple[Tensor, int]:
    """Features (n, p) less the means of their groups, and the degrees of freedom that are left."""
    means = torch.stack(
        [
            features[group == k].mean(0) if bool((group == k).any()) else 0 * features[0]
            for k in range(int(group.max()) + 1)
        ]
    )
    return features - means[group], max(len(features) - len(means), 1)
