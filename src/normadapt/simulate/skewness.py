"""The weight that serves a BN layer's output, with and without its skewness correction, against the true optimum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normadapt.asymptotics.bounds import risk_bound
from normadapt.asymptotics.weights import output_optimal
from normadapt.simulate.draws import EXPONENTIAL, LOGNORMAL, NORMAL, Law, Statistics, gamma, statistics
from normadapt.simulate.results import Experiment, Figure, Finding, Progress, Series

COUNTS = (8, 16, 32, 64, 128, 256)
SHIFTS = (1.0, 0.5, 0.25, -0.25, -0.5, -1.0)
LAWS = (NORMAL, gamma(8), EXPONENTIAL, LOGNORMAL)
_CHANNELS = 64  # that share an estimate of the skewness
_POINTS = 500  # of the target law, for the risk of a loss
_CONFIDENCE = 0.9
_DRAWS = (12_000_000, 200_000_000)  # by default and in full
_WORTH = 0.02  # a relative change of the loss below this does not matter


def skewness(seed: int, full: bool, progress: Progress) -> Experiment:
    """Weight of least output loss for the mean, the variance being the batch's own: formula against simulation."""
    generator = torch.Generator().manual_seed(seed)
    draws = _DRAWS[full]
    rows: list[Mapping[str, Any]] = []
    steps = len(LAWS) * len(COUNTS)
    for done, (law, n) in enumerate((law, n) for law in LAWS for n in COUNTS):
        groups = max(50, min(draws // 12, draws // (4 * n)) // _CHANNELS)
        test = statistics(law, n, (groups, _CHANNELS), generator)
        rows += [_row(law, n, shift, test) for shift in SHIFTS]
        if law is EXPONENTIAL:
            rows += _bound_rows(law, n, test, generator)
        progress(done + 1, steps)
    figures = (
        _weights(rows, 1.0),
        _weights(rows, -1.0),
        _losses(rows),
        _bound(rows),
    )
    return Experiment(
        "skewness",
        "Does skewness matter for the layer's output?",
        figures,
        _findings(rows),
        tuple(rows),
        {"seed": seed, "draws_per_setting": draws // 4, "channels": _CHANNELS, "variance_weight": 1.0},
    )


def _row(law: Law, n: int, shift: float, s: Statistics) -> dict[str, Any]:
    """Loss W ((1 - l) a + l e)^2 with W = v*/v, e = m - m*: quadratic in l, so its optimum is known in moments."""
    w, e = 1 / s.variance, s.mean
    influence_top, influence_bottom = w * shift * (shift - e), w * (e - shift) ** 2
    top, bottom = influence_top.mean(), influence_bottom.mean()
    best = top / bottom
    error = ((influence_top - best * influence_bottom).std() / bottom / s.mean.numel() ** 0.5).item()

    plain = output_optimal(shift, 0.0, 0.0, n, 1.0, clip=False)
    corrected = output_optimal(shift, 0.0, law.skewness, n, 1.0, clip=False)
    g = s.k3.mean(-1, keepdim=True) / s.variance.mean(-1, keepdim=True) ** 1.5
    # from the sample: the shift is the observed one, less its noise
    d2 = (shift - e) ** 2
    signal = torch.sign(shift - e) * (d2 - s.variance / n).clamp_min(0).sqrt() / s.variance.sqrt()
    own_plain = output_optimal(signal, 0.0, 0.0, n, 1.0)
    own = output_optimal(signal, 0.0, g, n, 1.0)

    def loss(weight: Tensor) -> float:
        return (w * ((1 - weight) * shift + weight * e) ** 2).mean().item()

    return {
        "law": law.name,
        "n": n,
        "shift": shift,
        "optimum": best.item(),
        "standard_error": error,
        "plain": plain.item(),
        "corrected": corrected.item(),
        "loss_optimum": loss(best),
        "loss_plain": loss(plain),
        "loss_corrected": loss(corrected),
        "loss_corrected_clipped": loss(corrected.clamp(0, 1)),
        "loss_batch": loss(torch.ones(())),
        "loss_estimated_plain": loss(own_plain),
        "loss_estimated_corrected": loss(own),
    }


def _bound_rows(law: Law, n: int, s: Statistics, generator: torch.Generator) -> list[dict[str, Any]]:
    """Claim 6: |R - R*| of the loss |y|, 1-Lipschitz in the output, for batch statistics, against its bounds."""
    x = law.draw((20_000,), generator).sort().values
    x = x.reshape(_POINTS, -1).mean(1)
    x = (x - x.mean()) / x.std(unbiased=False)
    mean, variance = s.mean.flatten()[:4_000], s.variance.flatten()[:4_000]
    risk = torch.stack([((x - m) / v.sqrt()).abs().mean() for m, v in zip(mean, variance, strict=True)])
    gap = (risk - x.abs().mean()).abs()
    expected = risk_bound(1.0, 1.0, 0.0, 0.0, count=n, skewness=law.skewness, excess_kurtosis=law.excess_kurtosis)
    certain = risk_bound(
        1.0, 1.0, 0.0, 0.0, count=n, skewness=law.skewness, excess_kurtosis=law.excess_kurtosis,
        confidence=_CONFIDENCE,
    )  # fmt: skip
    normal = risk_bound(1.0, 1.0, 0.0, 0.0, count=n, confidence=_CONFIDENCE)
    return [
        {
            "law": law.name,
            "n": n,
            "bound": True,
            "gap_mean": gap.mean().item(),
            "gap_quantile": gap.quantile(_CONFIDENCE).item(),
            "bound_mean": expected.item(),
            "bound_confidence": certain.item(),
            "bound_confidence_normal": normal.item(),
            "share_above_bound": (gap > certain).double().mean().item(),
            "share_above_normal": (gap > normal).double().mean().item(),
        }
    ]


def _of(rows: list[Mapping[str, Any]], law: str, n: int, shift: float) -> Mapping[str, Any]:
    return next(row for row in rows if (row["law"], row["n"], row.get("shift")) == (law, n, shift))


def _weights(rows: list[Mapping[str, Any]], shift: float) -> Figure:
    counts = tuple(float(n) for n in COUNTS)
    seen = [_of(rows, EXPONENTIAL.name, n, shift) for n in COUNTS]
    names = {"optimum": "optimum, simulated", "plain": "formula without skewness", "corrected": "formula with skewness"}
    series = tuple(Series(name, counts, tuple(row[key] for row in seen)) for key, name in names.items())
    at = _of(rows, EXPONENTIAL.name, 64, shift)
    over = " The optimum lies above 1: the library clips there." if at["optimum"] > 1 else ""
    side = "above" if shift > 0 else "below"
    text = (
        f"Exponential data, source mean one standard deviation {side} the target's. At n = 64 the optimum is "
        f"{at['optimum']:.4f} ± {at['standard_error']:.4f}; the formula gives {at['corrected']:.4f}, without skewness "
        f"{at['plain']:.4f}.{over}"
    )
    return Figure(f"Best weight on the test mean, shift {shift:+g}", text, "draws n", "weight", series, log_x=True)


def _losses(rows: list[Mapping[str, Any]]) -> Figure:
    counts = tuple(float(n) for n in COUNTS)
    series = []
    for shift in (0.5, -0.5):
        seen = [_of(rows, EXPONENTIAL.name, n, shift) for n in COUNTS]
        for key, name in (
            ("loss_plain", "without skewness"),
            ("loss_corrected_clipped", "with skewness, at most 1"),
            ("loss_estimated_plain", "estimated, without"),
            ("loss_estimated_corrected", "estimated, with"),
        ):
            excess = tuple(100 * (row[key] / row["loss_optimum"] - 1) for row in seen)
            series.append(Series(f"{shift:+g}: {name}", counts, tuple(v if v > 1e-3 else math.nan for v in excess)))
    at = {line.name: line.y[COUNTS.index(16)] for line in series}

    def pair(name: str) -> str:
        return f"{at['+0.5: ' + name]:.1f} % and {at['-0.5: ' + name]:.1f} %"

    text = (
        "Loss of the location part above that of the best fixed weight, exponential data, shift +0.5 and -0.5. At "
        f"n = 16 with all known: {pair('without skewness')} without the correction, {pair('with skewness, at most 1')} "
        f"with it. With shift and skewness estimated from the batch: {pair('estimated, without')} without, "
        f"{pair('estimated, with')} with it."
    )
    if min(at["+0.5: estimated, with"], at["-0.5: estimated, with"]) > max(
        at["+0.5: without skewness"], at["-0.5: without skewness"]
    ):
        text += " Not knowing the shift costs more than ignoring the skewness."
    return Figure(
        "What the correction is worth",
        text,
        "draws n",
        "loss above the optimum (%)",
        tuple(series),
        log_x=True,
        log_y=True,
    )


def _bound(rows: list[Mapping[str, Any]]) -> Figure:
    seen = [row for row in rows if row.get("bound")]
    counts = tuple(float(row["n"]) for row in seen)
    names = {
        "gap_mean": "mean |R - R*|",
        "bound_mean": "bound on the mean",
        "gap_quantile": f"{_CONFIDENCE:.0%} quantile of |R - R*|",
        "bound_confidence": f"bound with {_CONFIDENCE:.0%}",
    }
    series = tuple(Series(name, counts, tuple(row[key] for row in seen)) for key, name in names.items())
    last = seen[-1]
    text = (
        f"Risk of the loss |y| with a batch's statistics, exponential data. At n = {last['n']} the mean gap is "
        f"{last['gap_mean']:.4f} under a bound of {last['bound_mean']:.4f}; above the bound with {_CONFIDENCE:.0%} "
        f"were {max(row['share_above_bound'] for row in seen):.1%} of the batches at most."
    )
    return Figure("The risk bound", text, "draws n", "difference of risks", series, log_x=True, log_y=True)


def _findings(rows: list[Mapping[str, Any]]) -> tuple[Finding, ...]:
    n = 16
    both = [_of(rows, EXPONENTIAL.name, n, shift) for shift in (0.5, -0.5)]
    plain, corrected = (
        [row["loss_" + key] / row["loss_optimum"] - 1 for row in both] for key in ("plain", "corrected")
    )
    change = [row["loss_estimated_corrected"] / row["loss_estimated_plain"] - 1 for row in both]
    gauss = _of(rows, NORMAL.name, n, 0.5)
    bounds = [row for row in rows if row.get("bound")]
    tightness = [row["bound_mean"] / row["gap_mean"] for row in bounds]
    exceeded = max(row["share_above_bound"] for row in bounds)
    normal = max(row["share_above_normal"] for row in bounds)
    holds = min(tightness) >= 1 and exceeded <= 1 - _CONFIDENCE
    at = _of(rows, EXPONENTIAL.name, 64, 1.0)
    return (
        Finding(
            5,
            "Skewness-corrected weight for the layer's output, exponential data",
            f"n = 64, shift +1: optimum {at['optimum']:.4f}, formula {at['corrected']:.4f}, without skewness "
            f"{at['plain']:.4f}; n = {n}, shift ±0.5: loss above the optimum {plain[0]:.1%}/{plain[1]:.1%} without, "
            f"{corrected[0]:.1%}/{corrected[1]:.1%} with it; normal data "
            f"{gauss['loss_plain'] / gauss['loss_optimum'] - 1:.1%}",
            max(plain) > _WORTH,
            "pays if shift and skewness are known" if max(plain) > _WORTH else "changes nothing that matters",
        ),
        Finding(
            5,
            f"The same with shift and skewness estimated from the batch, n = {n}",
            f"loss changed by {change[0]:+.1%} (shift +0.5), {change[1]:+.1%} (-0.5)",
            max(map(abs, change)) > _WORTH,
            "changes nothing that matters"
            if max(map(abs, change)) <= _WORTH
            else (
                "gains on both sides"
                if max(change) < 0
                else "gains on one side, loses on the other"
                if min(change) < 0
                else "loses: the estimate of the skewness costs more than it brings"
            ),
        ),
        Finding(
            6,
            "Risk bound for a Lipschitz loss, batch statistics, exponential data",
            f"bound over mean gap {min(tightness):.1f} to {max(tightness):.1f}; the bound with {_CONFIDENCE:.0%} "
            f"was exceeded by {exceeded:.1%} of the batches at most, and taking the data to be normal by {normal:.1%}",
            normal > 1 - _CONFIDENCE >= exceeded,
            ("holds" if holds else "does not hold everywhere")
            + (
                "; higher orders needed" if normal > 1 - _CONFIDENCE else "; so loose that higher orders change nothing"
            ),
        ),
    )
