"""What a suite is: models, and the domains whose instances they meet."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeAlias

from torch import Tensor, nn

from normadapt.errors import NormadaptError

Split: TypeAlias = Literal["report", "dev"]
"""`dev` chooses hyper-parameters, `report` is reported; they share no seed and, where that is possible, no shift."""

CACHE = Path("normadapt-out/bench-cache")
"""Where suites keep what is costly to make, unless told otherwise: relative to the working directory."""

_KEPT = 24
"""Domains a task keeps in memory; gradual streams visit many more, each of them once."""


@dataclass(frozen=True)
class Domain:
    """Instances under one condition.

    Args:
        inputs: (M, ...) float32, ready for the model: already normalized.
        labels: (M,) int64.
    """

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Need:
    """Something a suite needs that does not come with normadapt.

    Args:
        what: Its name.
        is_there: Whether it is installed.
        install: The one command that installs it.
    """

    what: str
    is_there: Callable[[], bool]
    install: str


class Task:
    """A model in eval mode and the domains it meets. Nobody changes the model: methods take copies.

    Args:
        name: Unique among all suites, such as "fashion-c/5".
        model: In eval mode.
        make: Makes a domain by its name, always the same; what was made last is kept.
        clean: Name of the domain without shift, None where there is none.
        shifts: Names of the shifted domains, in the order in which continual streams visit them.
        ramps: From a shift to the names of domains of rising severity that end with the shift itself.
        negative: A negative control: adapting cannot be expected to gain anything.
        source: Makes the training inputs for a source profile, in batches; None where they are not available.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        make: Callable[[str], Domain],
        *,
        clean: str | None,
        shifts: Sequence[str],
        ramps: Mapping[str, tuple[str, ...]] | None = None,
        negative: bool = False,
        source: Callable[[], list[Tensor]] | None = None,
    ) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.clean = clean
        self.shifts = tuple(shifts)
        self.ramps: Mapping[str, tuple[str, ...]] = dict(ramps or {})
        self.negative = negative
        self._make = make
        self._source = source
        self._domains: dict[str, Domain] = {}
        self._batches: list[Tensor] | None = None

    @property
    def domain_names(self) -> tuple[str, ...]:
        """Every name that `domain` knows: the clean one, the shifts, and the steps of their ramps."""
        steps = [step for shift in self.shifts for step in self.ramps.get(shift, ())]
        return tuple(dict.fromkeys([*([] if self.clean is None else [self.clean]), *self.shifts, *steps]))

    def domain(self, name: str) -> Domain:
        """The instances of a domain, made when it is asked for.

        Raises:
            NormadaptError: If the task has no such domain.
        """
        if name not in self.domain_names:
            raise NormadaptError(
                f"the task {self.name} has no domain {name!r}\n  -> one of: {', '.join(self.domain_names)}"
            )
        found = self._domains.pop(name, None) or self._make(name)
        self._domains[name] = found  # the last one is the one used last
        if len(self._domains) > _KEPT:
            del self._domains[next(iter(self._domains))]
        return found

    def correct(self, output: Tensor, labels: Tensor) -> Tensor:
        """Which answers are right, (n,) bool: by default those whose largest score is the label's.

        Args:
            output: What the model answered, (n, classes).
            labels: (n,).
        """
        return output.argmax(1) == labels

    def groups(self, labels: Tensor) -> Tensor:
        """What stays the same within a run of a label-correlated stream, (n,) int64: by default the label."""
        return labels

    def source_batches(self) -> list[Tensor] | None:
        """About 2,000 training inputs, normalized, in batches of 100; None where they are not available."""
        if self._batches is None and self._source is not None:
            self._batches = self._source()
        return self._batches


class Suite(ABC):
    """Tasks that belong together.

    Args:
        cache: Folder for what is costly to make; made when it is needed.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    negative: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ()

    def __init__(self, cache: str | Path = CACHE) -> None:
        self.cache = Path(cache)

    def with_cache(self, cache: str | Path) -> Self:
        """The same suite with another cache folder."""
        other = copy.copy(self)
        other.cache = Path(cache)
        return other

    def missing(self) -> tuple[Need, ...]:
        """What is needed and not there."""
        return tuple(need for need in self.needs if not need.is_there())

    def tasks(self, split: Split, seed: int) -> list[Task]:
        """The suite's tasks; their domains are made when they are first asked for.

        Args:
            split: Which instances, and for some suites which shifts.
            seed: Of which instances are taken, and of all corruptions.

        Raises:
            NormadaptError: If something the suite needs is not there, with the command that installs it.
        """
        missing = self.missing()
        if missing:
            lines = (f"the suite {self.name} needs {need.what}\n  -> {need.install}" for need in missing)
            raise NormadaptError("\n".join(lines))
        return self._tasks(split, seed)

    def ahead(self, task: Task, names: Sequence[str], split: Split, seed: int) -> list[Callable[[], object]]:
        """What is costly to make for these domains and not in the cache yet, in parts that processes can share.

        Args:
            task: One of `tasks(split, seed)`.
            names: Of its domains.
            split: As for `tasks`.
            seed: As for `tasks`.

        Returns:
            Calls that can be pickled. Default: none.
        """
        return []

    @abstractmethod
    def _tasks(self, split: Split, seed: int) -> list[Task]: ...


def draw(split: Split, seed: int, *words: str | int) -> int:
    """A seed between 0 and 2^32 for one purpose: other splits, seeds and words give unrelated ones.

    Args:
        split: `report` and `dev` share no seed.
        seed: The user's.
        words: What it is for.
    """
    text = repr((split, seed, *words)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big")


def package_folder(package: str) -> Path | None:
    """Where an installed package lies, without importing it; None if it is not installed."""
    found = importlib.util.find_spec(package)
    return None if found is None or found.origin is None else Path(found.origin).parent
