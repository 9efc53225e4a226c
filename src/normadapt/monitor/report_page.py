"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normadapt.report import Report


def page(
    report: Report,
    *,
    title: str | None = None,
    status: Mapping[str, Any] | None = None,
    events: Sequence[Any] | None = None,
) -> str:
    """The whole page."""
    return str(report)
