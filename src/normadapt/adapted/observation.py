"""Looking on while a model adapts: what observers are shown of a pass, and the handle by which they leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from normadapt.adapted.streams import Record
from normadapt.layers.moments import InstanceMoments


class Seen(NamedTuple):
    """What an observer is shown of one adapting pass. Nothing in it may be changed; tensors may be kept.

    Args:
        records: Of all sites, in the order of `AdaptedModel.sites`.
        moments: Of the finite instances, by site; None at a site that the model did not call, or where none was finite.
        output: What the model returned.
        probabilities: Class probabilities (n, K) of the output, finite instances alone; None where it gives none.
        seconds: How long the pass took.
    """

    records: Sequence[Record]
    moments: Sequence[InstanceMoments | None]
    output: Any
    probabilities: Tensor | None
    seconds: float


class Observer(Protocol):
    """Anything to call with a stream's name and a `Seen`, after every adapting pass that succeeded.

    The model's lock is held meanwhile: it should be quick.
    """

    def __call__(self, stream: str, seen: Seen, /) -> object:
        """Look at what a pass did in a stream."""


class Observation:
    """One observer at work; `remove` ends it. It is its own context manager.

    Args:
        observer: Whom to call.
        leave: Takes this observation off the model.
    """

    def __init__(self, observer: Callable[[str, Any], object], leave: Callable[[Observation], None]) -> None:
        self.observer = observer
        self.failures = 0
        self.error: Exception | None = None
        self._leave = leave

    def show(self, stream: str, seen: Any) -> None:
        """Call the observer; what it raises is counted in `failures` and kept in `error`, never raised."""
        try:
            self.observer(stream, seen)
        except Exception as error:  # looking on may not cost anybody an answer
            self.failures += 1
            self.error = error.with_traceback(None)

    def remove(self) -> None:
        """Call the observer no more; a second time changes nothing."""
        self._leave(self)

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class Observers:
    """Who looks on, in the order in which they came.

    Args:
        lock: Held while one comes or leaves: whoever has left is not called any more by what the lock guards.
    """

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        self._lock = lock
        self._all: tuple[Observation, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, observer: Callable[[str, Any], object]) -> Observation:
        """Call one more from now on, until the handle is removed."""
        observation = Observation(observer, self._leave)
        with self._lock:
            self._all = (*self._all, observation)
        return observation

    def _leave(self, observation: Observation) -> None:
        with self._lock:
            self._all = tuple(other for other in self._all if other is not observation)

    def show(self, stream: str, seen: Any) -> None:
        """Call all of them."""
        for observation in self._all:
            observation.show(stream, seen)
