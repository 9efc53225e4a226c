"""From a stream's memory to what is said of its domains."""

from __future__ import annotations

from normadapt.adapted.rule import Memory
from normadapt.domains.bank import Bank, Domain
from normadapt.domains.words import look_in_words, resembled
from normadapt.layers.hooks import SiteHook
from normadapt.profiles.source_profile import SourceProfile
from normadapt.reports.domain_report import DomainReport


def domain_reports(memory: Memory, profile: SourceProfile, hooks: list[SiteHook]) -> tuple[DomainReport, ...]:
    """All domains of a stream, in the order in which they were met."""
    bank = memory.bank
    return tuple(_report(domain, bank, profile, hooks) for domain in bank.domains)


def _report(domain: Domain, bank: Bank, profile: SourceProfile, hooks: list[SiteHook]) -> DomainReport:
    shift, channels, sure, layers = 0.0, 0, 0.0, 0
    for hook, window in zip(hooks, domain.windows, strict=False):
        if window.weighed == 0:
            continue
        squares = window.shift.view(2, -1).square() @ hook.source.channel_weight
        shift += float(squares.sum())
        channels += hook.source.mean.numel()
        sure += 1 - float(window.no_shift)
        layers += 1
    is_source = bank.has_source and domain.number == 0
    looks = profile.looks
    described = looks.numel() > 0 and domain.count > 0
    look = domain.look[: looks.shape[-1]] / max(domain.count, 1.0)
    words = (
        look_in_words(look, looks[0], profile.places.deviation, "source" if bank.has_source else "first inputs")
        if described
        else ""
    )
    resembles = () if is_source else resembled(domain.place, profile.places.known, profile.rehearsals)
    return DomainReport(
        number=domain.number,
        name=bank.name_of(domain),
        seen=int(domain.count),
        since=int(domain.since),
        last=int(domain.last),
        shift=(shift / max(channels, 1)) ** 0.5,
        sure=sure / max(layers, 1),
        resembles=resembles,
        look=words,
        is_source=is_source,
        is_present=domain.number == bank.now,
    )
