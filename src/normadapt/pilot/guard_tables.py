"""Guards as tables of a plan file and back: known words and keys only, equal guards with equal tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from normadapt.errors import PlanError
from normadapt.pilot.guards import (
    ClassConcentration,
    ConfidenceCollapse,
    Disagreement,
    Guard,
    LabelledError,
    Latency,
    NonFinite,
    Score,
    VarianceRatio,
)

KINDS: dict[str, type[Guard]] = {
    kind.kind: kind
    for kind in (
        Disagreement,
        ClassConcentration,
        ConfidenceCollapse,
        Score,
        LabelledError,
        NonFinite,
        VarianceRatio,
        Latency,
    )
}
"""The guards by their word in a plan file."""


def guard_from_table(table: Mapping[str, Any]) -> Guard:
    """A guard from a table of a plan file: `kind` and its settings.

    Raises:
        PlanError: If the kind or a key is unknown, or a value is of the wrong type or out of its range.

    Example:
        >>> guard_from_table({"kind": "disagreement", "margin": 0.03})
        Disagreement(margin=0.03, confident=0.8)
    """
    values = dict(table)
    word = values.pop("kind", None)
    kind = KINDS.get(word) if isinstance(word, str) else None
    if kind is None:
        raise PlanError(f"a guard needs kind = one of {', '.join(map(repr, KINDS))}; got {word!r}")
    known = {field.name: field.default for field in fields(kind)}
    found = []
    unknown = sorted(set(values) - set(known))
    if unknown:
        found.append(
            f"guard {word!r} does not know {', '.join(map(repr, unknown))} -> it has "
            f"{', '.join(known) or 'no settings'}"
        )
    wrong = [key for key in values if key in known and not _fits(values[key], known[key])]
    if wrong:
        told = [f"{key} must be a {type(known[key]).__name__}, got {values[key]!r}" for key in wrong]
        found.append(f"guard {word!r}: " + "; ".join(told))
    # A plan file may say 1 for 1.0; equal guards must have equal tables.
    sound = {key: _as(known[key], v) for key, v in values.items() if key in known and key not in wrong}
    try:
        guard = kind(**sound)
    except PlanError as error:
        if "function" not in wrong:  # a function that was not understood is not missing
            found.append(str(error))
    if found:
        raise PlanError("; ".join(found))
    return guard


def guard_to_table(guard: Guard) -> dict[str, Any]:
    """The guard as a table of a plan file, for `guard_from_table`.

    Raises:
        PlanError: If a score's function has no name by which it could be imported again.
    """
    table: dict[str, Any] = {"kind": guard.kind}
    table.update({field.name: _as(field.default, getattr(guard, field.name)) for field in fields(guard)})
    if isinstance(guard, Score) and not isinstance(guard.function, str):
        table["function"] = _import_name(guard.function)
    return table


def _import_name(function: Any) -> str:
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}"
    try:
        same = Score(function=name).resolve() is function
    except PlanError:
        same = False
    if not same:
        raise PlanError(
            f"the function of a score must be importable to be written to a file; {name!r} is not -> define it at the "
            "top of a module and pass 'module:callable'"
        )
    return name


def _as(default: Any, value: Any) -> Any:
    """The value, a whole number as a float where the default is one."""
    return float(value) if isinstance(default, float) and type(value) is int else value


def _fits(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))
