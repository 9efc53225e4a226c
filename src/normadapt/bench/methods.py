"""The rows of the table: every rule under its usual name, with its settings."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor, nn

from normadapt import baselines
from normadapt.adapted._adapt import adapt
from normadapt.adapted.rule import Domains
from normadapt.bench.ablations import ABLATED
from normadapt.bench.ceiling import Known
from normadapt.bench.gradient import ETA, RDumb, Tent
from normadapt.domains.bank import BankSettings
from normadapt.errors import NormadaptError, SpecError
from normadapt.layers.policy import Policy
from normadapt.profiles.source_profile import SourceProfile
from normadapt.weights.matrix import WeightSettings

Role: TypeAlias = Literal["baseline", "gradient", "ours", "ablation", "limit"]
Answering: TypeAlias = Callable[[Tensor], Any]
"""A fresh model: takes a batch of inputs, adapts, and gives the output."""

_PROFILED = " + profile"
SOURCE, CEILING, LIMIT, OURS = "Source", "ceiling", "limit", "Domains"
OURS_PROFILE = OURS + _PROFILED
_GONE = "track"  # the rule before


class Make(Protocol):
    """Makes a fresh answering model; its `repr` names every hyper-parameter."""

    def __call__(self, model: nn.Module, profile: SourceProfile | None) -> Answering: ...  # noqa: D102

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that its answers come from, beside all that these import."""


@dataclass(frozen=True)
class Adapting:
    """Adapts with a policy, in this library's usual way."""

    policy: Policy

    def __call__(self, model: nn.Module, profile: SourceProfile | None) -> Answering:
        """The adapted model."""
        return adapt(model, profile, self.policy)

    @property
    def modules(self) -> tuple[str, ...]:
        """The policy's, and what passes batches to it."""
        return type(self.policy).__module__, "normadapt.adapted._adapt", "normadapt.adapted.forward"


@dataclass(frozen=True)
class Learning:
    """A gradient method with its default learning rate."""

    method: type[Tent]
    learning_rate: float = 1e-3

    def __call__(self, model: nn.Module, profile: SourceProfile | None) -> Answering:
        """A learning copy of the model."""
        return self.method(model, learning_rate=self.learning_rate)

    @property
    def modules(self) -> tuple[str, ...]:
        """The method's."""
        return (self.method.__module__,)


@dataclass(frozen=True)
class Plain:
    """The model as it was trained, in eval mode."""

    def __call__(self, model: nn.Module, profile: SourceProfile | None) -> Answering:
        """The model itself: it changes nothing."""
        return model

    @property
    def modules(self) -> tuple[str, ...]:
        """None: the suites' own count for every method."""
        return ()


@dataclass(frozen=True)
class Limit:
    """True statistics of every domain; the runner measures them, since no stream tells which domain it shows."""

    def __call__(self, model: nn.Module, profile: SourceProfile | None) -> Answering:
        """Cannot be asked without a domain."""
        raise NormadaptError("the limit is a matter of domains, not of a stream\n  -> normadapt.bench.limit")

    @property
    def modules(self) -> tuple[str, ...]:
        """What measures them."""
        return ("normadapt.bench.limit",)


@dataclass(frozen=True)
class Ceiling:
    """Statistics of all that was seen of an instance's domain; the runner tells which domain that is."""

    def __call__(self, model: nn.Module, profile: SourceProfile | None) -> Known:
        """A model that waits to be told the domains of each batch."""
        return Known(model)

    @property
    def modules(self) -> tuple[str, ...]:
        """What pools, and what passes batches to it."""
        return "normadapt.bench.ceiling", "normadapt.adapted.forward"


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        name: As tables show it.
        family: What settings of one rule have in common ("EMA").
        role: A fixed rule of the field, a gradient method, ours, ours with a step removed, or a limit to all of them.
        make: Makes a fresh answering model.
        batch_independent: Whether an answer depends on its own instance alone, so that one pass serves all streams.
        uses_profile: Whether it needs source data.
    """

    name: str
    family: str
    role: Role
    make: Make
    batch_independent: bool = False
    uses_profile: bool = False
    setting: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "setting", repr(self.make) + (_PROFILED if self.uses_profile else ""))


def _rule(name: str, policy: Policy, family: str | None = None, **more: Any) -> Method:
    return Method(name, family or name.partition("(")[0], "baseline", Adapting(policy), **more)


def ours(policy: Policy, name: str, role: Role = "ours", *, profile: bool = False) -> Method:
    """A row of ours; with `profile` it is named so and shown only where source data are available."""
    return Method(name + _PROFILED if profile else name, OURS, role, Adapting(policy), uses_profile=profile)


_KNOBS: Mapping[str, Callable[[float], Policy]] = {
    "SchneiderPrior": baselines.SchneiderPrior,
    "AlphaBN": baselines.AlphaBN,
    "EMA": baselines.EMA,
    "IABN": baselines.IABN,
}
"""Rules with one number to choose: any value may be asked for, as in "EMA(0.3)"."""


def _at(family: str, value: float) -> Method:
    return _rule(f"{family}({value:g})", _KNOBS[family](value), batch_independent=family == "IABN")


_ROWS: tuple[Method, ...] = (
    Method(SOURCE, "Source", "baseline", Plain(), batch_independent=True),
    _rule("BatchStatistics", baselines.BatchStatistics()),
    *(_at("SchneiderPrior", prior) for prior in (8.0, 16.0, 32.0, 128.0)),
    _rule("AlphaBN", baselines.AlphaBN()),
    *(_at("EMA", momentum) for momentum in (0.2, 0.1, 0.05, 0.01)),
    _rule("DUA", baselines.DUA()),
    *(_at("IABN", k) for k in (3.0, 4.0)),
    _rule("RBN", baselines.RBN()),
    _rule("TBR", baselines.TBR()),
    _rule("UnMixTNS", baselines.UnMixTNS()),
    _rule("TEMA", baselines.TEMA()),
    _rule("Hybrid", baselines.Hybrid()),
    _rule("MedBN", baselines.MedBN()),
    _rule("EDTN", baselines.EDTN()),
    _rule("BBN", baselines.BBN()),
    _rule("BDN", baselines.BDN()),
    Method("Tent", "Tent", "gradient", Learning(Tent)),
    Method("ETA", "ETA", "gradient", Learning(ETA)),
    Method("RDumb", "RDumb", "gradient", Learning(RDumb)),
    ours(Domains(), OURS),
    ours(Domains(), OURS, profile=True),
    Method(CEILING, "ceiling", "limit", Ceiling()),
    Method(LIMIT, "limit", "limit", Limit(), batch_independent=True),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ROWS}
"""The rows of the table by name, in the order in which they are shown."""

_ABLATIONS = tuple(ours(policy, name, "ablation", profile=p) for name, policy in ABLATED for p in (False, True))
ABLATIONS: Mapping[str, Method] = {method.name: method for method in _ABLATIONS}
"""Ours with one step removed each, by name; asked for with `--methods ablations`."""

_MAIN = (SOURCE, "BatchStatistics", "SchneiderPrior(16)", "EMA(0.1)", "IABN(4)", OURS, OURS_PROFILE, CEILING, LIMIT)
_GROUPS: Mapping[str, Callable[[], Iterable[Method]]] = {
    "all": METHODS.values,
    "main": lambda: (METHODS[name] for name in _MAIN),
    "baselines": lambda: (m for m in METHODS.values() if m.role in ("baseline", "gradient")),
    "ours": lambda: (m for m in METHODS.values() if m.role == "ours"),
    "ablations": ABLATIONS.values,
}
GROUPS = tuple(_GROUPS)
"""Names that stand for several rows."""


def select_methods(words: Iterable[str] | None) -> list[Method]:
    """The rows that were asked for, and always Source, the ceiling and the limit: gains are measured between them.

    Args:
        words: Names, families ("EMA") and groups ("all", "main", "baselines", "ours", "ablations"), each possibly
            several with commas between; also settings such as "EMA(0.3)" and "Domains(max_weight=0.5)", with any
            setting of the bank and of the weights, too; " + profile" behind the latter where source data should be
            used. None for all.

    Raises:
        SpecError: If a word stands for nothing.

    Example:
        >>> [method.name for method in select_methods(["Domains(max_weight=0.5), BatchStatistics"])]
        ['Source', 'BatchStatistics', 'Domains(max_weight=0.5)', 'ceiling', 'limit']
    """
    asked = ["all"] if words is None else [part.strip() for word in words for part in _parts(word) if part.strip()]
    chosen: dict[str, Method] = {name: METHODS[name] for name in (SOURCE, CEILING, LIMIT)}
    for word in asked:
        for method in _meant(word):
            chosen.setdefault(method.name, method)
    order = [*METHODS, *ABLATIONS]
    place = {name: i for i, name in enumerate(order)}
    # What is not in the list comes before the limits, in the order in which it was asked for.
    return sorted(chosen.values(), key=lambda m: (m.role == "limit", place.get(m.name, len(order))))


def _parts(word: str) -> list[str]:
    """Split at commas that are neither within parentheses nor part of a name, such as "Domains, no shares"."""
    parts, depth = [""], 0
    for i, sign in enumerate(word):
        depth += (sign == "(") - (sign == ")")
        if sign == "," and depth == 0 and not word.startswith(", no ", i):
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _meant(word: str) -> list[Method]:
    lower = word.lower()
    if lower in _GROUPS:
        return list(_GROUPS[lower]())
    every = [*METHODS.values(), *ABLATIONS.values()]
    exact = [m for m in every if m.name.lower() == lower]
    found = exact or [m for m in every if m.family.lower() == lower]
    if found:
        return found
    setting = re.fullmatch(rf"{OURS}\((.*)\)( \+ profile)?", word)
    if setting is not None:
        return [ours(_domains(word, setting[1]), word.removesuffix(_PROFILED), profile=setting[2] is not None)]
    if re.match(rf"{_GONE}\b", lower):
        raise SpecError(f"--methods: {word!r} is of a rule that is gone\n  -> the rule in its place is {OURS}")
    knob = re.fullmatch(r"(\w+)\((?:\w+=)?([-+.\de]+)\)", word)
    families = {family.lower(): family for family in _KNOBS}
    if knob is not None and knob[1].lower() in families:
        try:
            return [_at(families[knob[1].lower()], float(knob[2]))]
        except ValueError as error:
            raise SpecError(f"--methods: {word!r} cannot be made ({error})\n  -> such as: EMA(0.3)") from error
    names = [*_GROUPS, *dict.fromkeys(m.family for m in every), *(m.name for m in every)]
    close = get_close_matches(word, names, 1, 0.4)
    hint = f"did you mean {close[0]!r}? all are in: normadapt bench list" if close else "see: normadapt bench list"
    raise SpecError(f"--methods: there is no method {word!r}\n  -> {hint}")


def _domains(word: str, arguments: str) -> Domains:
    """`Domains` with the settings written in a method's name: keywords with literal values."""
    try:
        call = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("keywords only")
        given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        bank, weights = (
            {f.name: given.pop(f.name) for f in fields(kind) if f.name in given}
            for kind in (BankSettings, WeightSettings)
        )
        return Domains(bank=BankSettings(**bank), weights=WeightSettings(**weights), **given)
    except (ValueError, TypeError, SyntaxError) as error:
        example = f"{OURS}(max_weight=0.5)"
        raise SpecError(f"--methods: {word!r} cannot be made ({error})\n  -> such as: {example}") from error
