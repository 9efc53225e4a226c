"""The command line: one command per verb, each a thin shell around the library."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from torch import nn
from typer.core import TyperGroup

from normadapt import baselines
from normadapt.adapted._adapt import adapt
from normadapt.adapted._recalibrate import Recalibration, RecalibrationProgress
from normadapt.adapted._recalibrate import recalibrate as recalibrate_model
from normadapt.adapted.rule import Domains
from normadapt.adapted.streams import PER_INSTANCE
from normadapt.answers import answer_stream
from normadapt.bench_command import bench
from normadapt.dashboard_command import register as register_dashboard
from normadapt.demo import OURS, run_demo
from normadapt.errors import NormadaptError, SpecError
from normadapt.layers.policy import Policy
from normadapt.model_errors import told
from normadapt.monitor import Recorder
from normadapt.monitor_command import register as register_monitor
from normadapt.monitor_command import write_page
from normadapt.outputs import check_file, folder, plain, print_files, print_json, save_statistics
from normadapt.pilot_command import register
from normadapt.profiles._profile_source import ProfileProgress, profile_source
from normadapt.profiles.source_profile import SourceProfile
from normadapt.progress import progress_bar
from normadapt.simulate import EXPERIMENTS, run_simulation
from normadapt.specs import Data, load_data, load_model, resplit
from normadapt.tables import claims_table, demo_findings, demo_lead, demo_notes, demo_table, report_table
from normadapt.version import __version__
from normadapt.weights.blend import Blend


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except NormadaptError as error:
            # What a caller can put right is said in a paragraph; anything else keeps its traceback.
            _say_error(str(error))
            raise typer.Exit(2) from error
        except Exception as error:
            said = told(error)
            if said is None:
                raise
            _say_error(said)
            raise typer.Exit(2) from error


def _say_error(text: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"max_content_width": 100},
)


class PolicyName(StrEnum):
    """The policies that --policy knows."""

    DOMAINS = "domains"
    BLEND = "blend"
    SOURCE = "source"
    BATCH_STATISTICS = "batch-statistics"
    SCHNEIDER_PRIOR = "schneider-prior"
    EMA = "ema"


_POLICIES: Mapping[PolicyName, Callable[[], Policy]] = {
    PolicyName.DOMAINS: Domains,
    PolicyName.BLEND: Blend,
    PolicyName.SOURCE: baselines.Source,
    PolicyName.BATCH_STATISTICS: baselines.BatchStatistics,
    PolicyName.SCHNEIDER_PRIOR: baselines.SchneiderPrior,
    PolicyName.EMA: baselines.EMA,
}


def _policy_named(name: str) -> PolicyName:
    if name in list(PolicyName):
        return PolicyName(name)
    gone = "is gone; domains takes its place" if name == "track" else "is no policy"
    raise typer.BadParameter(f"{name!r} {gone} -> one of {', '.join(PolicyName)}")


_SPEC = "package.module:callable or path/file.py:callable"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{_SPEC}, returns the model.", show_default=False)]
DataSpec = Annotated[
    str,
    typer.Argument(metavar="DATA", help=f"{_SPEC}, yields inputs or (inputs, targets).", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"normadapt {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Keeps the normalization statistics of a trained model right while the data drift."""


app.add_typer(bench, name="bench")
register(app)
register_monitor(app)
register_dashboard(app)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for demo.json and report.html.")] = Path(
        "normadapt-out"
    ),
    seed: Annotated[int, typer.Option(help="Of the order of the images and of the noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """A digit classifier trained on USPS meets MNIST digits under five conditions."""
    place = folder(out)
    file, page = place / "demo.json", place / "report.html"
    with progress_bar("demo", "images") as advance:
        result = run_demo(seed=seed, progress=advance, record=Recorder)
    values = plain(result.to_dict())
    file.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n")
    missing = write_page(result.report, page, demo_lead(result))
    if as_json:
        print_json(values)
        return
    console = Console()
    console.print("USPSNet, trained on USPS digits, meets MNIST digits\n", style="bold")
    console.print(demo_table(result))
    console.print(demo_notes(result), style="dim", highlight=False)
    console.print(f"\nThe layers of {OURS} after the stream that runs through all conditions\n", style="bold")
    console.print(report_table(result.report))
    heading = f"\nWhere {OURS} gains or loses against the source model (points at batch size)\n"
    console.print(heading, style="bold", highlight=False)
    for finding in demo_findings(result):
        console.print(finding, highlight=False)
    console.print()
    print_files(console, [file] if missing else [file, page])
    if missing:
        console.print(f"no {page.name}: {missing}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def run(
    model: Model,
    data: DataSpec,
    source: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Source data to measure a profile on first (no labels)."),
    ] = None,
    source_profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE", exists=True, dir_okay=False, help="From `normadapt profile`."),
    ] = None,
    policy: Annotated[
        PolicyName,
        typer.Option(metavar="NAME", parser=_policy_named, help=f"How statistics are chosen: {', '.join(PolicyName)}."),
    ] = PolicyName.DOMAINS,
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Re-split DATA into batches of N. Default: as DATA gives them."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")] = Path("normadapt-out"),
    as_json: AsJson = False,
) -> None:
    """Run MODEL over DATA, adapting on the way.

    Writes predictions.npz, report.json and statistics.safetensors (the adapted buffers, keyed as in the state_dict).
    """
    if source is not None and source_profile is not None:
        raise SpecError("--source measures a profile and --profile reads one\n  -> give one of them")
    place = folder(out)
    net, stream = load_model(model), load_data(data)
    profile = None if source_profile is None else SourceProfile.load(source_profile)
    if source is not None:
        profile = _measure(net, load_data(source))
    adapted = adapt(net, profile, _POLICIES[policy]())
    items: Iterable[Any] = stream if batch_size is None else resplit(stream, batch_size)
    total = stream.batches if batch_size is None else None
    with progress_bar("run", "batches") as advance:
        answers = answer_stream(adapted, items, lambda batches, _instances: advance(batches, total))
    report = adapted.report()
    files = {name: place / name for name in ("predictions.npz", "report.json", "statistics.safetensors")}
    summary = plain(
        {
            "normadapt": __version__,
            "model": model,
            "data": data,
            "source": source,
            "policy": policy.value,
            "batch_size": batch_size,
            "batches": answers.batches,
            "instances": answers.instances,
            "accuracy": answers.accuracy,
            "source_accuracy": answers.source_accuracy,
            "report": report.to_dict(),
            "files": {name: str(path) for name, path in files.items()},
        }
    )
    answers.save(files["predictions.npz"])
    files["report.json"].write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*statistics of its own", UserWarning)  # said below
        save_statistics(adapted.freeze(), files["statistics.safetensors"], model)
    if as_json:
        print_json(summary)
        return
    console = Console()
    console.print(report_table(report))
    if any(site.status.endswith(PER_INSTANCE) for site in report.sites):
        console.print(
            "[yellow]the last batch held several domains; the file has the present one's statistics[/]", highlight=False
        )
    batches = "1 batch" if answers.batches == 1 else f"{answers.batches:,} batches"
    console.print(f"\n{answers.instances:,} instances in {batches}", highlight=False)
    lost = max(site.excluded for site in report.sites)
    if lost:
        console.print(f"[yellow]{lost:,} of them moved no statistics: NaN or Inf at a layer[/]", highlight=False)
    if answers.accuracy is not None and answers.source_accuracy is not None:
        gain = 100 * (answers.accuracy - answers.source_accuracy)
        colour = "green" if gain > 0 else "red" if gain < 0 else "default"
        console.print(
            f"accuracy: source {answers.source_accuracy:.1%}, {policy.value} {answers.accuracy:.1%} "
            f"([{colour}]{gain:+.1f} points[/])",
            highlight=False,
        )
    print_files(console, files.values())


@app.command()
def profile(
    model: Model,
    data: DataSpec,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The profile, as safetensors.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Measure MODEL's normalization layers on source DATA, once; labels are not used."""
    check_file(out)
    measured = _measure(load_model(model), load_data(data))
    measured.save(out)
    if as_json:
        print_json(
            {
                "model": model,
                "model_name": measured.model_name,
                "fingerprint": measured.fingerprint,
                "count": measured.count,
                "excluded": measured.excluded,
                "sites": list(measured.sites),
                "rehearsals": list(measured.rehearsals),
                "unlikeness": measured.unlikeness,
                "file": str(out),
            }
        )
        return
    console = Console()
    console.print(
        f"{measured.model_name}: {len(measured.sites)} layers measured on {measured.count:,} instances"
        + (f" and under {len(measured.rehearsals)} changes of them" if measured.rehearsals else "")
        + (f"; {measured.excluded:,} left out for NaN or Inf" if measured.excluded else ""),
        highlight=False,
    )
    print_files(console, [out])


@app.command()
def recalibrate(
    model: Model,
    data: DataSpec,
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="The new running_mean and running_var, as safetensors.", show_default=False),
    ],
    source_profile: Annotated[
        Path | None,
        typer.Option("--profile", metavar="FILE", exists=True, dir_okay=False, help="From `normadapt profile`."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Change of a layer at which it ends, in units of its output.")
    ] = 1e-5,
    max_passes: Annotated[int, typer.Option(min=1, help="Passes over DATA at most.")] = 100,
    as_json: AsJson = False,
) -> None:
    """Set MODEL's statistics to those of unlabelled target DATA, offline.

    FILE holds the buffers alone, keyed as in the state_dict: model.load_state_dict(load_file(FILE), strict=False).
    """
    check_file(out)
    net, target = load_model(model), load_data(data)
    known = None if source_profile is None else SourceProfile.load(source_profile)
    with warnings.catch_warnings(), progress_bar("recalibrate", "batches") as advance:

        def passed(state: RecalibrationProgress) -> None:
            change = "" if state.last_change is None else f", last change {state.last_change:.1e}"
            advance(state.batches, target.batches, f"recalibrate, pass {state.pass_index}{change}")

        # That it did not converge is said below.
        warnings.filterwarnings("ignore", message=r"recalibrate\(\) stopped")
        module = recalibrate_model(net, target, known, tolerance=tolerance, max_passes=max_passes, progress=passed)
    found = cast(Recalibration, module.recalibration)
    save_statistics(module, out, model)
    if as_json:
        print_json(plain({"model": model, "data": data, "recalibration": asdict(found), "file": str(out)}))
        return
    console = Console()
    outcome = "[green]converged[/]" if found.converged else "[yellow]not converged[/]"
    console.print(
        f"{outcome} after {found.passes} passes over {found.count:,} instances, last change {found.last_change:.1e}"
        + (f"; {found.excluded:,} left out for NaN or Inf" if found.excluded else ""),
        highlight=False,
    )
    print_files(console, [out])


@app.command()
def simulate(
    experiment: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"One of {', '.join(EXPERIMENTS)}; all by default.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Ten minutes for less noise, instead of one or two.")] = False,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for simulate.json and simulate.html.")] = Path(
        "normadapt-out"
    ),
    as_json: AsJson = False,
) -> None:
    """What the higher-order asymptotics are worth, measured on statistics alone."""
    if experiment is not None and experiment not in EXPERIMENTS:
        raise SpecError(f"--experiment: expected one of {', '.join(EXPERIMENTS)}, got {experiment!r}")
    place = folder(out)
    with progress_bar("simulate", "steps") as advance:
        found = run_simulation(None if experiment is None else [experiment], seed, full, advance)
    files = [place / "simulate.json", place / "simulate.html"]
    values = plain(found.to_dict())
    files[0].write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    files[1].write_text(found.to_html(__version__), encoding="utf-8")
    if as_json:
        print_json(values)
        return
    console = Console()
    console.print(claims_table(found.findings()))
    took = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found.seconds.items())
    console.print(f"\nSeed {seed}; {took}.", style="dim", highlight=False)
    print_files(console, files)


def _measure(model: nn.Module, data: Data) -> SourceProfile:
    with progress_bar("profile", "passes") as advance, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)

        def passed(at: ProfileProgress) -> None:
            # in the first pass it is not yet known how many there are
            advance(at.done, at.passes, f"profile, {at.stage}: {at.instances:,} instances")

        measured = profile_source(model, data, progress=passed)
    for warning in caught:
        Console(stderr=True).print(f"[yellow]{escape(str(warning.message))}[/]", highlight=False, soft_wrap=True)
    return measured


if __name__ == "__main__":
    app()
