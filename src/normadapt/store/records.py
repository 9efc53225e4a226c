"""What a store hands out, and the one way in which facts become text: canonical JSON, under the chain of digests.

An event's digest covers the one before it, so a log in which anything was changed, taken out or put in between no
longer adds up.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any

GENESIS = "0" * 64
"""What the first event has in place of the digest before it."""


@dataclass(frozen=True)
class Snapshot:
    """One state of an adapted model, kept under a number.

    Args:
        number: 0 is the source; every commit has the next number, and none is ever used twice.
        digest: SHA-256 of the file, which names it: the same content is stored once.
        created: When it was committed, unix seconds.
        note: The committer's words.
        good: Whether it may be rolled back to without being asked for by number.
        model_name: Class of the original model.
        fingerprint: Hash of the original model's values.
        streams: Names of the streams that it holds.
        bytes: Size of the file.
        version: The library's version that wrote it.
        parent: The head when it was committed; None for the source.
    """

    number: int
    digest: str
    created: float
    note: str
    good: bool
    model_name: str
    fingerprint: str
    streams: tuple[str, ...]
    bytes: int
    version: str
    parent: int | None = None


@dataclass(frozen=True)
class Event:
    """One line of the audit log.

    Args:
        seq: Its place, from 1, without gaps.
        time: Unix seconds, by the writer's clock.
        kind: What happened, in a word or two.
        facts: The particulars; plain JSON values.
        digest: SHA-256 of `previous` and the canonical JSON of the four above.
        previous: Digest of the event before; 64 zeros for the first.
    """

    seq: int
    time: float
    kind: str
    facts: dict[str, Any]
    digest: str
    previous: str


@dataclass(frozen=True)
class Command:
    """What an operator asked of the running pilot.

    Args:
        number: Its place among the commands, from 1.
        time: When it was sent, unix seconds.
        command: "promote", "pause", "resume", "rollback", ...
        facts: The particulars, such as who sent it.
    """

    number: int
    time: float
    command: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Verification:
    """What a check of a whole store found.

    Args:
        problems: One sentence each; none if all is well.
        events: Events in the log.
        snapshots: Snapshots that are kept.
        head: Number of the head; None before the first commit.
        digest: The last event's. Noted elsewhere, it shows later that no tail of the log was cut off and written anew.
        orphans: Files that no snapshot needs, left by a killed writer; the next `Store(path)` removes them.
    """

    problems: tuple[str, ...]
    events: int
    snapshots: int
    head: int | None
    digest: str
    orphans: int

    @property
    def ok(self) -> bool:
        """Whether no problem was found."""
        return not self.problems


def plain(value: Any, where: str = "facts") -> Any:
    """The same as plain JSON values: NaN and infinities become None, tuples lists, NumPy's and torch's scalars numbers.

    Raises:
        ValueError: If something in it has no counterpart in JSON; it is named.
    """
    if isinstance(value, Enum):
        return plain(value.value, where)
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return _plain_mapping(value, where)
    if isinstance(value, (tuple, list)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        inner = value.item()
        if not isinstance(inner, type(value)):
            return plain(inner, where)
        if isinstance(inner, Real):  # NumPy's long double, which gives itself
            return plain(float(inner), where)
    raise ValueError(
        f"{where} holds a {type(value).__name__}; expected numbers, strings, None, lists, dicts -> convert it"
    )


def _plain_mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, item in value.items():
        if str(key) in kept:
            raise ValueError(f"{where} has two keys that are both {str(key)!r} in JSON -> rename one")
        kept[str(key)] = plain(item, f"{where}[{key!r}]")
    return kept


def proper(word: str, what: str) -> str:
    """A name that SQLite takes.

    Raises:
        ValueError: If it is no string, or no proper Unicode.
    """
    if not isinstance(word, str):
        raise ValueError(f"{what} must be a string; got {word!r}")
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} must be proper Unicode; got {word!r}, with half of a surrogate pair -> leave it out"
        ) from error
    return word


def canonical(value: Any) -> str:
    """Plain JSON values as the one text that stands for them: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def event_digest(previous: str, seq: int, time: float, kind: str, facts: Mapping[str, Any]) -> str:
    """SHA-256 that binds an event to the one before.

    Args:
        previous: The one before's digest, hexadecimal.
        seq: The event's place.
        time: Unix seconds.
        kind: What happened.
        facts: Plain JSON values.
    """
    text = canonical({"seq": seq, "time": time, "kind": kind, "facts": facts})
    return hashlib.sha256((previous + text).encode("ascii")).hexdigest()
