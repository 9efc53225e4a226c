"""What the live page is sent: parts of the page as HTML, and what its figures are drawn from, as one JSON value."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from normadapt.monitor.live import Look
from normadapt.monitor.log_words import happenings
from normadapt.monitor.page_data import page_data
from normadapt.monitor.report_page import domain_table, figures, layer_table, lead_of, log_table, words
from normadapt.monitor.words import findings, moment, who
from normadapt.reports.history import History
from normadapt.reports.report import Report
from normadapt.store import Snapshot

COLUMNS = 256
"""Of the figures, at most: a screen shows no more, and every one is sent again with every update."""

_NAMES = {"off": "off", "shadow": "shadow", "full": "full", "rolled_back": "rolled back"}


def live_view(look: Look, *, obeys: bool, extra: Mapping[str, Any]) -> bytes:
    """The JSON that the page shows.

    Args:
        look: What there is.
        obeys: Whether the page's buttons have somebody to ask.
        extra: More values, such as the version.
    """
    kept = look.kept
    report = _thinned(kept.report)
    status = kept.status
    values = {
        **extra,
        "title": report.model_name,
        "lead": lead_of(report),
        "note": look.note,
        "stream": report.stream,
        "streams": list(kept.streams),
        "saved": _saved(look.saved),
        "trial": "" if status is None else trial(status),
        "words": words(findings(report, status), None),
        "domains": domain_table(report.domains),
        "figures": figures(report, status),
        "layers": layer_table(report.sites),
        "log": "" if kept.events is None else log_table(happenings(kept.events), look.events),
        "actions": _actions(status, look, obeys),
        "data": page_data(report, status),
    }
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode()


def _thinned(report: Report) -> Report:
    history: History | None = report.history
    return report if history is None else report.with_history(history.thinned(COLUMNS))


def _saved(saved: float | None) -> str:
    """How old a state is that another process left, if it is worth a word."""
    if saved is None:
        return ""
    age = time.time() - saved
    return f"As the pilot saved it {duration(age)} ago." if age >= 0 else f"As the pilot saved it, {moment(saved)}."


def _actions(status: Mapping[str, Any] | None, look: Look, obeys: bool) -> dict[str, Any]:
    """What the buttons can ask for now."""
    if status is None or not obeys:
        return {"any": False}
    stage = str(status.get("stage"))
    missing = "" if stage in ("off", "rolled_back") else "; ".join(_reasons(status))
    return {
        "any": True,
        "paused": bool(status.get("paused")),
        "canPause": stage != "off",
        "promote": _promotion(status),
        "missing": missing,
        "snapshots": _choices(look.snapshots, look.head),
    }


def _promotion(status: Mapping[str, Any]) -> str:
    """Where a promotion leads, in words."""
    stage, step = str(status.get("stage")), int(status.get("step") or 0)
    shares = list(status.get("plan", {}).get("shares") or ())
    names = [*(f"canary {share:.0%}" for share in shares), "full"]
    match stage:
        case "off":
            return "shadow"
        case "canary":
            return names[min(step + 1, len(names) - 1)]
        case "full":
            return "full, and forget earlier roll backs"
        case _:
            return names[0]


def _choices(snapshots: Sequence[Snapshot], head: int | None) -> list[list[Any]]:
    """Snapshots to go back to, the newest first: number and words."""
    told = []
    for snapshot in reversed(snapshots):
        more = [snapshot.note, moment(snapshot.created)]
        if snapshot.number == head:
            more.append("in use")
        if not snapshot.good:
            more.append("not known to be good")
        told.append([snapshot.number, f"{snapshot.number}: {', '.join(more)}"])
    return told


# -- the trial ---------------------------------------------------------------------------------------------------------


def trial(status: Mapping[str, Any]) -> str:
    """Where the trial stands and what it lacks for the next stage, as HTML."""
    return "\n".join((_stages(status), _standing(status), _progress(status), _guards(status)))


def _stages(status: Mapping[str, Any]) -> str:
    stage, step = str(status.get("stage")), int(status.get("step") or 0)
    shares = list(status.get("plan", {}).get("shares") or ())
    names = ["shadow", *(f"canary {share:.0%}" for share in shares), "full"]
    place = {"shadow": 0, "canary": 1 + step, "full": len(names) - 1}.get(stage, -1)
    here = ' aria-current="step"'
    steps = "".join(
        f'<li class="{"done" if i < place else "here" if i == place else "ahead"}"{here * (i == place)}>'
        f"{escape(name)}</li>"
        for i, name in enumerate(names)
    )
    away = "" if place >= 0 else f'<li class="away {stage}" aria-current="step">{_NAMES.get(stage, escape(stage))}</li>'
    return f'<ol class="stages" aria-label="Stages of the trial">{away}{steps}</ol>'


def _standing(status: Mapping[str, Any]) -> str:
    """Who answers, and why it does not go on."""
    serving, share = str(status.get("serving", "source")), float(status.get("share") or 0.0)
    answered = status.get("answered", {})
    name = who(serving)
    told = (
        "The source answers everything" if serving == "source" else f"{name[:1].upper()}{name[1:]} answers {share:.0%}"
    )
    told += f"; {int(answered.get('items', 0)):,} items answered so far."
    told = f"{'<strong>Paused.</strong> ' if status.get('paused') else ''}{escape(told)}"
    outcome = str(status.get("verdict", {}).get("outcome"))
    kind = "fail" if outcome == "fail" else "pass" if outcome == "pass" else "open"
    return f'<p class="standing">{told}</p><p class="verdict {kind}">{escape(_verdict(status, outcome))}</p>'


def _verdict(status: Mapping[str, Any], outcome: str) -> str:
    reasons = "; ".join(_reasons(status))
    if outcome == "fail":
        end = "it waits for an operator" if status.get("waits_for_operator") else "it begins again after its cool-down"
        return f"Taken back: {reasons}; {end}."
    if outcome == "pass":
        return "Full, and quiet." if status.get("stage") == "full" else "Complete: the next stage may begin."
    return f"Not yet: {reasons}." if reasons else "Not yet."


def _reasons(status: Mapping[str, Any]) -> list[str]:
    return [str(reason) for reason in status.get("verdict", {}).get("reasons", ())]


def _progress(status: Mapping[str, Any]) -> str:
    """Items, time and labels of the stage, against what it asks for."""
    stage = str(status.get("stage"))
    if stage == "off":
        return ""
    bars = []
    cooling = stage == "rolled_back"
    if not cooling:
        items, needed = int(status.get("items") or 0), int(status.get("items_needed") or 0)
        bars.append(_bar("items", f"{items:,} of {needed:,}", items, needed))
    if not (cooling and status.get("waits_for_operator")):
        seconds, needed_seconds = float(status.get("seconds") or 0), float(status.get("seconds_needed") or 0)
        text = f"{duration(seconds)} of {duration(needed_seconds)}"
        bars.append(_bar("cool-down" if cooling else "time under traffic", text, seconds, needed_seconds))
    labels = status.get("labels", {})
    if not cooling and labels.get("needed") and stage != "full":
        count, wanted = int(labels.get("of_this_stage") or 0), int(labels["needed"])
        bars.append(_bar("labels", f"{count:,} of {wanted:,}", count, wanted))
        evidence, goal = float(labels.get("evidence") or 0.0), float(labels.get("evidence_needed") or 0.0)
        bars.append(_bar("evidence of labels", f"{evidence:.1f} of {goal:.1f}", evidence, goal))
    return f'<div class="bars">{"".join(bars)}</div>' if bars else ""


def _bar(name: str, text: str, value: float, most: float) -> str:
    share = min(max(value / most, 0.0), 1.0) if most > 0 else 1.0
    full = ' class="full"' if share >= 1 else ""
    return (
        f"<label{full}><span>{escape(name)}</span><b>{escape(text)}</b>"
        f'<progress max="1" value="{share:.4f}">{share:.0%}</progress></label>'
    )


def _guards(status: Mapping[str, Any]) -> str:
    """How near each guard is to taking the trial back."""
    rows = []
    tripped = str(status.get("failure") or "").partition(":")[0]
    for name, told in status.get("guards", {}).items():
        if told.get("hard"):
            state, meter = "trips on the first sign", ""
        elif told.get("blind"):
            state, meter = "blind: the shadow stage never showed what is normal", ""
        else:
            value, threshold = float(told.get("log_value") or 0.0), float(told.get("threshold") or 1.0)
            share = min(max(value / threshold, 0.0), 1.0)
            learning = told.get("normal") is None
            state = f"{told.get('learned', 0):,} items learned" if learning else f"{value:+.1f} of {threshold:.1f}"
            meter = "" if learning else _meter(name, share, value, threshold)
        trips = name == tripped
        loud = ' class="bad"' if trips else ""
        cell = f"<td>{meter}</td><td>" if meter else '<td colspan="2">'
        rows.append(
            f'<tr{loud}><th scope="row">{escape(str(name).replace("_", " "))}</th>'
            f"{cell}{escape(state)}{' – took it back' if trips else ''}</td></tr>"
        )
    if not rows:
        return ""
    return (
        '<details class="guards" open><summary>Guards: evidence of harm, as log e-values</summary><table><tbody>'
        f"{''.join(rows)}</tbody></table></details>"
    )


def _meter(name: str, share: float, value: float, threshold: float) -> str:
    label = f"{name}: {value:.1f} of {threshold:.1f}"
    return (
        f'<meter min="0" max="1" low="0.5" high="0.8" optimum="0" value="{share:.4f}" '
        f'aria-label="{escape(label)}">{share:.0%}</meter>'
    )


def duration(seconds: float) -> str:
    """A length of time for people.

    Example:
        >>> duration(4), duration(200), duration(7260)
        ('4 s', '3 min', '2 h 1 min')
    """
    whole = round(max(seconds, 0.0))
    if whole < 120:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 120:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {rest} min" if rest else f"{hours} h"
