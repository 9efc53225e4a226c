"""What a pilot costs: how soon it answers again after a roll back, and shadow mode beside its two forward passes.

    python benchmarks/pilot.py [--rounds 60] [--json FILE]

The ResNet-18 of `overhead.py` (32x32 inputs, 20 BatchNorm2d), one thread, a store on the local disk. "Roll back" is the
whole of what a request pays that trips a guard: finding it, the source's answer's share taken off, the last good
snapshot in use again, the store's transaction on the disk. "Guards" is what the guards take of a request, "pilot" all
that a request in shadow takes beyond the source's and the adapted model's forward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from overhead import images, resnet18
from torch import nn

import normadapt as na
from normadapt.pilot import (
    ClassConcentration,
    ConfidenceCollapse,
    Disagreement,
    LabelledError,
    Latency,
    NonFinite,
    Pilot,
    Plan,
    Stage,
    StageRule,
    VarianceRatio,
)
from normadapt.store import Store

ROLLBACK_MS = 20.0
GUARDS_US = 50.0
GUARDS = (
    Disagreement(),
    ClassConcentration(),
    ConfidenceCollapse(),
    LabelledError(),
    NonFinite(),
    VarianceRatio(),
    Latency(seconds=60.0),
)


def milliseconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def plan(**changes: Any) -> Plan:
    """A plan that stays in its stage unless an operator moves it."""
    rules = {
        "shadow": StageRule(10**9, 0.0),
        "canary": (StageRule(10**9, 0.0, share=0.5),),
        "full": StageRule(10**9, 0.0),
        "commit_every": 10**9,
        "save_every": 10**9,
    }
    return Plan(**{"guards": GUARDS, **rules, **changes})


def rollbacks(model: nn.Module, profile: na.SourceProfile, folder: Path, rounds: int) -> list[float]:
    """Milliseconds that a tripping request takes beyond the two forward passes in it, and the next one beyond one."""
    pilot = Pilot(model, profile, Store(folder), plan())
    extra = []
    for _ in range(64):
        pilot(images(16))
    pilot.promote("benchmark", force=True)
    for _ in range(rounds):
        while pilot.stage is not Stage.FULL:
            pilot.promote("benchmark", force=True)
            pilot(images(1))
        bad, good = images(1) * float("nan"), images(1)
        with pilot.adapted.as_source():
            source = min(milliseconds(lambda: pilot.adapted(good)) for _ in range(3))  # noqa: B023
        with pilot.adapted.paused():
            paused = min(milliseconds(lambda: pilot.adapted(good)) for _ in range(3))  # noqa: B023
        tripping = milliseconds(lambda: pilot(bad))  # noqa: B023
        if pilot.stage is not Stage.ROLLED_BACK or not pilot.serving.startswith("snapshot"):
            raise RuntimeError(f"no roll back: {pilot.serving}, {pilot.verdict()}")
        after = milliseconds(lambda: pilot(good))  # noqa: B023
        extra.append(tripping + after - source - 2 * paused)
    pilot.close()
    return extra


def shadow(
    model: nn.Module, profile: na.SourceProfile, folder: Path, n: int, rounds: int
) -> tuple[float, float, float]:
    """Microseconds an item of the guards, and of the pilot beyond two passes; two passes in milliseconds."""
    pilot = Pilot(model, profile, Store(folder), plan())
    twin = na.adapt(model, profile)
    guards, spent = [0.0], []
    trial = pilot._trial
    measure, take = trial.watch.measure, trial.take

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                guards[0] += time.perf_counter() - start

        return run

    trial.watch.measure = timed(measure)  # type: ignore[method-assign]
    trial.take = timed(take)  # type: ignore[method-assign]
    of_guards, passes = [], []
    for turn in range(rounds + 10):
        x = images(n)
        ids = [f"{turn}-{place}" for place in range(n)]
        with twin.as_source():
            source = milliseconds(lambda: twin(x))  # noqa: B023
        both = source + milliseconds(lambda: twin(x))  # noqa: B023
        guards[0] = 0.0
        whole = milliseconds(lambda: pilot(x, ids=ids))  # noqa: B023
        if turn >= 10:
            of_guards.append(1e6 * guards[0] / n)
            spent.append(1e3 * (whole - both) / n)
            passes.append(both)
    pilot.close()
    return statistics.median(of_guards), statistics.median(spent), statistics.median(passes)


def main() -> int:
    """Print the table; the exit code says whether all aims were met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = resnet18()
    profile = na.profile_source(model, [images(50) for _ in range(4)])
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        extra = rollbacks(model, profile, Path(folder) / "rollback", max(10, arguments.rounds // 3))
        rows.append({"what": "roll back to answering again, ms", "value": statistics.median(extra), "aim": ROLLBACK_MS})
        rows.append({"what": "  the slowest", "value": max(extra), "aim": None})
        for n in (16, 1):
            guards, pilot, both = shadow(model, profile, Path(folder) / f"shadow-{n}", n, arguments.rounds)
            rows.append({"what": f"guards, microseconds an item, n = {n}", "value": guards, "aim": GUARDS_US})
            rows.append({"what": f"  pilot beyond its two passes, n = {n}", "value": pilot, "aim": None})
            rows.append({"what": f"  the two passes, ms a request, n = {n}", "value": both, "aim": None})
    for row in rows:
        verdict = (
            "" if row["aim"] is None else f"   aim {row['aim']:g}: {'met' if row['value'] <= row['aim'] else 'MISSED'}"
        )
        print(f"{row['what']:42} {row['value']:9.2f}{verdict}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2))
    return int(any(row["aim"] is not None and row["value"] > row["aim"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
