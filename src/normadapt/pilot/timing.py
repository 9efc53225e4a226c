"""Time under traffic: what counts as baking and cooling down.

A clock may stand, jump or run backwards. So time is the sum of the steps between requests: a step backwards counts as
none, and one longer than `idle` as none either, because nobody was there to be harmed or to show harm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


class TrafficTime:
    """Reads the clock at every request and adds up the time in which there was traffic.

    Args:
        clock: Gives seconds, as `time.time`.
        idle: A longer gap than this is no traffic, in seconds.
    """

    def __init__(self, clock: Callable[[], float], idle: float) -> None:
        self._clock = clock
        self._idle = idle
        self.last: float | None = None
        self.counted = 0.0
        self.trouble: str | None = None
        self._was_bad = False

    def now(self) -> float:
        """The clock's reading; the last known one where it fails."""
        try:
            reading = float(self._clock())
        except Exception as error:
            return self._bad(f"the clock failed: {error!r}")
        if not math.isfinite(reading):
            return self._bad(f"the clock read {reading}")
        if self.last is not None and reading < self.last:
            return self._bad(f"the clock went back by {self.last - reading:.3f} s", reading)
        self._was_bad = False
        return reading

    def tick(self) -> float:
        """Seconds of traffic since the last request; adds them to `counted`, and sets `trouble` once a bad spell."""
        self.trouble = None
        before, reading = self.last, self.now()
        step = 0.0 if before is None else reading - before
        self.last = reading
        if not 0 <= step <= self._idle:
            step = 0.0
        self.counted += step
        return step

    def gap(self) -> float:
        """Seconds since the last request, not below 0."""
        before = self.last
        return 0.0 if before is None else max(0.0, self._peek(before) - before)

    def restart(self) -> None:
        """Count from 0: another stage has begun."""
        self.counted = 0.0

    def to_dict(self) -> dict[str, Any]:
        """For another process to go on from."""
        return {"last": self.last, "counted": self.counted}

    def from_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what another process counted."""
        self.last, self.counted = state["last"], float(state["counted"])

    def _peek(self, fallback: float) -> float:
        try:
            reading = float(self._clock())
        except Exception:
            return fallback
        return reading if math.isfinite(reading) else fallback

    def _bad(self, text: str, reading: float | None = None) -> float:
        if not self._was_bad:
            self.trouble = text
        self._was_bad = True
        return reading if reading is not None else (self.last or 0.0)
