"""What is known of the stage so far, and the verdict on it: pass, fail, or not known yet. A pure function."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from normadapt.pilot.plan import Plan, StageRule
from normadapt.pilot.stages import Stage

QUIET = 0.5
"""A guard above this share of its threshold is too loud for a good snapshot or a promotion."""


class Outcome(StrEnum):
    """Of a stage."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Verdict:
    """On the stage that the pilot is in.

    Args:
        outcome: "pass": the next stage may begin; "fail": it was rolled back; "inconclusive": neither is known.
        reasons: What is missing or wrong, in words.
    """

    outcome: Outcome
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """For `Pilot.status`."""
        return {"outcome": self.outcome.value, "reasons": list(self.reasons)}


@dataclass(frozen=True)
class Findings:
    """What has been seen in the stage so far.

    Args:
        stage: Which.
        items: Answered by the adapted model in it.
        baked: Seconds under traffic in it.
        gap: Seconds since the last request.
        loudest: The guard that is nearest to its threshold.
        loudness: Its log e-value over the threshold's.
        labels: Of this stage's own items.
        label_evidence: Log e-value against "the adapted model is worse by more than the margin".
        labels_against: Whether labels show that it is.
        paused: Whether an operator holds it.
        failure: Why it was rolled back.
    """

    stage: Stage
    items: int
    baked: float
    gap: float
    loudest: str = ""
    loudness: float = 0.0
    labels: int = 0
    label_evidence: float = 0.0
    labels_against: bool = False
    paused: bool = False
    failure: str = ""


def incomplete(findings: Findings, rule: StageRule, plan: Plan) -> tuple[str, ...]:
    """What the stage itself still lacks: items, time, traffic."""
    missing = []
    if findings.gap > plan.idle:
        missing.append(f"no traffic for {findings.gap:.0f} s")
    if findings.items < rule.items:
        missing.append(f"{findings.items} of {rule.items} items")
    if findings.baked < rule.bake:
        missing.append(f"{findings.baked:.0f} of {rule.bake:.0f} s under traffic")
    return tuple(missing)


def warnings(findings: Findings, plan: Plan) -> tuple[str, ...]:
    """What speaks against going on, in whatever stage."""
    said = []
    if findings.loudness > QUIET:
        said.append(f"guard {findings.loudest} is at {findings.loudness:.0%} of its threshold")
    if findings.labels_against:
        said.append(f"{findings.labels} labels show that it is worse by more than {plan.label_margin:g}")
    return tuple(said)


def judge(findings: Findings, rule: StageRule, plan: Plan, label_threshold: float) -> Verdict:
    """The verdict on the stage.

    Without labels a stage passes only if the plan says so; `full` leads nowhere, so there a quiet time is enough.

    Args:
        findings: What has been seen.
        rule: What the stage asks for.
        plan: The whole plan.
        label_threshold: Log e-value from which labels say that the adapted model is not worse.
    """
    if findings.stage is Stage.ROLLED_BACK:
        return Verdict(Outcome.FAIL, (findings.failure or "rolled back",))
    if findings.stage is Stage.OFF:
        return Verdict(Outcome.INCONCLUSIVE, ("nothing is tried",))
    missing = [*incomplete(findings, rule, plan), *warnings(findings, plan)]
    if findings.paused:
        missing.append("paused by an operator")
    if findings.stage is not Stage.FULL and not plan.promote_without_labels:
        if findings.labels < plan.minimum_labels:
            missing.append(f"{findings.labels} of {plan.minimum_labels} labels")
        elif findings.label_evidence < label_threshold:
            missing.append(
                f"{findings.labels} labels do not show yet that it is worse by at most {plan.label_margin:g} "
                f"(log e-value {findings.label_evidence:.1f} of {label_threshold:.1f})"
            )
    if missing:
        return Verdict(Outcome.INCONCLUSIVE, tuple(missing))
    return Verdict(Outcome.PASS, ("complete, and no guard is loud",))
