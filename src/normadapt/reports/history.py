"""What adapting did over time, in a bounded number of columns: plain numbers that go to JSON and back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Numbers: TypeAlias = npt.NDArray[np.float64]

_FORMAT = 1
_BY_LAYER = ("shift", "tail", "mean_weight", "variance_weight")
_DIGITS = 4  # significant ones in JSON; three decimals of a standard deviation are more than a page can show


class Mark(NamedTuple):
    """Something that happened to the whole stream: a change of stage, a roll back, a new condition.

    Args:
        time: Unix seconds.
        kind: "stage", "rollback", "note", ...
        text: For people.
        items: Instances that the stream had seen then.
    """

    time: float
    kind: str
    text: str
    items: float = 0.0


class Channel(NamedTuple):
    """The instance means of one channel, and the statistics that they are normalized with. Units of the layer's input.

    Args:
        index: Which channel.
        gamma: How much of it reaches the layer's output, |gamma|.
        source: Mean and standard deviation of the source statistics, eps in the latter.
        scatter: Standard deviation of a source instance's mean, from a profile; None without one.
        in_use: Mean and standard deviation in use, eps in the latter.
        ends: Lowest and highest of the recent instance means.
        counts: Of their histogram, in equally wide bins between the ends.
        cumulants: Their mean, standard deviation, skewness and excess kurtosis.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index
    gamma: float
    source: tuple[float, float]
    scatter: float | None
    in_use: tuple[float, float]
    ends: tuple[float, float]
    counts: tuple[int, ...]
    cumulants: tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class History:
    """A stream's history: T columns of one or more batches each, L layers, K classes. NaN stands for not known.

    Args:
        stream: Its name.
        sites: Names of the layers (L), as in the report.
        times: When each column began (T,), unix seconds.
        batches: Batches in it (T,).
        items: Instances in it (T,).
        shift: Of each layer (L, T): see `SiteReport.shift`; mean over the column, as all that follow.
        tail: log10 of the probability of at least this shift if there were none (L, T).
        mean_weight, variance_weight: Weights on the test statistics (L, T).
        entropy: Of the answers (T,), in nats.
        agreement: Share of the answers that are the source's, too (T,); None where nobody compared.
        classes: Share of each predicted class (K, T); None where the output gives no classes.
        class_names: What the rows of `classes` stand for.
        marks: What happened, oldest first.
        channels: By layer, the channels with the largest shift.
    """

    stream: str
    sites: tuple[str, ...]
    times: Numbers
    batches: Numbers
    items: Numbers
    shift: Numbers
    tail: Numbers
    mean_weight: Numbers
    variance_weight: Numbers
    entropy: Numbers
    agreement: Numbers | None = None
    classes: Numbers | None = None
    class_names: tuple[str, ...] = ()
    marks: tuple[Mark, ...] = ()
    channels: tuple[tuple[Channel, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.times)

    @property
    def seen(self) -> Numbers:
        """Instances seen when each column began (T,)."""
        return np.cumsum(self.items) - self.items

    def thinned(self, most: int) -> History:
        """The same in at most `most` columns: neighbours are merged, each counted by its batches.

        Raises:
            ValueError: If `most` is below 1.
        """
        if most < 1:
            raise ValueError(f"most must be a number of columns from 1; got {most!r}")
        if len(self) <= most:
            return self
        starts = np.arange(0, len(self), math.ceil(len(self) / most))
        changes: dict[str, Any] = {
            "times": self.times[starts],
            "batches": np.add.reduceat(self.batches, starts),
            "items": np.add.reduceat(self.items, starts),
        }
        for name in (*_BY_LAYER, "entropy", "agreement", "classes"):
            values = getattr(self, name)
            if values is not None:
                changes[name] = _averaged(values, self.batches, starts)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, four digits of each number; NaN becomes None."""
        values: dict[str, Any] = {"format": _FORMAT}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "times":
                value = [round(float(time), 3) for time in value]
            elif isinstance(value, np.ndarray):
                value = _rounded(value)
            elif entry.name == "marks":
                value = [mark._asdict() for mark in value]
            elif entry.name == "channels":
                value = [[_channel_values(channel) for channel in site] for site in value]
            values[entry.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """What `to_dict` gave.

        Raises:
            ValueError: If it is nothing of the kind.
        """
        try:
            if values["format"] != _FORMAT:
                raise ValueError(f"format {values['format']!r}; this version reads {_FORMAT}")
            told = {entry.name: values[entry.name] for entry in fields(cls)}
            width, layers = len(told["times"]), len(told["sites"])
            for name in ("times", "batches", "items", "entropy"):
                told[name] = _array(told[name], (width,))
            for name in _BY_LAYER:
                told[name] = _array(told[name], (layers, width))
            if told["agreement"] is not None:
                told["agreement"] = _array(told["agreement"], (width,))
            if told["classes"] is not None:
                told["classes"] = _array(told["classes"], (len(told["class_names"]), width))
            told["sites"], told["class_names"] = tuple(told["sites"]), tuple(told["class_names"])
            told["marks"] = tuple(Mark(**mark) for mark in told["marks"])
            told["channels"] = tuple(tuple(_channel(entry) for entry in site) for site in told["channels"])
            return cls(**told)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"this is no history of normadapt: {error!r} -> pass what History.to_dict() gave"
            ) from error


def _averaged(values: Numbers, batches: Numbers, starts: npt.NDArray[Any]) -> Numbers:
    """Mean over neighbouring columns, by batches; NaN does not count unless nothing else is there."""
    known = np.isfinite(values)
    weight = np.where(known, batches, 0.0)
    total = np.add.reduceat(np.where(known, values, 0.0) * weight, starts, axis=-1)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / np.add.reduceat(weight, starts, axis=-1))


def _rounded(values: Numbers) -> Any:
    if values.ndim == 2:
        return [_rounded(row) for row in values]
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]


def _array(values: Sequence[Any], shape: tuple[int, ...]) -> Numbers:
    array = np.array(values, dtype=np.float64).reshape(-1) if not len(values) else np.array(values, dtype=np.float64)
    if array.size == 0:
        array = array.reshape(shape) if math.prod(shape) == 0 else array
    if array.shape != shape:
        raise ValueError(f"this is no history of normadapt: an array of shape {array.shape} where {shape} belongs")
    return array


def _channel_values(channel: Channel) -> dict[str, Any]:
    told = channel._asdict()
    return {key: _plain(value) for key, value in told.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _channel(values: Mapping[str, Any]) -> Channel:
    told: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Channel(**told)
