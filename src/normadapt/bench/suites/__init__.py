"""What the benchmark runs on: models with the shifted data they meet."""

from __future__ import annotations

from collections.abc import Mapping

from normadapt.bench.suites.activity import Activity
from normadapt.bench.suites.base import Domain, Need, Split, Suite, Task
from normadapt.bench.suites.crepe import Crepe
from normadapt.bench.suites.fashion import FashionC
from normadapt.bench.suites.third_party import SvhnMnist, UspsDigits, UspsMnist

SUITES: Mapping[str, Suite] = {
    suite.name: suite for suite in (UspsMnist(), SvhnMnist(), UspsDigits(), FashionC(), Activity(), Crepe())
}
"""By name, in the order of the report. `SUITES[name].with_cache(folder)` keeps costly data elsewhere."""

__all__ = ["SUITES", "Domain", "Need", "Split", "Suite", "Task"]
