"""Write the output of the README's commands into it, between its markers.

python benchmarks/refresh_readme.py [demo] [overhead]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def run(*command: str) -> str:
    """Standard output of a Python command, 80 columns wide."""
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, env=environment
    ).stdout


def replace(name: str, text: str) -> None:
    """Put `text` between the markers of that name."""
    pattern = rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)"
    readme, count = re.subn(pattern, lambda m: m[1] + text + m[2], README.read_text(), flags=re.S)
    if count != 1:
        raise SystemExit(f"README.md has {count} places marked {name!r}; expected 1")
    README.write_text(readme)


def demo() -> str:
    """The demo's output as a code block."""
    with tempfile.TemporaryDirectory() as folder:
        lines = run("-m", "normadapt.cli", "demo", "--out", folder).splitlines()
    lines = [line.rstrip() for line in lines if not line.startswith("written:")]
    return "```text\n" + "\n".join(lines).strip() + "\n```\n"


def overhead() -> str:
    """The benchmark's medians as a table."""
    output = run("benchmarks/overhead.py")
    found = re.findall(r"n = (\d+).*?target ([\d.]+) x|^ +(\S.*?) +([\d.]+) x ", output, flags=re.M)
    sizes, targets, ratios = [], [], {}
    for size, target, name, ratio in found:
        if size:
            sizes.append(size)
            targets.append(target)
        else:
            ratios.setdefault(name, []).append(ratio)
    rows = [["", *(f"n = {size}" for size in sizes)], ["---"] * (len(sizes) + 1), ["aimed at", *targets]]
    rows += [[name, *values] for name, values in ratios.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    for part in sys.argv[1:] or ["demo", "overhead"]:
        replace(part, {"demo": demo, "overhead": overhead}[part]())
