"""What the command line prints: results as tables and sentences. Nothing here computes a result."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from normadapt.demo import ALL_IN_TURN, CONDITIONS, METHODS, OURS, REPORT_BATCH_SIZE, SOURCE, DemoResult, Row
from normadapt.reports.report import Report, SiteReport, format_probability
from normadapt.simulate import Finding

_CHANCE = 2.0  # standard errors below which a difference is not called one


def demo_lead(result: DemoResult) -> str:
    """What the demo's page is about, with what the answers were worth."""
    report = result.report
    row = next(r for r in result.rows if (r.stream, r.batch_size) == (ALL_IN_TURN, REPORT_BATCH_SIZE))
    return (
        f"{report.model_name}, trained on USPS digits, answers {row.images:,} MNIST digits in batches of "
        f"{row.batch_size}, under {len(CONDITIONS)} conditions in turn: {row.accuracy[OURS]:.1%} right, "
        f"{row.accuracy[SOURCE]:.1%} without adapting."
    )


def report_table(report: Report) -> Group:
    """The domains and the layers of an adapted model, one a line; fits 80 columns where all are of one kind."""
    kinds = {site.kind for site in report.sites}
    knowledge = "with" if report.profiled else "without"
    head = f"{report.model_name} under {report.policy}, {knowledge} a source profile; stream {report.stream!r}"
    head += f"; all layers {kinds.copy().pop()}" if len(kinds) == 1 else ""
    table = _table()
    table.add_column("layer", overflow="fold")
    if len(kinds) > 1:
        table.add_column("kind", overflow="fold")
    for heading in ("ch", "seen", "eff. n", "shift", "tail p", "w(mean)", "w(var)"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("status", min_width=len("tracking"))
    for site in report.sites:
        kind = [site.kind] if len(kinds) > 1 else []
        table.add_row(site.name, *kind, *_site_cells(site))
    notes = [Text(note, style="yellow") for note in report.notes]
    return Group(Text(head, style="dim"), Text(), *_domains(report), *notes, *([Text()] if notes else []), table)


def _domains(report: Report) -> list[Table | Text]:
    """What the stream has met, the present one marked; nothing where the policy knows no domains."""
    if not report.domains:
        return []
    table = _table()
    table.add_column("", no_wrap=True)
    table.add_column("domain", overflow="fold")
    table.add_column("its inputs", overflow="fold")
    for heading in ("seen", "shift"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("shifted", no_wrap=True)
    for domain in report.domains:
        cells = (domain.name, domain.words, f"{domain.seen:,}", f"{domain.shift:.2f}", domain.surety)
        table.add_row("->" if domain.is_present else "", *cells, style="bold" if domain.is_present else "")
    return [table, Text()]


def _site_cells(site: SiteReport) -> list[str | Text]:
    status = f"{site.status} ({site.excluded:,} left out)" if site.excluded else site.status
    style = "green" if status.startswith("tracking") else "dim" if status == "source" else "yellow"
    return [
        str(site.channels),
        str(site.count),
        _number(site.effective_count, ".1f"),
        f"{site.shift:.3f}",
        format_probability(site.tail_probability),
        _number(site.mean_weight, ".2f"),
        _number(site.variance_weight, ".2f"),
        Text(status, style=style),
    ]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")


def claims_table(findings: Iterable[Finding]) -> Table:
    """For each claim of the paper what was asked, measured, and whether higher orders matter there."""
    table = _table()
    table.add_column("claim", justify="right")
    for heading in ("asked", "measured"):
        table.add_column(heading, ratio=1)
    table.add_column("higher order", min_width=12)
    for finding in findings:
        verdict = Text.assemble(
            ("matters" if finding.matters else "no matter", "green" if finding.matters else "yellow"),
            f": {finding.verdict}",
        )
        table.add_row(str(finding.claim), finding.question, finding.measured, verdict)
        table.add_section()
    return table


def demo_table(result: DemoResult) -> Table:
    """Accuracy in per cent: streams and batch sizes down, methods across, the best of each row in bold."""
    table = _table()
    table.add_column("stream", no_wrap=True)
    table.add_column("batch", justify="right")
    for method in METHODS:
        table.add_column(method, justify="right", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    before = None
    for row in result.rows:
        if before not in (None, row.stream):
            table.add_section()
        best = max(round(value, 3) for value in row.accuracy.values())
        cells = [
            Text(f"{100 * value:.1f}", style="bold" if round(value, 3) == best else "")
            for value in row.accuracy.values()
        ]
        stream = "" if before == row.stream else row.stream
        table.add_row(stream, str(row.batch_size), *cells, _gain(row))
        before = row.stream
    return table


def demo_notes(result: DemoResult) -> str:
    """How the table is to be read."""
    sizes: dict[int, list[str]] = {}
    for size, count in {row.batch_size: row.images for row in result.rows}.items():
        sizes.setdefault(count, []).append(str(size))
    images = "; ".join(f"{count:,} images a stream at batch size {_listed(of)}" for count, of in sizes.items())
    return (
        f"% of images answered rightly, best in bold; {images}. gain: {OURS} minus source, in points, grey where "
        f"within {_CHANCE:g} standard errors of 0. No method sees a label or source data; each starts afresh on "
        f"every line. Seed {result.seed}, {result.seconds:.0f} s."
    )


def demo_findings(result: DemoResult) -> list[Text]:
    """Per stream, in words, where ours gained or lost against the source model."""
    streams = dict.fromkeys(row.stream for row in result.rows)
    return [_finding(name, [row for row in result.rows if row.stream == name]) for name in streams]


def _finding(stream: str, rows: list[Row]) -> Text:
    gains = [row for row in rows if _beyond_chance(row) and row.gain > 0]
    losses = [row for row in rows if _beyond_chance(row) and row.gain < 0]
    same = [row for row in rows if not _beyond_chance(row)]
    parts = []
    if gains:
        parts.append(f"gains {_points(gains)}")
    if losses:
        parts.append(f"loses {_points(losses)}")
    if same:
        where = "" if len(same) == len(rows) else f" at batch size {_listed(str(row.batch_size) for row in same)}"
        parts.append(f"no difference beyond chance{where}")
    style = "green" if gains and not losses else "red" if losses and not gains else ""
    return Text.assemble((f"{stream}: ", "bold"), ("; ".join(parts) + ".", style))


def _points(rows: list[Row]) -> str:
    return _listed(f"{100 * abs(row.gain):.1f} at {row.batch_size}" for row in rows)


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _gain(row: Row) -> Text:
    style = "dim" if not _beyond_chance(row) else "green" if row.gain > 0 else "red"
    return Text(f"{100 * row.gain:+.1f}", style=style)


def _beyond_chance(row: Row) -> bool:
    return abs(row.gain) > _CHANCE * row.gain_error
