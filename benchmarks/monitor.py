"""What looking on costs, and the report of a long history: the targets of the recorder and of the page.

    python benchmarks/monitor.py [--rounds 60]

Recorder: a ResNet-18 with a 3x3 stem on 32x32 inputs, batches of 16, one thread. What the recorder does in a pass is
timed on its own, in the midst of real passes, and divided by the plain forward pass's time; the means over all rounds
are compared, so what it does only now and then counts. The report: 50 layers x 10,000 batches, from a recorder fed with
a made-up stream; the time from `Recorder.history` to the file, and the sizes of the file and of the history as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from overhead import images, resnet18
from torch import nn

import normadapt as na
from normadapt.adapted.observation import Seen
from normadapt.adapted.streams import Record
from normadapt.layers.moments import InstanceMoments
from normadapt.layers.policy import Diagnostics
from normadapt.monitor import Recorder

LAYERS, BATCHES, CHANNELS, CLASSES = 50, 10_000, 64, 10
SHARE, SECONDS, MEGABYTES = 0.01, 5.0, 6.0


def recorder_share(rounds: int) -> tuple[float, float]:
    """Seconds of a plain forward pass, and of what the recorder does in one."""
    model = resnet18()
    adapted = na.adapt(model)
    recorder = Recorder(adapted)
    recorder.detach()
    see, spent = recorder._see, 0.0

    def timed(stream: str, seen: Seen) -> None:
        nonlocal spent
        start = time.process_time()
        see(stream, seen)
        spent += time.process_time() - start

    plain = 0.0
    with torch.no_grad():
        for _ in range(5):  # warm: what happens once in a process is not a pass's
            adapted(images(16))
        adapted.observe(see).remove()
        with adapted.observe(see):
            for _ in range(40):
                adapted(images(16))
        with adapted.observe(timed) as handle:
            for _ in range(rounds):
                batch = images(16)
                start = time.process_time()
                model(batch)
                plain += time.process_time() - start
                adapted(batch)
            if handle.failures:
                raise SystemExit(f"the recorder failed: {handle.error!r}")
    return plain / rounds, spent / rounds


def deep_model() -> nn.Module:
    """As many layers as the page's target has."""
    torch.manual_seed(0)
    blocks = [
        m for i in range(LAYERS) for m in (nn.Conv2d(CHANNELS if i else 3, CHANNELS, 1), nn.BatchNorm2d(CHANNELS))
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES)).eval()


def long_recorder() -> Recorder:
    """A recorder that has seen a stream which drifts away, comes back and jumps; nothing but the recorder is run."""
    adapted = na.adapt(deep_model())
    now = 0.0
    recorder = Recorder(adapted, clock=lambda: now)
    recorder.detach()
    generator = torch.Generator().manual_seed(0)
    buffers = [(source.mean.float(), source.variance.float()) for source in adapted.sources]
    depth = torch.linspace(1.0, 0.2, LAYERS).tolist()
    pool = [torch.softmax(3 * torch.randn(16, CLASSES, generator=generator), 1) for _ in range(64)]
    moments = [
        [
            InstanceMoments(torch.randn(2, 16, CHANNELS, dtype=torch.float64, generator=generator) + 0.5 * d)
            for d in depth
        ]
        for _ in range(16)
    ]
    for batch in range(BATCHES):
        now = 1.7e9 + batch
        place = batch / BATCHES
        level = 0.0 if place < 0.2 else 0.8 * (place - 0.2) if place < 0.5 else 0.05 if place < 0.7 else 0.9
        noise = torch.rand(LAYERS, generator=generator).tolist()
        records = []
        for layer in range(LAYERS):
            shift = level * depth[layer] * (0.9 + 0.2 * noise[layer])
            squared = CHANNELS * shift * shift
            chance = CHANNELS * 0.01 * (0.7 + 0.6 * noise[layer])
            told: Any = Diagnostics(
                200.0,
                (squared / 2, squared / 2),
                (squared / 2 + chance, squared / 2 + chance),
                ((0.64, 0.0128), (0.64, 0.0128)),
                (min(1.0, 4 * shift), min(1.0, 3 * shift)),
                "tracking",
            )
            records.append(Record((), buffers[layer], 16 * (batch + 1), 0, "tracking", told))
        recorder._see("default", Seen(records, moments[batch % 16], None, pool[batch % 64], 0.01))
        if batch % 3 == 0:
            recorder.compare(pool[batch % 64], pool[(batch + (place > 0.7)) % 64], "default")
        if batch in (0, 3000, 5000, 7000):
            recorder.mark({0: "day", 3000: "evening", 5000: "lamp replaced", 7000: "another camera"}[batch])
    return recorder


def main() -> None:
    """Measure, print, and say whether the targets are met."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--keep", type=Path, help="folder to leave the page in")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain, spent = recorder_share(arguments.rounds)
    print(
        f"recorder: {1e6 * spent:.0f} us a pass, {spent / plain:.2%} of a forward pass ({1e3 * plain:.1f} ms, n = 16)"
    )
    start = time.perf_counter()
    recorder = long_recorder()
    print(f"(the made-up stream of {LAYERS} layers x {BATCHES:,} batches took {time.perf_counter() - start:.1f} s)")
    gc.collect()
    start = time.perf_counter()
    report = recorder.report()
    with tempfile.TemporaryDirectory() as temporary:
        page = report.to_html((arguments.keep or Path(temporary)) / "report.html", title="A long stream")
        seconds, megabytes = time.perf_counter() - start, page.stat().st_size / 1e6
    print(f"report: {seconds:.2f} s, {megabytes:.2f} MB")
    history = len(json.dumps(report.history.to_dict(), allow_nan=False)) / 1e6 if report.history is not None else 0.0
    print(f"history as JSON: {history:.2f} MB")
    met = spent <= SHARE * plain and seconds <= SECONDS and megabytes <= MEGABYTES and history <= 1.0
    print("all targets are met" if met else "NOT all targets are met")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
