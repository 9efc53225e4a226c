"""A plan's parts from TOML tables and back: known keys and types only, every problem named with its place."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from normadapt.errors import PlanError
from normadapt.pilot.guard_tables import guard_from_table, guard_to_table
from normadapt.pilot.guards import Guard, Score

_NO_ADVICE: Mapping[str, str] = MappingProxyType({})
_NUMBERS: Mapping[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def tables(path: Path) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
        PlanError: If it is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is no TOML file: {error}") from error


def entries(value: Any, where: str, problems: list[str]) -> list[tuple[str, Any]]:
    """The tables of an array, each with its place."""
    if not isinstance(value, list):
        problems.append(f"{where}: expected tables [[{where}]]; got {value!r}")
        return []
    return [(f"{where}[{place}]", entry) for place, entry in enumerate(value)]


def read_table(
    kind: type,
    table: Any,
    where: str,
    problems: list[str],
    left_out: Any = None,
    advice: Mapping[str, str] = _NO_ADVICE,
) -> Any:
    """A dataclass from its table, with what is wrong added to `problems`.

    Args:
        kind: The dataclass.
        table: What the file says.
        where: Its place in the file.
        problems: What is wrong so far.
        left_out: One of the kind with the values of keys that are left out; None: the dataclass's own defaults.
        advice: What to write for keys that must be there.

    Returns:
        The dataclass. Where something is wrong it has a value that can pass, for the rest to be checked at once.
    """
    if not isinstance(table, dict):
        problems.append(f"{where}: expected a table; got {table!r}")
        return left_out
    values = read_fields(kind, table, where + ".", problems, missing=left_out is None, advice=advice)
    if left_out is not None:
        return replace(left_out, **values)
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    return kind(**dict.fromkeys(needed, 1) | values)


def read_guard(table: Any, where: str, problems: list[str]) -> Guard | None:
    """A guard from its table, or None with what is wrong added to `problems`."""
    if not isinstance(table, dict):
        problems.append(f"{where}: expected a table; got {table!r}")
        return None
    try:
        return guard_from_table(table)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return None


def read_fields(
    kind: Any,
    table: Mapping[str, Any],
    prefix: str,
    problems: list[str],
    apart: tuple[str, ...] = (),
    *,
    missing: bool = True,
    advice: Mapping[str, str] = _NO_ADVICE,
) -> dict[str, Any]:
    """Values of the right types for a dataclass's fields in a table, those `apart` excepted."""
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}
    for key in table:
        if key not in known:
            problems.append(f"{prefix}{key}: unknown key -> known are {', '.join(known)}")
    values = {}
    for name, field in known.items():
        if name in apart:
            continue
        if name in table:
            before = len(problems)
            value = _value(table[name], hints[name], prefix + name, problems)
            if len(problems) == before:
                values[name] = value
        elif name in advice or (missing and field.default is MISSING and field.default_factory is MISSING):
            problems.append(f"{prefix}{name}: is missing -> {advice.get(name, 'say it')}")
    return values


def _value(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            problems.append(f"{where}: expected {' or '.join(map(repr, get_args(hint)))}; got {value!r}")
        return value
    kinds = get_args(hint) or (hint,)
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) in kinds:
        return value
    wanted = " or ".join(words for kind, words in _NUMBERS.items() if kind in kinds)
    problems.append(f"{where}: expected {wanted}; got {value!r}")
    return value


def as_declared(part: Any) -> None:
    """Whole numbers become floats where a field of a frozen dataclass is one: equal plans have one text and digest."""
    hints = get_type_hints(type(part))
    for field in fields(part):
        kinds = get_args(hints[field.name]) or (hints[field.name],)
        value = getattr(part, field.name)
        if float in kinds and type(value) is int and abs(value) < 1 << 1000:
            object.__setattr__(part, field.name, float(value))


def written(plan: Any) -> str:
    """A plan as TOML text.

    Raises:
        PlanError: If a guard's function cannot be named.
    """
    return _as_toml(plan, guard_to_table)


def signature(plan: Any) -> str:
    """A text that differs where plans differ; a function that cannot be imported stands there by what it is called."""
    return _as_toml(plan, _loosely)


def _loosely(guard: Guard) -> dict[str, Any]:
    try:
        return guard_to_table(guard)
    except PlanError:
        function = guard.function if isinstance(guard, Score) else None
        table = {field.name: getattr(guard, field.name) for field in fields(guard)}
        return {"kind": guard.kind, **table, "function": getattr(function, "__qualname__", type(function).__name__)}


def _as_toml(plan: Any, table_of: Any) -> str:
    values = {field.name: getattr(plan, field.name) for field in fields(plan)}
    lines = [f"{key} = {_text(value)}" for key, value in values.items() if _is_plain(value)]
    for key, value in values.items():
        if is_dataclass(value):
            lines += ["", f"[{key}]", *_lines(_table(value))]
        elif isinstance(value, tuple):
            for part in value:
                lines += ["", f"[[{key}]]", *_lines(table_of(part) if isinstance(part, Guard) else _table(part))]
    return "\n".join(lines) + "\n"


def _is_plain(value: Any) -> bool:
    return not is_dataclass(value) and not isinstance(value, tuple)


def _table(part: Any) -> dict[str, Any]:
    return {field.name: getattr(part, field.name) for field in fields(part)}


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_text(value)}" for key, value in table.items() if value is not None]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # as JSON writes it, but for two things: surrogate pairs are no TOML, nor is a bare DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
