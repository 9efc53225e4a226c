"""What a model's answers say of adapting, shift by shift, beside what adapting gains: why some targets are missed.

    python benchmarks/answers.py [--suite svhn-mnist usps-mnist usps-digits] [--seed 2] [--instances 160]

Third-party models, no profile, the benchmark's development split. Each shift is answered by the source, with the
statistics of the window that `Track` follows, and with each instance's own, whatever the answers speak for. H is the
mean entropy of the class probabilities, I the entropy of their mean less H (docs/METHOD.md, step 5); "agree" is the
share of instances to which the source and the window give the same class.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import normadapt as na
from normadapt.bench.suites import SUITES
from normadapt.bench.suites.base import Task
from normadapt.demo import one_thread
from normadapt.doubts import Doubts
from normadapt.policies import Track
from normadapt.policies.ways import FOLLOWED, OWN
from normadapt.layers.predictions import class_probabilities

BATCH = 16
SUITE_NAMES = ("svhn-mnist", "usps-mnist", "usps-digits")


@dataclass(frozen=True)
class Only(Track):
    """`Track` that keeps to one way, whatever the answers speak for."""

    way: str = FOLLOWED

    def choose(self, doubts: Doubts) -> str:
        """The one."""
        return self.way


def probabilities(call: Callable[[Tensor], Any], inputs: Tensor) -> Tensor:
    """Class probabilities (n, K) of a stream's instances, in batches of 16."""
    told = [class_probabilities(call(batch), None, needed=True) for batch in inputs.split(BATCH)]
    return torch.cat([part for part in told if part is not None]).double()


def row(task: Task, shift: str, instances: int, seed: int) -> list[str]:
    """A shift's line."""
    domain = task.domain(shift)
    chosen = torch.randperm(len(domain.inputs), generator=torch.Generator().manual_seed(seed))[:instances]
    inputs, labels = domain.inputs[chosen], domain.labels[chosen]
    models = (task.model, na.adapt(task.model, None, Only()), na.adapt(task.model, None, Only(way=OWN)))
    source, window, own = (probabilities(model, inputs) for model in models)
    right = [100 * float((answers.argmax(1) == labels).double().mean()) for answers in (source, window, own)]
    agree = 100 * float((source.argmax(1) == window.argmax(1)).double().mean())
    said = Doubts().compared({"source": source, "window": window})
    unsure, told = said.entropies, said.told
    return [shift, *(f"{share:.1f}" for share in right), f"{agree:.0f} %", *(f"{x:.2f}" for x in (*unsure, *told))]


def main() -> None:
    """Parse the command line and print a table per task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=SUITE_NAMES, default=SUITE_NAMES)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--instances", type=int, default=160)
    arguments = parser.parse_args()
    with one_thread(), torch.no_grad():
        for name in arguments.suite:
            for task in SUITES[name].tasks("dev", arguments.seed):
                table = Table(title=f"{task.name}: % right, what the answers say", title_justify="left")
                heads = ("shift", "source", "window", "own", "agree", "H src", "H win", "I src", "I win")
                for place, head in enumerate(heads):
                    table.add_column(head, justify="right" if place else "left", min_width=0 if place else 10)
                for shift in task.shifts:
                    table.add_row(*row(task, shift, arguments.instances, arguments.seed))
                Console().print(table)


if __name__ == "__main__":
    main()
