"""The results as one HTML file that needs nothing else: heat maps, curves over time, and all averages."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files

from normadapt.bench.about import About
from normadapt.bench.bootstrap import Interval
from normadapt.bench.files import page_data
from normadapt.bench.results import Results
from normadapt.bench.summary import Summary, summarize
from normadapt.bench.targets import Target, reservation, targets
from normadapt.page_style import document


def page(results: Results, about: About) -> str:
    """The whole page. Without scripts it still shows the targets and the averages of every suite."""
    here = files("normadapt.bench")
    css, script = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # `<` cannot end the script element early when it is written as an escape.
    data = json.dumps(page_data(results), separators=(",", ":")).replace("<", "\\u003c")
    averages = "\n".join(_averages(results, scope) for scope in results.scopes)
    main = f"""<h1>Every rule on every stream</h1>
<p class="lead">{_lead(results, about)}</p>
<p class="note"><code>{escape(about.command)}</code></p>
<div class="controls"><label>suite <select id="scope"></select></label>
<span class="field">batch size <span class="choice" id="n"></span></span>
<span class="field">show <span class="choice" id="measure"></span></span></div>
<h2 id="maps">Methods and streams</h2>
<div class="scroll" id="heat" tabindex="0"></div>
<p class="note">Points of accuracy, mean over the suite&#39;s tasks; blue above, orange below; the best rule of each
stream underlined. The limit has each domain&#39;s true statistics, the ceiling those of what was seen so far. Point at
a cell for its accuracy.</p>
<h2 id="time">Accuracy over time</h2>
<div class="controls"><label>task <select id="task"></select></label>
<label>stream <select id="stream"></select></label><span class="choice" id="size"></span></div>
<div class="chips" id="chips"></div>
<div id="curve"></div>
<h2 id="averages">Averages</h2>
{averages}
<p class="note">regret: points behind the best rule of a cell, on average and at worst. gain: share of the way from
Source to the limit, and to the ceiling. clean: points lost on clean data, at the worst batch size. cost: processor time
of a batch relative to the plain model. recovery: batches after a jump until 0.9 of the limit&#39;s accuracy. Intervals
are 95 %.</p>
<h2 id="targets">The targets</h2>
<p class="note">{escape(reservation(results))}</p>
<div class="scroll targets">{_targets(targets(results))}</div>"""
    scripts = f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n'
    return document("normadapt bench", css, main, scripts)


def _lead(results: Results, about: About) -> str:
    plan = results.plan
    versions = ", ".join(f"{name} {version}" for name, version in about.versions.items())
    kind = "The development split: not to be reported. " if plan.split == "dev" else ""
    answers = sum(len(cell.bits) for cells in results.cells.values() for cell in cells.values())
    return escape(
        f"{kind}{len(results.methods)} methods, {len(results.tasks)} tasks, {answers:,} answers. {about.date}, split "
        f"{plan.split}, seed {plan.seed}, scale {plan.scale:g}. {versions}. {about.machine}; {about.seconds:,.0f} s."
    )


def _averages(results: Results, scope: str) -> str:
    sizes = results.plan.batch_sizes
    headings = [
        "method",
        "average",
        "against ours",
        *(f"n={n}" for n in sizes),
        "regret",
        "worst",
        "gain",
        "of ceiling",
        "clean",
    ]
    headings += [f"cost n={n}" for n in sizes] + [f"recovery n={n}" for n in sizes]
    rows = "\n".join(_row(results, summary) for summary in summarize(results, scope))
    head = "".join(f"<th>{escape(name)}</th>" for name in headings)
    name = f"{scope} (negative control)" if scope in results.negative else scope
    return (
        f'<div data-scope="{escape(scope)}"><h3>{escape(name)}</h3><div class="scroll" tabindex="0"><table><thead><tr>'
        f"{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div></div>"
    )


def _row(results: Results, summary: Summary) -> str:
    sizes = results.plan.batch_sizes
    first = f'<td title="{escape(summary.method)}">{escape(summary.method)}</td>'
    role = results.methods[summary.method].role
    if summary.accuracy is None:
        return f'<tr class="{role}">{first}<td class="no">failed ({summary.failed})</td></tr>'
    place = summary.worst_place
    where = "" if place is None else f' title="{escape(place.task)} {escape(place.stream)}, n = {place.n}"'
    cells = [
        f"<td>{100 * summary.accuracy:.2f}</td>",
        f"<td>{_interval(summary.against_ours)}</td>",
        *(f"<td>{_percent(summary.by_size, n)}</td>" for n in sizes),
        f"<td>{_points(summary.regret)}</td>",
        f"<td{where}>{_points(summary.worst)}</td>",
        f"<td>{_share(summary.share)}</td>",
        f"<td>{_share(summary.ceiling_share)}</td>",
        f"<td>{_points(max(summary.clean_loss.values(), default=None))}</td>",
        *(f"<td>{summary.cost[n]:.2f}×</td>" if n in summary.cost else "<td>–</td>" for n in sizes),
        *(f"<td>{_batches(summary.recovery.get(n))}</td>" for n in sizes),
    ]
    return f'<tr class="{role}">{first}{"".join(cells)}</tr>'


def _percent(values: Mapping[int, float], n: int) -> str:
    return f"{100 * values[n]:.1f}" if n in values else "–"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %".replace("-", "−")


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}".replace("-0.0", "0.0").replace("-", "−")


def _interval(found: Interval | None) -> str:
    if found is None:
        return ""
    return f"{100 * found.value:+.2f} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]".replace("-", "−")


def _batches(value: float | None) -> str:
    return "–" if value is None else "never" if math.isinf(value) else f"{value:.0f}"


def _targets(found: Iterable[Target]) -> str:
    verdicts = {True: ("yes", "reached"), False: ("no", "missed"), None: ("unknown", "not run")}
    rows = "\n".join(
        f'<tr><td>{escape(t.name)}, {escape(t.setting)}</td><td data-name="Wanted">{escape(t.wanted)}</td>'
        f'<td data-name="Measured">{escape(re.sub("^-", "−", t.measured))}</td>'
        f'<td class="{verdicts[t.reached][0]}">{verdicts[t.reached][1]}</td></tr>'
        for t in found
    )
    head = "".join(f"<th>{name}</th>" for name in ("target", "wanted", "measured (points)", "verdict"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"
