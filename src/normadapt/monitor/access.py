"""Who may see the live page and use its buttons, and the headers under which it is sent."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normadapt.monitor.serving import LOOPBACK, SHORTEST

HEADERS: Mapping[str, str] = {
    # Plotly writes style attributes and rules, so styles may be inline; scripts may not, and nothing is evaluated.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Access:
    """The rules of one page.

    Args:
        token: What has to be known; None lets everybody in who reaches the page.
        hosts: Names under which the page may be asked for, "*" for any: a page elsewhere that makes its own name mean
            this machine (DNS rebinding) is refused. None: the loopback's without a token, any with one.

    Raises:
        ValueError: If the token is too short to be one.
    """

    def __init__(self, token: str | None, hosts: Iterable[str] | None) -> None:
        if token is not None and (not isinstance(token, str) or len(token.strip()) < SHORTEST):
            raise ValueError(f"token must be a text of at least {SHORTEST} characters; got one of {len(token or '')}")
        known = hosts if hosts is not None else (LOOPBACK if token is None else ("*",))
        self.hosts = frozenset(name.strip("[]").lower() for name in known)
        self._token = token
        key = token.encode() if token is not None else secrets.token_bytes(32)
        # what is handed out follows from the token, so that it is good after a restart, too
        self._session = _derived(key, "session")
        self.csrf = _derived(key, "csrf")
        self.cookie = f"normadapt_{_derived(key, 'cookie')[:8]}"

    @property
    def open(self) -> bool:
        """Whether no token is asked for."""
        return self._token is None

    def knows(self, token: str) -> bool:
        """Whether that is the token; it takes as long whatever the answer."""
        return self._token is not None and _same(token, self._token)

    def lets_in(self, connection: HTTPConnection) -> bool:
        """Whether a request comes with the token, or the cookie that was given for it."""
        if self._token is None:
            return True
        kind, _, told = connection.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.knows(told.strip()):
            return True
        return _same(connection.cookies.get(self.cookie, ""), self._session)

    def session(self, connection: HTTPConnection) -> dict[str, Any]:
        """The cookie to give to somebody who knew the token, as arguments of `set_cookie`."""
        return {
            "key": self.cookie,
            "value": self._session,
            "httponly": True,
            "samesite": "strict",
            "secure": connection.url.scheme == "https",
            "path": f"{connection.scope.get('root_path', '')}/",
        }

    def stranger(self, connection: HTTPConnection) -> str:
        """Why a request is refused for the name under which it came; empty if it is not."""
        if "*" in self.hosts or _name(connection.headers.get("host", "")) in self.hosts:
            return ""
        return "this page is not served under that host name -> app(..., hosts=[...]) names those that it is"

    def forged(self, connection: HTTPConnection) -> str:
        """Why an action is refused that no page of ours can have asked for; empty if one may have."""
        if connection.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return "this was asked for by another site's page"
        origin = connection.headers.get("origin")
        if origin is not None:
            theirs, ours = urlsplit(origin).netloc.lower(), connection.headers.get("host", "").lower()
            if theirs != ours and (not theirs or _name(theirs) not in self.hosts):
                return "this was asked for by another site's page"
        if not _same(connection.headers.get("x-normadapt-csrf", ""), self.csrf):
            return "this does not come from a page of ours, or from one that is out of date: reload it"
        return ""


class Headers:
    """Puts the security headers on every answer.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("cache-control", "no-store")
            await send(message)

        await self._app(scope, receive, with_headers)


def _derived(key: bytes, purpose: str) -> str:
    return hmac.new(key, b"normadapt " + purpose.encode(), hashlib.sha256).hexdigest()


def _same(one: str, other: str) -> bool:
    return hmac.compare_digest(one.encode(), other.encode())


def _name(host: str) -> str:
    """A Host header without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
