"""What a pilot costs: how soon it answers again after a roll back, and shadow mode beside its two forward passes.

    python benchmarks/pilot.py [--rounds 60] [--json FILE]

The ResNet-18 of `overhead.py` (32x32 inputs, 20 BatchNorm2d), one thread, a store on the local disk. "Roll back" is
what a request that trips a guard and the next one take beyond their forward passes: finding harm, the last good
snapshot in use again, the store's transaction on the disk. "Guards" is what the guards take of a request in shadow,
"pilot" all that such a request takes beyond its two forward passes, the guards included.
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
    NonFinite(own_only=False),  # a request of NaN is to trip
    VarianceRatio(),
    Latency(seconds=60.0),
)


class Stopwatch:
    """Adds up the time that wrapped calls take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def seconds(call: Callable[[], Any], *inside: Stopwatch) -> tuple[float, ...]:
    """How long a call takes, and how much of it was spent in what these watches are around."""
    for watch in inside:
        watch.seconds = 0.0
    start = time.perf_counter()
    call()
    return time.perf_counter() - start, *(watch.seconds for watch in inside)


def watched(pilot: Pilot) -> tuple[Stopwatch, Stopwatch]:
    """Stopwatches around the pilot's forward passes, and around its guards."""
    passes, guards = Stopwatch(), Stopwatch()
    arms = pilot._desk._arms
    arms.source = passes.around(arms.source)  # type: ignore[method-assign]
    arms.ours = passes.around(arms.ours)  # type: ignore[method-assign]
    pilot.watch.measure = guards.around(pilot.watch.measure)  # type: ignore[method-assign]
    pilot._trial.take = guards.around(pilot._trial.take)  # type: ignore[method-assign]
    return passes, guards


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
    """Milliseconds beyond forward passes of a request that trips and the next one, which is answered again."""
    pilot = Pilot(model, profile, Store(folder), plan())
    for _ in range(64):
        pilot(images(16))
    pilot.promote("benchmark", force=True)
    passes, _ = watched(pilot)
    extra = []
    for _ in range(rounds):
        while pilot.stage is not Stage.FULL:
            pilot.promote("benchmark", force=True)
            pilot(images(1))
        bad, good = images(1) * float("nan"), images(1)
        tripping = seconds(lambda: pilot(bad), passes)  # noqa: B023
        if pilot.stage is not Stage.ROLLED_BACK or not pilot.serving.startswith("snapshot"):
            raise RuntimeError(f"no roll back: {pilot.serving}, {pilot.verdict()}")
        after = seconds(lambda: pilot(good), passes)  # noqa: B023
        extra.append(1e3 * (tripping[0] - tripping[1] + after[0] - after[1]))
    pilot.close()
    return extra


def shadow(
    model: nn.Module, profile: na.SourceProfile, folder: Path, n: int, rounds: int
) -> tuple[float, float, float]:
    """Microseconds an item of the guards, and of the pilot beyond two passes; two passes in milliseconds."""
    pilot = Pilot(model, profile, Store(folder), plan())
    passes, guards = watched(pilot)
    spent = []
    for turn in range(rounds + 10):
        x, ids = images(n), [f"{turn}-{place}" for place in range(n)]
        spent.append(seconds(lambda: pilot(x, ids=ids), passes, guards))  # noqa: B023
    pilot.close()
    spent = spent[10:]
    of_guards = statistics.median(1e6 * inside / n for _, _, inside in spent)
    of_pilot = statistics.median(1e6 * (whole - both) / n for whole, both, _ in spent)
    return of_guards, of_pilot, statistics.median(1e3 * both for _, both, _ in spent)


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
