"""What is said of one domain of a stream: plain numbers and words, read-only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DomainReport:
    """One domain that a stream has met.

    Args:
        number: Unique in the stream; 0 is the source's where there is a profile.
        name: Given by a user; else in words what it is.
        seen: Instances assigned to it, repeated frames once.
        since, last: Instances of the stream before its first and its last one.
        shift: Root mean square over layers and channels of its shift from the source, in units of the layers' outputs.
        sure: Probability that there is a shift at all, averaged over the layers.
        resembles: Rehearsals that it is like, the nearest first.
        look: How its inputs differ from the source's.
        is_source: Whether it is the source's domain.
        is_present: Whether the stream is in it now.
    """

    number: int
    name: str
    seen: int
    since: int
    last: int
    shift: float
    sure: float
    resembles: tuple[str, ...] = ()
    look: str = ""
    is_source: bool = False
    is_present: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.words}; {self.seen:,} seen; shift {self.shift:.2f}; {self.surety}"

    @property
    def words(self) -> str:
        """What its inputs look like: "contrast 0.4 of source, brighter, like low contrast, bright 0.5"."""
        like = f"like {' and '.join(self.resembles)}" if self.resembles else ""
        return ", ".join(part for part in (self.look, like) if part) or "not described"

    @property
    def surety(self) -> str:
        """How sure it is that there is a shift, in a word or two."""
        if self.seen == 0:
            return "nothing seen"
        return "sure" if self.sure > 0.95 else "likely" if self.sure > 0.5 else "no shift"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "resembles": list(self.resembles)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DomainReport:
        """What `to_dict` gave."""
        return cls(**{**values, "resembles": tuple(values["resembles"])})
