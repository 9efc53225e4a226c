"""How often intervals for a shift miss it, each side for itself: normal theory against Cornish-Fisher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normadapt.asymptotics import edgeworth, normal
from normadapt.asymptotics.edgeworth import Group, StatisticCumulants
from normadapt.simulate.draws import EXPONENTIAL, LOGNORMAL, NORMAL, Law, Statistics, gamma, statistics
from normadapt.simulate.results import Experiment, Figure, Finding, Progress, Series

COUNTS = (5, 8, 10, 20, 50, 100)
LAWS = (NORMAL, gamma(8), EXPONENTIAL, LOGNORMAL)
_SIDE = 0.025
_CHANNELS = 64  # that share an estimate of skewness and kurtosis
_SOURCE_FACTOR = 4
_GROUPS = (800, 8_000)  # of samples that share an estimate, by default and in full
PLAIN, STUDENT = "normal", "Student"
KNOWN, OWN, SHARED = "Cornish-Fisher, known skewness", "Cornish-Fisher, own skewness", "Cornish-Fisher, shared skewness"
METHODS = (PLAIN, STUDENT, KNOWN, OWN, SHARED)


def coverage(seed: int, full: bool, progress: Progress) -> Experiment:
    """Miss rates of 95 % intervals for the shift of a mean, by law, draws and method; nominal 2.5 % on each side."""
    generator = torch.Generator().manual_seed(seed)
    groups = _GROUPS[full]
    rows: list[Mapping[str, Any]] = []
    steps = len(LAWS) * len(COUNTS)
    for done, (law, n) in enumerate((law, n) for law in LAWS for n in COUNTS):
        rows += _rows(law, n, groups, generator)
        progress(done + 1, steps)
    figures = (*(_figure(law, rows) for law in (EXPONENTIAL, LOGNORMAL)), _two_samples(rows))
    return Experiment(
        "coverage",
        "How often do intervals for a shift miss it?",
        figures,
        (_finding(rows), _second_finding(rows)),
        tuple(rows),
        {"seed": seed, "samples": groups * _CHANNELS, "counts": COUNTS, "side": _SIDE, "channels": _CHANNELS},
    )


def _rows(law: Law, n: int, groups: int, generator: torch.Generator) -> list[dict[str, Any]]:
    test = statistics(law, n, (groups, _CHANNELS), generator)
    source_count = _SOURCE_FACTOR * n
    source = statistics(law, source_count, (max(1, groups // 4), _CHANNELS), generator)
    part = Statistics(*(column[: source.mean.shape[0]] for column in test))
    rows = []
    for samples, name in (([(1.0, n, test)], "known"), ([(1.0, n, part), (-1.0, source_count, source)], "sampled")):
        difference = sum((w * s.mean for w, _, s in samples), torch.zeros_like(samples[0][2].mean))
        spread = sum((w * w * s.variance / m for w, m, s in samples), torch.zeros_like(difference)).sqrt()
        usable = spread > 0
        t = torch.where(usable, difference / torch.where(usable, spread, 1.0), torch.inf)
        for method in METHODS:
            low, high = _quantiles(method, law, samples)
            # the shift is 0: an interval [d - high s, d - low s] lies above it where t > high
            above, below = (t > high).double().mean().item(), (t < low).double().mean().item()
            length = torch.where(usable, (high - low) * spread, 0.0).median().item()
            rows.append(
                {
                    "law": law.name,
                    "n": n,
                    "source": name,
                    "method": method,
                    "above": above,
                    "below": below,
                    "standard_error": (_SIDE * (1 - _SIDE) / t.numel()) ** 0.5,
                    "median_length": length,
                }
            )
    return rows


def _quantiles(method: str, law: Law, samples: Sequence[tuple[float, int, Statistics]]) -> tuple[Tensor, Tensor]:
    """Lower and upper quantile of the studentized difference, as the method sees them."""
    side = torch.tensor(_SIDE, dtype=torch.float64)
    if method == PLAIN:
        z = -normal.quantile(side)
        return -z, z
    cumulants = edgeworth.studentized([_group(method, law, *sample) for sample in samples])
    mirrored = StatisticCumulants(-cumulants.k1, cumulants.k2, -cumulants.k3, cumulants.k4)
    return edgeworth.quantile(side, cumulants), -edgeworth.quantile(side, mirrored)


def _group(method: str, law: Law, weight: float, n: int, s: Statistics) -> Group:
    if method == STUDENT:
        return Group(weight, n, s.variance, 0.0, 0.0)
    if method == KNOWN:
        return Group(weight, n, s.variance, law.skewness * s.variance**1.5, law.excess_kurtosis * s.variance**2)
    if method == SHARED:
        scale = s.variance.mean(-1, keepdim=True)
        g = s.k3.mean(-1, keepdim=True) / scale**1.5
        kurtosis = s.k4.mean(-1, keepdim=True) / scale**2
        return Group(weight, n, s.variance, g * s.variance**1.5, kurtosis * s.variance**2)
    return Group(weight, n, s.variance, s.k3, s.k4)


def _rate(rows: list[Mapping[str, Any]], law: str, method: str, n: int, side: str, source: str = "known") -> float:
    return next(
        float(row[side])
        for row in rows
        if (row["law"], row["method"], row["n"], row["source"]) == (law, method, n, source)
    )


def _figure(law: Law, rows: list[Mapping[str, Any]]) -> Figure:
    counts = tuple(float(n) for n in COUNTS)
    series = [Series("nominal 2.5 % a side", counts, tuple(100 * _SIDE for _ in COUNTS), reference=True)]
    for method in (PLAIN, SHARED):
        for side, word in (("below", "shift above the interval"), ("above", "shift below it")):
            rates = tuple(100 * _rate(rows, law.name, method, n, side) for n in COUNTS)
            series.append(Series(f"{method}: {word}", counts, rates))
    plain, shared = (
        tuple(_rate(rows, law.name, method, 20, side) for side in ("below", "above")) for method in (PLAIN, SHARED)
    )
    text = (
        f"Intervals of nominally 95 % for the shift of a mean, {law.name} data (skewness {law.skewness:.1f}), source "
        f"statistic known. At n = 20 the normal interval misses in {plain[0]:.1%} and {plain[1]:.1%} of the "
        f"samples on its two sides, Cornish-Fisher with a skewness shared by {_CHANNELS} channels in "
        f"{shared[0]:.1%} and {shared[1]:.1%}."
    )
    return Figure(f"Misses of a 95 % interval, {law.name}", text, "draws n", "misses (%)", tuple(series), log_x=True)


def _two_samples(rows: list[Mapping[str, Any]]) -> Figure:
    counts = tuple(float(n) for n in COUNTS)
    series = [Series("nominal 5 %", counts, tuple(200 * _SIDE for _ in COUNTS), reference=True)]
    for method in METHODS:
        rates = tuple(
            100 * sum(_rate(rows, EXPONENTIAL.name, method, n, side, "sampled") for side in ("below", "above"))
            for n in COUNTS
        )
        series.append(Series(method, counts, rates))
    at = {line.name: line.y[0] for line in series}
    text = (
        f"Both sides together, exponential data, the source statistic itself from {_SOURCE_FACTOR} n draws. At "
        f"n = {COUNTS[0]}: normal {at[PLAIN]:.1f} %, Student {at[STUDENT]:.1f} %, with each channel's own skewness "
        f"{at[OWN]:.1f} %, shared {at[SHARED]:.1f} %, known {at[KNOWN]:.1f} %."
    )
    return Figure("Both samples random, exponential", text, "draws n", "misses (%)", tuple(series), log_x=True)


def _finding(rows: list[Mapping[str, Any]]) -> Finding:
    n = 20

    def worse(law: str, method: str) -> float:
        rates = (_rate(rows, law, method, n, side) for side in ("below", "above"))
        return max(rates, key=lambda rate: abs(rate - _SIDE))

    def off(law: str, method: str) -> float:
        return abs(worse(law, method) - _SIDE)

    exponential = EXPONENTIAL.name
    plain, shared = off(exponential, PLAIN), off(exponential, SHARED)
    total = [sum(_rate(rows, exponential, method, n, side) for side in ("below", "above")) for method in METHODS]
    both = dict(zip(METHODS, total, strict=True))
    gauss = off(NORMAL.name, STUDENT), off(NORMAL.name, SHARED)
    return Finding(
        1,
        f"Intervals for a shift, n = {n}, 2.5 % nominal a side",
        f"exponential: worse side misses {worse(exponential, PLAIN):.1%} (normal), {worse(exponential, OWN):.1%} "
        f"(Cornish-Fisher, own skewness), {worse(exponential, SHARED):.1%} "
        f"(shared by {_CHANNELS} channels); both sides together {both[PLAIN]:.1%} (normal), "
        f"{both[STUDENT]:.1%} (Student), {both[SHARED]:.1%}; normal data: off by {gauss[0]:.1%} (Student), "
        f"{gauss[1]:.1%} (Cornish-Fisher)",
        shared < 0.5 * plain,
        f"nominal rate {plain / max(shared, 1e-4):.1f} times nearer on skewed data"
        + ("; changes nothing that matters on normal data" if abs(gauss[0] - gauss[1]) < 0.005 else ""),
    )


def _second_finding(rows: list[Mapping[str, Any]]) -> Finding:
    n = 20
    both = {
        method: sum(_rate(rows, EXPONENTIAL.name, method, n, side, "sampled") for side in ("below", "above"))
        for method in METHODS
    }
    gain = abs(both[STUDENT] - 2 * _SIDE) - abs(both[SHARED] - 2 * _SIDE)
    return Finding(
        1,
        f"The same with the source statistic from {_SOURCE_FACTOR} n draws, both sides together (5 % nominal)",
        f"exponential: {both[PLAIN]:.1%} (normal), {both[STUDENT]:.1%} (Student), {both[OWN]:.1%} (Cornish-Fisher, own "
        f"skewness), {both[SHARED]:.1%} (shared)",
        abs(gain) > 0.01,
        f"nominal rate {100 * gain:+.1f} points nearer than Student"
        if abs(gain) > 0.01
        else "changes nothing that matters",
    )
