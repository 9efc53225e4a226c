"""A progress bar on the terminal, for work that may take longer than two seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Advance(Protocol):
    """Says how far the work is: so many units done, of a total if it is known, under a new label if there is one."""

    def __call__(self, done: int, total: int | None, label: str | None = None) -> None: ...  # noqa: D102


@contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Advance]:
    """A bar on standard error while the block runs; it gives the function that moves it.

    Gone when done, and absent where nobody watches: a log gets the results only.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} " + unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)

        def advance(done: int, total: int | None, label: str | None = None) -> None:
            bar.update(task, completed=done, total=total, description=label)

        yield advance
