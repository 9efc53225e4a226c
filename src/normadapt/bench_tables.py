"""What `normadapt bench` prints. Nothing here computes a result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from normadapt.bench.methods import ABLATIONS, METHODS
from normadapt.bench.results import Results
from normadapt.bench.suites import SUITES
from normadapt.bench.summary import Summary, summarize
from normadapt.bench.targets import Target

_STYLES = {"ours": "bold cyan", "ablation": "cyan", "limit": "dim", "baseline": "", "gradient": ""}


def _table(*headings: str, left: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 2), header_style="bold")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < left else "right", no_wrap=True)
    return table


def result_tables(results: Results, widths: int = 100) -> Group:
    """A table of methods per suite, the best of the rules in bold."""
    parts: list[RenderableType] = []
    for scope in results.scopes:
        negative = " (negative control)" if scope in results.negative else ""
        tasks = [task.name for task in results.tasks if task.suite == scope]
        about = f": {', '.join(tasks)}" if tasks and tasks != [scope] else ""
        parts += [Text(f"\n{scope}{negative}{about}", style="bold"), _scope_table(results, scope, widths)]
    return Group(*parts)


def _scope_table(results: Results, scope: str, width: int) -> Table:
    """As many columns as fit: averages first."""
    sizes = results.plan.batch_sizes
    found = summarize(results, scope)
    rules = [s for s in found if results.methods[s.method].role not in ("limit", "ablation")]
    best = max((s.accuracy for s in rules if s.accuracy is not None), default=None)
    best_by = {n: max((s.by_size[n] for s in rules if n in s.by_size), default=None) for n in sizes}
    columns: list[tuple[str, Callable[[Summary], Text]]] = [
        ("average", lambda s: _percent(s.accuracy, best)),
        ("vs ours", _against),
        *((f"n={n}", lambda s, n=n: _percent(s.by_size.get(n), best_by[n])) for n in sizes),
        ("regret", lambda s: _points(s.regret)),
        ("gain", lambda s: _share(s.share)),
        ("of ceiling", lambda s: _share(s.ceiling_share)),
        ("worst", lambda s: _points(s.worst)),
        ("clean", lambda s: _points(max(s.clean_loss.values(), default=None))),
        *((f"cost n={n}", lambda s, n=n: _times(s.cost, n)) for n in dict.fromkeys((sizes[0], sizes[-1]))),
    ]
    names = max(len(s.method) for s in found)
    cells = {s.method: [of(s) for _, of in columns] for s in found if s.accuracy is not None}
    room = width - names
    shown: list[int] = []
    for i, (heading, _) in enumerate(columns):
        room -= 3 + max(len(heading), *(len(row[i]) for row in cells.values()))
        if room < 0:
            break
        shown.append(i)
    table = _table("method", *(columns[i][0] for i in shown))
    for summary in found:
        role = results.methods[summary.method].role
        name = Text(summary.method, style=_STYLES[role])
        if summary.method not in cells:
            table.add_row(name, Text(f"failed ({summary.failed})", style="red"))
            continue
        if role == "limit":
            table.add_section()
        table.add_row(name, *(cells[summary.method][i] for i in shown))
    return table


def _percent(value: float | None, best: float | None = None) -> Text:
    if value is None:
        return Text("-", style="dim")
    shown = f"{100 * value:.1f}"
    return Text(shown, style="bold" if best is not None and shown == f"{100 * best:.1f}" else "")


def _against(summary: Summary) -> Text:
    found = summary.against_ours
    if found is None:
        return Text("")
    half = 100 * (found.high - found.low) / 2
    style = "red" if found.high < 0 else "green" if found.low > 0 else "dim"
    return Text(f"{100 * found.value:+.1f} ±{half:.1f}", style=style)


def _points(value: float | None) -> Text:
    return Text("-" if value is None else f"{100 * value:.1f}")


def _share(value: float | None) -> Text:
    return Text(
        "-" if value is None else f"{100 * value:.0f} %", style="red" if value is not None and value < 0 else ""
    )


def _times(costs: Mapping[int, float], n: int) -> Text:
    return Text(f"{costs[n]:.2f}x" if n in costs else "-")


def reading(results: Results) -> str:
    """How the tables are to be read."""
    return (
        "% of instances answered rightly, mean over streams, tasks and batch sizes n; best rule in bold. "
        "vs ours: points against ours (with a profile where a table has it), with half the width of a 95 % interval. "
        "regret: points behind the best rule of each cell, on average and at worst. gain: share of the way from Source "
        "to the limit (true statistics); of ceiling: to the statistics of what was seen so far. clean: points lost on "
        "clean data, at worst. Columns that do not fit this terminal are in bench.html. "
        f"Split {results.plan.split}, seed {results.plan.seed}, scale {results.plan.scale:g}."
    )


def targets_table(found: Iterable[Target]) -> Table:
    """Reached or missed, line by line; what was not run is left out."""
    table = _table("target", "setting", "wanted", "measured", "", left=5)
    table.columns[2].no_wrap = table.columns[3].no_wrap = False
    for target in found:
        if target.reached is not None:
            verdict = Text("reached", style="green") if target.reached else Text("missed", style="red")
            table.add_row(target.name, target.setting, target.wanted, target.measured, verdict)
    return table


def failures(results: Results, most: int = 8) -> list[str]:
    """A line per method that failed, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for entry in results.entries:
        if entry.error is not None:
            places = found.setdefault((entry.method, entry.error), [])
            places.append(f"{entry.place.task} {entry.place.stream} n={entry.place.n}")
    lines = [
        f"{method} failed at {places[0]}" + (f" and {len(places) - 1} more" if len(places) > 1 else "") + f": {error}"
        for (method, error), places in found.items()
    ]
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more failures, in results.json"]


def list_tables() -> Group:
    """The suites with what they need, and the methods by family."""
    suites = _table("suite", "", "what it is, and what it needs", left=3)
    suites.columns[2].no_wrap = False
    for suite in SUITES.values():
        missing = suite.missing()
        state = Text("missing", style="yellow") if missing else Text("ready", style="green")
        lines = [
            escape(
                suite.summary
                + (" (negative control)" if suite.negative and "negative control" not in suite.summary else "")
            )
        ]
        for need in suite.needs:
            lines.append(f"[dim]needs[/] {escape(need.what)}" + ("" if need.is_there() else ":"))
            if not need.is_there():
                lines.append(f"  -> {escape(need.install)}")
        suites.add_row(suite.name, state, "\n".join(lines))
    return Group(suites, Text(), _methods_table())


def _methods_table() -> Table:
    table = _table("kind", "methods, as --methods knows them", left=2)
    table.columns[1].no_wrap = False
    titles: Sequence[tuple[str, str]] = (
        ("baseline", "baselines"),
        ("gradient", "baselines that learn by gradients"),
        ("ours", "ours"),
        ("ablation", "ours with a step removed"),
        ("limit", "statistics of known domains"),
    )
    for role, title in titles:
        names = [m.name for m in (*METHODS.values(), *ABLATIONS.values()) if m.role == role]
        if names:
            table.add_row(title, ("\n" if role == "ablation" else ", ").join(names))  # theirs have commas
    table.add_row("groups", "all, main, baselines, ours, ablations; a family such as EMA; Domains(max_weight=0.5)")
    return table
