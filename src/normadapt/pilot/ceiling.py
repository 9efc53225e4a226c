"""The policy on trial: what it is, and the ceiling of its weight on the test statistics, which grows with the stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from normadapt.adapted._adapt import AdaptedModel
from normadapt.errors import PlanError
from normadapt.pilot.plan import StageRule


def describe_policy(policy: Any) -> str:
    """A policy with its settings in one line, the same in every process: what baselines were learned with."""
    kind = f"{type(policy).__module__}.{type(policy).__qualname__}"
    if not is_dataclass(policy):
        return kind
    settings = [f"{field.name}={_described(getattr(policy, field.name))}" for field in fields(policy)]
    return f"{kind}({', '.join(settings)})"


def _described(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {_described(part)}' for key, part in value.items())}}}"
    if is_dataclass(value):
        return describe_policy(value)
    named = value if hasattr(value, "__qualname__") else type(value)  # a repr may hold an address
    return f"{named.__module__}.{named.__qualname__}"


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
                "max_weight=1 in every stage of the plan, or take a policy that has it (Domains)"
            )

    def set(self, rule: StageRule) -> None:
        """The stage's ceiling, or the policy's own where that is lower."""
        if self._has:
            lower = min(float(self._policy.max_weight), rule.max_weight)
            self._adapted.policy = replace(self._policy, max_weight=lower)
