"""How often the tail-safe weight does more harm than its tolerance allows, against the probability it promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normadapt.asymptotics import normal
from normadapt.asymptotics.weights import tail_safe
from normadapt.simulate.draws import LAWS, Law, statistics
from normadapt.simulate.results import Experiment, Figure, Finding, Progress, Series

COUNTS = (4, 8, 16, 32, 64, 256)
SHIFTS = (0.0, 0.5, 1.0, 2.0)
LEVELS = (0.05, 0.01, 0.001)
_TOLERANCE = 0.5  # in standard errors of the test mean
_SAMPLES = (200_000, 2_000_000)  # by default and in full
_TERMS = {0: "normal quantile", 1: "Cornish-Fisher, 1 term", 2: "Cornish-Fisher, 2 terms"}


def tail(seed: int, full: bool, progress: Progress) -> Experiment:
    """Probability of more harm than the tolerance, by law, draws, shift and nominal probability; exact for gammas."""
    generator = torch.Generator().manual_seed(seed)
    samples = _SAMPLES[full]
    rows: list[Mapping[str, Any]] = []
    steps = len(LAWS) * len(COUNTS)
    for done, (law, n) in enumerate((law, n) for law in LAWS.values() for n in COUNTS):
        few = samples if n <= 32 else samples * 32 // n
        errors = None if _is_exact(law) else statistics(law, n, (few,), generator).mean.sort().values
        for delta in SHIFTS:
            for sign in (1, -1):
                rows += _rows(law, n, sign * delta / n**0.5, errors)
        progress(done + 1, steps)
    figures = (_by_count(rows, "exponential", 0.01), _by_level(rows, "exponential", 16), _by_law(rows))
    return Experiment(
        "tail",
        "Does the tail-safe weight keep its promise?",
        figures,
        (_finding(rows),),
        tuple(rows),
        {
            "seed": seed,
            "samples": samples,
            "tolerance_in_standard_errors": _TOLERANCE,
            "shifts_in_standard_errors": SHIFTS,
        },
    )


def _is_exact(law: Law) -> bool:
    return law.gamma_shape is not None or law.name == "normal"


def _rows(law: Law, n: int, shift: float, errors: Tensor | None) -> list[dict[str, Any]]:
    tolerance = _TOLERANCE / n**0.5
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    rows = []
    for terms in _TERMS:
        weight = tail_safe(
            shift, 1 / n, tolerance, levels, law.skewness, law.excess_kurtosis, n,
            terms=terms,  # type: ignore[arg-type]
        )  # fmt: skip
        reach = abs(shift) + tolerance
        # missing by |weight e - (1 - weight) shift| > reach
        high = ((1 - weight) * shift + reach) / weight
        low = ((1 - weight) * shift - reach) / weight
        harm = _beyond(law, n, high, errors) + _below(law, n, low, errors)
        for i, level in enumerate(LEVELS):
            rows.append(
                {
                    "law": law.name,
                    "n": n,
                    "shift": shift,
                    "shift_in_standard_errors": round(shift * n**0.5, 6),
                    "nominal": level,
                    "terms": terms,
                    "weight": weight[i].item(),
                    "harm": harm[i].item(),
                    "standard_error": 0.0 if errors is None else (level * (1 - level) / errors.numel()) ** 0.5,
                }
            )
    return rows


def _beyond(law: Law, n: int, x: Tensor, errors: Tensor | None) -> Tensor:
    """P(mean > x)."""
    if errors is not None:
        return 1 - torch.searchsorted(errors, x.contiguous(), right=True).double() / errors.numel()
    if law.gamma_shape is None:
        return normal.tail(x * n**0.5)
    shape, total = _gamma(law.gamma_shape, n, x)
    upper: Tensor = torch.special.gammaincc(shape, total)
    return upper


def _below(law: Law, n: int, x: Tensor, errors: Tensor | None) -> Tensor:
    """P(mean < x)."""
    if errors is not None:
        return torch.searchsorted(errors, x.contiguous()).double() / errors.numel()
    if law.gamma_shape is None:
        return normal.lower_tail(x * n**0.5)
    shape, total = _gamma(law.gamma_shape, n, x)
    lower: Tensor = torch.special.gammainc(shape, total)
    return lower


def _gamma(shape: float, n: int, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(x, n * shape), (n * (shape + x * shape**0.5)).clamp_min(0)


def _harm(rows: list[Mapping[str, Any]], law: str, n: int, nominal: float, terms: int) -> float:
    """The largest over the shifts for which the weight is below 1: elsewhere the promise does not bind."""
    seen = [
        float(row["harm"])
        for row in rows
        if (row["law"], row["n"], row["nominal"], row["terms"]) == (law, n, nominal, terms) and row["weight"] < 1
    ]
    return max(seen, default=float("nan"))


def _by_count(rows: list[Mapping[str, Any]], law: str, nominal: float) -> Figure:
    counts = tuple(float(n) for n in COUNTS)
    series = [Series("nominal", counts, tuple(100 * nominal for _ in COUNTS), reference=True)]
    series += [
        Series(name, counts, tuple(100 * _harm(rows, law, n, nominal, terms) for n in COUNTS))
        for terms, name in _TERMS.items()
    ]
    text = (
        f"Probability of missing the target by more than the source does plus half a standard error, {law} data, worst "
        f"of the shifts 0, ±0.5, ±1, ±2 standard errors, nominally {nominal:.0%}. At n = 4 it is "
        + ", ".join(f"{line.y[0]:.2f} % ({line.name})" for line in series[1:])
        + "; at n = 64 "
        + ", ".join(f"{line.y[COUNTS.index(64)]:.2f} %" for line in series[1:])
        + "."
    )
    return Figure(
        f"Harm beyond the tolerance, {law}, nominal {nominal:.0%}", text, "draws n", "probability (%)", tuple(series),
        log_x=True,
    )  # fmt: skip


def _by_level(rows: list[Mapping[str, Any]], law: str, n: int) -> Figure:
    series = [Series("as promised", LEVELS, tuple(1.0 for _ in LEVELS), reference=True)]
    series += [
        Series(name, LEVELS, tuple(_harm(rows, law, n, level, terms) / level for level in LEVELS))
        for terms, name in _TERMS.items()
    ]
    text = (
        f"The same at n = {n}, as a multiple of the promised probability. At {LEVELS[-1]:.1%} the normal quantile is "
        f"exceeded {series[1].y[-1]:.1f} times as often as promised, Cornish-Fisher {series[2].y[-1]:.1f} (1 term) and "
        f"{series[3].y[-1]:.1f} times (2 terms)."
    )
    return Figure(
        f"How far into the tail, {law}, n = {n}", text, "promised probability", "times the promise", tuple(series),
        log_x=True, log_y=True,
    )  # fmt: skip


def _by_law(rows: list[Mapping[str, Any]]) -> Figure:
    counts = tuple(float(n) for n in COUNTS)
    level = 0.01
    series = [Series("nominal", counts, tuple(100 * level for _ in COUNTS), reference=True)]
    series += [Series(law, counts, tuple(100 * _harm(rows, law, n, level, 2) for n in COUNTS)) for law in LAWS]
    most = {line.name: max(zip(line.y, COUNTS, strict=True)) for line in series[1:]}
    worst, second = sorted(most, key=lambda name: most[name], reverse=True)[:2]
    text = (
        f"Two-term Cornish-Fisher for every law, nominally {level:.0%}. Furthest above it: {worst} with "
        f"{most[worst][0]:.2f} % at n = {most[worst][1]}, then {second} with {most[second][0]:.2f} % at "
        f"n = {most[second][1]}."
    )
    return Figure("Every law, 2 terms, nominal 1 %", text, "draws n", "probability (%)", tuple(series), log_x=True)


def _finding(rows: list[Mapping[str, Any]]) -> Finding:
    n = 16
    plain, two = (_harm(rows, "exponential", n, 0.01, terms) for terms in (0, 2))
    far_plain, far_two = (_harm(rows, "exponential", n, 0.001, terms) for terms in (0, 2))
    gauss = _harm(rows, "normal", n, 0.01, 0)
    return Finding(
        5,
        f"Tail-safe weight, exponential data, n = {n}, worst shift",
        f"harm for a promised 1 %: {plain:.2%} (normal quantile), {two:.2%} (two terms); for 0.1 %: {far_plain:.2%}, "
        f"{far_two:.2%}; normal data: {gauss:.2%}",
        abs(two - 0.01) < 0.5 * abs(plain - 0.01),
        f"promise of 1 % broken by a factor {plain / 0.01:.1f} without skewness, {two / 0.01:.1f} with it",
    )
