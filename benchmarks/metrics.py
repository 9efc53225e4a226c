"""What metrics cost beside a forward pass: ResNet-18 on 32x32 inputs, 16 images, one thread.

    python benchmarks/metrics.py [--rounds 60]

Times what the exporter does while a request waits (of 20,000 passes shown to it), what a refresh costs in its own
thread, and what a scrape costs; and, for what might be missed so, the ratio of whole passes with and without it, taken
in turns. The target is 1 % of a forward pass.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from overhead import images, resnet18
from prometheus_client import CollectorRegistry, generate_latest

import normadapt as na
from normadapt.adapted.observation import Seen
from normadapt.monitor.metrics import PrometheusExporter
from normadapt.pilot import Disagreement, NonFinite, Pilot, Plan


def seconds(work: Any) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def shown(exporter: PrometheusExporter, seen: Seen, count: int = 20_000) -> float:
    """Seconds that showing a pass takes while the request waits."""
    look = exporter._meter._see
    started = time.perf_counter()
    for _ in range(count):
        look("default", seen)
    return (time.perf_counter() - started) / count


def main(rounds: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    model, x, every = resnet18(), images(16), 5.0
    plain, watched = na.adapt(copy.deepcopy(model)), na.adapt(copy.deepcopy(model))
    kept: list[Seen] = []
    registry = CollectorRegistry()
    with torch.no_grad(), PrometheusExporter(watched, registry=registry, seconds=every) as exporter:
        with watched.observe(lambda _stream, seen: kept.append(seen)):
            watched(x)
        for adapted in (plain, watched):
            adapted(x)
        times, ratios = [], []
        for place in range(rounds):
            order = (plain, watched) if place % 2 else (watched, plain)
            took = {id(adapted): seconds(lambda: adapted(x)) for adapted in order}  # noqa: B023
            times.append(took[id(plain)])
            ratios.append(took[id(watched)] / took[id(plain)])
        forward, show = statistics.median(times), shown(exporter, kept[0])
        refreshes = []
        for _ in range(20):
            for _ in range(64):
                exporter._meter._see("default", kept[0])
            refreshes.append(seconds(exporter.refresh))
        scrape = statistics.median(seconds(lambda: generate_latest(registry)) for _ in range(20))
    refresh = statistics.median(refreshes)
    pilot = Pilot(copy.deepcopy(model), plan=Plan(guards=(Disagreement(), NonFinite())))
    with torch.no_grad():
        pilot(x)
    status = statistics.median(seconds(pilot.status) for _ in range(50))
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"forward pass that adapts, 16 images   {forward * 1e3:8.2f} ms")
    print(f"exporter while a request waits        {show * 1e6:8.2f} us   {show / forward:.3%} of it")
    print(f"refresh in its thread, 64 passes      {refresh * 1e3:8.2f} ms   every {every:g} s: {refresh / every:.3%}")
    print(f"  of which the pilot's lock is held   {status * 1e3:8.2f} ms")
    print(f"scrape, {len(generate_latest(registry).splitlines())} lines                  {scrape * 1e3:8.2f} ms")
    print(f"whole passes, with over without       {middle:8.3f}      quartiles {low:.3f} to {high:.3f}")
    cost = show / forward + refresh / every
    print(f"cost {cost:.3%} of a forward pass, target 1 %: {'met' if cost <= 0.01 else 'MISSED'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    main(parser.parse_args().rounds)
