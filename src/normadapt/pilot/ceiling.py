"""The ceiling of the weight on the test statistics, which grows with the stage: a trial can begin cautiously."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from normadapt.adapt import AdaptedModel
from normadapt.errors import PlanError
from normadapt.pilot.plan import StageRule


class Ceiling:
    """Gives an adapted model its own policy with a lower `max_weight`.

    Args:
        adapted: The model.
        rules: All that the plan has.

    Raises:
        PlanError: If a rule sets a ceiling and the policy has none.
    """

    def __init__(self, adapted: AdaptedModel, rules: Sequence[StageRule]) -> None:
        self._adapted = adapted
        policy: Any = adapted.policy
        self._policy = policy
        self._has = is_dataclass(policy) and any(field.name == "max_weight" for field in fields(policy))
        if not self._has and any(rule.max_weight < 1 for rule in rules):
            raise PlanError(
                f"the plan sets max_weight, which the policy {type(policy).__name__} does not have -> say "
                "max_weight=1 in every stage of the plan, or take a policy that has it (Track)"
            )

    def set(self, rule: StageRule) -> None:
        """The stage's ceiling, or the policy's own where that is lower."""
        if self._has:
            lower = min(float(self._policy.max_weight), rule.max_weight)
            self._adapted.policy = replace(self._policy, max_weight=lower)
