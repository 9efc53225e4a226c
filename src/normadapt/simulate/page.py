"""The page of all figures: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from normadapt.page_style import document
from normadapt.simulate.charts import chart
from normadapt.simulate.results import Experiment, Figure, Finding

_STYLE = """
nav a{color:var(--c0);margin-right:1em;white-space:nowrap}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}
figure{margin:0;padding:14px;background:var(--card);border-radius:8px;min-width:0}
figcaption{font-size:.92rem;margin-top:.6em}
figure>svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:13px}
svg text.label{fill:var(--fg)}
path{fill:none}
.grid{stroke:var(--grid)}.axis{stroke:var(--axis)}
.ref{stroke:var(--fg);stroke-width:1.6;opacity:.75}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:.4em 0 0;padding:0;font-size:.86rem}
.key{width:26px;height:8px;margin-right:6px;vertical-align:middle}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;vertical-align:top;padding:8px 10px;border-bottom:1px solid var(--grid)}
th{color:var(--soft);font-weight:600}
.yes{color:var(--c2);font-weight:600}.no{color:var(--soft);font-weight:600}
@media (max-width:700px){
thead{display:none}table,tbody,tr,td{display:block}
tr{padding:10px 0;border-bottom:1px solid var(--grid)}td{border:0;padding:2px 0}
td[data-name]::before{content:attr(data-name) ": ";color:var(--soft)}
svg text{font-size:17px}
}
"""
_LINES = "".join(f"path.c{i}{{stroke:var(--c{i});stroke-width:2}}circle.c{i}{{fill:var(--c{i})}}" for i in range(8))


def page(experiments: Sequence[Experiment], version: str) -> str:
    """The whole page: the table of claims, then every experiment with its figures.

    Args:
        experiments: What was run.
        version: Of the library.
    """
    findings = sorted((f for e in experiments for f in e.findings), key=lambda f: f.claim)
    links = " ".join(f'<a href="#{e.name}">{escape(e.name)}</a>' for e in experiments)
    body = "\n".join(_section(e) for e in experiments)
    main = f"""<h1>What higher-order asymptotics bring to test-time normalization</h1>
<p class="lead">Statistic-level experiments of normadapt {escape(version)}. Every sentence with a number is written from
the numbers of this run; all of them are in simulate.json beside this page.</p>
<nav><a href="#claims">claims</a> {links}</nav>
<h2 id="claims">The claims, and what was measured</h2>
{_table(findings)}
{body}"""
    return document("normadapt simulate", _STYLE + _LINES, main)


def _section(experiment: Experiment) -> str:
    figures = "\n".join(_figure(figure) for figure in experiment.figures)
    return f"""<section>
<h2 id="{experiment.name}">{escape(experiment.title)}</h2>
<div class="figures">
{figures}
</div>
</section>"""


def _figure(figure: Figure) -> str:
    text = f"<figcaption>{escape(figure.text)}</figcaption>"
    return f"<figure><h3>{escape(figure.title)}</h3>\n{chart(figure)}\n{text}</figure>"


def _table(findings: Sequence[Finding]) -> str:
    rows = "\n".join(
        f'<tr><td data-name="Claim">{f.claim}</td><td>{escape(f.question)}</td><td>{escape(f.measured)}</td>'
        f'<td data-name="Matters"><span class="{"yes" if f.matters else "no"}">{"yes" if f.matters else "no"}</span>: '
        f"{escape(f.verdict)}</td></tr>"
        for f in findings
    )
    head = "".join(f"<th>{name}</th>" for name in ("Claim", "Question", "Measured", "Does it matter?"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>"
