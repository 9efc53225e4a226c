"""`Notes`: what a store keeps besides snapshots: events of one's own, documents, and commands for a running pilot."""

from __future__ import annotations

import json
import operator
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any

from normadapt.store.database import Database
from normadapt.store.ledger import pointer
from normadapt.store.log import OWN_KINDS, append, clock, document, read_events
from normadapt.store.records import Command, Event, canonical, proper

_WAITING = "SELECT number, time, command, facts FROM commands WHERE taken IS NULL ORDER BY number"


class Notes:
    """The part of a `Store` that knows nothing of models."""

    _database: Database

    def record(self, kind: str, /, **facts: Any) -> Event:
        """Append an event of your own to the audit log.

        Args:
            kind: What happened; not one of those that the store writes itself (`OWN_KINDS`).
            **facts: Plain JSON values; NaN and infinities become None.

        Raises:
            ValueError: If the kind is the store's own, or a fact has no counterpart in JSON.
            StoreError: If it cannot be written.
        """
        if not isinstance(kind, str) or not kind or kind in OWN_KINDS:
            raise ValueError(
                f"kind must be a word that the store does not use itself ({', '.join(sorted(OWN_KINDS))}); got {kind!r}"
            )
        proper(kind, "kind")
        with self._database.write("write to") as connection:
            return append(connection, kind, facts)

    def history(
        self, limit: int | None = None, *, after: int = 0, kinds: Iterable[str] | None = None
    ) -> tuple[Event, ...]:
        """Events, oldest first.

        Args:
            limit: The newest so many; None for all.
            after: Only events with a higher `seq`.
            kinds: Only these.

        Raises:
            ValueError: If an argument is out of range.
            StoreError: If they cannot be read.
        """
        if limit is not None and (limit := _whole(limit, "limit")) < 0:
            raise ValueError(f"limit must be from 0, or None for all; got {limit!r}")
        after = _whole(after, "after")
        if kinds is not None:
            kinds = [proper(kind, "a kind") for kind in ([kinds] if isinstance(kinds, str) else kinds)]
        with self._database.read() as connection:
            return read_events(connection, limit, after, kinds)

    def events_since(self, seq: int) -> tuple[Event, ...]:
        """Events with a higher `seq`, oldest first: what a poller asks again and again."""
        return self.history(after=seq)

    def generation(self) -> int:
        """A number that grows with every commit, rollback and command; cheap to ask."""
        with self._database.read() as connection:
            return pointer(connection)[1]

    def changes(self) -> int:
        """A number that is another one once anything was written since it was last asked; the cheapest of all looks.

        It means nothing beyond this object, and may change without cause.
        """
        with self._database.read() as connection:
            return int(connection.execute("PRAGMA data_version").fetchone()[0])

    def read_state(self, name: str) -> dict[str, Any] | None:
        """The document that was written under this name; None if there is none."""
        proper(name, "the name of a state")
        with self._database.read() as connection:
            row = connection.execute("SELECT value FROM states WHERE name = ?", (name,)).fetchone()
        return None if row is None else document(row[0], f"the state {name!r}")

    def write_state(self, name: str, value: Mapping[str, Any]) -> None:
        """Keep a small document of JSON values under a name, in place of the one there; floats return exactly, NaN too.

        Raises:
            ValueError: If it holds something that has no counterpart in JSON.
            StoreError: If it cannot be written.
        """
        proper(name, "the name of a state")
        try:
            text = json.dumps(dict(value))
        except TypeError as error:
            raise ValueError(f"a state must hold plain JSON values: {error} -> convert it first") from error
        with self._database.write("write to") as connection:
            connection.execute("INSERT OR REPLACE INTO states VALUES (?, ?)", (name, text))

    def send(self, command: str, /, **facts: Any) -> int:
        """Leave a command for the pilot that runs on this store; returns its number. It is in the audit log, too."""
        command = proper(str(command), "a command")
        with self._database.write("write to") as connection:
            pointer(connection)  # must be there to be changed
            event = append(connection, "command", {"command": command, "facts": facts})
            row = (event.time, command, canonical(event.facts["facts"]))
            cursor = connection.execute("INSERT INTO commands (time, command, facts) VALUES (?, ?, ?)", row)
            connection.execute("UPDATE pointer SET generation = generation + 1")
            return int(cursor.lastrowid or 0)

    def take_commands(self) -> tuple[Command, ...]:
        """The commands that nobody has taken yet, in the order in which they were sent; each is given out once."""
        if not self.waiting_commands():
            return ()
        with self._database.write("write to") as connection:
            taken = _commands(connection)
            connection.execute("UPDATE commands SET taken = ? WHERE taken IS NULL", (clock(),))
        return taken

    def waiting_commands(self) -> tuple[Command, ...]:
        """The commands that nobody has taken yet; they stay."""
        with self._database.read() as connection:
            return _commands(connection)


def _commands(connection: sqlite3.Connection) -> tuple[Command, ...]:
    return tuple(
        Command(number, moment, command, document(facts, f"the facts of command {number}"))
        for number, moment, command, facts in connection.execute(_WAITING).fetchall()
    )


def _whole(value: int, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise ValueError(f"{what} must be a whole number; got {value!r}") from error
