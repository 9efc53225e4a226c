"""What others did to a pilot's store: the commands that they left, and the roll backs that they did there themselves.

Both are followed in the order of the log. A pilot's own roll backs are in the log, too; up to which place everything
is followed already is known by number, so that neither a commit in between nor a restart can hide one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from normadapt.store import Event, Store

FOLLOWED = "pilot-followed"
"""Under this name the store has the place in the log up to which roll backs are followed."""

_BEGIN_AGAIN = ("promote", "resume")
_OURS = ("transition", "resumed", "rolled back")  # what a pilot of an earlier version wrote once it had followed


class Word(NamedTuple):
    """An operator's word.

    Args:
        seq: Its place in the log.
        command: As it was sent; "rollback" also for a roll back that was done in the store.
        facts: The particulars.
        number: The command's; None for a roll back that was done in the store.
        void: Whether a roll back came after it that its sender could not know of.
    """

    seq: int
    command: str
    facts: Mapping[str, Any]
    number: int | None = None
    void: bool = False


class Inbox:
    """Reads a store for a pilot.

    Args:
        store: The pilot's handle.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_new = store.read_state(FOLLOWED) is None
        self.seq = _followed(store)

    def moved(self) -> Event | None:
        """The newest roll back that somebody else did and this pilot has not followed."""
        return _roll_back_after(self._store, self.seq)

    def words(self, *, commands: bool, tripped: bool) -> list[Word]:
        """What is to be followed, in the order of the log; a command is given out once.

        A roll back makes older words to go on void: whoever said them meant what ran then.

        Args:
            commands: Whether to take commands, which has to be written down.
            tripped: Whether the pilot has gone back itself, and the log does not show it yet.
        """
        moved = self.moved()
        done = [] if moved is None else [Word(moved.seq, "rollback", moved.facts)]
        if not commands or not self._store.waiting_commands():
            return done
        with self._store.transaction() as store:  # should reading fail, the commands are not taken
            taken = store.take_commands()
            places = [event.seq for event in store.history(kinds=["command"])]
            backs = [event.seq for event in store.history(limit=1, kinds=["rollback"])]
        words = [Word(places[c.number - 1], c.command, c.facts, c.number) for c in taken]
        last = max(backs + [word.seq for word in words if word.command == "rollback"], default=0)
        checked = [word._replace(void=word.command in _BEGIN_AGAIN and (tripped or word.seq < last)) for word in words]
        return sorted(done + checked)


def unfollowed(store: Store) -> Event | None:
    """The newest roll back that no pilot has followed yet, as far as the store knows."""
    return _roll_back_after(store, _followed(store))


def _followed(store: Store) -> int:
    document = store.read_state(FOLLOWED)
    if document is not None:
        return int(document["seq"])
    ours = store.history(limit=1, kinds=_OURS)
    return ours[0].seq if ours else 0


def _roll_back_after(store: Store, seq: int) -> Event | None:
    events = store.history(limit=1, after=seq, kinds=["rollback"])
    return events[0] if events else None
