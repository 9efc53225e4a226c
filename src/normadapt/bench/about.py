"""What a report says about its own making: when, with what, on what."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from normadapt.version import __version__


@dataclass(frozen=True)
class About:
    """The circumstances of a run; no path and no name of a host.

    Args:
        date: Day it ended, in UTC.
        command: The command line that makes it again.
        seconds: How long it took.
        computed: Cells that were computed; all others were reused from an earlier run of the same code.
        versions: Of this library and of what computes.
        machine: Processor, cores and threads.
    """

    date: str
    command: str
    seconds: float
    computed: int
    versions: Mapping[str, str]
    machine: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def about(command: str, seconds: float, computed: int, jobs: int) -> About:
    """The circumstances of the run that ends now."""
    versions = {
        "normadapt": __version__,
        "torch": torch.__version__.partition("+")[0],
        "numpy": np.__version__,
        "Python": platform.python_version(),
    }
    capability = torch.backends.cpu.get_cpu_capability()
    machine = (
        f"{platform.system()} on {platform.machine()} ({capability}), {os.cpu_count()} cores, "
        f"{jobs} {'process' if jobs == 1 else 'processes'} of one thread"
    )
    return About(datetime.now(UTC).strftime("%Y-%m-%d"), command, round(seconds, 1), computed, versions, machine)
