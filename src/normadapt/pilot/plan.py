"""What an operator wants of a trial: stages, guards and limits, checked as a whole before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from normadapt.errors import PlanError
from normadapt.pilot import plan_file
from normadapt.pilot.baseline import BURSTS_SHOW
from normadapt.pilot.guards import Guard


@dataclass(frozen=True)
class StageRule:
    """What one stage asks for before the next may begin.

    Args:
        items: Items that the adapted model must have answered in it (in shadow: beside the source).
        bake: Seconds under traffic that it must have lasted; an hour if it is not said.
        max_weight: Ceiling of the weight on the test statistics in it, in [0, 1], for policies that have `max_weight`.
        share: Of the items, answered by the adapted model. A step of the canary must say it; in shadow it is 0 and in
            full 1, and both may leave it out.
    """

    items: int
    bake: float = 3600.0
    max_weight: float = 1.0
    share: float | None = None

    def __post_init__(self) -> None:
        plan_file.as_declared(self)


# Shadow has no ceiling: nobody is served there, and what is normal must be learned from what `full` will do.
_SHADOW = StageRule(BURSTS_SHOW, 3600.0)
_CANARY = (
    StageRule(200, 3600.0, max_weight=0.25, share=0.01),
    StageRule(500, 3600.0, max_weight=0.5, share=0.05),
    StageRule(1000, 3600.0, max_weight=0.75, share=0.25),
    StageRule(2000, 3600.0, share=0.5),
)
_FULL = StageRule(5000, 86400.0)
_STEP = {
    "items": "say how many items the adapted model must answer in this step, as items = 200",
    "share": "say the share of the ids that this step gives to the adapted model, as share = 0.01",
}


@dataclass(frozen=True)
class Plan:
    """A trial of an adapted model, from shadow to full.

    Args:
        guards: From `normadapt.pilot.guards`; at least one.
        alpha: Probability of a false roll back by the statistical guards in a stage, however long it is.
        shadow: Rule of the stage in which both models answer and the source's answer is served. With fewer than 3,000
            items guards may take harmless bursts for harm.
        canary: Rules of the steps, with rising shares.
        full: Rule of the last stage: after it, earlier roll backs are forgotten.
        cool_down: Seconds under traffic after a roll back, before the canary begins again.
        cusum: Whether guards in `full` are e-CUSUMs, which forget a long quiet past and see harm sooner after it, and
            for which alpha is the rate of false alarms (one in 1/alpha items or so), not their probability.
        paired_share: Share of the items in `full` that the source answers too, above 0: guards that compare and labels
            see these alone. 1 finds harm soonest, at the price of the source's forward pass for every item.
        promote_without_labels: Whether a stage may pass on label-free evidence alone.
        minimum_labels: Labels of a stage's own items, without which labels do not promote.
        label_margin: Difference in error rate up to which the adapted model does not count as worse.
        label_alpha: Probability that labels let one stage pass although the adapted model is worse by more than that.
        unit: What is hashed: "request" (each item's own id) or "stream" (the whole stream on one side).
        salt: Part of the hash; two pilots with different salts do not pick the same ids.
        idle: A gap between requests longer than this, in seconds, is no traffic: it does not count as baking.
        remember: Items kept for labels that come late.
        commit_every: Items of the adapted model between two good snapshots, and items after a snapshot in which no
            guard may be loud before it counts as good: more than harm takes to be seen.
        save_every: Items between two writings of the pilot's state.

    Raises:
        PlanError: Naming everything that is wrong.

    Example:
        >>> from normadapt.pilot import Disagreement, NonFinite
        >>> plan = Plan(guards=(Disagreement(), NonFinite()), cool_down=600.0)
        >>> plan.shares
        (0.01, 0.05, 0.25, 0.5)
        >>> Plan(guards=())
        Traceback (most recent call last):
        normadapt.errors.PlanError: the plan is refused:
          guards: no guard, no pilot -> give at least one, as Disagreement() and NonFinite()
    """

    guards: tuple[Guard, ...]
    alpha: float = 1e-3
    shadow: StageRule = _SHADOW
    canary: tuple[StageRule, ...] = _CANARY
    full: StageRule = _FULL
    cool_down: float = 3600.0
    cusum: bool = False
    paired_share: float = 0.1
    promote_without_labels: bool = False
    minimum_labels: int = 100
    label_margin: float = 0.02
    label_alpha: float = 0.05
    unit: Literal["request", "stream"] = "request"
    salt: str = "normadapt"
    idle: float = 300.0
    remember: int = 10_000
    commit_every: int = 1000
    save_every: int = 500

    def __post_init__(self) -> None:
        plan_file.as_declared(self)
        problems = _problems(self)
        if problems:
            raise PlanError("the plan is refused:" + "".join(f"\n  {problem}" for problem in problems))

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the canary's steps."""
        return tuple(float(rule.share or 0) for rule in self.canary)

    @property
    def digest(self) -> str:
        """Names what the plan says: baselines that were learned under it belong to no other."""
        return sha256(plan_file.signature(self).encode()).hexdigest()

    @classmethod
    def from_toml(cls, path: Path | str) -> Plan:
        """The plan in a TOML file.

        Raises:
            PlanError: Naming every unknown key, wrong type and refused value.
            OSError: If the file cannot be read.
        """
        tables = plan_file.tables(Path(path))
        problems: list[str] = []
        values = plan_file.read_fields(cls, tables, "", problems, apart=("shadow", "canary", "full", "guards"))
        for stage, usual in (("shadow", _SHADOW), ("full", _FULL)):
            if stage in tables:
                values[stage] = plan_file.read_table(StageRule, tables[stage], stage, problems, usual)
        if "canary" in tables:
            steps = plan_file.entries(tables["canary"], "canary", problems)
            values["canary"] = tuple(
                plan_file.read_table(StageRule, step, where, problems, advice=_STEP) for where, step in steps
            )
        guards = plan_file.entries(tables.get("guards", []), "guards", problems)
        values["guards"] = tuple(plan_file.read_guard(guard, where, problems) for where, guard in guards)
        if not guards and not any(line.startswith("guards:") for line in problems):
            problems.append(
                'guards: no guard, no pilot -> add at least one: [[guards]] and below it kind = "disagreement"'
            )
        try:  # say at once what else is wrong with the parts that could be read
            plan = cls(**values)
        except PlanError as error:
            known = {line.partition(":")[0] for line in problems}
            more = [line.strip() for line in str(error).splitlines()[1:]]
            problems += [line for line in more if line.partition(":")[0] not in known]
        if problems:
            raise PlanError(f"the plan in {path} is refused:" + "".join(f"\n  {problem}" for problem in problems))
        return plan

    def to_toml(self) -> str:
        """The plan as TOML, which `from_toml` reads back.

        Raises:
            PlanError: If a guard's function cannot be named by a module and a name.
        """
        return plan_file.written(self)


def _problems(plan: Plan) -> list[str]:
    found: list[str] = []

    def need(good: bool, text: str) -> None:
        if not good:
            found.append(text)

    def number(name: str, low: float, high: float = math.inf, *, open_low: bool = False, whole: bool = False) -> None:
        value = getattr(plan, name)
        kind = int if whole else (int, float)
        good = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        good = good and (low < value if open_low else low <= value) and value <= high
        span = f"{'above' if open_low else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")
        need(good, f"{name}: expected {'a whole number' if whole else 'a number'} {span}; got {value!r}")

    number("alpha", 0, 0.5, open_low=True)
    number("cool_down", 0)
    number("paired_share", 0, 1, open_low=True)
    number("minimum_labels", 1, whole=True)
    number("label_margin", 0, 0.5, open_low=True)
    number("label_alpha", 0, 0.5, open_low=True)
    number("idle", 0, open_low=True)
    number("remember", 1, whole=True)
    number("commit_every", 1, whole=True)
    number("save_every", 1, whole=True)
    for name in ("cusum", "promote_without_labels"):
        need(isinstance(getattr(plan, name), bool), f"{name}: expected true or false; got {getattr(plan, name)!r}")
    need(plan.unit in ("request", "stream"), f'unit: expected "request" or "stream"; got {plan.unit!r}')
    need(isinstance(plan.salt, str) and _is_text(plan.salt), f"salt: expected a text of unicode; got {plan.salt!r}")
    found += _guard_problems(plan.guards)
    found += _rule_problems(plan.shadow, "shadow", 0.0)
    found += _rule_problems(plan.full, "full", 1.0)
    if not isinstance(plan.canary, tuple) or not plan.canary:
        return [*found, "canary: expected at least one step, each with its share -> a trial begins small"]
    for place, rule in enumerate(plan.canary):
        found += _rule_problems(rule, f"canary[{place}]", None)
    shares = [rule.share for rule in plan.canary if isinstance(rule, StageRule) and _is_number(rule.share)]
    rising = all(a < b for a, b in pairwise(shares))  # type: ignore[operator]
    need(rising, f"canary: shares must rise from step to step; got {', '.join(map(str, shares))}")
    return found


def _guard_problems(guards: Any) -> list[str]:
    if not isinstance(guards, tuple):
        return [f"guards: expected a tuple of guards; got a {type(guards).__name__}"]
    if not guards:
        return ["guards: no guard, no pilot -> give at least one, as Disagreement() and NonFinite()"]
    found = [
        f"guards[{place}]: expected a guard from normadapt.pilot.guards; got {guard!r}"
        for place, guard in enumerate(guards)
        if not isinstance(guard, Guard)
    ]
    names = [guard.name for guard in guards if isinstance(guard, Guard)]
    return found + [f"guards: {name} is there twice" for name in sorted({n for n in names if names.count(n) > 1})]


def _rule_problems(rule: Any, where: str, own_share: float | None) -> list[str]:
    if not isinstance(rule, StageRule):
        return [f"{where}: expected a StageRule; got {rule!r}"]
    found = []
    if not (isinstance(rule.items, int) and not isinstance(rule.items, bool) and rule.items >= 1):
        found.append(f"{where}.items: expected a whole number from 1; got {rule.items!r}")
    if not (_is_number(rule.bake) and rule.bake >= 0):
        found.append(f"{where}.bake: expected seconds from 0; got {rule.bake!r}")
    if not (_is_number(rule.max_weight) and 0 <= rule.max_weight <= 1):
        found.append(f"{where}.max_weight: expected a weight in [0, 1]; got {rule.max_weight!r}")
    if own_share is None:
        if not (_is_number(rule.share) and 0 < rule.share < 1):  # type: ignore[operator]
            found.append(f"{where}.share: expected a share between 0 and 1; got {rule.share!r}")
    elif rule.share is not None and rule.share != own_share:
        found.append(f"{where}.share: is {own_share:g} always; got {rule.share!r} -> leave it out")
    return found


def _is_text(value: str) -> bool:
    """Whether a file can hold it: half of a surrogate pair cannot be written."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
