"""Write docs/BENCHMARKS.md: the full report, and what each step of Track is worth.

    python benchmarks/report.py [--scale 0.6] [--seed 1] [--jobs 2]

Runs `normadapt bench` twice, with --resume: what an earlier run of the same code left in normadapt-out/ is used again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("normadapt-out")
ABLATION = ["--suite", "fashion-c", "--methods", "ours,ablations"]
ABLATION += ["--batch-size", "16"]


def bench(arguments: list[str], folder: str) -> str:
    """Run the command, show what it shows, and give back its Markdown."""
    page = OUT / folder / "report.md"
    command = [sys.executable, "-m", "normadapt.cli", "bench", *arguments, "--resume"]
    subprocess.run([*command, "--out", str(OUT / folder), "--markdown", str(page)], cwd=ROOT, check=True)
    return (ROOT / page).read_text()


def assembled(full: str, ablations: str, common: list[str]) -> str:
    """The full report with the ablations' tables in it."""
    tables = [
        f"### {suite}\n\n{table}"
        for suite, table in re.findall(
            r"^## `([\w-]+)`$.*?^### Ours with a step removed\n\n(.*?)(?=\n\n|\Z)", ablations, re.DOTALL | re.MULTILINE
        )
    ]
    section = (
        "## Ours with a step removed\n\n"
        f"From `normadapt bench {' '.join([*common, *ABLATION])}`; a row above ours says that the step costs more than "
        "it is worth there.\n\n" + "\n\n".join(tables) + "\n\n"
    )
    mark = "## How it was measured"
    return full.replace(mark, section + mark, 1)


def main() -> None:
    """Both runs, one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", default="0.6", help="relative length of the streams")
    parser.add_argument("--seed", default="1", help="of all draws")
    parser.add_argument("--jobs", default="2", help="processes")
    given = parser.parse_args()
    common = ["--scale", given.scale, "--seed", given.seed, "--jobs", given.jobs]
    full = bench(common, "bench")
    ablations = bench([*common, *ABLATION], "ablations")
    (ROOT / "docs/BENCHMARKS.md").write_text(assembled(full, ablations, common))


if __name__ == "__main__":
    main()
