"""`normadapt dashboard`: what it refuses in one line, and that it serves, and ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from monitor.live_server import story, wait
from normadapt import dashboard_command
from normadapt.cli import app
from normadapt.monitor import serving

TOKEN = "a long token"


def refused(*args: str, **env: str) -> str:
    outcome = CliRunner().invoke(app, ["dashboard", *args], env=env)
    assert outcome.exit_code == 2, outcome.output
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit)
    lines = outcome.output.strip().splitlines()
    assert len(lines) == 1, outcome.output
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def served_with(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    told: list[Any] = []
    monkeypatch.setattr(dashboard_command, "serve", lambda made, listener: told.append((made, listener.getsockname())))
    return told


@pytest.fixture
def store(tmp_path: Path) -> Path:
    story(tmp_path / "s").pilot.close()
    return tmp_path / "s"


def test_a_store_that_is_none_is_said_in_a_line(tmp_path: Path) -> None:
    assert "there is no store at" in refused("--store", str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "other").mkdir()
    assert "there is no store at" in refused("--store", str(tmp_path / "other"))
    (tmp_path / "other" / "store.db").write_text("nothing of ours, and long enough to have a header of its own")
    assert "store.db" in refused("--store", str(tmp_path / "other"))


def test_a_port_that_is_taken_is_said_in_a_line(store: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        told = refused("--store", str(store), "--port", port)
        assert f"port {port}" in told
        assert "in use" in told
    assert "nothing can listen at" in refused("--store", str(store), "--host", "203.0.113.1", "--token", TOKEN)
    assert "nothing can listen at" in refused("--store", str(store), "--host", "no.such.host.invalid", "--token", TOKEN)


def test_another_host_needs_a_token(store: Path, served_with: list[Any]) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        assert "give a token" in refused("--store", str(store), "--host", host)
    assert "give a token" in refused("--store", str(store), "--host", "0.0.0.0", NORMADAPT_TOKEN="")
    assert "at least 8" in refused("--store", str(store), "--token", "short")
    assert served_with == []
    arguments = ["dashboard", "--store", str(store), "--host", "0.0.0.0", "--port", "0"]
    outcome = CliRunner().invoke(app, arguments, env={"NORMADAPT_TOKEN": TOKEN})
    assert outcome.exit_code == 0, outcome.output
    assert TOKEN not in outcome.output
    assert served_with[0][0].state.access.knows(TOKEN)
    assert "*" in served_with[0][0].state.access.hosts


def test_the_loopback_alone_by_default(store: Path, served_with: list[Any]) -> None:
    outcome = CliRunner().invoke(app, ["dashboard", "--store", str(store), "--port", "0"])
    assert outcome.exit_code == 0, outcome.output
    made, address = served_with[0]
    assert address[0] == "127.0.0.1"
    assert made.state.access.open
    assert made.state.access.hosts == {"localhost", "127.0.0.1", "::1"}


def test_without_the_extra_it_says_what_to_install(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert "pip install 'normadapt[dashboard]'" in refused("--store", str(store))


def test_it_serves_and_ends_on_a_signal(store: Path) -> None:
    command = [sys.executable, "-m", "normadapt.cli", "dashboard", "--store", str(store), "--port", "0"]
    env = {**os.environ, "NORMADAPT_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.match(r"(http://127\.0\.0\.1:\d+)/", line)
            assert found is not None, line
            base = found[1]
            wait(lambda: _code(base) == 401)
            allowed = {"authorization": f"Bearer {TOKEN}"}
            assert "canary" in httpx.get(f"{base}/view", headers=allowed).json()["trial"]
            with httpx.stream("GET", f"{base}/events", headers=allowed, timeout=20) as events:
                next(events.iter_lines())  # a page that is open does not keep it
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=10)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (0, "", "")


def _code(base: str) -> int:
    try:
        return httpx.get(f"{base}/view").status_code
    except httpx.TransportError:
        return 0
