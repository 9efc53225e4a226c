"""From a stream's records to a `Report`: the only place where diagnostics are reduced to numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from normadapt.adapted.streams import Record
from normadapt.asymptotics.quadratic import tail_from_cumulants
from normadapt.layers.hooks import SiteHook
from normadapt.layers.policy import Policy, standardize
from normadapt.reports.confidence import risk_parts, weight_interval
from normadapt.reports.domain_report import DomainReport
from normadapt.reports.report import Interval, Report, SiteReport


def describe(
    model_name: str,
    policy: Policy,
    stream: str,
    adapting: bool,
    hooks: list[SiteHook],
    records: list[Record],
    domains: tuple[DomainReport, ...] = (),
    notes: tuple[str, ...] = (),
) -> Report:
    """The report on one stream of an adapted model."""
    return Report(
        model_name=model_name,
        policy=repr(policy),
        stream=stream,
        profiled=any(hook.source.profile is not None for hook in hooks),
        adapting=adapting,
        sites=tuple(_site_report(h, r) for h, r in zip(hooks, records, strict=True)),
        domains=domains,
        notes=notes,
    )


def _site_report(hook: SiteHook, record: Record) -> SiteReport:
    site, source, told = hook.site, hook.source, record.diagnostics
    weight = source.channel_weight
    effective = probability = mean_weight = variance_weight = risk = None
    shift_interval: Interval | None = None
    intervals: tuple[Interval | None, Interval | None] = (None, None)
    if told is None:
        location, ratio = standardize(torch.stack(record.buffers).double(), source.units).unbind()
        squared = float((location.square() + (ratio.log() / 2).square()) @ weight)
    else:
        squared = sum(told.shift)
        effective = told.effective_count
        tails = tail_from_cumulants(
            torch.tensor(told.squared, dtype=torch.float64), torch.tensor(told.cumulants, dtype=torch.float64)
        )
        probability = min(1.0, 2 * float(tails.min()))
        mean_weight, variance_weight = (_average(w, weight) for w in told.weight)
        intervals = weight_interval(told, 0, source), weight_interval(told, 1, source)
        risk = risk_parts(told, source)
        if told.shift_interval is not None:
            shift_interval = Interval(*(max(end, 0.0) ** 0.5 for end in told.shift_interval))
    return SiteReport(
        name=site.name or type(site.module).__name__,
        kind=site.kind,
        channels=site.channels,
        count=record.count,
        effective_count=effective,
        shift=(max(squared, 0.0) / site.channels) ** 0.5,
        tail_probability=probability,
        mean_weight=mean_weight,
        variance_weight=variance_weight,
        status=record.status,
        excluded=record.excluded,
        mean_weight_interval=intervals[0],
        variance_weight_interval=intervals[1],
        risk=risk,
        shift_interval=shift_interval,
    )


def _average(weights: Tensor | float, channel_weight: Tensor) -> float:
    if isinstance(weights, float):
        return weights
    return float(torch.as_tensor(weights) @ channel_weight / channel_weight.sum())
