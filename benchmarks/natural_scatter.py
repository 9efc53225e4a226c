"""How much of a layer's variance lies between instances, and how far domains shift it: measured on data.

    python benchmarks/natural_scatter.py [SUITE ...]

For every normalization layer of the benchmark's development tasks: T = 1 - E[variance within an instance]/v_s
(docs/METHOD.md) beside the scatter of the instance means that it should tell, on the domain nearest to the source. Then
how much of that scatter lies between the classes, and the squared shifts of all shifted domains, of locations and of
half-log-variances per unit of weight: least, median, most.
"""

from __future__ import annotations

import statistics
import sys

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from normadapt.bench.suites import SUITES
from normadapt.bench.suites.base import Task
from normadapt.demo import one_thread
from normadapt.layers.hooks import SiteHook, hooked_copy
from normadapt.layers.moments import gather_evidence

INSTANCES, BATCH = 400, 100


class _Looker:
    """Keeps every site's instance moments."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Tensor]] = {}

    def step(self, hook: SiteHook, x: Tensor) -> None:
        evidence, _ = gather_evidence(x)
        if evidence is not None:
            self.seen.setdefault(hook.index, []).append(evidence.instances.values)


def moments(task: Task, names: list[str]) -> tuple[list[SiteHook], dict[int, Tensor], Tensor]:
    """Sites, standardized locations and variance ratios (2, n, C) of each, and labels (n,), of instances of domains."""
    inputs, labels = [], []
    for name in names:
        domain = task.domain(name)
        order = torch.randperm(len(domain.inputs), generator=torch.Generator().manual_seed(0))
        chosen = order[: INSTANCES // len(names)]
        inputs.append(domain.inputs[chosen])
        labels.append(task.groups(domain.labels[chosen]))
    copy, hooks = hooked_copy(task.model, None, verb="this")
    looker = _Looker()
    for hook in hooks:
        hook.current = looker
    with torch.no_grad():
        for batch in torch.cat(inputs).split(BATCH):
            copy(batch)
    found = {}
    for hook in hooks:
        source, (mean, variance) = hook.source, torch.cat(looker.seen[hook.index], 1)
        scale = source.variance + source.eps
        found[hook.index] = torch.stack(((mean - source.mean) / scale.sqrt(), variance / scale))
    return hooks, found, torch.cat(labels)


def natural(seen: Tensor, share: Tensor) -> tuple[float, float]:
    """T, and the variance of the instance means over v_s."""
    location, ratio = seen
    return max(0.0, 1 - float((ratio @ share).mean())), float(location.var(0) @ share)


def between_classes(location: Tensor, labels: Tensor, share: Tensor) -> float:
    """The part of the variance of the instance means that lies between classes."""
    within = torch.zeros_like(share)
    for label in labels.unique():
        members = location[labels == label]
        within += (members - members.mean(0)).square().sum(0)
    degrees = max(len(location) - len(labels.unique()), 1)
    return max(0.0, float((location.var(0) - within / degrees) @ share))


def shifts(seen: Tensor, share: Tensor) -> tuple[float, float]:
    """Squared shifts of a domain, of location and of the half-log-variance."""
    location, ratio = seen
    mean = location.mean(0)
    half = ((ratio + location.square()).mean(0) - mean.square()).clamp_min(1e-12).log() / 2
    return float(mean.square() @ share), float(half.square() @ share)


def of_three(values: list[float]) -> str:
    """Least, median, most."""
    return " ".join(f"{value:.3f}" for value in (min(values), statistics.median(values), max(values)))


def main() -> None:
    """A table per task."""
    console = Console()
    columns = "layer", "T", "measured", "between classes", "shift: locations", "scales"
    with one_thread():
        for name in sys.argv[1:] or SUITES:
            for task in SUITES[name].tasks("dev", 1)[:1]:
                near = task.clean or task.shifts[0]
                hooks, one, labels = moments(task, [near])
                moved = [moments(task, [shift])[1] for shift in task.shifts]
                table = Table(*columns, title=f"{task.name}, {near}")
                for hook in hooks:
                    here, share = one[hook.index], hook.source.share
                    row = *natural(here, share), between_classes(here[0], labels, share)
                    squared = zip(*(shifts(domain[hook.index], share) for domain in moved), strict=True)
                    texts = [of_three(list(values)) for values in squared]
                    table.add_row(hook.source.name, *(f"{value:.3f}" for value in row), *texts)
                console.print(table)


if __name__ == "__main__":
    main()
