"""A process with an exporter, for tests of several: does so many passes, then what it is told, line by line."""

import os
import sys
import time

import torch
from torch import nn

import normadapt as na
from monitor import watched
from normadapt.monitor.metrics import PrometheusExporter


def make() -> na.AdaptedModel:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 2, 3)]
    for _ in range(8):
        layers += [nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1)]
    return watched.adapted(nn.Sequential(*layers, nn.Flatten(), nn.Linear(72, 3)))


def passes(adapted: na.AdaptedModel, count: int, shift: float) -> None:
    with torch.no_grad():
        for place in range(count):
            adapted((torch.randn(8, 1, 8, 8) + shift) * (1 + place % 5))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def talk() -> None:
    adapted = make()
    exporter = PrometheusExporter(adapted, top=1, seconds=3600, model="m")
    say(f"ready {os.getpid()}")
    for line in sys.stdin:
        word, *numbers = line.split()
        if word == "passes":
            count, shift = int(numbers[0]), float(numbers[1])
            for _ in range(count):  # a refresh after each: other layers come to lead
                passes(adapted, 1, shift)
                exporter.refresh()
            say(f"done {adapted.report().sites[0].shift}")
        elif word == "read":
            from prometheus_client import generate_latest

            say(generate_latest(exporter.readable()).decode() + "end")
        elif word == "end":
            return


def fork() -> None:
    """A worker that was forked after the exporter was made; exits with 0 if its own thread refreshes there."""
    from prometheus_client import CollectorRegistry

    adapted, registry = make(), CollectorRegistry()
    exporter = PrometheusExporter(adapted, registry=registry, seconds=0.05, model="m")
    assert exporter.model
    child = os.fork()
    if not child:
        passes(adapted, 3, 2.0)
        limit = time.monotonic() + 5
        while registry.get_sample_value("normadapt_shift", {"model": "m"}) is None and time.monotonic() < limit:
            time.sleep(0.02)
        os._exit(registry.get_sample_value("normadapt_shift", {"model": "m"}) is None)
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"talk": talk, "fork": fork}[sys.argv[1]]()
