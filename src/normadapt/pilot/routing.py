"""Which model answers an item: a stable hash of its id, the same in every process, version and order of arrival.

An id's place in [0, 1) does not depend on the share, so a share that rises only adds ids: whoever was answered by the
adapted model at 5 % is so at 25 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, TypeAlias

from normadapt.pilot.stages import Position, Stage

Id: TypeAlias = str | int
"""A request's name: a text or a whole number; 7 and "7" are the same."""

_BITS = 53  # as many as a float holds


def arm_of(id: Id, salt: str) -> float:  # noqa: A002 (the word that the user writes)
    """An id's place in [0, 1): uniform over ids, and another one under another salt.

    Args:
        id: The request's or stream's name.
        salt: The plan's; two pilots with different salts do not pick the same ids.

    Example:
        >>> arm_of("request-1", "pilot") == arm_of("request-1", "pilot")
        True
        >>> 0 <= arm_of(17, "") < 1
        True
    """
    text = f"{len(salt)}:{salt}{id}".encode("utf-8", "surrogatepass")
    return (int.from_bytes(blake2b(text, digest_size=8).digest()) >> (64 - _BITS)) / (1 << _BITS)


def chosen(ids: Sequence[Id], share: float, salt: str) -> list[int]:
    """Places of those ids that a share of the whole takes.

    Example:
        >>> chosen(["a", "b", "c"], 1.0, "pilot"), chosen(["a", "b", "c"], 0.0, "pilot")
        ([0, 1, 2], [])
    """
    if share <= 0:
        return []
    if share >= 1:
        return list(range(len(ids)))
    return [place for place, id_ in enumerate(ids) if arm_of(id_, salt) < share]


class Route(NamedTuple):
    """Who answers what of a request.

    Args:
        asked: Places of the items that the arm's model answers, the adapted model or the last good snapshot.
        paired: Those of them that the source answers too.
        whole: Whether the source answers the whole request.
        served: Whether the arm's answers are given out.
    """

    asked: list[int]
    paired: list[int]
    whole: bool
    served: bool


def route(position: Position, units: Sequence[Id], items: Sequence[Id], paired_share: float, salt: str) -> Route:
    """Who answers what of a request, where the pilot stands so.

    Args:
        position: Where the pilot stands.
        units: What is hashed for the arm, one for each item: its own id, or its stream's.
        items: What is hashed for the pairs, where the arm answers everything: the items' ids.
        paired_share: Share of pairs there.
        salt: The plan's.
    """
    everything = list(range(len(units)))
    if position.stage is Stage.SHADOW:
        return Route(everything, everything, whole=True, served=False)
    if position.share < 1:
        asked = chosen(units, position.share, salt)
        return Route(asked, asked, whole=True, served=True)
    return Route(everything, chosen(items, paired_share, salt + "/paired"), whole=False, served=True)


_LONGEST = 1024  # bits of a number that is an id: python refuses to write out very long ones


class IdsError(ValueError):
    """What was given as ids names no items; says why."""


def read_ids(ids: Any, count: int) -> Sequence[Id]:
    """A name for each of `count` items, from any sequence of texts or whole numbers, an array or a tensor.

    Raises:
        IdsError: If it is something else.

    Example:
        >>> import numpy as np
        >>> read_ids(np.array([7, 8]), 2), read_ids(("a", np.int64(3)), 2)
        ([7, 8], ['a', 3])
    """
    listed = ids
    if not isinstance(ids, Sequence) and callable(getattr(ids, "tolist", None)):
        listed = ids.tolist()  # an array, a tensor, a column of a table
    if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes, bytearray)):
        raise IdsError(f"expected a sequence with a text or whole number for each item; got a {type(ids).__name__}")
    if len(listed) != count:
        raise IdsError(f"{len(listed)} ids for {count} items")
    read: list[Id] = []
    for place, entry in enumerate(listed):
        id_ = entry
        if not isinstance(id_, (str, int)) and hasattr(id_, "item") and getattr(id_, "ndim", None) == 0:
            id_ = id_.item()  # a number of numpy or torch
        if isinstance(id_, bool) or not isinstance(id_, (str, int)):
            raise IdsError(f"the id of item {place} is a {type(entry).__name__}; expected a text or a whole number")
        if isinstance(id_, int) and id_.bit_length() > _LONGEST:
            raise IdsError(
                f"the id of item {place} is a number of {id_.bit_length()} bits; expected {_LONGEST} at most"
            )
        read.append(id_)
    return read
