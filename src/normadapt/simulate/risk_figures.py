"""The figures of the experiment `risk`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from normadapt.simulate.results import Figure, Series

RULES = (
    "batch",
    "fixed, n/(n + 16)",
    "plug-in, biased",
    "plug-in",
    "pooled",
    "shrink, SURE",
    "shrink, ML",
    "tail-safe",
)
_SHOWN = 16


def value(
    rows: Iterable[Mapping[str, Any]],
    law: str,
    kind: str,
    shift: float,
    n: int,
    rule: str,
    statistic: str | None = None,
) -> float:
    """The risk of one setting; the statistic is the one that the kind shifts, or the location."""
    statistic = statistic or ("scale" if kind == "scale" else "location")
    wanted = (law, kind, shift, n, rule, statistic)
    return next(
        float(row["risk"])
        for row in rows
        if (row["law"], row["kind"], row["shift"], row["n"], row["rule"], row["statistic"]) == wanted
    )


def risk_figures(
    rows: list[Mapping[str, Any]], counts: tuple[int, ...], shifts: tuple[float, ...], scales: tuple[float, ...]
) -> tuple[Figure, ...]:
    """Risk against the location shift, against the draws, against the scale shift, under skewness and outliers."""
    return (
        _location(rows, "normal", shifts),
        _location(rows, "exponential", shifts),
        _counts(rows, counts),
        _scale(rows, "normal", scales),
        _scale(rows, "Student t(5)", scales),
        _skewness(rows),
        _contamination(rows),
    )


def _location(rows: list[Mapping[str, Any]], law: str, shifts: tuple[float, ...]) -> Figure:
    series = [
        Series(
            rule,
            shifts,
            tuple(_SHOWN * value(rows, law, "location", shift, _SHOWN, rule) for shift in shifts),
            reference=rule == "oracle",
        )
        for rule in ("oracle", *RULES)
    ]
    worst = {line.name: max(line.y) for line in series}
    text = (
        f"{law.capitalize()} data, n = {_SHOWN}, 16 channels shifted by as much in alternating directions; 1 is the "
        f"risk of the batch mean. Highest over the shifts: plug-in {worst['plug-in']:.2f}, pooled "
        f"{worst['pooled']:.2f}, shrink {worst['shrink, SURE']:.2f} (SURE) and {worst['shrink, ML']:.2f} (ML)."
    )
    return Figure(
        f"Location shift, {law}", text, "shift (standard deviations)", "n × risk of the mean", tuple(series), y_max=2.5,
    )  # fmt: skip


def _counts(rows: list[Mapping[str, Any]], counts: tuple[int, ...]) -> Figure:
    law, shift = "exponential", 0.35
    series = tuple(
        Series(
            rule,
            tuple(map(float, counts)),
            tuple(value(rows, law, "location", shift, n, rule) for n in counts),
            reference=rule == "oracle",
        )
        for rule in ("oracle", *RULES)
    )
    at = {line.name: (line.y[0], line.y[-1]) for line in series}
    text = (
        f"Location shift of {shift} standard deviations, {law} data. Pooled over the oracle: "
        f"{at['pooled'][0] / at['oracle'][0]:.2f} at n = {counts[0]}, {at['pooled'][1] / at['oracle'][1]:.2f} at "
        f"n = {counts[-1]}; batch over the oracle: {at['batch'][0] / at['oracle'][0]:.2f} and "
        f"{at['batch'][1] / at['oracle'][1]:.2f}."
    )
    return Figure("Risk against the draws", text, "draws n", "risk of the mean", series, log_x=True, log_y=True)


def _scale(rows: list[Mapping[str, Any]], law: str, scales: tuple[float, ...]) -> Figure:
    series = tuple(
        Series(
            rule,
            scales,
            tuple(_SHOWN * value(rows, law, "scale", shift, _SHOWN, rule) for shift in scales),
            reference=rule == "oracle",
        )
        for rule in ("oracle", *RULES)
    )
    middle = scales.index(0.0)
    at = {line.name: (line.y[middle], max(line.y)) for line in series}
    text = (
        f"{law} data, n = {_SHOWN}, all channels scaled alike. Without a shift: batch {at['batch'][0]:.2f}, pooled "
        f"{at['pooled'][0]:.2f}; at worst: batch {at['batch'][1]:.2f}, pooled {at['pooled'][1]:.2f}, plug-in "
        f"{at['plug-in'][1]:.2f}."
    )
    text = text[0].upper() + text[1:]
    return Figure(
        f"Scale shift, {law}", text, "shift of the half-log variance", "n × risk of the log-scale", series, y_max=2.5,
    )  # fmt: skip


def _against(rows: list[Mapping[str, Any]], kind: str, statistic: str) -> tuple[Series, ...]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if (row["kind"], row["n"], row["statistic"]) == (kind, _SHOWN, statistic) and row["rule"] in (*RULES, "oracle"):
            lines.setdefault(row["rule"], []).append((row["shift"], _SHOWN * row["risk"]))
    series = []
    for rule in ("oracle", *RULES):
        x, y = zip(*sorted(lines[rule]), strict=True)
        series.append(Series(rule, x, y, reference=rule == "oracle"))
    return tuple(series)


def _skewness(rows: list[Mapping[str, Any]]) -> Figure:
    series = _against(rows, "skewness", "location")
    at = {line.name: (line.y[0], line.y[-1]) for line in series}
    text = (
        f"Gamma data with the source's mean and variance, n = {_SHOWN}: every adaptation is a false alarm. From "
        f"skewness {series[0].x[0]:.2f} to {series[0].x[-1]:.2f} the pooled rule's risk goes from "
        f"{at['pooled'][0]:.2f} to {at['pooled'][1]:.2f}, the plug-in's from "
        f"{at['plug-in'][0]:.2f} to {at['plug-in'][1]:.2f}."
    )
    return Figure("Skewness alone shifts", text, "skewness", "n × risk of the mean", series)


def _contamination(rows: list[Mapping[str, Any]]) -> Figure:
    series = _against(rows, "contamination", "location")
    at = {line.name: line.y[-1] for line in series}
    text = (
        f"Normal data, n = {_SHOWN}; a share of the draws is moved by six standard deviations, the mean wanted is that "
        f"of the whole. At {series[0].x[-1]:.0%}: batch {at['batch']:.1f}, pooled {at['pooled']:.1f}, plug-in "
        f"{at['plug-in']:.1f}, oracle {at['oracle']:.1f}."
    )
    return Figure("Contamination", text, "share of moved draws", "n × risk of the mean", series)
