"""Trains the source models of `normadapt bench` and writes their checkpoints.

    python benchmarks/train_sources.py fashion    # about 8 minutes on one core
    python benchmarks/train_sources.py activity   # about two minutes

The data: Debian's dataset-fashion-mnist (MIT licence) and the watch data of the package seglearn (BSD licence);
`make bench-setup` installs both. A seed fixes everything that is drawn; the last digits still depend on the machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from normadapt.bench.models import WEIGHTS, ActivityNet, FashionNet
from normadapt.bench.suites import activity
from normadapt.bench.suites.fashion import fashion_images, fashion_inputs

SEED = 0


def train(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    augment: Callable[[Tensor, torch.Generator], Tensor],
    *,
    epochs: int,
    batch_size: int = 128,
    rate: float = 0.2,
    decay: float = 5e-4,
) -> None:
    """SGD with Nesterov momentum; the rate rises over the first 15 % of the steps and falls linearly to zero."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay, nesterov=True)
    per_epoch, start = len(inputs) // batch_size, time.time()
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        total = 0.0
        for k in range(per_epoch):
            done = (epoch * per_epoch + k) / (epochs * per_epoch)
            optimizer.param_groups[0]["lr"] = rate * min(done / 0.15, (1 - done) / 0.85) + 1e-4
            chosen = order[k * batch_size : (k + 1) * batch_size]
            batch = augment(inputs[chosen], generator)
            loss = F.cross_entropy(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / per_epoch:.3f}, {time.time() - start:.0f} s", flush=True)
    model.eval()


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        answers = torch.cat([model(part).argmax(1) for part in inputs.split(500)])
    return float((answers == labels).double().mean())


def write(model: nn.Module, name: str, /, **notes: object) -> None:
    """The checkpoint with its notes."""
    path = WEIGHTS / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, path, {key: str(value) for key, value in notes.items()})
    path.chmod(0o644)  # safetensors keeps its files to their owner
    print(f"{path.name}: {path.stat().st_size:,} bytes, {notes}", flush=True)


def flipped_and_cropped(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored at random, then a random 28 x 28 crop of the image with a border of 2 pixels."""
    flip = torch.rand(len(inputs), generator=generator) < 0.5
    inputs = torch.where(flip.view(-1, 1, 1, 1), inputs.flip(3), inputs)
    size, border = inputs.shape[-1], 2
    padded = F.pad(inputs, (border,) * 4, value=-FashionNet.MEAN / FashionNet.DEVIATION)  # black
    top, left = torch.randint(0, 2 * border + 1, (2, len(inputs), 1), generator=generator)
    rows, columns = top + torch.arange(size), left + torch.arange(size)
    image = torch.arange(len(inputs)).view(-1, 1, 1)
    cropped = padded[image, 0, rows.unsqueeze(2), columns.unsqueeze(1)].unsqueeze(1)
    return cropped.contiguous(memory_format=torch.channels_last)


def fashion(epochs: int) -> None:
    """FashionNet on the 60,000 training images."""
    torch.manual_seed(SEED)
    model = FashionNet().to(memory_format=torch.channels_last)  # a third less time to train
    images, labels = fashion_images("train")
    start = time.time()
    train(model, fashion_inputs(images), labels, flipped_and_cropped, epochs=epochs)
    seconds = time.time() - start
    model = model.to(memory_format=torch.contiguous_format)
    images, labels = fashion_images("test")
    write(
        model,
        "fashion",
        model="normadapt.bench.models.FashionNet",
        data="Fashion-MNIST, 60,000 training images (Debian dataset-fashion-mnist, MIT licence)",
        licence="Apache-2.0, as normadapt",
        seed=SEED,
        epochs=epochs,
        seconds=round(seconds),
        test_accuracy=round(accuracy(model, fashion_inputs(images), labels), 4),
    )


def scaled(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Each window times a random factor near 1, a little noise added: people differ in vigour."""
    factor = 1 + 0.1 * torch.randn((len(inputs), 1, 1), generator=generator)
    return factor * inputs + 0.05 * torch.randn(inputs.shape, generator=generator)


def watch(epochs: int, folds: list[str]) -> None:
    """An ActivityNet per fold, on windows of the subjects that the fold does not leave out."""
    for fold in folds:
        subjects = activity.UNSEEN[fold]
        torch.manual_seed(SEED)
        model = ActivityNet()
        inputs, labels = activity.training_windows(fold, hop=activity.HOP // 2)
        train(model, activity.normalized(inputs, fold), labels, scaled, epochs=epochs, batch_size=64, rate=0.1)
        inputs, labels = activity.clean_windows(fold)
        write(
            model,
            f"activity-{fold}",
            model="normadapt.bench.models.ActivityNet",
            data=f"watch data of seglearn (BSD licence), first 80 % of each series, without subjects {subjects}",
            licence="Apache-2.0, as normadapt",
            seed=SEED,
            epochs=epochs,
            clean_accuracy=round(accuracy(model, activity.normalized(inputs, fold), labels), 4),
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fashion", "activity"])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--folds", nargs="+", choices=list(activity.UNSEEN), default=list(activity.UNSEEN))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.what == "fashion":
        fashion(chosen.epochs or 10)
    else:
        watch(chosen.epochs or 20, chosen.folds)
