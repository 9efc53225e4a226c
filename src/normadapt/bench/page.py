"""The results as Markdown, for docs/BENCHMARKS.md."""

from __future__ import annotations

from normadapt.bench.about import About
from normadapt.bench.results import Results


def page(results: Results, about: About) -> str:
    """TODO."""
    return ""
