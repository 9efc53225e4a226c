"""What the pages' figures are drawn from: a report with its history as one JSON value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from normadapt.asymptotics import edgeworth
from normadapt.monitor.words import findings, uses_time
from normadapt.reports.history import Channel, History, Numbers
from normadapt.reports.report import Report

_COLUMNS = 512
_POINTS, _REACH = 61, 4.5  # of a density, and standard deviations; figures.js draws it on the same
_GAP = 20.0  # usual distances between two columns that make a gap


def page_data(report: Report, status: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that the figures show; NaN is None.

    Args:
        report: With a history, or without.
        status: What `Pilot.status()` gave.
    """
    found = findings(report, status)
    layers = [
        {
            "name": site.name,
            "channels": site.channels,
            "weights": [site.mean_weight, site.variance_weight],
            "intervals": [site.mean_weight_interval, site.variance_weight_interval],
        }
        for site in report.sites
    ]
    first = found.layers[0] if found.layers else _most_shifted(report)
    values: dict[str, Any] = {"layers": layers, "shifted": list(found.layers), "first": first, "history": None}
    if report.history is not None and len(report.history):
        values["history"] = _history(report.history.thinned(_COLUMNS), uses_time(report.history, status))
    return values


def _most_shifted(report: Report) -> int:
    return max(range(len(report.sites)), key=lambda place: report.sites[place].shift, default=0)


def _history(history: History, time: bool) -> dict[str, Any]:
    ends = history.seen + history.items
    starts, stop = (1000 * history.times, 0.0) if time else (history.seen, float(ends[-1]))
    steps = np.diff(starts)
    usual = float(np.median(steps[steps > 0])) if (steps > 0).any() else 1.0
    if time:
        stop = float(starts[-1]) + usual
    gaps = np.flatnonzero(steps > _GAP * usual) if time else np.array([], dtype=int)
    places = [round(float(place), 1 if usual < 10 else 0) for place in starts]
    return {
        "time": time,
        "names": list(history.sites),
        "starts": places,
        "stop": stop,
        "usual": usual,
        "gaps": gaps.tolist(),
        "items": [int(count) for count in history.items],
        "shift": _table(history.shift),
        "tail": _table(history.tail, 1),
        "meanWeight": _table(history.mean_weight, 2),
        "varianceWeight": _table(history.variance_weight, 2),
        "entropy": _row(history.entropy, 3),
        "agreement": None if history.agreement is None else _row(history.agreement, 4),
        "classes": None if history.classes is None else _table(history.classes),
        "classNames": list(history.class_names),
        "marks": [
            {"at": round(1000 * mark.time) if time else mark.items, "kind": mark.kind, "text": mark.text}
            for mark in history.marks
        ],
        "channels": _panels(history.channels),
    }


def _table(values: Numbers, decimals: int = 3) -> list[list[float | None]]:
    return [_row(row, decimals) for row in values]


def _row(values: Numbers, decimals: int) -> list[float | None]:
    return [None if math.isnan(value) else value for value in np.round(values, decimals).tolist()]


@lru_cache(maxsize=8)  # the live page shows the same again and again; what is returned is only read
def _panels(channels: tuple[tuple[Channel, ...], ...]) -> list[list[dict[str, Any]]]:
    """For each layer and channel the histogram of instance means and both laws, before and after."""
    flat = [channel for site in channels for channel in site]
    if not flat:
        return [[] for _ in channels]
    z = torch.linspace(-_REACH, _REACH, _POINTS, dtype=torch.float64)
    shape = torch.tensor([channel.cumulants[2:] for channel in flat], dtype=torch.float64).nan_to_num(0.0)
    skewness, kurtosis = shape[:, :1].clamp(-3, 3), shape[:, 1:].clamp(-2, 12)
    zero = torch.zeros_like(skewness)
    laws = edgeworth.density(z, (zero, zero + 1, skewness, kurtosis), clamp=True)
    told = iter([_panel(channel, law) for channel, law in zip(flat, laws.numpy(), strict=True)])
    return [[next(told) for _ in site] for site in channels]


def _panel(channel: Channel, law: Numbers) -> dict[str, Any]:
    """What both panels of a channel are drawn from; the page moves it to the units of either's statistics.

    The source's law is the goal in both: what the layers behind were trained on.
    """
    mean, sd = channel.cumulants[:2]
    scatter = sd if channel.scatter is None else channel.scatter
    width = (channel.ends[1] - channel.ends[0]) / len(channel.counts) or 1e-9
    return {
        "index": channel.index,
        "known": channel.scatter is not None,
        "count": sum(channel.counts),
        "low": _short(channel.ends[0]),
        "width": _short(width),
        "counts": list(channel.counts),
        "mean": _short(mean),
        "sd": _short(sd),
        "law": [round(float(value), 3) for value in law],
        "scatter": _short(max(scatter / channel.source[1], 1e-9)),
        "before": [_short(value) for value in channel.source],
        "after": [_short(value) for value in channel.in_use],
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")
