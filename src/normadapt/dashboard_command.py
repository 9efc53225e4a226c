"""`normadapt dashboard`: serves the live page of a trial's store."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normadapt.errors import SpecError
from normadapt.monitor.serving import LOOPBACK, SHORTEST, check_extra, is_loopback
from normadapt.monitor.serving import app as live_app

if TYPE_CHECKING:
    from fastapi import FastAPI


def dashboard(
    store: Annotated[
        Path, typer.Option("--store", metavar="DIR", help="The trial's store.", show_default=False, file_okay=False)
    ],
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; others need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8765,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            envvar="NORMADAPT_TOKEN",
            show_envvar=True,
            help="To see the page and use its buttons. Given in the environment, no list of processes shows it.",
        ),
    ] = None,
) -> None:
    """The live page of a trial: what its report shows, the stage, and buttons to act. Ctrl-C ends it."""
    check_extra()
    token = token or None
    alone = is_loopback(host)
    if token is None and not alone:
        raise SpecError(
            f"--host: {host} can be reached from other machines, and whoever does can roll back the trial -> give a "
            "token: NORMADAPT_TOKEN=... normadapt dashboard ..."
        )
    if token is not None and len(token.strip()) < SHORTEST:
        raise SpecError(f"--token: expected at least {SHORTEST} characters, got {len(token.strip())}")
    made = live_app(store, token=token, hosts=(*LOOPBACK, host) if alone else ("*",))
    with _listen(host, port) as listener:
        taken = listener.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        typer.echo(f"http://{name}:{taken}/ shows {store}" + (", with the token" if token else "") + "; Ctrl-C ends it")
        serve(made, listener)


def _listen(host: str, port: int) -> socket.socket:
    """A socket of ours, so that an address that is taken or no address is said in a line.

    Raises:
        SpecError: If nothing can listen there.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, UnicodeError) as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SpecError(
            f"--host, --port: nothing can listen at {host}, port {port}: {words} -> name another"
        ) from error


def serve(made: FastAPI, listener: socket.socket) -> None:
    """Answer requests until a signal ends it.

    Args:
        made: What `monitor.app` gave.
        listener: Bound already.
    """
    with suppress(KeyboardInterrupt):  # that is how it is meant to end
        server_of(made).run(sockets=[listener])


def server_of(made: FastAPI) -> Any:
    """A server that ends its streams of events when it is told to stop, instead of waiting for the clients."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            made.state.hub.close()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        made, log_level="warning", access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=5
    )
    return Server(config)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(dashboard)
