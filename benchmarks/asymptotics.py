"""What the asymptotics cost: saddlepoint tails in bulk, and one gate's tail. One thread; medians.

python benchmarks/asymptotics.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from normadapt.asymptotics.quadratic import tail_from_cumulants, tail_is_below
from normadapt.asymptotics.saddlepoint import GammaCGF, tail


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    """Median time of a call, after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print the figures beside what is aimed at."""
    torch.set_num_threads(1)
    shape = torch.linspace(1, 50, 100_000, dtype=torch.float64)
    x = torch.linspace(0.3, 3, 100_000, dtype=torch.float64)
    bulk = median_seconds(lambda: tail(GammaCGF(shape, shape), x), 20)
    print(f"100,000 Lugannani-Rice tails of gamma laws: {bulk:.3f} s (aimed at 0.25)")
    for q, where in ((0.8, "no shift"), (9.0, "between the bounds"), (60.0, "a clear shift")):
        gate = median_seconds(lambda q=q: tail_is_below(q, 1.0, 0.9, 1e-3), 2000)
        print(f"one gate, {where}: {1e6 * gate:.1f} microseconds (aimed at 50)")
    cumulants = torch.tensor([[1.0, 0.9]] * 2, dtype=torch.float64)
    both = torch.tensor([9.0, 2.0], dtype=torch.float64)
    full = median_seconds(lambda: tail_from_cumulants(both, cumulants), 2000)
    print(f"the tails of one site for the report, location and scale: {1e6 * full:.1f} microseconds")


if __name__ == "__main__":
    main()
