"""`normadapt bench`: a thin shell around the benchmark."""

from __future__ import annotations

import json
import os
import shlex
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from normadapt.bench.about import about
from normadapt.bench.cells import CellFile, read_cells
from normadapt.bench.files import to_dict
from normadapt.bench.markdown import markdown
from normadapt.bench.methods import ABLATIONS, METHODS, select_methods
from normadapt.bench.page import page
from normadapt.bench.results import Results
from normadapt.bench.runner import Plan, run_plan
from normadapt.bench.streams import BATCH_SIZES, STREAMS
from normadapt.bench.suites import SUITES
from normadapt.bench.suites.base import Suite
from normadapt.bench.targets import can_judge, targets
from normadapt.bench_tables import failures, list_tables, reading, result_tables, targets_table
from normadapt.errors import NormadaptError, SpecError
from normadapt.outputs import check_file, folder, plain, print_files, print_json
from normadapt.progress import progress_bar

QUICK_SCALE, QUICK_SIZES, QUICK_METHODS = 0.1, (1, 16), ("main",)
QUICK_STREAMS = ("continual", "mixed", "runs", "clean")
QUICK_WITHOUT = ("fashion-c/3",)  # half of the longest suite: its other severity says enough for a first look

bench = typer.Typer(invoke_without_command=True, no_args_is_help=False, add_completion=False)


class SplitName(StrEnum):
    """The splits that --split knows."""

    REPORT = "report"
    DEV = "dev"


def _split(values: list[str] | None) -> list[str] | None:
    """An option may be repeated, and may name several with commas between."""
    return None if values is None else [part.strip() for value in values for part in value.split(",") if part.strip()]


@bench.callback()
def run(
    context: typer.Context,
    suite: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A suite; may be repeated. Default: all that are there.")
    ] = None,
    streams: Annotated[
        list[str] | None, typer.Option(metavar="NAMES", help=f"Among {', '.join(STREAMS)}. Default: all.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES", help="Methods, families, groups, or a setting such as 'Domains(max_weight=0.5)'."
        ),
    ] = None,
    batch_size: Annotated[
        list[str] | None, typer.Option(metavar="N", help="Instances per batch; may be repeated.")
    ] = None,
    split: Annotated[
        SplitName, typer.Option(help="report, or dev: other seeds and shifts, to choose hyper-parameters on.")
    ] = SplitName.REPORT,
    seed: Annotated[int, typer.Option(min=0, help="Of all draws.")] = 0,
    scale: Annotated[
        float | None, typer.Option(min=0.001, help="Relative length of the streams.", show_default="1")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one per core.")] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Three minutes: few and short streams, two batch sizes, the main methods, fashion-c at one severity.",
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Reuse what --out holds of the same code and seed.")] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results.json, bench.html, cells.jsonl.")] = Path(
        "normadapt-out/bench"
    ),
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the tables as Markdown, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")] = False,
) -> None:
    """Every rule on every stream, against what could be known. `bench list` shows suites and methods."""
    if context.invoked_subcommand is not None:
        return
    notes = Console(stderr=True)
    chosen, skipped = _suites(_split(suite))
    plan = Plan(
        tuple(chosen),
        tuple(_streams(_split(streams), QUICK_STREAMS if quick else tuple(STREAMS))),
        tuple(select_methods(methods if methods is not None else QUICK_METHODS if quick else None)),
        _sizes(_split(batch_size), quick=quick),
        split.value,
        seed,
        scale if scale is not None else QUICK_SCALE if quick else 1.0,
        QUICK_WITHOUT if quick else (),
    )
    place = folder(out)
    if markdown_file is not None:
        check_file(markdown_file)
    for line in skipped:
        notes.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    processes = jobs or os.cpu_count() or 1
    file = CellFile(place / "cells.jsonl")
    known = read_cells(place / "cells.jsonl") if resume else {}
    computed = 0

    def keep(cells: Any) -> None:
        nonlocal computed
        computed += len(cells)
        file.append(cells)

    begin = time.perf_counter()
    with progress_bar("bench", "instances") as advance:
        tasks, cells = run_plan(
            plan, jobs=processes, known=known, keep=keep, tell=lambda d, t, label: advance(d, t or None, label)
        )
        seconds = time.perf_counter() - begin
        if not cells:
            raise NormadaptError(
                f"there is nothing to run: no suite asked for has a stream {' or '.join(plan.streams)}\n"
                "  -> 'clean' needs a suite with source-like data (fashion-c, activity)"
            )
        advance(0, None, "counting")
        results = Results(plan, tasks, cells)
        made = about(_command(plan, quick=quick), seconds, computed, processes)
        values = plain(to_dict(results, made))
    files = [place / "results.json", place / "bench.html"]
    files[0].write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files[1].write_text(page(results, made), encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(markdown(results, made), encoding="utf-8")
        files.append(markdown_file)
    if as_json:
        print_json(values)
        return
    console = Console()
    console.print(result_tables(results, console.width))
    found = targets(results)
    if can_judge(results) and any(target.reached is not None for target in found):
        console.print("\nThe targets (points)\n", style="bold")
        console.print(targets_table(found))
    for line in failures(results):
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n{reading(results)} {seconds:.0f} s, {computed} cells computed.", style="dim", highlight=False)
    print_files(console, files)


@bench.command("list")
def list_all(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")] = False,
) -> None:
    """What suites there are, what each needs and how to install it; what methods, what streams."""
    if not as_json:
        Console().print(list_tables())
        return
    print_json(
        {
            "suites": [
                {
                    "name": suite.name,
                    "summary": suite.summary,
                    "negative": suite.negative,
                    "ready": not suite.missing(),
                    "needs": [
                        {"what": need.what, "there": need.is_there(), "install": need.install} for need in suite.needs
                    ],
                }
                for suite in SUITES.values()
            ],
            "methods": [
                {"name": m.name, "family": m.family, "role": m.role, "setting": m.setting}
                for m in (*METHODS.values(), *ABLATIONS.values())
            ],
            "streams": dict(STREAMS),
        }
    )


def _suites(names: list[str] | None) -> tuple[list[Suite], list[str]]:
    """The suites that can run, and a line for each that cannot.

    Raises:
        SpecError: If a name is unknown.
        NormadaptError: If none of them can run.
    """
    unknown = [name for name in names or [] if name not in SUITES]
    if unknown:
        raise SpecError(f"--suite: there is no suite {unknown[0]!r}\n  -> one of: {', '.join(SUITES)}")
    asked = [SUITES[name] for name in dict.fromkeys(names or SUITES)]
    lines = {
        suite.name: f"skipped: {suite.name} needs {' and '.join(n.what for n in missing)} "
        f"-> {' && '.join(dict.fromkeys(n.install for n in missing))}"
        for suite in asked
        if (missing := suite.missing())
    }
    ready = [suite for suite in asked if suite.name not in lines]
    if not ready:
        remedies = "\n".join(line.removeprefix("skipped: ").replace(" -> ", "\n  -> ") for line in lines.values())
        raise NormadaptError(remedies or "there is no suite")
    return ready, list(lines.values())


def _streams(names: list[str] | None, usual: tuple[str, ...]) -> list[str]:
    unknown = [name for name in names or [] if name not in STREAMS]
    if unknown:
        raise SpecError(f"--streams: there is no stream {unknown[0]!r}\n  -> among: {', '.join(STREAMS)}")
    return [name for name in STREAMS if name in (usual if names is None else names)]


def _sizes(values: list[str] | None, *, quick: bool) -> tuple[int, ...]:
    if values is None:
        return QUICK_SIZES if quick else BATCH_SIZES
    bad = [value for value in values if not value.isdecimal() or int(value) < 1]
    if bad:
        raise SpecError(f"--batch-size: expected a whole number, at least 1; got {bad[0]!r}\n  -> such as 16 or 1,16")
    return tuple(sorted({int(value) for value in values}))


def _command(plan: Plan, *, quick: bool) -> str:
    """The command line that makes the same again; folders and processes change nothing."""
    words = ["normadapt", "bench"]
    if quick:
        words.append("--quick")
    if len(plan.suites) < len(SUITES):
        words += [word for suite in plan.suites for word in ("--suite", suite.name)]
    if plan.streams != (QUICK_STREAMS if quick else tuple(STREAMS)):
        words += ["--streams", ",".join(plan.streams)]
    usual = select_methods(QUICK_METHODS if quick else None)
    if list(plan.methods) != usual:
        words += ["--methods", ",".join(method.name for method in plan.methods)]
    if plan.batch_sizes != (QUICK_SIZES if quick else BATCH_SIZES):
        words += ["--batch-size", ",".join(map(str, plan.batch_sizes))]
    if plan.split != "report":
        words += ["--split", plan.split]
    if plan.scale != (QUICK_SCALE if quick else 1.0):
        words += ["--scale", f"{plan.scale:g}"]
    return shlex.join([*words, "--seed", str(plan.seed)])
