"""The results as plain data: for JSON, and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from normadapt.bench.about import About
from normadapt.bench.bootstrap import Interval
from normadapt.bench.curves import curves
from normadapt.bench.results import ALL, Entry, Results
from normadapt.bench.summary import Summary, summarize
from normadapt.bench.targets import targets


def to_dict(results: Results, about: About) -> dict[str, Any]:
    """Everything but the bits: shares between 0 and 1; infinite recovery times are null."""
    plan = results.plan
    return {
        "about": about.to_dict(),
        "split": plan.split,
        "seed": plan.seed,
        "scale": plan.scale,
        "batch_sizes": list(plan.batch_sizes),
        "streams": list(plan.streams),
        "tasks": [task.__dict__ for task in results.tasks],
        "methods": [
            {"name": m.name, "family": m.family, "role": m.role, "setting": m.setting} for m in results.methods.values()
        ],
        "targets": [target.__dict__ for target in targets(results)],
        "summaries": {scope: [_summary(s) for s in summarize(results, scope)] for scope in results.scopes},
        "cells": [_entry(results, entry) for entry in results.entries],
    }


def _interval(found: Interval | None) -> list[float] | None:
    return None if found is None else [round(v, 5) for v in (found.value, found.low, found.high)]


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5) if abs(value) < 1e6 else None
    if isinstance(value, Mapping):
        return {str(key): _round(entry) for key, entry in value.items()}
    return value


def _summary(summary: Summary) -> dict[str, Any]:
    values = {name: _round(value) for name, value in summary.__dict__.items()}
    place = summary.worst_place
    return {
        **values,
        "against_ours": _interval(summary.against_ours),
        "against_plain": _interval(summary.against_plain),
        "worst_place": None if place is None else place.__dict__,
    }


def _entry(results: Results, entry: Entry) -> dict[str, Any]:
    cell = results.cells[entry.place][entry.method]
    values: dict[str, Any] = {**entry.place.__dict__, "method": entry.method}
    if entry.error is not None:
        return {**values, "error": entry.error}
    return {
        **values,
        "instances": len(cell.bits),
        "accuracy": _round(entry.accuracy),
        "against_ours": _interval(entry.against_ours),
        "against_plain": _interval(entry.against_plain),
        "regret": _round(entry.regret),
        "share": _round(entry.share),
        "ceiling_share": _round(entry.ceiling_share),
        "cost": _round(entry.cost),
        "seconds": cell.seconds,
        "batch_seconds": cell.batch_seconds,
    }


def page_data(results: Results) -> dict[str, Any]:
    """What the page's script draws: accuracies per 10,000, so that they stay short."""
    scopes = []
    for name in results.scopes:
        places = [place for suite in results.scope(name) for place in suite]
        streams = [s for s in results.plan.streams if any(p.stream == s for p in places)]
        sizes = [n for n in results.plan.batch_sizes if any(p.n == n for p in places)]
        scopes.append(
            {
                "name": name,
                "negative": name in results.negative,
                "streams": streams,
                "sizes": sizes,
                "accuracy": {str(n): _accuracies(results, name, streams, n) for n in sizes},
            }
        )
    along = [
        {
            "task": c.place.task,
            "stream": c.place.stream,
            "n": c.place.n,
            "bin": c.bin,
            "length": c.length,
            "marks": c.marks,
            "lines": {name: [round(1000 * value) for value in line] for name, line in c.lines.items()},
        }
        for c in curves(results)
    ]
    methods = [{"name": m.name, "role": m.role} for m in results.methods.values()]
    return {"all": ALL, "methods": methods, "scopes": scopes, "curves": along}


def _accuracies(results: Results, scope: str, streams: list[str], n: int) -> dict[str, list[int | None]]:
    parts = results.scope(scope)
    found = {}
    for method in results.methods:
        means = [results.mean(parts, method, lambda p, s=s: p.stream == s and p.n == n) for s in streams]  # type: ignore[misc]
        if any(mean is not None for mean in means):
            found[method] = [None if mean is None else round(10_000 * mean) for mean in means]
    return found
