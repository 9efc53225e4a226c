"""The report as one HTML page that needs nothing else: words first, then figures, then the audit log."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import import_module
from importlib.resources import files
from typing import Any

from normadapt.errors import ExtraMissingError
from normadapt.monitor.log_words import Happening, happenings, in_words
from normadapt.monitor.page_data import page_data
from normadapt.monitor.words import Finding, findings, moment, who
from normadapt.page_style import document
from normadapt.reports.domain_report import DomainReport
from normadapt.reports.report import Report, SiteReport, format_probability, format_shift, format_weight
from normadapt.version import __version__

_LOG_ROWS = 500


def page(
    report: Report,
    *,
    title: str | None = None,
    lead: str | None = None,
    status: Mapping[str, Any] | None = None,
    events: Sequence[Any] | None = None,
) -> str:
    """The whole page. Without scripts it still has the words, the layers and the audit log.

    Args:
        report: What is shown.
        title: What stands at the top.
        lead: A sentence under it: what was run.
        status: What `Pilot.status()` gave.
        events: What `Store.history()` gave, oldest first, or the same as plain dicts.

    Raises:
        ExtraMissingError: If Plotly is not installed.
    """
    library = plotly_script()
    # `<` cannot end the script element early when it is written as an escape.
    data = json.dumps(page_data(report, status), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    log = happenings(events or ())
    name = title or f"{report.model_name}: what adapting did"
    main = "\n".join(
        (
            f'<h1>{escape(name)}</h1>\n<p class="lead">{escape(lead or lead_of(report))}</p>',
            words(findings(report, status), status),
            domain_table(report.domains),
            figures(report, status),
            layer_table(report.sites),
            "" if events is None else log_table(log),
            _FOOT.format(policy=escape(report.policy), version=escape(__version__)),
        )
    )
    scripts = (
        f"<script>{library}</script>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{asset("figures.js")}</script>\n'
    )
    return document(name, asset("page.css"), main, scripts)


def plotly_script() -> str:
    """Plotly as it comes with its wheel.

    Raises:
        ExtraMissingError: If it is not installed.
    """
    try:
        import_module("plotly")
        return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    except (ImportError, OSError) as error:
        raise ExtraMissingError("the report page needs Plotly -> pip install 'normadapt[report]'") from error


def asset(name: str) -> str:
    """A file of the pages, by name: "page.css" or "figures.js"."""
    return files("normadapt.monitor").joinpath(name).read_text(encoding="utf-8")


def lead_of(report: Report) -> str:
    """Policy, profile, stream and length, in a sentence."""
    profile = "with a source profile" if report.profiled else "without a source profile"
    count = "" if report.history is None else f"; {report.history.items.sum():,.0f} instances seen"
    return f"Policy {report.policy.partition('(')[0]}, {profile}; stream “{report.stream}”{count}."


def words(found: Finding, status: Mapping[str, Any] | None) -> str:
    """The headline and what follows from it, as HTML."""
    told = [f"<p>{escape(sentence)}</p>" for sentence in found.sentences]
    if status is not None:
        told.insert(0, f"<p>{escape(_standing(status))}</p>")
    kind = {True: "shifted", False: "calm", None: "unknown"}[found.shifted]
    return f'<section class="words {kind}"><p class="headline">{escape(found.headline)}</p>\n{"".join(told)}</section>'


def _standing(status: Mapping[str, Any]) -> str:
    """Where a trial stands, in a sentence or two."""
    stage, share = str(status.get("stage", "?")).replace("_", " "), float(status.get("share") or 0.0)
    serving = str(status.get("serving", "source"))
    answers = "the source answers everything"
    if serving != "source":
        answers = f"{who(serving)} answers {share:.0%} of the items"
    told = f"The trial is {'paused in ' if status.get('paused') else 'at '}“{stage}”: {answers}."
    if status.get("failure"):
        told += f" It was taken back: {status['failure']}."
    if status.get("waits_for_operator"):
        told += " It waits for an operator."
    return told


def figures(report: Report, status: Mapping[str, Any] | None) -> str:
    """Places for the figures that `figures.js` draws, as HTML."""
    if not report.sites:
        return ""
    weights = """<h2 id="weights-title">Where each layer takes its statistics from</h2>
<p class="note">0: the source’s, 1: the stream’s. Bars are 95 % intervals, where they are known.</p>
<div class="figure" id="weights" role="img" aria-labelledby="weights-title"></div>"""
    history = report.history
    if history is None or not len(history):
        return weights
    answers = "Thin: as it was; thick: smoothed. Darker: more of the answers."
    if history.agreement is None:
        answers += " Nobody compared them with the source’s: Recorder.compare, or a pilot, does."
    return f"""<h2 id="map-title">Where and when the stream is shifted</h2>
<div class="controls"><span class="field" id="measure-name">show</span><span class="choice" role="group"
aria-labelledby="measure-name"><button type="button" data-measure="shift" aria-pressed="true">shift</button><button
type="button" data-measure="tail" aria-pressed="false">probability by chance</button></span>
<span class="hint">A click on a row opens that layer.</span></div>
<div class="figure" id="map" role="img" aria-labelledby="map-title"></div>
<p class="note" id="map-note"></p>
<h2 id="layer-title">One layer</h2>
<div class="controls"><label>layer <select id="layer"></select></label>
<label>channel <select id="channel"></select></label></div>
<div class="pair"><figure><h3>Before: under the source’s statistics</h3>
<div class="figure" id="before" role="img" aria-label="Distributions under the source's statistics"></div></figure>
<figure><h3>After: under the statistics in use</h3>
<div class="figure" id="after" role="img" aria-label="Distributions under the statistics in use"></div></figure></div>
<p class="note" id="channel-note"></p>
<h3 id="trace-title">Its weights and shift over time</h3>
<div class="figure" id="trace" role="img" aria-labelledby="trace-title"></div>
<h2 id="answers-title">The answers over time</h2>
<p class="note">{answers}</p>
<div class="figure" id="answers" role="img" aria-labelledby="answers-title"></div>
{weights}"""


def domain_table(domains: Sequence[DomainReport]) -> str:
    """What the stream has met, the present domain marked, as HTML; nothing where the policy knows no domains."""
    if not domains:
        return ""
    head = "".join(
        f"<th>{name}</th>" for name in ("domain", "its inputs", "seen", "first at", "last at", "shift, sd", "shifted")
    )
    rows = "\n".join(map(_domain_row, domains))
    return (
        '<h2 id="domains-title">The domains that the stream has met</h2>\n'
        '<div class="scroll domains" role="region" aria-labelledby="domains-title" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )


def _domain_row(domain: DomainReport) -> str:
    start, now = ('<tr class="here">', " <b>now</b>") if domain.is_present else ("<tr>", "")
    numbers = (f"{domain.seen:,}", f"{domain.since:,}", f"{domain.last:,}", f"{domain.shift:.2f}", domain.surety)
    cells = (escape(domain.name) + now, escape(domain.words), *numbers)
    return start + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def layer_table(sites: Sequence[SiteReport]) -> str:
    """All layers as a table, folded, as HTML."""
    if not sites:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("layer", "shift", "by chance", "w(mean)", "w(variance)", "status"))
    rows = "\n".join(
        f"<tr><td>{escape(site.name)}</td><td>{format_shift(site.shift, site.shift_interval)}</td>"
        f"<td>{format_probability(site.tail_probability)}</td>"
        f"<td>{format_weight(site.mean_weight, site.mean_weight_interval)}</td>"
        f"<td>{format_weight(site.variance_weight, site.variance_weight_interval)}</td>"
        f"<td>{escape(site.status)}</td></tr>"
        for site in sites
    )
    return (
        "<details><summary>The layers as a table</summary>"
        '<div class="scroll" role="region" aria-label="Layers" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div></details>"
    )


def log_table(log: Sequence[Happening], total: int | None = None, most: int = _LOG_ROWS) -> str:
    """The audit log, the newest first, as HTML.

    Args:
        log: Events, oldest first; the newest of them are enough.
        total: How many there are in all, if `log` is not all of them.
        most: Rows to show.
    """
    shown = list(reversed(log))[:most]
    total = len(log) if total is None else total
    rows = "\n".join(
        f'<tr class="{escape(kind_class(event.kind))}"><td>{escape(moment(event.time, seconds=True))}</td>'
        f"<td>{escape(event.kind)}</td><td>{escape(in_words(event))}</td></tr>"
        for event in shown
    )
    count = (
        f"{total:,} event{'s' * (total != 1)}, the newest first"
        if len(shown) == total
        else (f"the newest {len(shown):,} of {total:,} events; all of them: normadapt history")
    )
    return (
        f'<h2 id="log">Audit log</h2>\n<p class="note">{count}.</p>\n'
        '<div class="scroll log" role="region" aria-labelledby="log" tabindex="0"><table>'
        "<thead><tr><th>time</th><th>what</th><th>particulars</th></tr></thead>"
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def kind_class(kind: str) -> str:
    """The style of an event's row."""
    return "bad" if kind in ("trip", "rollback", "rolled back") else "move" if kind == "transition" else "plain"


_FOOT = """<p class="note foot">Shift: how far a layer’s statistics have left the source’s, location and scale
together, in standard deviations (sd) of its output: root mean square over channels, sampling noise subtracted.
Probability by chance: of at least that shift if there were none. Policy: {policy}. normadapt {version}.</p>"""
