"""The live page as an application, to be served by itself or mounted in another."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from normadapt.errors import SpecError, StoreError, StoreLockedError
from normadapt.monitor.access import Access, Headers
from normadapt.monitor.hub import Full, Hub
from normadapt.monitor.live import ACTIONS, Order, subject_of
from normadapt.monitor.live_page import ASSETS, live_page, login_page
from normadapt.monitor.recorder import Recorder
from normadapt.pilot import Pilot
from normadapt.store import Store

_LONGEST = 16 * 1024  # bytes of a request's body
_NAME, _REASON, _STREAM = 100, 500, 1000  # characters
_WRONG = 0.3  # seconds that a wrong token takes to be refused


def build(
    watched: Pilot | Recorder | Store | Path | str,
    *,
    token: str | None,
    hosts: Collection[str] | None,
    title: str | None,
) -> FastAPI:
    """See `normadapt.monitor.app`."""
    access = Access(token, hosts)
    hub = Hub(subject_of(watched), {"csrf": access.csrf})
    made = FastAPI(title="normadapt", docs_url=None, redoc_url=None, openapi_url=None)
    made.state.hub = hub
    made.state.access = access
    made.add_middleware(_Door, access=access)
    made.add_middleware(Headers)
    made.add_exception_handler(HTTPException, _refused)
    made.add_exception_handler(SpecError, _unknown)
    made.add_exception_handler(StoreError, _unreadable)

    @made.get("/")
    async def page(request: Request) -> Response:
        if "token" in request.query_params:  # it is not to stay in the address
            return await _log_in(request, access, request.query_params["token"])
        return Response(live_page(title), media_type="text/html; charset=utf-8")

    @made.post("/login")
    async def login(request: Request) -> Response:
        told = parse_qs((await _body(request)).decode("utf-8", "replace"))
        return await _log_in(request, access, told.get("token", [""])[0])

    @made.get("/assets/{name}")
    async def asset(name: str) -> Response:
        if name not in ASSETS:
            raise HTTPException(404, "there is no such file")
        body = await asyncio.to_thread(_compressed, name)
        headers = {"content-encoding": "gzip", "cache-control": "private, max-age=31536000, immutable"}
        return Response(body, headers=headers, media_type=ASSETS[name][1])

    @made.get("/view")
    async def view(request: Request) -> Response:
        payload = await hub.view(_stream(request))
        return Response(payload.body, headers={"content-encoding": "gzip"}, media_type="application/json")

    @made.get("/events")
    async def events(request: Request) -> Response:
        return _EventStream(hub, _stream(request))

    @made.post("/actions/{action}")
    async def act(action: str, request: Request) -> Response:
        refusal = access.forged(request)
        if refusal:
            raise HTTPException(403, refusal)
        order = _order(action, await _json(request))
        try:
            told = await asyncio.to_thread(hub.subject.act, order)
        except StoreLockedError as error:
            raise HTTPException(503, f"{error}", {"retry-after": "2"}) from error
        except StoreError as error:
            raise HTTPException(503, f"{error}") from error
        except ValueError as error:
            raise HTTPException(409, f"{error}") from error
        finally:
            hub.hurry()
        return JSONResponse({"done": told})

    return made


# -- who comes in ------------------------------------------------------------------------------------------------------


class _Door:
    """Refuses whoever may not come in, before anything else is looked at."""

    def __init__(self, app: Any, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)  # type: ignore[no-any-return]
        request = Request(scope, receive)
        answer = self._refusal(request)
        if answer is not None:
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)
        return None

    def _refusal(self, request: Request) -> Response | None:
        stranger = self._access.stranger(request)
        if stranger:
            return _told(421, stranger)
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        knocks = path == "/login" or (path in ("", "/") and "token" in request.query_params)
        if knocks or path == "/assets/page.css" or self._access.lets_in(request):
            return None
        if path in ("", "/") and request.method == "GET":
            return Response(login_page(), 401, media_type="text/html; charset=utf-8")
        return _told(401, "a token is needed -> open the page and give it, or send Authorization: Bearer TOKEN")


async def _log_in(request: Request, access: Access, token: str) -> Response:
    base = f"{request.scope.get('root_path', '')}/"
    if access.open:
        return RedirectResponse(base, 303)
    if not access.knows(token):
        await asyncio.sleep(_WRONG)
        return Response(login_page(wrong=True), 401, media_type="text/html; charset=utf-8")
    answer = RedirectResponse(base, 303)
    answer.set_cookie(**access.session(request))
    return answer


# -- what is asked -----------------------------------------------------------------------------------------------------


def _stream(request: Request) -> str | None:
    """Which stream; None for the one seen last."""
    name = request.query_params.get("stream")
    if name is not None and len(name) > _STREAM:
        raise HTTPException(422, f"stream must be a name of at most {_STREAM} characters; got {len(name)}")
    return name or None


async def _body(request: Request) -> bytes:
    """A body of bearable length."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LONGEST:
            raise HTTPException(413, f"the body must have at most {_LONGEST} bytes")
    return body


async def _json(request: Request) -> dict[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the body must be JSON, with Content-Type: application/json")
    try:
        told = json.loads(await _body(request))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is no JSON: {error}") from error
    if not isinstance(told, dict):
        raise HTTPException(422, f"the body must be a JSON object; got a {type(told).__name__}")
    return told


def _order(action: str, told: dict[str, Any]) -> Order:
    """What somebody wants, checked."""
    if action not in ACTIONS:
        raise HTTPException(404, f"there is no action {action[:50]!r}; there are {', '.join(ACTIONS)}")
    unknown = sorted(told.keys() - {"by", "to", "reason", "force"})
    if unknown:
        raise HTTPException(422, f"unknown {', '.join(map(repr, unknown))[:200]}; known are by, to, reason, force")
    by, to, reason, force = told.get("by"), told.get("to"), told.get("reason", ""), told.get("force", False)
    if not isinstance(by, str) or not by.strip() or len(by) > _NAME or not by.isprintable():
        raise HTTPException(422, f"by must be the name of who wants it, for the audit log: 1 to {_NAME} characters")
    if to is not None and (isinstance(to, bool) or not isinstance(to, int) or not 0 <= to < 2**53):
        raise HTTPException(422, "to must be the number of a snapshot, or null for the last good one")
    if (
        not isinstance(reason, str)
        or len(reason) > _REASON
        or re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", reason)
    ):
        raise HTTPException(422, f"reason must be a text of at most {_REASON} characters")
    if not isinstance(force, bool):
        raise HTTPException(422, "force must be true or false")
    return Order(action, by.strip(), to, reason.strip(), force)


# -- what is answered --------------------------------------------------------------------------------------------------


class _EventStream(StreamingResponse):
    """Server-sent events: another version is there. Whoever wants it asks for the view."""

    def __init__(self, hub: Hub, stream: str | None) -> None:
        self._hub = hub
        self._stream = stream
        super().__init__(self._lines(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def _lines(self) -> Any:
        yield "retry: 1000\n\n"
        async for version in self._hub.versions():
            yield ": here\n\n" if version is None else f'id: {version}\ndata: {{"version":{version}}}\n\n'

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # counted here and not in the generator, which ends late when the client is gone in the midst of sending
        try:
            with self._hub.client(self._stream):
                await super().__call__(scope, receive, send)
        except Full:
            await _told(503, "too many clients listen -> try again later", {"retry-after": "5"})(scope, receive, send)


@cache
def _compressed(name: str) -> bytes:
    return gzip.compress(ASSETS[name][0]().encode(), 6)


def _told(code: int, words: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": words}, code, headers)


async def _refused(_: Request, error: Exception) -> Response:
    code = getattr(error, "status_code", 500)
    return _told(code, str(getattr(error, "detail", error)), getattr(error, "headers", None))


async def _unknown(_: Request, error: Exception) -> Response:
    return _told(404, str(error))


async def _unreadable(_: Request, error: Exception) -> Response:
    return _told(503, str(error), {"retry-after": "2"})
