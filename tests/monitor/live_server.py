"""A trial, and a real server of its live page in a thread, for the tests of the page."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from torch import nn

from normadapt import Domains
from normadapt.dashboard_command import server_of
from normadapt.monitor import Recorder
from normadapt.pilot import Disagreement, NonFinite, StageRule
from pilot import stories


class AheadClock:
    """The real time, and the seconds that a story adds to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return time.time() + self.now


def story(store: Path | None, stage: str = "canary") -> Any:
    """Requests to a pilot that has come to a stage; its state is saved at every request."""
    told = stories.Story(store=store, plan=stories.make_plan(save_every=1), clock=AheadClock())
    return told.until(stage) if stage else told


@contextmanager
def served(made: FastAPI, port: int = 0) -> Iterator[str]:
    """A real server in a thread; gives its address."""
    with socket.create_server(("127.0.0.1", port), backlog=512) as listener:
        server = server_of(made)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait(lambda: bool(server.started))
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the server did not end"


def wait(done: Callable[[], bool], seconds: float = 10.0) -> None:
    """Until something is so."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise AssertionError("it did not come to pass in time")
        time.sleep(0.005)


def two_layers() -> nn.Sequential:
    """The stories' model with another normalized layer behind its first: still right on nearly all of their images."""
    told = stories.make_model()
    more = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, momentum=None))
    with torch.no_grad():
        more[0].weight.copy_(torch.eye(8)[:, :, None, None])
        more.train()(told[:3](stories.images(600, seed=101)[0]))
        # its normalization is taken back, so that the head finds what it was fitted to
        more[1].weight.copy_((more[1].running_var + more[1].eps).sqrt())
        more[1].bias.copy_(more[1].running_mean)
    return nn.Sequential(*told[:3], *more, *told[3:]).eval()


def shifted_story(store: Path | None, batches: int = 30) -> Any:
    """A trial in its canary whose camera has become brighter lately."""
    steps = (StageRule(1000, 10.0, share=0.25), StageRule(1000, 10.0, share=0.5))
    model = two_layers()
    told = stories.Story(
        store=store,
        plan=stories.make_plan(save_every=1, guards=(NonFinite(), Disagreement(margin=0.5)), canary=steps),
        clock=AheadClock(),
        model=model,
        profile=stories.make_profile(model),
        policy=Domains(),
    )
    told.recorder = Recorder(told.pilot)
    told.until("canary", stream="left")
    for _ in range(batches):
        told.send(change=lambda x: 1.3 * x + 0.4, stream="left")
    told.send(stream="right")
    told.send(stream="left")
    return told
