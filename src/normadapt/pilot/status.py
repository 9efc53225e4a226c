"""A trial as plain data: what the command line and the live page show."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from normadapt.pilot.keeper import Keeper
from normadapt.pilot.stages import Stage

if TYPE_CHECKING:
    from normadapt.pilot.trial import Trial

_LAST = 20


STATUS = "pilot-status"
"""Under this name the store has what `status` gave when the pilot last saved its state, and `saved`: when."""


def status(trial: Trial, keeper: Keeper) -> dict[str, Any]:
    """Everything that an operator may want to see.

    Args:
        trial: The trial.
        keeper: What it keeps.
    """
    position, rule = trial.position, trial.rule
    cooling = position.stage is Stage.ROLLED_BACK and not position.waits
    return {
        "stage": position.stage.value,
        "step": position.step,
        "steps": len(trial.plan.canary),
        "share": position.share,
        "serving": trial.serving,
        "adapting": trial.adapting and position.stage is not Stage.OFF,
        "paused": position.paused,
        "waits_for_operator": position.waits,
        "rollbacks": position.rollbacks,
        "verdict": trial.verdict().to_dict(),
        "failure": trial.failure or None,
        "items": trial.items,
        "items_needed": rule.items,
        "seconds": trial.time.counted,
        "seconds_needed": trial.plan.cool_down if cooling else rule.bake,
        "seconds_since_request": trial.time.gap(),
        "max_weight": rule.max_weight,
        "answered": {key: trial.answered[key] for key in ("requests", "items", "source", "adapted", "snapshot")},
        "guards": trial.watch.status(),
        "blind": list(trial.watch.blind),
        "labels": {
            "of_this_stage": trial.labels.count,
            "needed": 0 if trial.plan.promote_without_labels else trial.plan.minimum_labels,
            "evidence": trial.labels.evidence,
            "evidence_needed": trial.labels.threshold,
            "used": trial.labels.matched - trial.labels.outdated,
            "outdated": trial.labels.outdated,
            "for_nothing": trial.labels.unmatched,
            "remembered": len(trial.labels),
        },
        "snapshot": keeper.number,
        "store": {"path": keeper.path, "trouble": keeper.trouble, "waiting": keeper.waiting},
        "counts": dict(keeper.counts),
        "events": [asdict_event(event) for event in list(keeper.events)[-_LAST:]],
        "plan": {"digest": trial.plan.digest, "alpha": trial.plan.alpha, "unit": trial.plan.unit}
        | {"shares": list(trial.plan.shares), "rule": asdict(rule)},
        "time": keeper.now,
    }


def asdict_event(event: Any) -> dict[str, Any]:
    """An event as plain data."""
    return {"time": event.time, "kind": event.kind, "facts": event.facts}
