"""How soon the live page shows a batch, what 200 open pages cost, and what a page costs the requests.

    python benchmarks/live.py [--batches 60]

A pilot with a ResNet-18 (3x3 stem, 32x32 inputs, batches of 16, one thread) answers a request every 0.5 s in its shadow
stage, with a store on the disk. What looks at the page runs in a process of its own, listens to the events, and asks
for the view at each, as `live.js` does; a batch is shown when a view that counts it has arrived in full. In the last
part the page is `normadapt dashboard` beside the pilot, which saves its state at every request.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch
from overhead import images, resnet18

from normadapt.dashboard_command import server_of
from normadapt.monitor import Recorder, app
from normadapt.pilot import Disagreement, NonFinite, Pilot, Plan

TARGET, CLIENTS, EVERY = 0.2, 200, 0.5


# -- who looks ---------------------------------------------------------------------------------------------------------


async def get(host: str, port: int, path: str) -> bytes:
    """A body, over a connection of its own."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return answer.partition(b"\r\n\r\n")[2]


async def page(host: str, port: int, reads: bool) -> None:
    """Listen, ask for the view at every event, and say which it was and when it was there; one reads the items in it.

    Reading them all would be most of the work, and a browser's, which has a machine of its own.
    """
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET /events HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    while line := await reader.readline():
        if line.startswith(b"data: "):
            body = await get(host, port, "/view")
            moment = time.time()
            start = zlib.decompressobj(31).decompress(body, 300)
            version = int(re.search(rb'"version":(\d+)', start)[1])  # type: ignore[index]
            found = re.search(rb"([\d,]+) items answered", gzip.decompress(body)) if reads else None
            items = int(found[1].replace(b",", b"")) if found else None
            sys.stdout.write(json.dumps([moment, version, items, len(body)]) + "\n")
            sys.stdout.flush()
    writer.close()


async def pages(url: str, count: int) -> None:
    """So many pages, until this process is ended."""
    address = urlsplit(url)
    await asyncio.gather(*(page(address.hostname or "", address.port or 0, number == 0) for number in range(count)))


# -- what is looked at -------------------------------------------------------------------------------------------------


class Watcher:
    """Pages in another process, and what they have seen."""

    def __init__(self, url: str, count: int) -> None:
        command = [sys.executable, __file__, "--pages", str(count), "--url", url]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.seen: list[tuple[float, int, int | None, int]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.seen.append(tuple(json.loads(line)))

    def wait(self, count: int) -> None:
        """Until that many views have come."""
        end = time.monotonic() + 60
        while len(self.seen) < count and time.monotonic() < end:
            time.sleep(0.02)

    def delays(self, batches: list[tuple[float, int]], count: int) -> list[float]:
        """Seconds from each batch's end until that many pages had a view that counts it."""
        first = {}  # items -> version
        for _, version, items, _ in self.seen:
            if items is not None:
                first.setdefault(items, version)
        found = []
        for done, items in batches:
            version = min((v for known, v in first.items() if known >= items), default=None)
            if version is not None:
                times = sorted(moment for moment, told, _, _ in self.seen if told >= version and moment >= done)
                if len(times) >= count:
                    found.append(times[count - 1] - done)
        return found

    def end(self) -> None:
        """Close the pages."""
        self.process.terminate()
        self.process.wait()


@contextmanager
def served(made: object) -> Iterator[str]:
    """The page of this process's pilot, in a thread."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        server = server_of(made)  # type: ignore[arg-type]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


@contextmanager
def beside(store: Path) -> Iterator[str]:
    """The page of a store, in a process of its own."""
    command = [sys.executable, "-u", "-m", "normadapt.cli", "dashboard", "--store", str(store), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split("/ shows")[0]
        process.terminate()


def send(pilot: Pilot, count: int, items: int) -> tuple[list[tuple[float, int]], list[float]]:
    """Requests, one every EVERY seconds: when each was answered with how many items in all, and how long it took."""
    batches, took = [], []
    with torch.no_grad():
        for _ in range(count):
            batch = images(16)
            start = time.perf_counter()
            pilot(batch)
            took.append(time.perf_counter() - start)
            items += 16
            batches.append((time.time(), items))
            time.sleep(max(0.0, EVERY - took[-1]))
    time.sleep(1.0)
    return batches, took


def say(name: str, delays: list[float], of: int) -> float:
    """Print the quantiles of some delays; the median."""
    middle = statistics.median(delays)
    high = sorted(delays)[int(0.95 * (len(delays) - 1))]
    print(
        f"{name}: median {1e3 * middle:.0f} ms, 95 % within {1e3 * high:.0f} ms, slowest {1e3 * max(delays):.0f} ms "
        f"({len(delays)} of {of} batches seen)"
    )
    return middle


def main(count: int) -> None:
    """Measure, print, and say whether the target is met."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        store = Path(temporary) / "store"
        plan = Plan(guards=(Disagreement(), NonFinite()), save_every=16)
        with Pilot(resnet18(), store=store, plan=plan) as pilot:
            recorder = Recorder(pilot)
            items = 16 * count
            _, alone = send(pilot, count, 0)
            made = app(recorder)
            with served(made) as url:
                watcher = Watcher(url, 1)
                watcher.wait(1)
                batches, watched = send(pilot, count, items)
                items += 16 * count
                middle = say("in one process, 1 page", watcher.delays(batches, 1), count)
                size, layers = watcher.seen[-1][3], len(recorder.history().sites)
                print(f"  a view has {size / 1e3:.0f} kB (compressed), of {layers} layers")
                watcher.end()
                before, after = statistics.median(alone), statistics.median(watched)
                print(f"  a request takes {1e3 * before:.1f} ms without a page, {1e3 * after:.1f} ms with it (medians)")
                watcher = Watcher(url, CLIENTS)
                watcher.wait(CLIENTS)
                looks, start = made.state.hub.looks, time.monotonic()
                batches, crowded = send(pilot, count, items)
                items += 16 * count
                rate = (made.state.hub.looks - looks) / (time.monotonic() - start)
                say(f"in one process, {CLIENTS} pages, until the last has it", watcher.delays(batches, CLIENTS), count)
                print(f"  {rate:.1f} looks a second for all; a request takes {1e3 * statistics.median(crowded):.1f} ms")
                watcher.end()
            with beside(store) as url:
                watcher = Watcher(url, 1)
                watcher.wait(1)
                batches, _ = send(pilot, count, items)
                say("beside the pilot, from its saving", watcher.delays(batches, 1), count)
                watcher.end()
    met = middle <= TARGET
    print(f"target {1e3 * TARGET:.0f} ms in one process: {'met' if met else 'MISSED'}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--pages", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.pages:
        asyncio.run(pages(arguments.url, arguments.pages))
    else:
        main(arguments.batches)
