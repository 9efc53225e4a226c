"""`app`: the live page for those who serve it; what it needs is only imported when it is asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from normadapt.errors import ExtraMissingError
from normadapt.monitor.recorder import Recorder
from normadapt.pilot import Pilot
from normadapt.store import Store

if TYPE_CHECKING:
    from fastapi import FastAPI

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine that no other can use."""

SHORTEST = 8
"""Characters of a token, at least."""


def app(
    watched: Pilot | Recorder | Store | Path | str,
    *,
    token: str | None = None,
    hosts: Collection[str] | None = None,
    title: str | None = None,
) -> FastAPI:
    """The live page: what `Report.to_html` shows, as it happens, with the stage of a trial and its buttons.

    Serve it with any ASGI server, or mount it: `mine.mount("/normadapt", monitor.app(pilot))`. A pilot of this process
    is looked on at; of a store, which a pilot elsewhere writes, the page shows what was saved last. The page asks
    nobody but this application for anything.

    Args:
        watched: A pilot, or a `Recorder` of a pilot or a model; a store or its folder.
        token: What has to be known to see the page and to use its buttons: as `Authorization: Bearer`, in a form, or
            once as `?token=`. Without one everybody who reaches the page may do everything.
        hosts: Names under which the page may be asked for; ("*",) for any. Default: those of the loopback without a
            token, any with one.
        title: What stands at the top; by default the model's name.

    Returns:
        The application; `app.state.hub.clients` are those who look.

    Raises:
        TypeError, ValueError: If an argument is not what it should be.
        StoreError: If the store cannot be opened.
        ExtraMissingError: If FastAPI or Plotly is not installed.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import normadapt as na
        >>> adapted = na.adapt(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)))
        >>> page = app(Recorder(adapted))
        >>> page.state.hub.clients
        0
    """
    check_extra()
    from normadapt.monitor.live_app import build  # FastAPI is read only now

    return build(watched, token=token, hosts=hosts, title=title)


def check_extra() -> None:
    """Say what to install if what the live page needs is not there.

    Raises:
        ExtraMissingError: Naming it.
    """
    missing = [name for name in ("fastapi", "plotly", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ExtraMissingError(f"the live page needs {', '.join(missing)} -> pip install 'normadapt[dashboard]'")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address.

    Example:
        >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
        (True, True, False, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
