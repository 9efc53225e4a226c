"""Write docs/BENCHMARKS.md: the full report, and what each step of Track is worth.

    python benchmarks/report.py [--scale 0.6] [--seed 1] [--jobs 2]

Runs `normadapt bench` once for the report and once for each table of ablations, with --resume: what an earlier run of
the same code left in normadapt-out/ is used again.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("normadapt-out")
_SMALL = "Track, no jumps over batches"
ABLATIONS = {
    "batches of 16": ("16", "ours,ablations", ""),
    "batches of 1 and 4": (
        "1,4",
        f"ours,{_SMALL},{_SMALL} + profile",
        "Where batches are smaller than 16, a moving average over them is tested for jumps, too.",
    ),
}
"""Tables, each with its batch sizes, its methods and what is said above it."""


def bench(arguments: list[str], folder: str) -> str:
    """Run the command, show what it shows, and give back its Markdown."""
    page = OUT / folder / "report.md"
    command = [sys.executable, "-m", "normadapt.cli", "bench", *arguments, "--resume"]
    subprocess.run([*command, "--out", str(OUT / folder), "--markdown", str(page)], cwd=ROOT, check=True)
    return (ROOT / page).read_text()


def tables(report: str) -> list[str]:
    """The rows without a profile and those with one of the table of ablations, each with its head."""
    found = re.search(r"^### Ours with a step removed\n\n(.*?)(?=\n\n|\Z)", report, re.DOTALL | re.MULTILINE)
    if found is None:
        raise SystemExit("the report has no table of ablations")
    head, rule, *rows = found[1].splitlines()
    profiled = [row for row in rows if "+ profile" in row]
    return ["\n".join([head, rule, *part]) for part in ([row for row in rows if row not in profiled], profiled)]


def assembled(full: str, ablations: dict[str, tuple[str, str]]) -> str:
    """The full report with the tables of ablations in it, each of a command and a report."""
    parts = [
        "## Ours with a step removed",
        "From runs of their own; `python benchmarks/report.py` makes all of this page. "
        "A row above ours says that the step costs more than it is worth there; rows without a profile are compared "
        "with Track without one. The steps are those of docs/METHOD.md.",
    ]
    for title, (command, report) in ablations.items():
        without, profiled = tables(report)
        parts += [
            f"### fashion-c, {title}",
            f"{ABLATIONS[title][2]} From `normadapt bench {command}`.".strip(),
            without,
            "With a profile:",
            profiled,
        ]
    mark = "## How it was measured"
    full = full.replace("every figure here comes from it.", "every figure but those of steps removed comes from it.", 1)
    return full.replace(mark, "\n\n".join([*parts, mark]), 1)


def main() -> None:
    """All runs, one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="0.6", help="relative length of the streams")
    parser.add_argument("--seed", default="1", help="of all draws")
    parser.add_argument("--jobs", default="2", help="processes")
    given = parser.parse_args()
    common = ["--scale", given.scale, "--seed", given.seed, "--jobs", given.jobs]
    full = bench(common, "bench")
    ablations = {}
    for title, (sizes, methods, _) in ABLATIONS.items():
        arguments = [*common, "--suite", "fashion-c", "--batch-size", sizes, "--methods", methods]
        ablations[title] = shlex.join(arguments), bench(arguments, "ablations-" + sizes.replace(",", "-"))
    (ROOT / "docs/BENCHMARKS.md").write_text(assembled(full, ablations))


if __name__ == "__main__":
    main()
