"""Simulated traffic: a data set sent to a pilot as if it were requests, with faults and late labels."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from normadapt.errors import SpecError
from normadapt.layers.batches import batch_length, split_item
from normadapt.layers.predictions import Predictions
from normadapt.pilot.faults import Injector
from normadapt.pilot.pilot import Pilot
from normadapt.pilot.signals import answers
from normadapt.specs import resplit, split_targets

LATE = 160
"""Items after which the label of one comes."""


@dataclass(frozen=True)
class Traffic:
    """What was sent, and how it was answered.

    Args:
        requests: Requests.
        items: Items in them.
        labels: Labels that came late.
        accuracy: Share of right answers of what went out; None without class targets.
        source_accuracy: The same of the source model on the same inputs.
        stages: Stages that the pilot was in, in turn, each with the number of the item at which it began.
    """

    requests: int
    items: int
    labels: int
    accuracy: float | None
    source_accuracy: float | None
    stages: tuple[tuple[int, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


class SteppedClock:
    """Seconds that pass by the request instead of by the clock, so that baking times can be rehearsed.

    Args:
        step: Seconds from one request to the next.
        start: First reading.
    """

    def __init__(self, step: float, start: float | None = None) -> None:
        self.step = step
        self.now = time.time() if start is None else start

    def __call__(self) -> float:
        """The reading."""
        return self.now

    def turn(self) -> None:
        """Another request."""
        self.now += self.step


def send_traffic(
    pilot: Pilot,
    data: Iterable[Any],
    *,
    items: int | None = None,
    batch_size: int | None = None,
    faults: Injector | None = None,
    labels: bool = True,
    clock: SteppedClock | None = None,
    predictions: Predictions | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Traffic:
    """Send data to a pilot, request by request.

    Ids are running numbers, which go on where the pilot's last process ended.

    Args:
        pilot: The pilot.
        data: Batches: inputs or (inputs, targets).
        items: How many to send; the data are begun again as often as it takes. None: once through.
        batch_size: Items of a request; None: as the data give them.
        faults: Done to the inputs, counted from the first item of this call.
        labels: Whether targets come back late as labels.
        clock: Turned before each request.
        predictions: As the pilot's.
        progress: Called with the number of items answered so far, and the stage.

    Raises:
        SpecError: If the data give no items.
    """
    first = int(pilot.status()["answered"]["items"])
    coming: deque[tuple[int, Any]] = deque()
    sent = requests = labelled = right = source_right = counted = 0
    stages: list[tuple[int, str]] = []

    def deliver(until: int) -> int:
        given = 0
        while coming and coming[0][0] < until:
            id_, label = coming.popleft()
            pilot.label(first + id_, label)
            given += 1
        return given

    with torch.no_grad():
        for item in _batches(data, items, batch_size):
            inputs, targets = split_targets(item)
            count = batch_length(inputs)
            args, kwargs = split_item(inputs)
            if faults is not None:
                args, kwargs = faults(args, sent), faults(kwargs, sent)
            if clock is not None:
                clock.turn()
            place = pilot.stage.value + (f" {pilot.share:.0%}" if 0 < pilot.share < 1 else "")
            if not stages or stages[-1][1] != place:
                stages.append((sent, place))
            output = pilot(*args, ids=range(first + sent, first + sent + count), **kwargs)
            if targets is not None and _are_classes(targets):
                said = answers(output, predictions)
                with pilot.adapted.as_source():
                    source = answers(pilot.adapted(*args, **kwargs), predictions)
                wanted = targets.tolist()
                if said is not None and source is not None:
                    counted += count
                    right += sum(a == y for a, y in zip(said.classes, wanted, strict=True))
                    source_right += sum(a == y for a, y in zip(source.classes, wanted, strict=True))
                if labels:
                    coming.extend((sent + place, y) for place, y in enumerate(wanted))
            sent += count
            requests += 1
            labelled += deliver(sent - LATE)
            if progress is not None:
                progress(sent, pilot.stage.value)
        labelled += deliver(sent)
    if sent == 0:
        raise SpecError("DATA gave no item -> check the paths in it")
    if stages[-1][1] != pilot.stage.value and pilot.share in (0, 1):
        stages.append((sent, pilot.stage.value))
    return Traffic(
        requests,
        sent,
        labelled,
        right / counted if counted else None,
        source_right / counted if counted else None,
        tuple(stages),
    )


def _are_classes(targets: Tensor) -> bool:
    return targets.dim() == 1 and not targets.is_floating_point()


def _batches(data: Iterable[Any], items: int | None, size: int | None) -> Iterator[Any]:
    """Batches of the data, begun again until there were so many items."""
    left = items
    while left is None or left > 0:
        some = False
        for item in data if size is None else resplit(data, size):
            inputs, _ = split_targets(item)
            count = batch_length(inputs)
            if left is not None and count > left:
                item = next(iter(resplit([item], left)))
                count = left
            some = some or count > 0
            yield item
            if left is not None:
                left -= count
                if left <= 0:
                    return
        if left is None or not some:
            return
