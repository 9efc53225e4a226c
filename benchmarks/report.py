"""Write docs/BENCHMARKS.md: the full report, and what each step of Domains is worth.

    python benchmarks/report.py [--scale 0.6] [--seed 1] [--jobs 2]

Runs `normadapt bench` once for the report and once for the ablations, with --resume: what an earlier run of the same
code left in normadapt-out/ is used again.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("normadapt-out")
SUITES = ("fashion-c", "activity", "usps-digits")
SIZES = "1,16"
ABLATIONS = [*(word for suite in SUITES for word in ("--suite", suite)), "--batch-size", SIZES]
ABLATIONS += ["--methods", "ours,ablations"]


def bench(arguments: list[str], folder: str) -> str:
    """Run the command, show what it shows, and give back its Markdown."""
    page = OUT / folder / "report.md"
    command = [sys.executable, "-m", "normadapt.cli", "bench", *arguments, "--resume"]
    subprocess.run([*command, "--out", str(OUT / folder), "--markdown", str(page)], cwd=ROOT, check=True)
    return (ROOT / page).read_text()


def tables(report: str) -> Iterator[tuple[str, str]]:
    """Title and table for each suite, without a profile and with one."""
    for section in re.split(r"^## ", report, flags=re.MULTILINE)[1:]:
        found = re.search(r"^### Ours with a step removed\n\n(.*?)(?=\n\n|\Z)", section, re.DOTALL | re.MULTILINE)
        suite = section.splitlines()[0].strip("`")
        if found is None or suite not in SUITES:
            continue
        head, rule, *rows = found[1].splitlines()
        profiled = [row for row in rows if "+ profile" in row]
        alone = [row for row in rows if row not in profiled]
        for title, part in ((suite, alone), (f"{suite}, with a profile", profiled)):
            if part:
                yield title, "\n".join([head, rule, *part])


def assembled(full: str, command: str, ablations: str) -> str:
    """The full report with the tables of ablations in it."""
    parts = [
        "## Ours with a step removed",
        f"From `normadapt bench {command}`; `python benchmarks/report.py` makes all of this page. Each row changes one "
        "setting or one step (src/normadapt/bench/ablations.py). A row above ours says that the step costs more than "
        "it is worth there; rows without a profile are compared with Domains without one.",
    ]
    for title, table in tables(ablations):
        parts += [f"### {title}", table]
    mark = "## How it was measured"
    full = full.replace("every figure here comes from it.", "every figure but those of steps removed comes from it.", 1)
    return full.replace(mark, "\n\n".join([*parts, mark]), 1)


def main() -> None:
    """Both runs, one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="0.6", help="relative length of the streams")
    parser.add_argument("--seed", default="1", help="of all draws")
    parser.add_argument("--jobs", default="2", help="processes")
    given = parser.parse_args()
    common = ["--scale", given.scale, "--seed", given.seed, "--jobs", given.jobs]
    full = bench(common, "bench")
    arguments = [*common, *ABLATIONS]
    page = assembled(full, shlex.join(arguments), bench(arguments, "ablations"))
    (ROOT / "docs/BENCHMARKS.md").write_text(page)


if __name__ == "__main__":
    main()
