"""How much of a layer's variance lies between instances: measured on data, and told by the layer's own statistics.

    python benchmarks/natural_scatter.py [SUITE ...]

For every normalization layer of the benchmark's development tasks: T = 1 - E[variance within an instance]/v_s
(docs/METHOD.md) beside the scatter of the instance means that it should tell, on the domain nearest to the source; and
the variance of the half-log-variances averaged over channels, for that one domain and for all shifts mixed.
"""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from normadapt.bench.suites import SUITES
from normadapt.bench.suites.base import Task
from normadapt.demo import one_thread
from normadapt.hooks import SiteHook, hooked_copy
from normadapt.statistics import gather_evidence

INSTANCES, BATCH = 400, 100


class _Looker:
    """Keeps every site's instance moments."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Tensor]] = {}

    def step(self, hook: SiteHook, x: Tensor) -> None:
        evidence, _, _ = gather_evidence(x)
        if evidence is not None:
            self.seen.setdefault(hook.index, []).append(evidence.instances.values)


def scatter(task: Task, names: list[str]) -> dict[str, tuple[float, float, float]]:
    """By layer: T, variance of the instance means over v_s, and what the scales of all channels vary together."""
    parts = []
    for name in names:
        inputs = task.domain(name).inputs
        chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
        parts.append(inputs[chosen[: INSTANCES // len(names)]])
    copy, hooks = hooked_copy(task.model, None, verb="this")
    looker = _Looker()
    for hook in hooks:
        hook.current = looker
    with torch.no_grad():
        for batch in torch.cat(parts).split(BATCH):
            copy(batch)
    found = {}
    for hook in hooks:
        source, (mean, variance) = hook.source, torch.cat(looker.seen[hook.index], 1)
        scale = source.variance + source.eps
        location, ratio = (mean - source.mean) / scale.sqrt(), variance / scale
        half = (ratio + (location - location.mean(0)) ** 2).clamp_min(1e-12).log() / 2
        natural = max(0.0, 1 - float((ratio @ source.share).mean()))
        found[source.name] = natural, float(location.var(0) @ source.share), float((half @ source.share).var())
    return found


def main() -> None:
    """A table per task."""
    console = Console()
    with one_thread():
        for name in sys.argv[1:] or SUITES:
            for task in SUITES[name].tasks("dev", 1)[:1]:
                near = task.clean or task.shifts[0]
                one, several = scatter(task, [near]), scatter(task, list(task.shifts))
                table = Table("layer", "T", "measured", "together", "together, mixed", title=f"{task.name}, {near}")
                for layer, (natural, measured, together) in one.items():
                    row = natural, measured, together, several[layer][2]
                    table.add_row(layer, *(f"{value:.3f}" for value in row))
                console.print(table)


if __name__ == "__main__":
    main()
