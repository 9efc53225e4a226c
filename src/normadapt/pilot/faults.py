"""What can go wrong with a camera, for drills: faults done to the inputs of a model, each by its name.

A fault is told nothing of the model, and knows the inputs' scale only from what it is given, so it works on any float
tensors (n, ...). Some go on where the last batch ended: a frozen camera repeats one frame, a drift grows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from normadapt.errors import SpecError

Change: TypeAlias = Callable[[Tensor], Tensor]
"""What a fault does to a batch of inputs (n, ...)."""

_DRIFT = 0.002  # standard deviations of the inputs that a drift adds an item
_HONEST = 4  # of a poisoned stream, one item in so many is somebody else's


def _constant(generator: torch.Generator) -> Change:
    """Every value of every frame is the mean of the first faulty batch: a broken sensor."""
    level: list[Tensor] = []

    def change(inputs: Tensor) -> Tensor:
        if not level:
            level.append(inputs.mean())
        return torch.full_like(inputs, float(level[0]))

    return change


def _dark(generator: torch.Generator) -> Change:
    """Every value is the least of the first faulty batch: the lens is covered."""
    level: list[Tensor] = []

    def change(inputs: Tensor) -> Tensor:
        if not level:
            level.append(inputs.amin())
        return torch.full_like(inputs, float(level[0]))

    return change


def _inverted(generator: torch.Generator) -> Change:
    """Light is dark and dark is light, within the range of the first faulty batch."""
    ends: list[Tensor] = []

    def change(inputs: Tensor) -> Tensor:
        if not ends:
            ends.append(inputs.amin() + inputs.amax())
        return ends[0] - inputs

    return change


def _nan(generator: torch.Generator) -> Change:
    """No value is a number."""
    return lambda inputs: torch.full_like(inputs, float("nan"))


def _noise(generator: torch.Generator) -> Change:
    """Noise and no picture, with the mean and standard deviation of the batch."""

    def change(inputs: Tensor) -> Tensor:
        drawn = torch.randn(inputs.shape, generator=generator, dtype=torch.float32).to(inputs)
        return inputs.mean() + inputs.std(correction=0) * drawn

    return change


def _frozen(generator: torch.Generator) -> Change:
    """The first frame again and again."""
    frame: list[Tensor] = []

    def change(inputs: Tensor) -> Tensor:
        if not frame:
            frame.append(inputs[:1].clone())
        return frame[0].expand_as(inputs).clone()

    return change


def _drift(generator: torch.Generator) -> Change:
    """Brighter by 0.002 standard deviations with every item, without end."""
    seen = 0
    scale: list[Tensor] = []

    def change(inputs: Tensor) -> Tensor:
        nonlocal seen
        if not scale:
            scale.append(inputs.std(correction=0))
        steps = torch.arange(seen, seen + len(inputs), dtype=torch.float32).to(inputs)
        seen += len(inputs)
        return inputs + _DRIFT * scale[0] * steps.view(-1, *(1,) * (inputs.dim() - 1))

    return change


def _poisoned(generator: torch.Generator) -> Change:
    """Three items in four are blank and bright, for the statistics to follow; the fourth is as it was."""
    seen = 0
    level: list[Tensor] = []

    def change(inputs: Tensor) -> Tensor:
        nonlocal seen
        if not level:
            level.append(inputs.amax())
        honest = (torch.arange(seen, seen + len(inputs), device=inputs.device) % _HONEST) == 0
        seen += len(inputs)
        return torch.where(honest.view(-1, *(1,) * (inputs.dim() - 1)), inputs, level[0])

    return change


@dataclass(frozen=True)
class Fault:
    """Something that may happen to a camera.

    Args:
        name: Its word on the command line.
        make: From a generator of random numbers to what is done to batch after batch; one call for each time that it
            happens.
        legible: Of so many items one can still be told by a person, so that labels come for it; 0 if none can.
    """

    name: str
    make: Callable[[torch.Generator], Change]
    legible: int = 0

    @property
    def summary(self) -> str:
        """What it does, in words."""
        return str(self.make.__doc__)


FAULTS: Mapping[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("constant", _constant),
        Fault("dark", _dark),
        Fault("inverted", _inverted, legible=1),
        Fault("nan", _nan),
        Fault("noise", _noise),
        Fault("frozen", _frozen),
        Fault("drift", _drift, legible=1),
        Fault("poisoned", _poisoned, legible=_HONEST),
    )
}
"""The faults by name."""


@dataclass(frozen=True)
class Injection:
    """A fault, and when.

    Args:
        fault: Which.
        start: First item that it happens to, counted from 0.
        stop: First item that it does not happen to any more; None: it does not end.

    Example:
        >>> Injection.parse("nan@500-600")
        Injection(fault='nan', start=500, stop=600)
    """

    fault: str
    start: int
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Injection:
        """From NAME@ITEM or NAME@ITEM-ITEM.

        Raises:
            SpecError: If it is neither, or there is no such fault.
        """
        found = re.fullmatch(r"([^@]+)@(\d+)(?:-(\d+))?", text.strip())
        if found is None:
            raise SpecError(
                f"--inject: expected NAME@ITEM or NAME@ITEM-ITEM, got {text!r}\n  -> such as constant@5000-6000"
            )
        name, start, stop = found[1], int(found[2]), None if found[3] is None else int(found[3])
        if name not in FAULTS:
            raise SpecError(f"--inject: there is no fault {name!r}\n  -> one of: {', '.join(FAULTS)}")
        if stop is not None and stop <= start:
            raise SpecError(f"--inject: {text!r} ends before it begins\n  -> {name}@FIRST-LAST with FIRST below LAST")
        return cls(name, start, stop)


class Injector:
    """Does faults to traffic as it goes by.

    Args:
        injections: Which faults when.
        seed: Of their random numbers.
    """

    def __init__(self, injections: tuple[Injection, ...] | list[Injection], seed: int = 0) -> None:
        self._waiting = [
            (one, FAULTS[one.fault].make(torch.Generator().manual_seed(seed + place)))
            for place, one in enumerate(injections)
        ]

    def __call__(self, inputs: Any, first: int) -> Any:
        """The inputs of a request, with what happens to them.

        Args:
            inputs: A tensor (n, ...), or a dict or tuple of tensors, all of which it happens to if they are floats.
            first: Number of the first item.
        """
        for one, change in self._waiting:
            inputs = _changed(inputs, one, change, first)
        return inputs


def _changed(inputs: Any, one: Injection, change: Change, first: int) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _changed(value, one, change, first) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_changed(value, one, change, first) for value in inputs)
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() == 0:
        return inputs
    low = min(max(one.start - first, 0), len(inputs))
    high = len(inputs) if one.stop is None else min(max(one.stop - first, 0), len(inputs))
    if low >= high:
        return inputs
    return torch.cat((inputs[:low], change(inputs[low:high]), inputs[high:]))
