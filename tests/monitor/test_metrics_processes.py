"""Metrics of several processes, with real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

prometheus = pytest.importorskip("prometheus_client", reason="METRICS NOT TESTED: pip install prometheus-client")

SCRIPT = Path(__file__).parent / "metrics_worker.py"
DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


class Worker:
    """One process; its text streams are lines."""

    def __init__(self, mode: str, folder: Path | None) -> None:
        environment = {key: value for key, value in os.environ.items() if key != DIRECTORY}
        environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        if folder is not None:
            environment[DIRECTORY] = str(folder)
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), mode], env=environment, stdin=-1, stdout=-1, stderr=-1, text=True
        )

    def _stream(self, stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream

    def line(self) -> str:
        text = self._stream(self.process.stdout).readline().strip()
        if not text:
            raise AssertionError(f"the process ended: {self._stream(self.process.stderr).read()}")
        return text

    def say(self, text: str) -> str:
        self._send(text)
        return self.line()

    def _send(self, text: str) -> None:
        stream = self._stream(self.process.stdin)
        stream.write(text + "\n")
        stream.flush()

    def read(self) -> dict[str, float]:
        self._send("read")
        lines: list[str] = []
        while (text := self._stream(self.process.stdout).readline().rstrip("\n")) != "end":
            lines.append(text)
        samples = (text.rsplit(" ", 1) for text in lines if text and not text.startswith("#"))
        return {name: float(number) for name, number in samples}

    def end(self) -> None:
        self._send("end")
        assert self.process.wait(20) == 0


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[tuple[Worker, Worker]]:
    both = Worker("talk", tmp_path), Worker("talk", tmp_path)  # they start at the same time
    try:
        for worker in both:
            assert worker.line().split() == ["ready", str(worker.process.pid)]
        yield both
    finally:
        for worker in both:
            worker.process.kill()
            worker.process.communicate()


UPDATES = 'normadapt_updates_total{model="m"}'
COUNT = 'normadapt_update_duration_seconds_count{model="m"}'
LARGEST = 'normadapt_shift{model="m"}'
FIRST = 'normadapt_layer_shift{layer="1",model="m"}'


def test_two_processes_are_one_to_whoever_reads(workers: tuple[Worker, Worker], tmp_path: Path) -> None:
    first, second = workers
    _, calm = first.say("passes 7 0.0").split()
    told = second.read()
    assert told[UPDATES] == told[COUNT] == 7  # whoever is asked
    _, far = second.say("passes 5 6.0").split()
    assert float(far) > 2 * float(calm)
    for worker in workers:
        told = worker.read()
        assert told[UPDATES] == told[COUNT] == 12  # added up
        assert told['normadapt_update_duration_seconds_bucket{le="+Inf",model="m"}'] == 12
        assert told[LARGEST] >= float(far) * (1 - 1e-9)  # the last to say so
        layers = [name for name in told if name.startswith("normadapt_layer_shift{")]
        assert 1 <= len(layers) <= 2 * 4  # four times `top` in each process
        assert not any("pid=" in name for name in told)
    shift = told[LARGEST]
    _, _ = first.say("passes 1 0.0").split()
    assert first.read()[LARGEST] != shift  # the last to say so is another now
    second.end()
    told = first.read()
    assert told[UPDATES] == 13  # what an ended process has counted stays counted
    assert not list(tmp_path.glob(f"gauge_*_{second.process.pid}.db"))  # and what it said of itself does not
    first.process.kill()
    first.process.wait(20)
    from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

    registry = prometheus.CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    assert registry.get_sample_value("normadapt_shift", {"model": "m"}) is not None
    mark_process_dead(first.process.pid, str(tmp_path))  # as a server's child_exit does
    assert registry.get_sample_value("normadapt_shift", {"model": "m"}) is None
    assert registry.get_sample_value("normadapt_updates_total", {"model": "m"}) == 13


@pytest.mark.skipif(not hasattr(os, "fork"), reason="FORK NOT TESTED: there is none on this system")
def test_an_exporter_made_before_a_fork_goes_on_in_the_child() -> None:
    worker = Worker("fork", None)
    _, trouble = worker.process.communicate(timeout=60)
    assert worker.process.returncode == 0, trouble
