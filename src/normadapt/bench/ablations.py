"""`Domains` with one step removed each: what every step is worth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normadapt.adapted.rule import Domains, Memory
from normadapt.domains.bank import BankSettings
from normadapt.layers.moments import Evidence
from normadapt.layers.policy import Policy, Source, State, Statistics
from normadapt.profiles.source_profile import SourceProfile
from normadapt.weights.matrix import SitePrior, WeightSettings

_NEVER = 1e-12
_USUAL = WeightSettings()
_AS_ANY = replace(_USUAL, source_is_source=_USUAL.no_shift)


@dataclass(frozen=True)
class _Changed(Domains):
    """Works under a changed profile."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def step(self, state: State, evidence: Evidence, source: Source) -> tuple[State, Statistics]:
        """The usual one."""
        memory: Memory | None = evidence.memory
        if source.profile is not None:
            source = source._replace(profile=self._once(source.profile))
        if memory is not None and memory.learned is not None:
            evidence = evidence._replace(memory=memory._replace(learned=self._once(memory.learned)))
        return super().step(state, evidence, source)

    def _once(self, profile: SourceProfile) -> SourceProfile:
        """The changed profile, kept with the one that it was made from."""
        kept: dict[str, SourceProfile] = profile.__dict__.setdefault("_changed", {})
        name = type(self).__name__
        if name not in kept:
            kept[name] = self.changed(profile)
        return kept[name]

    def changed(self, profile: SourceProfile) -> SourceProfile:
        """The profile without what is removed."""
        raise NotImplementedError


@dataclass(frozen=True, repr=False)
class NoDomains(_Changed):
    """All instances are of one domain, whose shift is as probable as any other domain's."""

    weights: WeightSettings = _AS_ANY

    def changed(self, profile: SourceProfile) -> SourceProfile:
        """No layer tells domains apart."""
        return replace(profile, place_site="")


@dataclass(frozen=True, repr=False)
class NoSkewness(_Changed):
    """Locations and scales are taken for uncorrelated: no third cumulant enters a weight."""

    def changed(self, profile: SourceProfile) -> SourceProfile:
        """The blocks between locations and scales are zero."""
        sites = {name: replace(site, prior=uncorrelated(site.prior)) for name, site in profile.sites.items()}
        return replace(profile, sites=sites)


def uncorrelated(prior: SitePrior) -> SitePrior:
    """The prior without covariances between locations and scales.

    Its leading directions are split into their parts in the locations and in the scales, so that nothing else is lost.
    """
    half = len(prior.unit) // 2
    parts = (_orthonormal(prior.basis[:half]), _orthonormal(prior.basis[half:]))
    basis = torch.block_diag(*parts)
    freedom = (1 - basis.square().sum(1)).clamp_min(1e-9)
    eye = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
    beside = eye - prior.basis @ prior.basis.T

    def split(inner: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """A covariance along the directions, and the variances beyond them."""
        full = prior.basis @ inner @ prior.basis.T + (beside * rest) @ beside
        full[:half, half:] = full[half:, :half] = 0
        found = basis.T @ full @ basis
        outside = eye - basis @ basis.T
        return found, (outside @ full @ outside).diagonal().clamp_min(0) / freedom

    within, within_rest = split(prior.within, prior.within_rest)
    between, between_rest = split(prior.between, prior.between_rest)
    return prior._replace(
        basis=basis,
        shifts=split(prior.shifts, torch.zeros_like(prior.within_rest))[0],
        within=within,
        between=between,
        identity=(basis.T / prior.unit.square()) @ basis,
        within_rest=within_rest,
        between_rest=between_rest,
        freedom=freedom,
        classes=prior.classes @ prior.basis.T @ basis,
    )


def _orthonormal(factor: Tensor) -> Tensor:
    """An orthonormal basis (m, k) of the columns of (m, r)."""
    left, values, _ = torch.linalg.svd(factor, full_matrices=False)
    found: Tensor = left[:, values > 1e-9]
    return found


def _weights(**changes: object) -> Domains:
    return Domains(weights=replace(_USUAL, **changes))  # type: ignore[arg-type]


ABLATED: tuple[tuple[str, Policy], ...] = (
    ("Domains, no rehearsed shifts", _weights(priors=tuple(p for p in _USUAL.priors if p[0] == 0))),
    ("Domains, no residual", _weights(priors=tuple(dict.fromkeys((s, 0.0) for s, _ in _USUAL.priors)))),
    ("Domains, no shares", _weights(shares=())),
    ("Domains, no predicted classes", _weights(believed=0.0)),
    ("Domains, no tempering", _weights(tempering=1.0)),
    ("Domains, no sure source", Domains(weights=_AS_ANY)),
    ("Domains, no doubt", _weights(source_is_source=1 - 2**-53)),
    ("Domains, no founding", Domains(bank=BankSettings(founding=_NEVER))),
    ("Domains, no switching", Domains(bank=BankSettings(switches=_NEVER))),
    ("Domains, no domains", NoDomains()),
    ("Domains, no skewness", NoSkewness()),
)
"""Names and policies."""
