"""Does the state drift on a long run? Clean accuracy and memory over 100,000 batches with shifts that come and go.

    python benchmarks/long_run.py [--batches 100000] [--size 16] [--suite usps|fashion] [--seed 0]

The stream visits clean data and the shifts in random order, 50 to 500 batches at a time. Ten times on the way the
model is asked the same clean images, after 100 clean batches to settle; its state is put back afterwards, so asking
changes nothing. Drift would show as a falling accuracy, a leak as growing memory.

usps: a third party's USPSNet on the MNIST digits, under the conditions of `normadapt demo`; its source data are not
available, so its profile is measured on the plain digits. fashion: the benchmark's FashionNet under severity 5 of the
development corruptions, with the profile of its training images. Both are run with and without a profile.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import normadapt as na
from normadapt.bench.suites import SUITES
from normadapt.demo import CONDITIONS, mnist_digits, normalized, usps_net

CLEAN = "clean"
VISIT = (50, 500)
SETTLING = 100  # clean batches before the clean accuracy is taken
CHECKS = 10
ALLOWED = 0.2  # points that the clean accuracy may differ from the first
GROWTH = 4.0  # MiB that memory may grow after the first tenth: the allocator is not exact


class Material(NamedTuple):
    """A model, its source profile, and inputs with labels by condition; the first is clean."""

    model: nn.Module
    profile: na.SourceProfile
    inputs: Mapping[str, Tensor]
    labels: Mapping[str, Tensor]


def usps(seed: int) -> Material:
    """USPSNet and the digits under five conditions."""
    model = usps_net()
    digits, labels = mnist_digits(seed)
    inputs = {name: normalized(change(digits, seed)) for name, change in CONDITIONS.items()}
    profile = na.profile_source(model, list(inputs[CLEAN][:2000].split(100)))
    return Material(model, profile, inputs, dict.fromkeys(inputs, labels))


def fashion(seed: int) -> Material:
    """FashionNet and Fashion-MNIST under the development corruptions."""
    task = SUITES["fashion-c"].tasks("dev", seed)[-1]
    source = task.source_batches()
    if source is None or task.clean is None:
        raise SystemExit("fashion-c has no clean or no source data")
    names = {CLEAN: task.clean, **{shift: shift for shift in task.shifts}}
    domains = {name: task.domain(domain) for name, domain in names.items()}
    return Material(
        task.model,
        na.profile_source(task.model, source),
        {name: domain.inputs for name, domain in domains.items()},
        {name: domain.labels for name, domain in domains.items()},
    )


@torch.no_grad()
def share_right(model: nn.Module, inputs: Tensor, labels: Tensor, size: int) -> float:
    """Of the answers to a stream in batches."""
    right = sum(
        int((model(batch).argmax(1) == truth).sum())
        for batch, truth in zip(inputs.split(size), labels.split(size), strict=True)
    )
    return right / len(labels)


def clean_accuracy(adapted: na.AdaptedModel, material: Material, size: int) -> float:
    """Share of right answers to all clean images, in batches; the state is afterwards what it was."""
    state = adapted.snapshot()
    inputs, labels = material.inputs[CLEAN], material.labels[CLEAN]
    for i in range(SETTLING):
        adapted(inputs[(i * size) % (len(inputs) - size) :][:size])
    accuracy = share_right(adapted, inputs, labels, size)
    adapted.restore(state)
    return accuracy


def peak_megabytes() -> float:
    """Most memory that this process has ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def held_megabytes() -> float:
    """Memory that this process holds now, where the system tells it, else the peak."""
    status = Path("/proc/self/statm")
    if not status.is_file():
        return peak_megabytes()
    return int(status.read_text().split()[1]) * resource.getpagesize() / 2**20


def state_kilobytes(adapted: na.AdaptedModel) -> float:
    """Everything that adapting has changed."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapted.snapshot().values()) / 1024


def run(name: str, adapted: na.AdaptedModel, material: Material, batches: int, size: int, seed: int) -> bool:
    """One long run; prints a line per check. Whether there was no drift and no leak."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    print(f"\n{name}, batches of {size}\n")
    headings = ("batches", 9), ("shifts", 7), ("clean %", 8), ("all %", 7), ("state KiB", 10), ("held MiB", 9)
    print(" ".join(heading.rjust(width) for heading, width in (*headings, ("peak MiB", 9), ("s", 6))))
    begin = time.perf_counter()
    accuracies, held, states = [], [], []
    condition, left, visits, right, asked = CLEAN, 0, 0, 0, 0
    for done in range(batches + 1):
        if done % max(batches // CHECKS, 1) == 0:
            accuracies.append(clean_accuracy(adapted, material, size))
            held.append(held_megabytes())
            states.append(state_kilobytes(adapted))
            along = f"{100 * right / asked:7.2f}" if asked else "      -"
            memory = f"{states[-1]:10.1f} {held[-1]:9.1f} {peak_megabytes():9.1f}"
            seconds = time.perf_counter() - begin
            print(f"{done:9,} {visits:7,} {100 * accuracies[-1]:8.2f} {along} {memory} {seconds:6.0f}", flush=True)
            right = asked = 0
        if left == 0:
            condition = draw.choice([other for other in material.inputs if other != condition])
            left, visits = draw.randint(*VISIT), visits + 1
        inputs, labels = material.inputs[condition], material.labels[condition]
        chosen = torch.randint(len(inputs), (size,), generator=generator)
        right += int((adapted(inputs[chosen]).argmax(1) == labels[chosen]).sum())
        asked, left = asked + size, left - 1
    drift = 100 * max(abs(accuracy - accuracies[0]) for accuracy in accuracies)
    last = 100 * (accuracies[-1] - accuracies[0])
    growth = held[-1] - held[1]  # the first check is before everything has been allocated
    # The state holds projections of at most a few dozen instances, so its size moves a little.
    steady = abs(last) <= ALLOWED and growth < GROWTH and states[-1] < 2 * states[1]
    print(
        f"\nclean at the end minus at the start: {last:+.2f} points (largest on the way {drift:.2f}; allowed {ALLOWED})"
    )
    print(f"memory after the first tenth: {growth:+.1f} MiB; {'steady' if steady else 'NOT STEADY'}")
    return steady


def main() -> None:
    """Run with and without a profile, and say by the exit status whether both were steady."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--suite", choices=("usps", "fashion"), default="usps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    material = {"usps": usps, "fashion": fashion}[options.suite](options.seed)
    steady = [
        run(name, na.adapt(material.model, profile), material, options.batches, options.size, options.seed)
        for name, profile in (("Domains", None), ("Domains + profile", material.profile))
    ]
    sys.exit(0 if all(steady) else 1)


if __name__ == "__main__":
    main()
