"""Risk of each weight rule against the true shift, with the oracle as the floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normadapt.asymptotics.m_estimation import Huber, one_step
from normadapt.asymptotics.weights import oracle, plug_in, plug_in_risk, pooled, shrink, tail_safe
from normadapt.simulate.draws import CONTAMINATED, EXPONENTIAL, LAWS, NORMAL, Law, Statistics, gamma, statistics
from normadapt.simulate.results import Experiment, Finding, Progress
from normadapt.simulate.risk_figures import RULES, risk_figures, value

COUNTS = (4, 8, 16, 64, 256)
ALL_COUNTS = (4, 8, 16, 32, 64, 128, 256)
SHIFTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0)  # of the location, in standard deviations
SCALES = (-0.7, -0.35, -0.1, 0.0, 0.1, 0.35, 0.7)  # half the log-variance
SKEWED = (64, 16, 8, 4, 3, 2, 1)  # degrees of gamma laws: skewness sqrt(8/degrees), 0.35 to 2.8
OUTLIERS = (0.0, 0.01, 0.03, 0.1, 0.2)  # share of the draws that a bias of the sensor moves by six standard deviations
CHANNELS = 16
_REPLICATIONS = (200, 1_000)  # by default, and in full
_MOVED = 6.0
_TOLERANCE = 0.25  # of the tail-safe rule, in standard deviations
_PATTERN = torch.tensor([1.0, -1.0] * (CHANNELS // 2), dtype=torch.float64)


class _Observed(NamedTuple):
    """What a rule sees, per replication and channel: the difference and its estimated sampling variance."""

    difference: Tensor
    sampling_variance: Tensor


def _fixed(seen: _Observed, n: int) -> Tensor:
    return torch.full_like(seen.difference, n / (n + 16))


_WEIGHTS: Mapping[str, Callable[[_Observed, int], Tensor]] = {
    "source": lambda seen, n: torch.zeros_like(seen.difference),
    "batch": lambda seen, n: torch.ones_like(seen.difference),
    "fixed, n/(n + 16)": _fixed,
    "plug-in, biased": lambda seen, n: oracle(seen.difference, seen.sampling_variance),
    "plug-in": lambda seen, n: plug_in(seen.difference, seen.sampling_variance),
    "pooled": lambda seen, n: pooled(seen.difference, seen.sampling_variance).unsqueeze(-1),
    "shrink, SURE": lambda seen, n: shrink(seen.difference, seen.sampling_variance, "sure").weights,
    "shrink, ML": lambda seen, n: shrink(seen.difference, seen.sampling_variance, "ml").weights,
    "tail-safe": lambda seen, n: tail_safe(0.0, seen.sampling_variance, _TOLERANCE, 0.05, terms=0),
}


def risk(seed: int, full: bool, progress: Progress) -> Experiment:
    """Mean squared error of mean and log-scale for every rule, by law, kind of shift, its size and the draws."""
    generator = torch.Generator().manual_seed(seed)
    replications, counts = (_REPLICATIONS[full], ALL_COUNTS if full else COUNTS)
    rows: list[Mapping[str, Any]] = []
    steps = len(counts) * (len(LAWS) + 2)
    done = 0
    for n in counts:
        for law in LAWS.values():
            s = statistics(law, n, (replications, CHANNELS), generator)
            rows += _location_rows(law, n, s) + _scale_rows(law, n, s)
            progress(done := done + 1, steps)
        rows += [row for degrees in SKEWED for row in _skewness_rows(gamma(degrees), n, replications, generator)]
        progress(done := done + 1, steps)
        rows += [row for share in OUTLIERS for row in _outlier_rows(share, n, replications, generator)]
        progress(done := done + 1, steps)
    huber = _huber(200 * replications, generator)
    second_order = [_second_order(sign, 500 * replications, generator) for sign in (1, -1)]
    return Experiment(
        "risk",
        "What does each weight rule cost?",
        risk_figures(rows, counts, SHIFTS, SCALES),
        _findings(rows, huber, second_order),
        tuple(rows),
        {
            "seed": seed,
            "replications": replications,
            "channels": CHANNELS,
            "rules": RULES,
            "huber": huber,
            "second_order": second_order,
        },
    )


def _compare(seen: _Observed, truth: Tensor, n: int, setting: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Risks of every rule and of the oracle: the best fixed weight of each channel, found with the truth known.

    Args:
        seen: Differences from the source (replications, channels).
        truth: The true differences (channels,).
        n: Draws per sample.
        setting: What the rows share.
    """
    d, error = seen.difference, seen.difference - truth
    # (1 - l)^2 t^2 - 2 l (1 - l) t E e + l^2 E e^2, per channel
    bias, square = error.mean(0), error.square().mean(0)
    best = ((truth * truth + truth * bias) / (truth * truth + 2 * truth * bias + square)).nan_to_num(0).clamp(0, 1)
    risks = {"oracle": ((best * d - truth) ** 2).mean(-1)}
    for rule, weight in _WEIGHTS.items():
        risks[rule] = ((weight(seen, n) * d - truth) ** 2).mean(-1)
    size = d.shape[0]
    return [
        {
            **setting,
            "n": n,
            "rule": rule,
            "risk": values.mean().item(),
            "standard_error": (values.std() / size**0.5).item(),
        }
        for rule, values in risks.items()
    ]


def _location(s: Statistics, shift: Tensor, n: int) -> _Observed:
    return _Observed(s.mean + shift, s.variance / n)


def _scale(s: Statistics, shift: float | Tensor, n: int) -> _Observed:
    """Half-log variances; their sampling variance from the kurtosis that the channels share."""
    tiny = s.variance.clamp_min(1e-6)  # of Bernoulli data a sample may have none
    kurtosis = s.k4.mean(-1, keepdim=True) / tiny.square().mean(-1, keepdim=True)
    variance = (kurtosis / n + 2 / (n - 1)).clamp_min(0.5 / n) / 4
    return _Observed(tiny.log() / 2 + shift, variance.expand_as(tiny))


def _location_rows(law: Law, n: int, s: Statistics) -> list[dict[str, Any]]:
    rows = []
    for shift in SHIFTS:
        truth = shift * _PATTERN
        setting = {"law": law.name, "kind": "location", "shift": shift, "statistic": "location"}
        rows += _compare(_location(s, truth, n), truth, n, setting)
    return rows


def _scale_rows(law: Law, n: int, s: Statistics) -> list[dict[str, Any]]:
    rows = []
    for shift in SCALES:
        truth = torch.full((CHANNELS,), shift, dtype=torch.float64)
        setting = {"law": law.name, "kind": "scale", "shift": shift}
        rows += _compare(_scale(s, truth, n), truth, n, {**setting, "statistic": "scale"})
    return rows


def _skewness_rows(law: Law, n: int, replications: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """The target differs from the source in its skewness alone: every adaptation is a false alarm."""
    s = statistics(law, n, (replications, CHANNELS), generator)
    nothing = torch.zeros(CHANNELS, dtype=torch.float64)
    setting = {"law": law.name, "kind": "skewness", "shift": law.skewness}
    return _compare(_location(s, nothing, n), nothing, n, {**setting, "statistic": "location"}) + _compare(
        _scale(s, nothing, n), nothing, n, {**setting, "statistic": "scale"}
    )


def _outlier_rows(share: float, n: int, replications: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """A share of the target's draws is moved; the mean and scale wanted are those of the whole."""

    def draw(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
        moved = torch.rand(shape, generator=g) < share
        return NORMAL.draw(shape, g) + _MOVED * moved.double()

    s = statistics(Law("outliers", 0.0, 0.0, draw), n, (replications, CHANNELS), generator)
    mean = torch.full((CHANNELS,), _MOVED * share, dtype=torch.float64)
    scale = torch.full((CHANNELS,), 1 + _MOVED**2 * share * (1 - share), dtype=torch.float64).log() / 2
    setting = {"law": "normal", "kind": "contamination", "shift": share}
    return _compare(_Observed(s.mean, s.variance / n), mean, n, {**setting, "statistic": "location"}) + _compare(
        _scale(s, 0.0, n), scale, n, {**setting, "statistic": "scale"}
    )


def _huber(samples: int, generator: torch.Generator) -> dict[str, float]:
    """Claim 3: mean squared error of a Huber step from the median, and from the source, over that of the mean."""
    n = 16
    found = {}
    for law in (CONTAMINATED, NORMAL):
        x = law.draw((n, samples), generator)
        scale = (x - x.median(0).values).abs().median(0).values / 0.6745
        psi = Huber(1.345, scale)
        plain = x.mean(0).square().mean()
        starts: dict[str, Tensor | float] = {"median": x.median(0).values, "source": 0.5, "far source": 2.0}
        for name, start in starts.items():
            error = one_step(psi, x, start).nan_to_num(nan=2.0).square()
            found[f"{law.name} from the {name}"] = (error.mean() / plain).item()
    return found


def _second_order(sign: int, samples: int, generator: torch.Generator) -> dict[str, float]:
    """Claim 5: the plug-in rule's risk against the batch mean's, exponential data, n = 64, shift ±1."""
    n, shift = 64, float(sign)
    s = statistics(EXPONENTIAL, n, (samples,), generator)
    d = s.mean + shift
    gain = n * ((plug_in(d, s.variance / n) * d - shift).square() - s.mean.square())
    predicted = n * plug_in_risk(shift, 1.0, EXPONENTIAL.skewness, n).item() - 1
    normal = n * plug_in_risk(shift, 1.0, 0.0, n).item() - 1
    error = (gain.std() / samples**0.5).item()
    return {"shift": shift, "measured": gain.mean().item(), "standard_error": error, "formula": predicted,
            "without_skewness": normal}  # fmt: skip


def _findings(
    rows: list[Mapping[str, Any]], huber: Mapping[str, float], second_order: list[dict[str, float]]
) -> tuple[Finding, ...]:
    n = 16

    def excess(rule: str, law: str = "normal", statistic: str = "location") -> float:
        """Largest risk over that of the batch's statistic, over the shifts."""
        sizes = SHIFTS if statistic == "location" else SCALES
        return max(
            value(rows, law, statistic, size, n, rule) / value(rows, law, statistic, size, n, "batch") for size in sizes
        )

    def average(rule: str) -> float:
        ratios = [
            value(rows, law, "location", shift, n, rule) / value(rows, law, "location", shift, n, "batch")
            for law in LAWS
            for shift in SHIFTS
        ]
        return sum(ratios) / len(ratios)

    means = {rule: average(rule) for rule in ("oracle", "plug-in", "pooled", "shrink, SURE", "shrink, ML")}
    best = min((rule for rule in means if rule != "oracle"), key=lambda rule: means[rule])
    false_alarm = [
        value(rows, gamma(degrees).name, "skewness", gamma(degrees).skewness, n, "pooled") * n for degrees in (64, 2)
    ]
    with_shift, against = second_order
    measured = [row["measured"] for row in second_order]
    spread = {law: value(rows, law, "location", 1.0, n, "pooled") * n for law in LAWS}
    moved = max(abs(v - spread["normal"]) for v in spread.values())
    robust, normal = huber["contaminated from the median"], huber["normal from the median"]
    return (
        Finding(
            2,
            f"Weights of least mean squared error, n = {n}, all laws and shifts",
            "risk over the batch mean's, on average: "
            + ", ".join(f"{rule} {r:.2f}" for rule, r in means.items())
            + f"; at worst (normal): plug-in {excess('plug-in'):.2f}, pooled {excess('pooled'):.2f}",
            means["plug-in"] > 1.05 * means[best],
            f"{best} is the best that needs no truth; a channel alone "
            + ("does worse than the plain batch mean at worst" if excess("plug-in") > 1.05 else "is safe"),
        ),
        Finding(
            2,
            f"The same for other laws, shift of one standard deviation, n = {n}",
            "n times the pooled rule's risk: " + ", ".join(f"{law} {r:.2f}" for law, r in spread.items()),
            moved > 0.1,
            "changes nothing that matters: two moments decide" if moved <= 0.1 else f"differs by up to {moved:.2f}",
        ),
        Finding(
            5,
            f"Skewness alone shifts (same mean and variance), n = {n}",
            f"n times the pooled rule's risk: {false_alarm[0]:.2f} at skewness 0.35, {false_alarm[1]:.2f} at 2",
            abs(false_alarm[1] - false_alarm[0]) > 0.1,
            "changes nothing that matters"
            if abs(false_alarm[1] - false_alarm[0]) <= 0.1
            else "false alarms depend on it",
        ),
        Finding(
            5,
            "Plug-in risk to second order, exponential data, n = 64, shift one standard deviation",
            f"measured {measured[0]:+.1%} of the batch mean's with the shift, {measured[1]:+.1%} against it (±"
            f"{with_shift['standard_error']:.1%}); formula {with_shift['formula']:+.1%} and {against['formula']:+.1%}, "
            f"without skewness {with_shift['without_skewness']:+.1%}",
            max(map(abs, measured)) > 0.02,
            "differs by sign: skewness against the shift costs"
            if measured[1] - measured[0] > 0.02
            else "changes nothing that matters",
        ),
        Finding(
            3,
            f"One Huber step over the mean, mean squared error, n = {n}",
            f"contaminated data {robust:.2f}, normal {normal:.2f} from the median; contaminated "
            f"{huber['contaminated from the source']:.2f} from a source half a standard deviation off, "
            f"{huber['contaminated from the far source']:.2f} from two",
            robust < 0.9,
            "start from the median"
            if huber["contaminated from the far source"] > 1.1 * robust
            else "any start will do",
        ),
    )
