"""A history in words: is the stream shifted, since when, where, and what did adapting do to the answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from normadapt.adapted.streams import PER_INSTANCE
from normadapt.reports.history import History, Numbers
from normadapt.reports.report import Report

Flags: TypeAlias = npt.NDArray[np.bool_]

ALARM = 1e-3
"""A layer counts as shifted when a shift like its own had at most this probability, over all layers, without one."""

_FELT = 0.1  # standard deviations of the output; a smaller shift can be sure, and not matter
_CALM = 3  # columns without a shift that end it
_SIZES = ((0.1, "hardly"), (0.3, "slightly"), (1.0, "clearly"), (math.inf, "strongly"))


class Finding(NamedTuple):
    """What is said about a stream.

    Args:
        headline: One sentence.
        sentences: More, each on its own.
        shifted: Whether the stream is shifted now; None where nothing can be said.
        layers: Numbers of the layers that are shifted now, the most shifted first.
        began: Column in which it began; None where it is not shifted.
    """

    headline: str
    sentences: tuple[str, ...]
    shifted: bool | None
    layers: tuple[int, ...]
    began: int | None


def who(serving: str) -> str:
    """Who answers, from `Pilot.serving`."""
    return {"source": "the source", "adapted": "the adapted model"}.get(serving, serving)


def uses_time(history: History, status: Mapping[str, Any] | None) -> bool:
    """Whether the abscissa is the time, as for a trial; else it is the number of instances seen."""
    return status is not None and len(history) > 1 and bool(history.times[-1] > history.times[0])


def findings(report: Report, status: Mapping[str, Any] | None = None) -> Finding:
    """What a report says, in words.

    Args:
        report: With a history, or without.
        status: What `Pilot.status()` gave.
    """
    history = report.history
    if history is None or not len(history):
        return _without_history(report)
    flags = _flags(history)
    now = np.flatnonzero(flags[:, -1])
    now = now[np.argsort(-np.nan_to_num(history.shift[now, -1]), kind="stable")]
    any_layer = np.asarray(flags.any(0))
    began = _began(any_layer) if now.size else None
    time = uses_time(history, status)
    if began is not None:
        worst = int(now[0])
        headline = (
            f"The stream is {_size(history.shift[worst, -1])} shifted from the source, {_since(history, began, time)}."
        )
        first = _where(history, now)
    elif any_layer.any():
        last = int(np.flatnonzero(any_layer)[-1])
        until = _moment(history, min(last + 1, len(history) - 1), time)
        headline = f"The stream is not shifted now; it was until {until}."
        worst = int(np.nanargmax(np.nanmax(np.nan_to_num(history.shift), 1)))
        first = f"The largest shift was in layer {history.sites[worst]}: {np.nanmax(history.shift[worst]):.2f} sd."
    else:
        headline = "The stream is not shifted from the source."
        largest = float(np.nan_to_num(history.shift).max(initial=0.0))
        first = f"No layer left the source's statistics by more than chance and {_FELT:g} sd ({largest:.2f} at most)."
    sentences = [first, *_domains(report)]
    sentences.append(_weights(report, history))
    sentences.extend(_answers(history))
    backs = sum(mark.kind == "rollback" for mark in history.marks)
    if backs:
        sentences.append(f"The trial was rolled back {'once' if backs == 1 else f'{backs} times'} in this history.")
    sentences.extend(report.notes)
    return Finding(headline, tuple(s for s in sentences if s), began is not None, tuple(now.tolist()), began)


def _without_history(report: Report) -> Finding:
    if not report.sites:
        return Finding("No history was kept of this trial.", (_HOW,), None, (), None)
    if not any(site.count for site in report.sites):
        return Finding("Nothing was adapted yet.", report.notes, None, (), None)
    order = sorted(range(len(report.sites)), key=lambda place: -report.sites[place].shift)
    limit = ALARM / len(order)
    shifted = [
        place
        for place in order
        if report.sites[place].shift > _FELT and _below(report.sites[place].tail_probability, limit)
    ]
    first = report.sites[order[0]]
    if shifted:
        headline = f"The stream is {_size(first.shift)} shifted from the source."
    else:
        headline = "The stream is not shifted from the source."
    where = f"Largest in layer {first.name}: {first.shift:.2f} sd; {len(shifted)} of {len(order)} layers are shifted."
    return Finding(headline, (where, *_domains(report), *report.notes, _HOW), bool(shifted), tuple(shifted), None)


def _domains(report: Report) -> list[str]:
    """Which domain the stream is in, and whether several share its batches."""
    present = next((domain for domain in report.domains if domain.is_present), None)
    if present is None:
        return []
    met = sum(domain.seen > 0 or domain.is_present for domain in report.domains)
    among = f", one of {met} domains that it has met" if met > 1 else ""
    looks = "the source’s domain" if present.is_source else f"“{present.name}” ({present.words})"
    told = [f"Its inputs are now of {looks}{among}."]
    if any(site.status.endswith(PER_INSTANCE) for site in report.sites):
        told.append("The last batch held several domains; each instance was answered with its own domain’s statistics.")
    return told


_HOW = "How it came to this was not recorded: Recorder(adapted) keeps a history."


def _below(probability: float | None, limit: float) -> bool:
    return probability is None or probability < limit


def _flags(history: History) -> Flags:
    """Which layers were shifted in which columns (L, T)."""
    limit = math.log10(ALARM / max(len(history.sites), 1))
    with np.errstate(invalid="ignore"):
        return np.asarray((history.shift > _FELT) & ((history.tail < limit) | np.isnan(history.tail)))


def _began(shifted: Flags) -> int:
    """The column in which the present shift began: shifted ever since, but for a few columns."""
    began, calm = len(shifted) - 1, 0
    for place in range(len(shifted) - 1, -1, -1):
        calm = 0 if shifted[place] else calm + 1
        if calm >= _CALM:
            break
        if shifted[place]:
            began = place
    return began


def _size(shift: float) -> str:
    return next(word for limit, word in _SIZES if shift < limit or limit == math.inf)


def moment(time: float, *, seconds: bool = False) -> str:
    """A time for people."""
    clock = "%H:%M:%S" if seconds else "%H:%M"
    return datetime.fromtimestamp(time, UTC).strftime(f"%d %b %Y, {clock} UTC").lstrip("0")


def _moment(history: History, column: int, time: bool) -> str:
    return moment(history.times[column]) if time else f"instance {history.seen[column]:,.0f}"


def _since(history: History, column: int, time: bool) -> str:
    if column == 0:
        return "from the first batch on"
    soon = ", almost from the start" if column <= 0.03 * len(history) else ""
    return f"since {_moment(history, column, time)}{soon}"


def _where(history: History, now: Any) -> str:
    worst, count = int(now[0]), len(history.sites)
    size = f"layer {history.sites[worst]} is shifted most, by {history.shift[worst, -1]:.2f} sd of its output"
    if len(now) == count:
        if count == 1:
            return f"{size[:1].upper()}{size[1:]}."
        return f"{'Both' if count == 2 else f'All {count}'} layers are shifted; {size}."
    return f"{len(now)} of {count} layers {'is' if len(now) == 1 else 'are'} shifted; {size}."


def _weights(report: Report, history: History) -> str:
    told = [weight for site in report.sites for weight in (site.mean_weight, site.variance_weight)]
    weights = np.array([float("nan") if weight is None else weight for weight in told])
    if not np.isfinite(weights).any():  # else what the layers use now, which a roll back may have changed since
        weights = np.concatenate((history.mean_weight[:, -1], history.variance_weight[:, -1]))
    if not np.isfinite(weights).any():
        return ""
    average = float(np.nanmean(weights))
    return f"To answer, the layers now go {average:.0%} of the way from the source’s statistics to the stream’s."


def _answers(history: History) -> list[str]:
    told = []
    recent = slice(-max(1, len(history) // 4), None)
    weight = history.items[recent]
    if history.agreement is not None and np.isfinite(history.agreement).any():
        whole = 1 - _mean(history.agreement, history.items)
        late = 1 - _mean(history.agreement[recent], weight)
        sentence = f"Adapting changed {whole:.1%} of the answers"
        told.append(f"{sentence}, {late:.1%} in the last quarter." if math.isfinite(late) else f"{sentence}.")
    first = slice(None, max(1, len(history) // 4))
    if np.isfinite(history.entropy).any() and len(history) > 3:
        before, after = _mean(history.entropy[first], history.items[first]), _mean(history.entropy[recent], weight)
        if math.isfinite(before) and math.isfinite(after):
            rose = "rose" if after > 1.1 * before else "fell" if after < 0.9 * before else "stayed"
            change = f"stayed near {after:.2f}" if rose == "stayed" else f"{rose} from {before:.2f} to {after:.2f}"
            told.append(f"Their entropy {change} nats (first and last quarter).")
    return told


def _mean(values: Numbers, weights: Numbers) -> float:
    known = np.isfinite(values)
    total = float(weights[known].sum())
    return float((values[known] * weights[known]).sum()) / total if total > 0 else float("nan")
