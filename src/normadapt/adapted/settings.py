"""How the current thread or task uses an adapted model: which stream, and whether it adapts."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

DEFAULT_STREAM = "default"


class Setting(NamedTuple):
    """A stream's name, and "adapt", "paused" or "source"."""

    stream: str = DEFAULT_STREAM
    mode: str = "adapt"


# Keyed by id of the model, which the contexts below keep alive. A context variable, so that threads and async tasks do
# not see each other's.
_SETTINGS: contextvars.ContextVar[Mapping[int, Setting] | None] = contextvars.ContextVar("normadapt", default=None)


def current(model: Any) -> Setting:
    """The setting in which this thread or task uses `model` now."""
    return (_SETTINGS.get() or {}).get(id(model), Setting())


@contextmanager
def use(model: Any, **changes: str) -> Iterator[Any]:
    """Context in which this thread or task uses `model` with these changes to its setting."""
    token = _SETTINGS.set({**(_SETTINGS.get() or {}), id(model): current(model)._replace(**changes)})
    try:
        yield model
    finally:
        _SETTINGS.reset(token)
