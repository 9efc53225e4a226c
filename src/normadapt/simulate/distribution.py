"""How far the normal law, Edgeworth and saddlepoint are from the exact law of a mean, in its centre and its tails."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from normadapt.asymptotics import edgeworth
from normadapt.asymptotics.edgeworth import Group
from normadapt.asymptotics.m_estimation import log_likelihood_ratio
from normadapt.asymptotics.saddlepoint import BinomialCGF, GammaCGF, tail
from normadapt.simulate.results import Experiment, Figure, Finding, Progress, Series

COUNTS = (2, 5, 10, 20, 50, 100)
_SHOWN = 10
_TRIALS, _CHANCE = 40, 0.2
_LEVELS = (0.1, 1e-2, 1e-4, 1e-6, 1e-8)
NORMAL, ONE, TWO = "normal", "Edgeworth, 1 term", "Edgeworth, 2 terms"
LR, BN = "Lugannani-Rice", "Barndorff-Nielsen"


def distribution(seed: int, full: bool, progress: Progress) -> Experiment:
    """Errors against the exact laws: gamma for the mean of exponentials, binomial for counts. Nothing is drawn."""
    counts = (*COUNTS, 200, 500) if full else COUNTS
    rows: list[Mapping[str, Any]] = []
    for done, n in enumerate(counts):
        rows += _exponential_rows(n)
        progress(done + 1, len(counts) + 1)
    rows += _binomial_rows()
    rows += _lan_rows(counts)
    progress(len(counts) + 1, len(counts) + 1)
    figures = (_upper_figure(), _binomial_figure(), _centre_figure(rows), _lan_figure(rows))
    return Experiment(
        "distribution",
        "How well is the law of a batch mean known?",
        figures,
        _findings(rows),
        tuple(rows),
        {"counts": counts, "levels": _LEVELS, "trials": _TRIALS, "chance": _CHANCE},
    )


def _exact(n: int, z: Tensor) -> Tensor:
    """P(mean of n exponentials >= 1 + z/sqrt(n))."""
    shape = torch.full_like(z, float(n))
    exact: Tensor = torch.special.gammaincc(shape, n + z * n**0.5)
    return exact


def _point(n: int, probability: float) -> Tensor:
    """The standardized point with that upper tail, by bisection."""
    low, high = torch.tensor(-(float(n) ** 0.5), dtype=torch.float64), torch.tensor(60.0, dtype=torch.float64)
    for _ in range(80):
        middle = (low + high) / 2
        above = _exact(n, middle) > probability
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return low


def _approximations(n: int, z: Tensor) -> dict[str, Tensor]:
    cumulants = edgeworth.standardized(Group(1, n, 1.0, 2.0, 6.0))
    cgf = GammaCGF(n, n)
    x = 1 + z / n**0.5
    return {
        NORMAL: edgeworth.tail(z, cumulants, terms=0),
        ONE: edgeworth.tail(z, cumulants, terms=1),
        TWO: edgeworth.tail(z, cumulants, terms=2),
        LR: tail(cgf, x),
        BN: tail(cgf, x, method="barndorff-nielsen"),
    }


def _exponential_rows(n: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    centre = torch.linspace(-1, 1, 81, dtype=torch.float64)
    exact = _exact(n, centre)
    for name, value in _approximations(n, centre).items():
        rows.append(
            {
                "law": "mean of exponentials",
                "n": n,
                "where": "centre",
                "method": name,
                "absolute_error": (value - exact).abs().max().item(),
            }
        )
    for level in _LEVELS:
        z = _point(n, level)
        for name, value in _approximations(n, z).items():
            error = (value / _exact(n, z) - 1).item()
            rows.append(
                {
                    "law": "mean of exponentials",
                    "n": n,
                    "where": level,
                    "method": name,
                    "value": value.item(),
                    "relative_error": error,
                }
            )
    return rows


def _binomial_exact() -> Tensor:
    """P(S >= k), k = 0..trials, added from the small end."""
    k = torch.arange(_TRIALS + 1, dtype=torch.float64)
    n = torch.tensor(float(_TRIALS), dtype=torch.float64)
    log = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    p = torch.tensor(_CHANCE, dtype=torch.float64)
    mass = torch.exp(log + k * p.log() + (n - k) * (1 - p).log())
    tails: Tensor = mass.flip(0).cumsum(0).flip(0)
    return tails


def _binomial_methods() -> dict[str, Callable[[Tensor], Tensor]]:
    v = _CHANCE * (1 - _CHANCE)
    cumulants = edgeworth.standardized(Group(1, _TRIALS, v, v * (1 - 2 * _CHANCE), v * (1 - 6 * v)))
    sd = math.sqrt(_TRIALS * v)
    cgf = BinomialCGF(_TRIALS, _CHANCE)

    def standard(k: Tensor) -> Tensor:
        return (k - _TRIALS * _CHANCE) / sd

    return {
        "normal, half a step": lambda k: edgeworth.tail(standard(k - 0.5), cumulants, terms=0),
        "Edgeworth, 2 terms, half a step": lambda k: edgeworth.tail(standard(k - 0.5), cumulants),
        "Lugannani-Rice, as if continuous": lambda k: tail(cgf, k),
        "Lugannani-Rice, 1st correction": lambda k: tail(cgf, k, lattice="first"),
        "Lugannani-Rice, 2nd correction": lambda k: tail(cgf, k, lattice="second"),
        "Barndorff-Nielsen, 2nd correction": lambda k: tail(cgf, k, method="barndorff-nielsen", lattice="second"),
    }


def _binomial_rows() -> list[dict[str, Any]]:
    exact = _binomial_exact()
    k = torch.arange(1, _TRIALS, dtype=torch.float64)
    known = exact[1:-1]
    seen = (known < 0.6) & (known > 1e-8)
    return [
        {
            "law": "binomial",
            "n": _TRIALS,
            "where": "0.5 to 1e-8",
            "method": name,
            "relative_error": (method(k)[seen] / known[seen] - 1).abs().max().item(),
        }
        for name, method in _binomial_methods().items()
    ]


def _lan_rows(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    h = torch.linspace(-1.3, 1.3, 27, dtype=torch.float64)
    z = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).unsqueeze(1)
    for n in counts:
        t = h / n**0.5
        exact = t * (n + n**0.5 * z) + n * torch.log1p(-t)
        for terms in (1, 2, 3):
            error = (log_likelihood_ratio(h, z, 2, 6, n, terms) - exact).abs().max()
            rows.append({"law": "tilt", "n": n, "where": "|h| <= 1.3", "terms": terms, "absolute_error": error.item()})
    return rows


def _upper_figure() -> Figure:
    z = torch.linspace(-0.5, float(_point(_SHOWN, 1e-9)), 120, dtype=torch.float64)
    exact = _exact(_SHOWN, z)
    x = tuple(exact.tolist())
    series = [
        Series(name, x, tuple((value / exact - 1).abs().tolist())) for name, value in _approximations(_SHOWN, z).items()
    ]
    last = {line.name: line.y[-1] for line in series}
    text = (
        f"Relative error of an upper tail of the mean of {_SHOWN} exponential draws. At 1e-9 the normal law and both "
        f"Edgeworth expansions are off by {min(last[NORMAL], last[ONE], last[TWO]):.0%} or more; Lugannani-Rice is "
        f"off by {last[LR]:.2%}, Barndorff-Nielsen by {last[BN]:.2%}. The dips are changes of sign."
    )
    return Figure(
        f"Upper tail, mean of {_SHOWN} exponentials", text, "exact tail probability", "relative error",
        tuple(series), log_x=True, log_y=True,
    )  # fmt: skip


def _binomial_figure() -> Figure:
    exact = _binomial_exact()
    k = torch.arange(1, _TRIALS, dtype=torch.float64)
    seen = (exact[1:-1] < 0.6) & (exact[1:-1] > 1e-9)
    k, known = k[seen], exact[1:-1][seen]
    x = tuple(known.tolist())
    series = tuple(
        Series(name, x, tuple((method(k) / known - 1).abs().tolist())) for name, method in _binomial_methods().items()
    )
    worst = {line.name: max(line.y) for line in series}
    text = (
        f"Counts of {_TRIALS} trials of chance {_CHANCE}. Treated as continuous, Lugannani-Rice errs by up to "
        f"{worst['Lugannani-Rice, as if continuous']:.0%}; with the second lattice correction by at most "
        f"{worst['Lugannani-Rice, 2nd correction']:.2%}, from one half to 1e-9."
    )
    return Figure(
        "Counts need the lattice correction", text, "exact tail probability", "relative error", series,
        log_x=True, log_y=True,
    )  # fmt: skip


def _centre_figure(rows: list[Mapping[str, Any]]) -> Figure:
    seen = [row for row in rows if row["where"] == "centre"]
    counts = sorted({row["n"] for row in seen})
    series = []
    for name in (NORMAL, ONE, TWO, LR, BN):
        errors = tuple(row["absolute_error"] for row in seen if row["method"] == name)
        series.append(Series(name, tuple(map(float, counts)), errors))
    at = {line.name: line.y[counts.index(_SHOWN)] for line in series}
    growth = math.log(counts[-1] / counts[-2])
    order = {line.name: math.log(line.y[-1] / line.y[-2]) / growth for line in series}
    text = (
        "Largest error of a probability within one standard deviation of the mean. "
        f"At n = {_SHOWN}: normal {at[NORMAL]:.1e}, one term {at[ONE]:.1e}, two terms {at[TWO]:.1e}, Lugannani-Rice "
        f"{at[LR]:.1e}. They fall as n to the power {order[NORMAL]:.2f}, {order[ONE]:.2f}, {order[TWO]:.2f} and "
        f"{order[LR]:.2f}; theory promises -0.5, -1, -1.5 and -1.5."
    )
    return Figure(
        "Centre, mean of n exponentials", text, "draws n", "error of a probability", tuple(series),
        log_x=True, log_y=True,
    )  # fmt: skip


def _lan_figure(rows: list[Mapping[str, Any]]) -> Figure:
    seen = [row for row in rows if row["law"] == "tilt"]
    counts = tuple(float(n) for n in sorted({row["n"] for row in seen}))
    names = {1: "LAN", 2: "with skewness", 3: "with kurtosis"}
    series = tuple(
        Series(name, counts, tuple(row["absolute_error"] for row in seen if row["terms"] == terms))
        for terms, name in names.items()
    )
    text = (
        "Log-likelihood ratio of an exponential law tilted by up to 1.3 standard errors, and its expansions. "
        f"At n = {counts[-1]:g} local asymptotic normality alone is off by {series[0].y[-1]:.1e}, with the skewness "
        f"{series[1].y[-1]:.1e}, with the kurtosis {series[2].y[-1]:.1e}."
    )
    return Figure("Higher-order LAN", text, "draws n", "error of the log-ratio", series, log_x=True, log_y=True)


def _findings(rows: list[Mapping[str, Any]]) -> tuple[Finding, ...]:
    def centre(method: str) -> float:
        return next(
            float(r["absolute_error"])
            for r in rows
            if (r["n"], r["where"], r.get("method")) == (_SHOWN, "centre", method)
        )

    def far(method: str, level: float) -> float:
        return next(
            float(r["relative_error"]) for r in rows if (r["n"], r["where"], r.get("method")) == (_SHOWN, level, method)
        )

    def lan(terms: int) -> float:
        return next(float(r["absolute_error"]) for r in rows if (r["n"], r.get("terms")) == (_SHOWN, terms))

    lattice = {r["method"]: r["relative_error"] for r in rows if r["law"] == "binomial"}
    edgeworth_gain = centre(NORMAL) / centre(TWO)
    saddlepoint = max(abs(far(LR, level)) for level in _LEVELS)
    return (
        Finding(
            1,
            f"Edgeworth expansion of the mean of {_SHOWN} exponentials",
            f"error in the centre {centre(NORMAL):.1e} (normal), {centre(ONE):.1e}, {centre(TWO):.1e}; "
            f"at a tail of 1e-4 off by {far(NORMAL, 1e-4):+.1%}, {far(ONE, 1e-4):+.1%}, {far(TWO, 1e-4):+.1%}",
            edgeworth_gain > 2,
            f"centre {edgeworth_gain:.0f} times nearer" + ("; not for far tails" if abs(far(TWO, 1e-4)) > 0.1 else ""),
        ),
        Finding(
            3,
            f"Log-likelihood ratio of a tilt (LAN), n = {_SHOWN}",
            f"error {lan(1):.2f} with LAN alone, {lan(2):.2f} with skewness, {lan(3):.2f} with kurtosis",
            lan(1) > 2 * lan(3),
            f"{lan(1) / lan(3):.0f} times nearer",
        ),
        Finding(
            4,
            f"Saddlepoint tail of the mean of {_SHOWN} exponentials, 0.1 to 1e-8",
            f"Lugannani-Rice within {saddlepoint:.2%}, the normal law off by {far(NORMAL, 1e-8):+.0%} at 1e-8; counts: "
            f"{lattice['Lugannani-Rice, as if continuous']:.0%} as if continuous, "
            f"{lattice['Lugannani-Rice, 2nd correction']:.2%} with the 2nd lattice correction",
            saddlepoint < 0.1 * abs(far(NORMAL, 1e-8)),
            "uniformly accurate" if saddlepoint < 0.01 else f"within {saddlepoint:.0%}",
        ),
    )
