"""What the commands around a trial print: where it stands, what happened, how the drill went. Computes no result."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from normadapt.pilot import Transition
from normadapt.pilot.drill import DrillResult
from normadapt.pilot.outbox import AT
from normadapt.pilot.rehearsal import BATCH, TICK, Step
from normadapt.store import Event, Verification

_LOUD, _TRIPS = 0.5, 1.0  # share of its threshold from which a guard is loud, and from which it trips
_STYLES = {"pass": "green", "fail": "red", "inconclusive": "yellow"}
_ALARMS = ("trip", "rollback", "store trouble", "events lost", "blind guards", "command refused", "state refused")
_WARNINGS = (
    "answers not finite",
    "answers without rows",
    "short shadow",
    "snapshots distrusted",
    "snapshot refused",
    "clock trouble",
)


def _table(*headings: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 2), header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", no_wrap=heading in right)
    return table


def status_table(status: Mapping[str, Any], now: float | None = None) -> Group:
    """A trial as `Pilot.status` describes it.

    Args:
        status: What it gave.
        now: Unix seconds, to say how old it is.
    """
    facts = Table.grid(padding=(0, 3))
    for name, told in _facts(status, now):
        facts.add_row(Text(name, style="bold"), told)
    parts: list[RenderableType] = [facts]
    if any(not guard["hard"] for guard in status["guards"].values()):
        parts += [Text(), _guards_table(status["guards"])]
    hard = [name for name, guard in status["guards"].items() if guard["hard"]]
    if hard:
        parts += [Text(f"Trip at once, without statistics: {', '.join(hard)}.", style="dim")]
    return Group(*parts)


def _facts(status: Mapping[str, Any], now: float | None) -> Iterable[tuple[str, Text]]:
    stage = status["stage"].replace("_", " ")
    where = f"{stage}, step {status['step'] + 1} of {status['steps']}" if stage == "canary" else stage
    held = ", paused by an operator" if status["paused"] else ""
    waits = ", waits for an operator's word" if status["waits_for_operator"] else ""
    yield "stage", Text(where + held + waits, style="bold red" if stage == "rolled back" else "bold")
    answer = "the source answers all"
    if status["share"] > 0:
        weights = f", weights up to {status['max_weight']:g}" if status["serving"] == "adapted" else ""
        answer = f"{status['serving']} answers {status['share']:.0%} of the ids{weights}"
    elif status["stage"] == "shadow":
        answer += ", the adapted model answers unheard"
    yield "serving", Text(answer)
    verdict = status["verdict"]
    reasons = "; ".join(verdict["reasons"])
    yield "verdict", Text.assemble((verdict["outcome"], _STYLES[verdict["outcome"]]), f": {reasons}")
    seconds = f"{status['seconds']:,.0f} of {status['seconds_needed']:,.0f} s under traffic"
    items = f"{status['items']:,} of {status['items_needed']:,} items, " if stage != "rolled back" else ""
    yield "so far", Text(items + seconds)
    labels = status["labels"]
    needed = f" of {labels['needed']:,}" if labels["needed"] else ""
    told = f"{labels['of_this_stage']:,}{needed} of this stage"
    told += f"; log e-value {labels['evidence']:.1f} of {labels['evidence_needed']:.1f} for letting it on"
    yield "labels", Text(told)
    number = status["snapshot"]
    yield "last good", Text("the source" if number == 0 else f"snapshot {number}" if number else "in memory only")
    answered = status["answered"]
    arms = ", ".join(f"{answered[key]:,} by {_ARMS[key]}" for key in _ARMS if answered[key])
    yield "answered", Text(f"{answered['items']:,} items in {answered['requests']:,} requests: {arms or 'none'}")
    if status["store"]["trouble"]:
        yield "store", Text(status["store"]["trouble"].splitlines()[0], style="red")
    if status["blind"]:
        yield "blind", Text(f"guards that learned too little: {', '.join(status['blind'])}", style="yellow")
    if now is not None and status.get("saved"):
        yield "as of", Text(f"{_ago(now - status['saved'])} ago", style="dim")


_ARMS = {"source": "the source", "adapted": "the adapted model", "snapshot": "a snapshot"}


def _ago(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def _guards_table(guards: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("guard", "lately", "in all", "normal", "items", "evidence", right=_NUMBERS)
    for name, guard in guards.items():
        if guard["hard"]:
            continue
        shown = Text(name)  # a score's name is its author's: no markup
        if guard["normal"] is None:
            table.add_row(shown, "-", "-", "-", f"{guard['learned']:,}", Text("learning", style="dim"))
            continue
        level = max(guard["log_value"], 0) / guard["threshold"]
        style = "red" if level >= _TRIPS else "yellow" if level >= _LOUD else ""
        evidence = Text("blind", style="yellow") if guard["blind"] else Text(f"{level:.0%}", style=style)
        told = [_on_its_scale(guard, guard.get(key)) for key in ("recent", "mean", "normal")]
        table.add_row(shown, *told, f"{guard['items']:,}", evidence)
    table.caption = (
        "With a sign: difference to the source, 0 if alike. evidence: log e-value, in % of what trips; a stage passes "
        "below 50 %."
    )
    table.caption_justify = "left"
    return table


_NUMBERS = ("lately", "in all", "normal", "items", "evidence")


def _on_its_scale(guard: Mapping[str, Any], signal: float | None) -> str:
    """A signal as people read it: a guard that compares has 1/2 where the models are alike."""
    if signal is None:
        return "-"
    scale = guard.get("scale", 1.0)
    return f"{signal:.3f}" if scale == 1 else f"{(signal - 0.5) / scale:+.3f}"


def moves_table(moves: Iterable[tuple[int, Transition]]) -> Table:
    """The moves of a pilot, each with the number of the item at which it was made."""
    table = _table("item", "stage", "serving", "why", right=("item",))
    for item, move in moves:
        share = f" {move.after.share:.0%}" if 0 < move.after.share < 1 else ""
        stage = move.after.stage.value.replace("_", " ")
        by = f" by {move.by}" if move.by else ""
        why = f"{move.cause.value}{by}" + (f": {move.reason}" if move.reason else "")
        style = "red" if stage == "rolled back" else ""
        table.add_row(f"{item:,}", Text(stage + share, style=style), move.serving, Text(why))
    return table


def history_table(events: Iterable[Event]) -> Table:
    """Events of the audit log, oldest first."""
    table = _table("no.", "time", "what", "particulars", right=("no.", "time"))
    for event in events:
        style = "red" if event.kind in _ALARMS else "yellow" if event.kind in _WARNINGS else ""
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
        table.add_row(str(event.seq), moment, Text(event.kind, style=style), Text(_particulars(event)))
    return table


def _particulars(event: Event) -> str:
    facts = event.facts
    by = f" by {facts['by']}" if facts.get("by") else ""
    reason = f": {facts['reason']}" if facts.get("reason") else ""
    match event.kind:
        case "transition":
            share = f" {facts['share']:.0%}" if 0 < facts["share"] < 1 else ""
            move = f"{facts['from']} -> {facts['to']}{share}, {facts['cause']}{by}".replace("_", " ")
            return f"{move}; {facts['serving']} serves{reason}"
        case "commit":
            return f"snapshot {facts.get('number')}: {facts.get('note')}"
        case "rollback":
            return f"from {facts['from']} to {facts['to']}{by}{reason}"
        case "trip":
            return f"{facts['guard']} in {facts['stage']}{reason}"
        case "command":
            return f"{facts['command']}" + "".join(f", {key} {value}" for key, value in facts["facts"].items())
    return ", ".join(f"{key} {_short(value)}" for key, value in facts.items() if key != AT) or "-"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(_short(entry) for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verification_lines(found: Verification) -> list[Text]:
    """What a check of the store found: a line for each problem, then the sum."""
    lines = [Text(problem, style="red") for problem in found.problems]
    head = "nothing committed yet" if found.head is None else f"the head is {found.head}"
    outcome = ("all is well", "green") if found.ok else (f"{len(found.problems)} problems", "red")
    lines.append(
        Text.assemble(outcome, f": {found.events:,} events, {found.snapshots:,} snapshots, {head}, digest ")
        + Text(found.digest[:16])
    )
    return lines


def drill_table(result: DrillResult) -> Table:
    """The drill's time line."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("image", justify="right", no_wrap=True)
    table.add_column("step", no_wrap=True)
    table.add_column("expected", ratio=6)
    table.add_column("got", ratio=7)
    table.add_column("", no_wrap=True)
    for step in result.steps:
        if step.name.startswith("fault"):
            table.add_section()
        name = Text(step.name, style="bold" if step.name.startswith("fault") else "")
        table.add_row(f"{step.at:,}", name, Text(step.expected), Text(step.got), _mark(step))
    return table


def _mark(step: Step) -> Text:
    if not step.ok:
        return Text("FAIL", style="bold red")
    return Text("gap", style="yellow") if step.gap else Text("ok", style="green")


def drill_notes(result: DrillResult) -> str:
    """How the time line is to be read."""
    good = sum(step.ok for step in result.steps)
    gaps = sum(step.gap for step in result.steps)
    told = f"{good} of {len(result.steps)} steps went as expected"
    told += f" ({gaps} gaps: faults that no guard sees)" if gaps else ""
    return (
        f"{told}. {result.images:,} images in requests of {BATCH}, {result.seconds:.0f} s, {result.usual_ms:.0f} ms a "
        f"request in full. The clock is turned by hand, {TICK:g} s a request; everything else is real: model, images, "
        f"guards, store. A fault's row: what tripped, after how many images, what was in use how many ms later; the "
        "source answered that request, unless labels tripped. right: of what went out, on images that a person could "
        f"tell. Seed {result.seed}."
    )
