"""A trial, and a real server of its live page in a thread, for the tests of the page."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from normadapt.dashboard_command import server_of
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
