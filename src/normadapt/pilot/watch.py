r"""All guards together: learns what is normal in the shadow phase, then says when it no longer is.

With k statistical guards each may be wrong with probability alpha/k, and a guard trips when its log e-value reaches
$\log(k/\alpha)$. Nothing is shared between them, so they may depend on each other in any way. The promise is for one
stretch from `restart` to `restart`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from normadapt.adapted._adapt import AdaptedModel
from normadapt.adapted.settings import DEFAULT_STREAM
from normadapt.errors import PlanError
from normadapt.layers.predictions import Predictions
from normadapt.pilot.guard_state import GuardState
from normadapt.pilot.guard_tables import guard_from_table, guard_to_table
from normadapt.pilot.guards import Guard, LabelledError, Latency, NonFinite, VarianceRatio
from normadapt.pilot.judges import Rows
from normadapt.pilot.signals import Signals, signals, variance_ratio

_STREAMS = 1000  # whose items are counted, for when to look at their statistics again


@dataclass(frozen=True)
class Trip:
    """A guard found harm.

    Args:
        guard: Its name.
        log_value: Largest log e-value; None for a hard guard, which needs no statistics.
        threshold: What it had to reach; None for a hard guard.
        items: Items it had judged since the last restart.
        reason: For people.
    """

    guard: str
    log_value: float | None
    threshold: float | None
    items: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the audit log."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Watch:
    """All guards of a pilot.

    Before `freeze_baselines` only the hard guards can trip. Afterwards a statistical guard whose signal the shadow
    phase never showed judges nothing either, and `blind` names it: what is normal cannot be made up. `LabelledError`
    needs no shadow phase.

    Args:
        guards: What is watched, each with a name of its own.
        alpha: Probability, over all statistical guards, of tripping without harm.
        cusum: e-CUSUM processes, for the long run: they do not pay for a long quiet past, alpha then bounds the rate of
            false alarms (at most one in k/alpha items of each guard, on average) instead of their probability.

    Raises:
        PlanError: If there are no guards, two have one name, or alpha is not in (0, 1).

    Example:
        >>> from normadapt.pilot.guards import Disagreement
        >>> watch = Watch([Disagreement()], alpha=1e-3)
        >>> watch.learn({"disagreement": [0.0] * 990 + [1.0] * 10})
        >>> watch.freeze_baselines()
        >>> watch.update({"disagreement": [1.0] * 20}).guard
        'disagreement'
    """

    def __init__(self, guards: Sequence[Guard], alpha: float, *, cusum: bool = False) -> None:
        names = [guard.name for guard in guards]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice:
            what = f"two guards are named {', '.join(map(repr, twice))}" if twice else "there is no guard"
            raise PlanError(f"{what} -> give a pilot at least one guard, and each a name of its own")
        if not 0 < alpha < 1:
            raise PlanError(f"alpha must be a probability in (0, 1); got {alpha!r}")
        self.guards = tuple(guards)
        self.alpha = float(alpha)
        self.cusum = bool(cusum)
        self.states = {guard.name: GuardState(guard) for guard in guards if not guard.hard}
        self.threshold = math.log(max(len(self.states), 1) / self.alpha)
        self.frozen = False
        self._hard = tuple((guard.name, guard) for guard in guards if guard.hard)
        self._every = min((guard.every for guard in guards if isinstance(guard, VarianceRatio)), default=None)
        self._slow: dict[str, list[bool]] = {guard.name: [] for guard in guards if isinstance(guard, Latency)}
        self._unlooked: OrderedDict[str, int] = OrderedDict()  # by stream: items since its statistics were looked at

    @property
    def blind(self) -> tuple[str, ...]:
        """Statistical guards that could not trip on anything, because the shadow phase taught them too little."""
        return tuple(
            name for name, state in self.states.items() if state.hypothesis is not None and state.hypothesis.blind
        )

    @property
    def level(self) -> float:
        """Largest log e-value of all guards now, as a share of the threshold: 1 trips."""
        return max((state.log_value for state in self.states.values()), default=0.0) / self.threshold

    def measure(
        self,
        source_output: Any,
        adapted_output: Any,
        inputs: Any = None,
        *,
        predictions: Predictions | None = None,
        seconds: float | None = None,
        adapted: AdaptedModel | None = None,
        items: int = 1,
        stream: str = DEFAULT_STREAM,
    ) -> Signals:
        """As `signals`, and looks at the statistics of `adapted` in a stream's every `VarianceRatio.every` items."""
        variance = None
        every = self._every
        if every is not None and adapted is not None:
            unlooked = self._unlooked.pop(stream, every) + items
            if unlooked >= every:
                variance, unlooked = variance_ratio(adapted), 0
            self._unlooked[stream] = unlooked
            if len(self._unlooked) > _STREAMS:
                self._unlooked.popitem(last=False)  # it will be looked at as soon as it comes again
        return signals(
            self.guards,
            source_output,
            adapted_output,
            inputs,
            predictions=predictions,
            seconds=seconds,
            variance=variance,
        )

    def learn(self, rows: Rows) -> None:
        """Learn from the shadow phase's next items.

        Raises:
            ValueError: After `freeze_baselines`.
        """
        if self.frozen:
            raise ValueError("the baselines are frozen -> make a new Watch for a new shadow phase")
        for state in self.states.values():
            state.baseline.learn(state.judge.learn(rows))

    def freeze_baselines(self) -> None:
        """The shadow phase ends: what it showed, with a margin, is normal. A second call does nothing."""
        if not self.frozen:
            self.frozen = True
            for state in self.states.values():
                state.freeze(self.alpha / len(self.states), self.cusum)

    def update(self, rows: Rows) -> Trip | None:
        """Judge the next items; the first guard that trips, the hard ones before the others.

        A statistical guard that has tripped goes on tripping until `restart`.
        """
        found = self._hard_trip(rows)
        for state in self.states.values():
            state.update(rows)
            if state.peak >= self.threshold and found is None:
                found = self._trip(state)
        return found

    def _trip(self, state: GuardState) -> Trip:
        """A trip in words; signals of a guard that compares are told as differences, 0 for models that are alike."""
        guard, hypothesis = state.guard, state.hypothesis

        def told(signal: float) -> str:
            return f"{signal:.3f}" if guard.scale == 1 else f"{(signal - 0.5) / guard.scale:+.3f}"

        normal = ""
        if hypothesis is not None:
            normal = f"normal is at most {told(hypothesis.item if hypothesis.block is None else hypothesis.block)}"
            if isinstance(guard, LabelledError):
                normal += " by the plan"
            elif hypothesis.items:
                normal += f" (shadow phase: {told(hypothesis.rate)} over {hypothesis.items} items)"
        reason = (
            f"{guard.measures}: {told(state.recent)} over the last {len(state.latest)} items, {told(state.mean)} over "
            f"all {state.items}; {normal}; odds against chance e^{state.peak:.1f}, needed e^{self.threshold:.1f}"
        )
        return Trip(guard.name, state.peak, self.threshold, state.items, reason)

    def _hard_trip(self, rows: Rows) -> Trip | None:
        found: Trip | None = None
        for name, guard in self._hard:
            row = rows.get(name)
            reason = ""
            if not row:
                continue
            if isinstance(guard, NonFinite) and any(row):
                reason = f"{sum(map(bool, row))} of {len(row)} outputs are not finite"
            elif isinstance(guard, VarianceRatio) and not (guard.low <= row[0] and row[-1] <= guard.high):
                reason = f"variances are {row[0]:.3g} to {row[-1]:.3g} of the source's"
                reason += f", allowed {guard.low:g} to {guard.high:g}"
            elif isinstance(guard, Latency):
                reason = self._latency(guard, row)
            if reason and found is None:
                found = Trip(guard.name, None, None, len(row), reason)
        return found

    def _latency(self, guard: Latency, row: Sequence[float]) -> str:
        slow = self._slow[guard.name]
        for seconds in row:
            slow.append(not seconds <= guard.seconds)
            del slow[: -guard.requests]
        if len(slow) < guard.requests or 2 * sum(slow) <= guard.requests:
            return ""
        return f"{sum(slow)} of the last {len(slow)} requests took over {guard.seconds:g} s, the last {row[-1]:.3g} s"

    def restart(self, *, cusum: bool | None = None) -> None:
        """Wealth back to 1 and recent items forgotten, baselines kept; also changes over to e-CUSUM or back."""
        self.cusum = self.cusum if cusum is None else bool(cusum)
        for state in self.states.values():
            state.restart(self.cusum)
        self._slow = {name: [] for name in self._slow}
        self._unlooked.clear()

    def status(self) -> dict[str, dict[str, Any]]:
        """What people may want to see of each guard, as plain data."""
        told: dict[str, dict[str, Any]] = {}
        for guard in self.guards:
            state = self.states.get(guard.name)
            if state is None:
                told[guard.name] = {"kind": guard.kind, "hard": True}
                continue
            known = state.hypothesis
            told[guard.name] = {
                "kind": guard.kind,
                "hard": False,
                "measures": guard.measures,
                "scale": guard.scale,
                "log_value": state.log_value,
                "peak": state.peak,
                "threshold": self.threshold,
                "items": state.items,
                "mean": _number(state.mean),
                "recent": _number(state.recent),
                "learned": state.baseline.count,
                "rate": None if known is None else _number(known.rate),
                "normal": None if known is None else (known.item if known.block is None else known.block),
                "normal_in_a_burst": None if known is None else known.item,
                "blind": known is not None and known.blind,
            }
        return told

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data; `from_dict` gives a watch that goes on the same to the bit."""
        return {
            "guards": [_table(guard) for guard in self.guards],
            "alpha": self.alpha,
            "cusum": self.cusum,
            "frozen": self.frozen,
            "states": {name: state.to_dict() for name, state in self.states.items()},
            "slow": {name: list(slow) for name, slow in self._slow.items()},
            "unlooked": dict(self._unlooked),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], guards: Sequence[Guard] | None = None) -> Watch:
        """The watch that `to_dict` described.

        Args:
            state: What it gave.
            guards: The same guards, where one cannot be read from plain data (a score whose function has no name).

        Raises:
            ValueError: If it describes none, or one of other guards.
        """
        try:
            told = list(state["guards"])
            made = cls([guard_from_table(t) for t in told] if guards is None else guards, state["alpha"])
            if [_table(guard) for guard in made.guards] != told:
                raise ValueError("the state is of a watch with other guards -> begin a new shadow phase")
            made.cusum, made.frozen = bool(state["cusum"]), bool(state["frozen"])
            for name, known in made.states.items():
                known.load(state["states"][name])
            made._slow = {name: [bool(s) for s in state["slow"][name]] for name in made._slow}
            unlooked = state["unlooked"]
            if isinstance(unlooked, Mapping):  # one number for all streams, once
                made._unlooked.update({str(stream): int(items) for stream, items in unlooked.items()})
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is not the state of a watch ({error!r}) -> pass what to_dict() gave") from error
        return made


def _table(guard: Guard) -> dict[str, Any]:
    """Its table; a function that has no name is left out, and `from_dict` needs the guards then."""
    try:
        return guard_to_table(guard)
    except PlanError:
        known = {field.name: getattr(guard, field.name) for field in fields(guard) if field.name != "function"}
        return {"kind": guard.kind, **known}


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
