"""What one statistical guard knows: its baseline, its hypothesis, and the e-processes at work on it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from normadapt.pilot.baseline import BLOCK, BLOCK_MEMORY, ITEM_SHARE, Baseline, Hypothesis
from normadapt.pilot.e_process import EProcess
from normadapt.pilot.guards import Guard, LabelledError
from normadapt.pilot.judges import Rows, judge_of


class GuardState:
    """What a statistical guard knows: its baseline, and the e-processes at work.

    Several processes share a guard's wealth by fixed weights, and each is held to its own share: by the union bound the
    guard is right as often as one process would be.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.name = guard.name
        self.peak = 0.0  # largest log e-value since the restart
        self.judge = judge_of(guard)
        self.baseline = Baseline()
        self.hypothesis: Hypothesis | None = None
        self._processes: list[tuple[float, EProcess]] = []  # (log weight, process): items, then blocks in turn
        self._open: list[float] = []
        self._turn = 0
        self.latest: deque[float] = deque(maxlen=BLOCK)  # signals since the restart, for people

    @property
    def log_value(self) -> float:
        """Log e-value now."""
        return max((weight + process.log_value for weight, process in self._processes), default=0.0)

    @property
    def items(self) -> int:
        """Items judged since the restart."""
        return self._processes[0][1].count if self._processes else 0

    @property
    def mean(self) -> float:
        """Mean of their signals."""
        return self._processes[0][1].mean if self._processes else math.nan

    @property
    def recent(self) -> float:
        """Mean of the latest signals, a block at most."""
        return math.fsum(self.latest) / len(self.latest) if self.latest else math.nan

    def freeze(self, delta: float, cusum: bool) -> None:
        """Baselines become the hypothesis, and betting begins."""
        self.baseline.learn(self.judge.freeze())
        margin: float = getattr(self.guard, "margin", 0.0) * self.guard.scale
        fixed = 0.5 + margin if isinstance(self.guard, LabelledError) else None
        self.hypothesis = self.baseline.hypothesis(margin, delta, fixed)
        self.restart(cusum)

    def restart(self, cusum: bool) -> None:
        """Wealth back to 1."""
        self.judge.restart()
        self._open, self._turn, self.peak = [], 0, 0.0
        self.latest.clear()
        if self.hypothesis is None:
            return
        if self.hypothesis.block is None:
            self._processes = [(0.0, EProcess(self.hypothesis.item, reset_at_one=cusum))]
            return
        self._processes = [(math.log(ITEM_SHARE), EProcess(self.hypothesis.item, reset_at_one=cusum))]
        for _ in range(2):
            block = EProcess(self.hypothesis.block, reset_at_one=cusum, memory=BLOCK_MEMORY)
            self._processes.append((math.log((1 - ITEM_SHARE) / 2), block))

    def update(self, rows: Rows) -> None:
        """Judge the next items."""
        if self.name not in rows or not self._processes:
            return
        items = self.judge.judge(rows)
        self.latest.extend(items)
        weight, process = self._processes[0]
        process.take(items)
        self.peak = max(self.peak, weight + process.peak)
        if len(self._processes) == 1:
            return
        for x in items:
            self._open.append(x)
            if len(self._open) == BLOCK:
                weight, process = self._processes[1 + self._turn]
                process.take([math.fsum(self._open) / BLOCK])
                self.peak = max(self.peak, weight + process.peak)
                self._open, self._turn = [], 1 - self._turn

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        hypothesis = None if self.hypothesis is None else self.hypothesis._asdict()
        if hypothesis is not None and math.isnan(hypothesis["rate"]):
            hypothesis["rate"] = None
        return {
            "judge": self.judge.to_dict(),
            "baseline": self.baseline.to_dict(),
            "hypothesis": hypothesis,
            "processes": [[weight, process.to_dict()] for weight, process in self._processes],
            "open": list(self._open),
            "turn": self._turn,
            "latest": list(self.latest),
            "peak": self.peak,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `to_dict` gave."""
        self.judge.load(state["judge"])
        self.baseline = Baseline.from_dict(state["baseline"])
        known = state["hypothesis"]
        if known is not None:
            self.hypothesis = Hypothesis(**{**known, "rate": math.nan if known["rate"] is None else known["rate"]})
        self._processes = [(float(weight), EProcess.from_dict(process)) for weight, process in state["processes"]]
        self._open, self._turn = [float(x) for x in state["open"]], int(state["turn"])
        self.latest.extend(float(x) for x in state.get("latest", ()))
        self.peak = float(state["peak"])
