"""`normadapt report`: a thin shell around the report page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from normadapt.errors import ExtraMissingError
from normadapt.monitor.kept import write_report
from normadapt.outputs import check_file, print_files
from normadapt.reports.report import Report


def report(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="STORE|FILE", exists=True, help="A trial's store, or a report as JSON.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("normadapt-out/report.html"),
    stream: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which stream. Default: the one seen last.")
    ] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="What stands at the top.")] = None,
) -> None:
    """One page for the browser: is the stream shifted, since when, where, and what did adapting do."""
    check_file(out)
    write_report(source, out, stream=stream, title=title)
    print_files(Console(), [out])


def write_page(report: Report, path: Path, lead: str) -> str | None:
    """Write a command's own page; without Plotly say what is missing instead of failing."""
    try:
        report.to_html(path, lead=lead)
    except ExtraMissingError as error:
        return str(error)
    return None


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command()(report)
