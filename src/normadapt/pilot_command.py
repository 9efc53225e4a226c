"""`normadapt pilot`, `rollback`, `history`, `verify` and `drill`: thin shells around a trial and its store."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from normadapt.errors import ExtraMissingError, SpecError
from normadapt.monitor import Recorder
from normadapt.monitor.kept import write_report
from normadapt.outputs import check_file, folder, plain, print_files, print_json
from normadapt.pilot import Pilot, Plan, Transition
from normadapt.pilot.drill import run_drill
from normadapt.pilot.example_plan import EXAMPLE
from normadapt.pilot.faults import FAULTS, Injection, Injector
from normadapt.pilot.inbox import unfollowed
from normadapt.pilot.keeper import STATE
from normadapt.pilot.lease import runs_on
from normadapt.pilot.operators import roll_back_in
from normadapt.pilot.status import STATUS
from normadapt.pilot.traffic import SteppedClock, send_traffic
from normadapt.pilot_tables import (
    drill_notes,
    drill_table,
    history_table,
    moves_table,
    status_table,
    verification_lines,
)
from normadapt.profiles.source_profile import SourceProfile
from normadapt.progress import progress_bar
from normadapt.specs import load_data, load_model
from normadapt.store import Store

pilot = typer.Typer(no_args_is_help=True, add_completion=False, help="A trial of the adapted model, step by step.")

_SPEC = "package.module:callable or path/file.py:callable"
StoreFolder = Annotated[
    Path, typer.Option("--store", metavar="DIR", help="The trial's store.", show_default=False, file_okay=False)
]
By = Annotated[str, typer.Option("--by", metavar="NAME", help="Who wants it, for the log.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the order of the images and of the noise.")]


class Labels(StrEnum):
    """What becomes of the targets of DATA."""

    LATE = "late"
    NONE = "none"


@pilot.command()
def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"{_SPEC}, returns the model.", show_default=False)],
    data: Annotated[
        str, typer.Argument(metavar="DATA", help=f"{_SPEC}, yields inputs or (inputs, targets).", show_default=False)
    ],
    plan: Annotated[
        Path,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="From `pilot plan`.", show_default=False),
    ],
    store: StoreFolder,
    source_profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE", exists=True, dir_okay=False, help="From `normadapt profile`."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Items of a request. Default: as DATA gives them.")
    ] = None,
    items: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Items to send; DATA is begun again. Default: once through.")
    ] = None,
    inject: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FAULT@ITEM[-ITEM]", help=f"A fault, from an item on; may be repeated. One of {', '.join(FAULTS)}."
        ),
    ] = None,
    labels: Annotated[Labels, typer.Option(help="Whether targets come back, 160 items later.")] = Labels.LATE,
    tick: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.0, help="Seconds a request. Default: the real clock.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the faults' noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Send DATA to MODEL under a plan as if it were requests. A second call goes on where the first one ended."""
    injections = [Injection.parse(text) for text in inject or []]
    for one in injections:
        if items is not None and one.start >= items:
            raise SpecError(
                f"--inject: {one.fault} would begin at item {one.start:,}, after the last of --items {items:,} (items "
                "are counted from 0 in every run)\n  -> a smaller number, or more --items"
            )
    wanted = Plan.from_toml(plan)
    net, stream = load_model(model), load_data(data)
    profile = None if source_profile is None else SourceProfile.load(source_profile)
    moves: list[tuple[int, Transition]] = []
    sent = 0
    with Store(store) as kept:
        clock = None if tick is None else SteppedClock(tick, max(time.time(), _last_reading(kept)))
        trial = Pilot(
            net,
            profile,
            kept,
            wanted,
            clock=time.time if clock is None else clock,
            on_transition=lambda move: moves.append((sent, move)),
        )
        Recorder(trial)  # its history is saved with the trial, for `normadapt report`
        with trial, progress_bar("pilot", "items") as advance:

            def answered(count: int, stage: str) -> None:
                nonlocal sent
                sent = count
                advance(count, items, f"pilot, {stage}")

            traffic = send_traffic(
                trial,
                stream,
                items=items,
                batch_size=batch_size,
                faults=Injector(injections, seed),
                labels=labels is Labels.LATE,
                clock=clock,
                progress=answered,
            )
            status = trial.status()
    late = [f"{one.fault}@{one.start}" for one in injections if one.start >= traffic.items]
    if late:  # how many items DATA has is not known before
        message = f"--inject: {', '.join(late)} never happened: DATA ended after {traffic.items:,} items; see --items"
        typer.echo(message, err=True)
    if as_json:
        told = [{"item": item, **move.to_dict()} for item, move in moves]
        print_json(plain({"traffic": traffic.to_dict(), "moves": told, "status": status}))
        return
    console = Console()
    if moves:
        console.print(moves_table(moves))
        console.print()
    console.print(status_table(status))
    right = ""
    if traffic.accuracy is not None and traffic.source_accuracy is not None:
        right = f"; {traffic.accuracy:.1%} answered rightly, by the source {traffic.source_accuracy:.1%}"
    console.print(f"\n{traffic.items:,} items sent, {traffic.labels:,} labels came back{right}", highlight=False)


@pilot.command("plan")
def write_plan(
    out: Annotated[Path, typer.Option(metavar="FILE", help="The plan, as TOML.", show_default=False)],
) -> None:
    """Write a plan to begin with, which explains itself."""
    check_file(out)
    if out.exists():
        raise SpecError(f"--out: {out} is there already\n  -> name another file, or remove it first")
    out.write_text(EXAMPLE, encoding="utf-8")
    print_files(Console(), [out])


@pilot.command("status")
def show_status(store: StoreFolder, as_json: AsJson = False) -> None:
    """Where the trial stands, as of its last saving, and what operators have done since."""
    with Store(store, create=False) as kept:
        told, waiting = kept.read_state(STATUS), kept.waiting_commands()
        moved = unfollowed(kept)
    if told is None:
        raise SpecError(
            f"no pilot has run on {store} yet\n  -> normadapt pilot run MODEL DATA --plan FILE --store {store}"
        )
    running = runs_on(store)
    if as_json:
        commands = [asdict(command) for command in waiting]
        head = None if moved is None else {"to": moved.facts["to"], "by": moved.facts["by"]}
        print_json(plain({**told, "running": running, "waiting_commands": commands, "moved_head": head}))
        return
    console = Console()
    console.print(status_table(told, time.time()))
    lines = []
    if not running:
        lines.append(f"No pilot runs on this store now; all of this is as of {_ago(told)}.")
    if moved is not None:
        by = moved.facts["by"] or "somebody"
        lines.append(f"Since then {by} has rolled back to snapshot {moved.facts['to']}, which a pilot has to follow.")
    if waiting:
        names = ", ".join(f"{command.number} ({command.command})" for command in waiting)
        lines.append(f"Commands that wait for a pilot: {names}.")
    for line in lines:
        console.print(f"\n{line}", style="yellow", markup=False, highlight=False)


@pilot.command()
def promote(
    store: StoreFolder,
    by: By,
    force: Annotated[bool, typer.Option("--force", help="Even though the stage is not complete.")] = False,
) -> None:
    """Let the next stage begin, or start again after a roll back."""
    _send(store, "promote", by=by, force=force)


@pilot.command()
def pause(store: StoreFolder, by: By) -> None:
    """Hold statistics and stage; guards go on."""
    _send(store, "pause", by=by)


@pilot.command()
def resume(store: StoreFolder, by: By) -> None:
    """End a pause, or start again what is rolled back."""
    _send(store, "resume", by=by)


def rollback(
    store: StoreFolder,
    to: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="A snapshot's number; 0 is the source. Default: the last good one, as `pilot status` names it; once "
            "that is in use, the good one before it.",
        ),
    ] = None,
    by: Annotated[str, typer.Option("--by", metavar="NAME", help="Who wants it, for the log.")] = "the command line",
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the log.")] = "",
    as_json: AsJson = False,
) -> None:
    """Go back to a snapshot; nothing is deleted. A running pilot follows within a second."""
    with Store(store, create=False) as kept:
        before, after = roll_back_in(kept, to, by, reason)
    if as_json:
        print_json(plain({"from": before.number, "to": after.number, "note": after.note, "created": after.created}))
        return
    Console().print(f"from snapshot {before.number} to {after.number} ({after.note})", markup=False, highlight=False)


def history(
    store: StoreFolder,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="The newest so many. Default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """What happened, from the audit log, oldest first."""
    with Store(store, create=False) as kept:
        events = kept.history(limit)
    if as_json:
        print_json(plain([asdict(event) for event in events]))
        return
    Console().print(history_table(events))


def verify(store: StoreFolder, as_json: AsJson = False) -> None:
    """Check a store: the log's chain, every snapshot, the head. Exit code 1 when something is wrong."""
    with Store(store, create=False) as kept:
        found = kept.verify()
    if as_json:
        print_json(plain({"ok": found.ok, **asdict(found)}))
    else:
        for line in verification_lines(found):
            Console().print(line, highlight=False, soft_wrap=True)
    if not found.ok:
        raise typer.Exit(1)


def drill(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for drill.json, drill-store/ and report.html.")
    ] = Path("normadapt-out"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """A whole trial on the demo's model, with faults done to its camera. Exit code 1 if a step failed."""
    place = folder(out)
    file, store = place / "drill.json", _fresh(place / "drill-store")
    with progress_bar("drill", "images") as advance:
        result = run_drill(
            store,
            seed=seed,
            progress=lambda images, doing: advance(images, None, f"drill, {doing}"),
            opened=Recorder,
        )
    values = plain(result.to_dict())
    file.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    page, missing = place / "report.html", None
    try:
        write_report(store, page, title="A drill: the trial of USPSNet")
    except ExtraMissingError as error:
        missing = error
    if as_json:
        print_json(values)
    else:
        console = Console()
        console.print("USPSNet on MNIST digits: let in step by step, and taken back on harm\n", style="bold")
        console.print(drill_table(result))
        console.print(f"\n{drill_notes(result)}", style="dim", highlight=False)
        print_files(console, [file, store] if missing else [file, store, page])
        if missing is not None:
            console.print(f"no {page.name}: {missing}", markup=False, highlight=False, soft_wrap=True)
    if not result.ok:
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.add_typer(pilot, name="pilot")
    for command in (rollback, history, verify, drill):
        app.command()(command)


def _send(store: Path, command: str, **facts: Any) -> None:
    with Store(store, create=False) as kept:
        number, told = kept.send(command, **facts), kept.read_state(STATUS)
    left = f"command {number} ({command}) is left for the "
    if runs_on(store):
        typer.echo(left + "pilot, which takes it within a second of a request")
    else:
        last = "none has run yet" if told is None else f"the last one saved its state {_ago(told)}"
        typer.echo(left + f"next pilot: none runs on this store now, {last}. A roll back before that makes it void")


def _ago(status: dict[str, Any]) -> str:
    return f"{max(time.time() - float(status['saved']), 0):,.0f} s ago"


def _last_reading(store: Store) -> float:
    """Of the clock of the pilot that ran before; a stepped clock may be ahead of the real one."""
    told = store.read_state(STATE) or {}
    return float((told.get("time") or {}).get("last") or 0.0)


def _fresh(path: Path) -> Path:
    """The folder without what an earlier drill left there.

    Raises:
        SpecError: If it holds something else.
    """
    if path.exists():
        if not path.is_dir() or (any(path.iterdir()) and not (path / "store.db").is_file()):
            raise SpecError(f"--out: {path} is there and is no store of an earlier drill\n  -> name another folder")
        shutil.rmtree(path)
    return path
