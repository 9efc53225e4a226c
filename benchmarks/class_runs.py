"""What runs of one class cost where nothing has shifted: clean images, sorted by class within stretches of a stream.

    python benchmarks/class_runs.py [--images 1000] [--seed 0]

A stream of clean images is cut into as many parts as it is to show every class, and each part is sorted by class; a run
is then so many images of one class. Every rule starts afresh. Models, images and profiles are those of
`benchmarks/long_run.py`: FashionNet on its own test images, and USPSNet on MNIST digits, to which it has not been
trained, so that adapting gains something there.
"""

from __future__ import annotations

import argparse

import torch
from long_run import CLEAN, Material, fashion, share_right, usps
from torch import Tensor

import normadapt as na

SIZES = (1, 16)
PARTS = (10, 2, 1)


def in_runs(labels: Tensor, parts: int) -> Tensor:
    """Indices that sort each of so many parts of a stream by class."""
    whole = torch.arange(len(labels))
    return torch.cat([part[torch.argsort(labels[part], stable=True)] for part in whole.chunk(parts)])


def table(name: str, material: Material, images: int, seed: int) -> None:
    """One line per length of the runs and batch size."""
    inputs, labels = material.inputs[CLEAN], material.labels[CLEAN]
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:images]
    inputs, labels = inputs[chosen], labels[chosen]
    classes = len(labels.unique())
    print(f"\n{name}, {len(labels):,} clean images\n\n   run  batch  source  Domains  Domains + profile")
    for parts in (0, *PARTS):
        order = in_runs(labels, parts) if parts else torch.arange(len(labels))
        run = f"{len(labels) / classes / parts:.0f}" if parts else "none"
        for size in SIZES:
            stream = inputs[order], labels[order], size
            models = material.model, na.adapt(material.model), na.adapt(material.model, material.profile)
            source, alone, profiled = (100 * share_right(model, *stream) for model in models)
            print(f"{run:>6} {size:6} {source:7.1f} {alone:8.1f} {profiled:18.1f}", flush=True)


def main() -> None:
    """Parse the command line and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, material in (("FashionNet", fashion(arguments.seed)), ("USPSNet", usps(arguments.seed))):
        table(name, material, arguments.images, arguments.seed)


if __name__ == "__main__":
    main()
