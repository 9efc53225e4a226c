"""The live page's application: what it shows and does, whom it lets in, and what it survives."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import socket
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from torch import nn

import normadapt as na
from monitor.live_server import served, story, wait
from normadapt.errors import ExtraMissingError, StoreError
from normadapt.monitor import HISTORY, Recorder, app, live, serving
from normadapt.monitor.live_view import trial
from normadapt.reports.history import History
from normadapt.reports.report import Report
from normadapt.store import Store

BASE = "http://127.0.0.1"


@asynccontextmanager
async def client(made: Any, base: str = BASE, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(made), base_url=base, **options) as asked:
        yield asked


def get(made: Any, path: str, **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client(made) as asked:
            return await asked.get(path, **options)

    return asyncio.run(ask())


def post(made: Any, action: str, told: Any = None, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with client(made) as asked:
            csrf = (await asked.get("/view", headers=headers)).json().get("csrf", "")
            told_headers = {"x-normadapt-csrf": csrf, **headers}
            return await asked.post(
                f"/actions/{action}", json={"by": "anna"} if told is None else told, headers=told_headers
            )

    return asyncio.run(ask())


def error(answer: httpx.Response, code: int) -> str:
    assert answer.status_code == code, answer.text
    return str(answer.json()["error"])


@contextmanager
def listening(base: str, query: str = "") -> Iterator[Iterator[int]]:
    """Versions that the stream of events tells."""
    with httpx.stream("GET", f"{base}/events{query}", timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield (json.loads(line[6:])["version"] for line in answer.iter_lines() if line.startswith("data: "))


# -- what it shows -----------------------------------------------------------------------------------------------------


def test_the_view_of_a_pilot_has_the_trial_and_what_the_report_has(tmp_path: Path) -> None:
    told = story(tmp_path / "s", "")
    made = app(Recorder(told.pilot))
    for _ in range(20):
        told.send(stream="left")
    told.send(stream="right")
    values = get(made, "/view").json()
    assert values["stream"] == "right"
    assert values["streams"] == ["left", "right"]
    assert '<li class="here" aria-current="step">shadow</li>' in values["trial"]
    assert "of 100" in values["trial"]
    assert values["actions"]["promote"] == "canary 25%"
    assert values["actions"]["snapshots"][-1][1].startswith("0: the source")
    assert "event" in values["log"]
    left = get(made, "/view?stream=left").json()
    assert left["data"]["history"]["items"] == [8] * 20
    assert "headline" in left["words"]
    assert values["version"] == left["version"]


def test_a_model_without_a_trial_has_a_page_without_buttons() -> None:
    adapted = na.adapt(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    made = app(Recorder(adapted))
    values = get(made, "/view").json()
    assert values["trial"] == ""
    assert values["actions"] == {"any": False}
    assert values["log"] == ""
    assert "nothing to ask for" in error(post(made, "pause"), 409)
    assert get(made, "/").status_code == 200


def test_the_view_of_a_store_is_what_the_pilot_saved(tmp_path: Path) -> None:
    told = story(tmp_path / "s", "")
    Recorder(told.pilot)
    told.until("canary", stream="left")
    told.pilot.close()
    values = get(app(tmp_path / "s"), "/view").json()
    assert values["stream"] == "left"
    assert values["saved"].startswith("As the pilot saved it")
    assert "canary 25%</li>" in values["trial"]
    assert values["data"]["history"]["time"] is True
    with Store(tmp_path / "s") as store:
        assert get(app(store), "/view").json()["log"] == values["log"]


def test_a_roll_back_stands_where_the_trial_did() -> None:
    told = story(None)
    told.pilot.rollback("anna", reason="a <b>smell</b>")
    text = trial(told.pilot.status())
    assert '<li class="away rolled_back" aria-current="step">rolled back</li>' in text
    assert "Taken back: rolled back by anna: a &lt;b&gt;smell&lt;/b&gt;; it waits for an operator." in text


def test_an_application_can_be_mounted_under_a_prefix() -> None:
    mine = FastAPI()
    mine.mount("/inside/page", app(story(None).pilot, token="a long token"))

    async def ask() -> None:
        async with client(mine) as asked:
            assert (await asked.get("/inside/page/")).status_code == 401
            moved = await asked.get("/inside/page/?token=a+long+token")
            assert moved.status_code == 303
            assert moved.headers["location"] == "/inside/page/"
            assert "path=/inside/page/" in moved.headers["set-cookie"].lower()
            page = await asked.get("/inside/page/")
            assert page.status_code == 200
            assert 'src="assets/' in page.text
            assert (await asked.get("/inside/page/view")).json()["streams"] is not None
            assert (await asked.get("/inside/page/assets/live.js")).status_code == 200

    asyncio.run(ask())


def test_the_page_and_its_files_ask_nobody_else_for_anything() -> None:
    made = app(story(None, "").pilot)
    for path in ("/", "/assets/live.js", "/assets/figures.js", "/assets/page.css"):
        text = get(made, path).text.replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text, path
        assert "https://" not in text, path
    for path in ("/docs", "/redoc", "/openapi.json", "/assets/../app.py", "/assets/report_page.py", "/nowhere"):
        assert get(made, path).status_code == 404, path


def test_what_needs_the_extra_says_so_and_nothing_else_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        serving, "find_spec", lambda name: None if name == "fastapi" else importlib.util.find_spec(name)
    )
    with pytest.raises(ExtraMissingError, match=r"fastapi -> pip install 'normadapt\[dashboard\]'"):
        app(story(None, "").pilot)


def test_the_package_does_not_import_fastapi() -> None:
    import subprocess

    code = "import sys, normadapt.cli; sys.exit('fastapi' in sys.modules or 'uvicorn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- what it does ------------------------------------------------------------------------------------------------------


def test_the_buttons_act_on_a_pilot(tmp_path: Path) -> None:
    told = story(tmp_path / "s")
    made = app(told.pilot)
    assert "Paused" in post(made, "pause").json()["done"]
    assert told.pilot.position.paused
    assert get(made, "/view").json()["actions"]["paused"] is True
    post(made, "resume")
    assert not told.pilot.position.paused
    assert "is not complete" in error(post(made, "promote"), 409)
    assert post(made, "promote", {"by": "anna", "force": True}).status_code == 200
    assert told.pilot.position.step == 1
    answer = post(made, "rollback", {"by": "anna", "to": 0, "reason": "a smell"})
    assert "rolled back" in answer.json()["done"]
    assert told.pilot.stage.value == "rolled_back"
    view = get(made, "/view").json()
    assert "head from snapshot" in view["log"]
    assert "by anna: a smell" in view["log"]


def test_the_buttons_leave_commands_in_a_store(tmp_path: Path) -> None:
    told = story(tmp_path / "s")
    made = app(tmp_path / "s")
    assert "is left for the pilot" in post(made, "pause").json()["done"]
    told.pilot.poll()
    assert told.pilot.position.paused
    post(made, "promote", {"by": "anna", "force": True})
    told.pilot.poll()
    assert told.pilot.position.step == 1
    assert "Back at snapshot 0" in post(made, "rollback", {"by": "anna", "to": 0, "reason": "a smell"}).json()["done"]
    told.pilot.poll()
    assert told.pilot.stage.value == "rolled_back"
    assert told.pilot.serving == "source"
    assert "no snapshot 99" in error(post(made, "rollback", {"by": "anna", "to": 99}), 409)


def test_the_last_good_snapshot_is_the_one_that_the_status_names(tmp_path: Path) -> None:
    told = story(tmp_path / "s")
    with Store(tmp_path / "s", create=False) as store:
        status = store.read_state("pilot-status")
    assert status is not None
    assert status["snapshot"] > 0
    done = post(app(tmp_path / "s"), "rollback", {"by": "anna", "to": None}).json()["done"]
    assert f"Back at snapshot {status['snapshot']} " in done
    told.pilot.poll()
    assert told.pilot.serving == f"snapshot {status['snapshot']}"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({}, "by must be the name"),
        ({"by": "  "}, "by must be the name"),
        ({"by": 3}, "by must be the name"),
        ({"by": "a" * 101}, "by must be the name"),
        ({"by": "a\nb"}, "by must be the name"),
        ({"by": "a", "to": "1"}, "to must be the number"),
        ({"by": "a", "to": True}, "to must be the number"),
        ({"by": "a", "to": -1}, "to must be the number"),
        ({"by": "a", "to": 1.5}, "to must be the number"),
        ({"by": "a", "to": 10**30}, "to must be the number"),
        ({"by": "a", "reason": ["x"]}, "reason must be a text"),
        ({"by": "a", "reason": "x" * 501}, "reason must be a text"),
        ({"by": "a", "reason": "\x00"}, "reason must be a text"),
        ({"by": "a", "force": "yes"}, "force must be true or false"),
        ({"by": "a", "stage": "full"}, "unknown 'stage'"),
        (["by"], "must be a JSON object"),
    ],
)
def test_bad_orders_are_refused_in_words(told: Any, words: str) -> None:
    assert words in error(post(app(story(None, "").pilot), "rollback", told), 422)


def test_bad_requests_are_refused_in_words(tmp_path: Path) -> None:
    made = app(story(tmp_path / "s", "").pilot)

    async def ask() -> None:
        async with client(made) as asked:
            csrf = {"x-normadapt-csrf": (await asked.get("/view")).json()["csrf"]}
            as_json = {**csrf, "content-type": "application/json"}
            assert "no action 'explode'" in error(
                await asked.post("/actions/explode", json={"by": "a"}, headers=csrf), 404
            )
            assert "no JSON" in error(await asked.post("/actions/pause", content=b"{", headers=as_json), 400)
            assert "no JSON" in error(await asked.post("/actions/pause", content=b"\xff\xfe{", headers=as_json), 400)
            deep = b"[" * 9000 + b"]" * 5000
            assert "no JSON" in error(await asked.post("/actions/pause", content=deep, headers=as_json), 400)
            assert "JSON" in error(await asked.post("/actions/pause", content=b"by=a", headers=csrf), 415)
            long = json.dumps({"by": "a" * 20_000}).encode()
            assert "at most" in error(await asked.post("/actions/pause", content=long, headers=as_json), 413)
            assert (await asked.get("/actions/pause")).status_code == 405
            assert (await asked.post("/view")).status_code == 405
            assert "nothing was seen of a stream 'x'" in error(await asked.get("/view?stream=x"), 404)
            assert "at most" in error(await asked.get("/view", params={"stream": "x" * 1001}), 422)
            assert "at most" in error(await asked.get("/events", params={"stream": "x" * 1001}), 422)

    asyncio.run(ask())


def test_what_is_watched_has_to_be_something() -> None:
    with pytest.raises(TypeError, match="needs a Pilot, a Recorder, a Store or a store's folder"):
        app(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 8 characters"):
        app(story(None, "").pilot, token="short")
    with pytest.raises(StoreError, match="there is no store"):
        app("/nowhere")


# -- whom it lets in ---------------------------------------------------------------------------------------------------


def test_every_answer_has_the_headers() -> None:
    made = app(story(None, "").pilot, token="a long token")
    for path in ("/", "/view", "/nowhere", "/assets/page.css"):
        headers = get(made, path).headers
        policy = headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "unsafe-eval" not in policy
        assert "frame-ancestors 'none'" in policy
        assert "default-src 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    assert get(made, "/").headers["cache-control"] == "no-store"


def test_a_token_is_needed_where_there_is_one() -> None:
    made = app(story(None, "").pilot, token="a long token")
    page = get(made, "/")
    assert page.status_code == 401
    assert '<input id="token"' in page.text
    for path in ("/view", "/events", "/assets/live.js", "/nowhere"):
        assert "a token is needed" in error(get(made, path), 401), path
    assert get(made, "/view", headers={"authorization": "Bearer a long token"}).status_code == 200
    assert get(made, "/view", headers={"authorization": "bearer  a long token"}).status_code == 200
    for wrong in ("Bearer", "Bearer a long toke", "Bearer a long token2", "Basic a long token", "a long token"):
        assert get(made, "/view", headers={"authorization": wrong}).status_code == 401
    assert post(made, "pause", None, authorization="Bearer a long token").status_code == 200


def test_the_form_gives_a_cookie_that_scripts_cannot_read() -> None:
    made = app(story(None, "").pilot, token="a long tökén")

    async def ask() -> None:
        async with client(made) as asked:
            assert (await asked.post("/login", data={"token": "wrong"})).status_code == 401
            assert "not the token" in (await asked.post("/login", content=b"\xff%%%")).text
            assert not asked.cookies
            answer = await asked.post("/login", data={"token": "a long tökén"})
            assert answer.status_code == 303
            cookie = answer.headers["set-cookie"]
            assert "HttpOnly" in cookie
            assert "SameSite=strict" in cookie
            assert "tök" not in cookie
            assert (await asked.get("/view")).status_code == 200
            name, value = next(iter(asked.cookies.items()))
            asked.cookies.set(name, value[:-1] + ("0" if value[-1] != "0" else "1"))
            assert (await asked.get("/view")).status_code == 401

    asyncio.run(ask())
    again = app(story(None, "").pilot, token="a long tökén")  # a restart keeps the browsers that were let in
    assert again.state.access.cookie == made.state.access.cookie
    assert again.state.access.csrf == made.state.access.csrf


def test_actions_need_our_own_page() -> None:
    told = story(None)
    made = app(told.pilot)
    out_of_date = "reload it"
    for headers, words in (
        ({"x-normadapt-csrf": ""}, out_of_date),
        ({"x-normadapt-csrf": "0" * 64}, out_of_date),
        ({"origin": "http://evil.example"}, "another site's page"),
        ({"origin": "null"}, "another site's page"),
        ({"sec-fetch-site": "cross-site"}, "another site's page"),
        ({"sec-fetch-site": "same-site"}, "another site's page"),
    ):
        assert words in error(post(made, "pause", None, **headers), 403), headers
    assert not told.pilot.position.paused
    assert post(made, "pause", None, origin="http://127.0.0.1", **{"sec-fetch-site": "same-origin"}).status_code == 200


def test_another_name_for_this_machine_is_refused() -> None:
    pilot = story(None, "").pilot

    def code(made: FastAPI, host: str) -> int:
        return get(made, "/view", headers={"host": host}).status_code

    made = app(pilot)
    assert [code(made, host) for host in ("localhost:8765", "127.0.0.1", "[::1]:1", "LOCALHOST")] == [200] * 4
    assert [code(made, host) for host in ("evil.example", "127.0.0.1.evil.example", "", "[", "10.0.0.1:8765")] == [
        421
    ] * 5
    assert code(app(pilot, hosts=["Page.example"]), "page.example:443") == 200
    assert code(app(pilot, hosts=["*"]), "anything") == 200
    assert get(app(pilot, token="a long token"), "/view", headers={"host": "x"}).status_code == 401


# -- how it is told ----------------------------------------------------------------------------------------------------


def test_an_update_is_there_soon_after_a_batch() -> None:
    told = story(None, "")
    told.send()
    with served(app(told.pilot)) as base, httpx.Client(base_url=base) as asked, listening(base) as versions:
        next(versions)
        time.sleep(0.5)
        took = []
        for _ in range(8):
            before = asked.get("/view").json()
            told.send()
            start = time.monotonic()
            for version in versions:
                if version > before["version"] and asked.get("/view").json()["data"] != before["data"]:
                    break
            took.append(time.monotonic() - start)
            time.sleep(0.15)
    assert sorted(took)[len(took) // 2] < 0.2, took


def test_a_store_is_asked_for_news(tmp_path: Path) -> None:
    told = story(tmp_path / "s", "")
    with served(app(tmp_path / "s")) as base, listening(base) as versions:
        first = next(versions)
        told.send()
        assert next(version for version in versions if version != first)
        wait(lambda: "8 of 100" in httpx.get(f"{base}/view").json()["trial"])


def test_nothing_is_read_while_nobody_looks() -> None:
    told = story(None, "")
    made = app(told.pilot)
    hub = made.state.hub
    with served(made) as base:
        with listening(base) as versions:
            next(versions)
            wait(lambda: hub.looks >= 1)
            assert hub.clients == 1
        wait(lambda: hub.clients == 0)
        looks = hub.looks
        for _ in range(5):
            told.send()
        time.sleep(0.4)
        assert hub.looks == looks
        assert not hub._views


def test_clients_that_go_leave_nothing_behind(tmp_path: Path) -> None:
    told = story(tmp_path / "s", "")
    made = app(told.pilot)
    hub = made.state.hub
    with served(made) as base:
        port = int(base.rpartition(":")[2])
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)) as raw:  # no goodbye: the connection is cut
                raw.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                raw.recv(100)
                told.send()
        wait(lambda: hub.clients == 0)
        wait(lambda: hub._task is None)
        told.send()
        assert httpx.get(f"{base}/view").status_code == 200
    assert told.pilot.adapted._observers


def test_two_hundred_clients_share_one_look() -> None:
    told = story(None, "")
    told.send()
    made = app(told.pilot)
    hub = made.state.hub

    async def listen_to(asked: httpx.AsyncClient, seen: list[int], go: asyncio.Event) -> None:
        async with asked.stream("GET", "/events") as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    seen.append(json.loads(line[6:])["version"])
                    if go.is_set() and seen[-1] > started[0]:
                        return

    started = [0]

    async def all_of_them(base: str) -> float:
        limits = httpx.Limits(max_connections=None)
        go = asyncio.Event()
        async with httpx.AsyncClient(base_url=base, timeout=60, limits=limits) as asked:
            seen: list[list[int]] = [[] for _ in range(200)]
            tasks = [asyncio.create_task(listen_to(asked, one, go)) for one in seen]
            while not all(seen):
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
            assert hub.clients == 200
            looks, started[0] = hub.looks, hub.version
            go.set()
            await asyncio.to_thread(told.send)
            start = time.monotonic()
            await asyncio.wait_for(asyncio.gather(*tasks), 30)
            assert hub.looks - looks <= 5  # not one for each
            return time.monotonic() - start

    with served(made) as base:
        assert asyncio.run(all_of_them(base)) < 5
        wait(lambda: hub.clients == 0)


def test_a_client_too_many_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normadapt.monitor.hub.CLIENTS", 1)
    with served(app(story(None, "").pilot)) as base, listening(base) as versions:
        next(versions)
        answer = httpx.get(f"{base}/events")
        assert "too many" in error(answer, 503)
        assert answer.headers["retry-after"]


def test_a_client_that_does_not_read_costs_no_memory_and_delays_nobody() -> None:
    told = story(None, "")
    made = app(told.pilot)
    with served(made) as base:
        port = int(base.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            with listening(base) as versions:
                for _ in range(10):
                    told.send()
                    next(versions)
            assert made.state.hub.clients >= 1
            told.send()
            assert httpx.get(f"{base}/view").status_code == 200


def test_streams_end_when_the_server_is_told_to_stop() -> None:
    with served(app(story(None, "").pilot)) as base:
        stream = httpx.stream("GET", f"{base}/events", timeout=20)
        answer = stream.__enter__()
        lines = answer.iter_lines()
        next(lines)
        start = time.monotonic()
    assert time.monotonic() - start < 4  # `served` waits for the server's end
    list(lines)  # a clean end, and no error
    stream.__exit__(None, None, None)


def test_looking_on_never_fails_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    told = story(None, "")
    made = app(told.pilot)
    with served(made) as base, listening(base) as versions:
        next(versions)
        monkeypatch.setattr(made.state.hub, "_loop", object())  # nothing that can be woken
        told.send()
        assert told.pilot.stage.value == "shadow"


# -- what it survives --------------------------------------------------------------------------------------------------


def test_a_store_that_another_writer_holds_is_shown_and_an_action_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_WAIT", 0.1)
    told = story(tmp_path / "s")
    told.pilot.close()
    made = app(tmp_path / "s")
    other = sqlite3.connect(tmp_path / "s" / "store.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    try:
        for action in ("pause", "rollback"):
            answer = post(made, action)
            assert "another" in error(answer, 503), answer.text
            assert answer.headers["retry-after"]
        assert "canary" in get(made, "/view").json()["trial"]
    finally:
        other.close()
    assert post(made, "pause").status_code == 200


def test_a_store_that_goes_leaves_the_last_look_with_a_note_and_comes_back(tmp_path: Path) -> None:
    told = story(tmp_path / "s")
    told.pilot.close()
    made = app(tmp_path / "s")
    with served(made) as base, listening(base) as versions:
        next(versions)
        wait(lambda: made.state.hub.looks >= 1)
        before = httpx.get(f"{base}/view").json()
        shutil.move(tmp_path / "s", tmp_path / "elsewhere")
        wait(lambda: "cannot be read" in httpx.get(f"{base}/view").json()["note"])
        after = httpx.get(f"{base}/view").json()
        assert after["trial"] == before["trial"]
        refused = httpx.post(f"{base}/actions/pause", json={"by": "a"}, headers={"x-normadapt-csrf": after["csrf"]})
        assert "there is no store" in error(refused, 503)
        shutil.move(tmp_path / "elsewhere", tmp_path / "s")
        wait(lambda: httpx.get(f"{base}/view").json()["note"] == "")
        assert httpx.get(f"{base}/view").json()["trial"] == before["trial"]


def test_a_store_that_never_could_be_read_is_a_clear_answer(tmp_path: Path) -> None:
    told = story(tmp_path / "s")
    told.pilot.close()
    with Store(tmp_path / "s") as store:
        store.write_state(HISTORY, {"report": {}, "streams": {}})
    assert "cannot be read" in error(get(app(tmp_path / "s"), "/view"), 503)


def test_trouble_of_a_pilots_store_is_a_note(tmp_path: Path) -> None:
    told = story(tmp_path / "s")
    made = app(told.pilot)
    shutil.rmtree(tmp_path / "s")
    told.send()
    values = get(made, "/view").json()
    assert "store" in values["note"]
    assert "canary" in values["trial"]


def test_a_hundred_thousand_rows_are_the_newest_and_a_count(tmp_path: Path) -> None:
    told = story(tmp_path / "s")
    told.pilot.close()
    rows, width = 100_000, 100_000
    with Store(tmp_path / "s") as store:
        first = store.history(1)[0].seq
        with store.transaction():
            for number in range(rows):
                store.record("note", number=number)
        noise = np.random.default_rng(0).normal(size=(1, width))
        numbers = (1e9 + np.arange(width), np.ones(width), np.ones(width), noise, noise, noise, noise, noise[0])
        history = History("long", ("1",), *numbers)
        report = Report.from_dict({**na.adapt(told.model).report().to_dict(), "stream": "long"})
        store.write_state(HISTORY, {"report": report.to_dict(), "streams": {"long": history.to_dict()}})
    made = app(tmp_path / "s")
    start = time.monotonic()
    answer = get(made, "/view")
    took = time.monotonic() - start
    values = answer.json()
    assert f"the newest 200 of {rows + first:,} events" in values["log"]
    assert f"number {rows - 1}<" in values["log"]
    assert values["log"].count("<tr") == 201
    assert len(values["data"]["history"]["starts"]) <= 256
    assert len(answer.content) < 200_000
    assert took < 10


def test_many_threads_and_pages_at_once(tmp_path: Path) -> None:
    told = story(tmp_path / "s", "")
    made = app(told.pilot)
    done = threading.Event()
    failures: list[str] = []

    def look(base: str) -> None:
        while not done.is_set():
            answer = httpx.get(f"{base}/view")
            if answer.status_code != 200:
                failures.append(answer.text)

    with served(made) as base:
        threads = [threading.Thread(target=look, args=(base,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for place in range(60):
            told.send(stream=f"camera {place % 7}")
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []
