"""Which files an answer depends on: the modules that it comes from, and all that these import."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from normadapt.version import __version__

_ROOT = Path(__file__).parents[2]
_WEIGHTS = Path(__file__).parent / "weights"


@functools.cache
def digest(modules: tuple[str, ...], ends: tuple[str, ...] = ()) -> str:
    """Hash of the version, of the files of `closure(modules, ends)` and of the source models' weights."""
    found = hashlib.sha256(__version__.encode())
    for path in sorted([*closure(modules, ends).values(), *_WEIGHTS.glob("*")]):
        found.update(path.name.encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def closure(modules: Iterable[str], ends: Iterable[str] = ()) -> dict[str, Path]:
    """The modules, those of this library that they import, and so on: their files by name.

    Args:
        modules: Names; of other libraries only those that are loaded already.
        ends: Names of modules that count themselves, but not what they import.
    """
    found: dict[str, Path] = {}
    ends, left = set(ends), list(modules)
    while left:
        name = left.pop()
        path = _file(name)
        if name not in found and path is not None:
            found[name] = path
            if name not in ends:
                left += _imported(name, path)
    return found


def _file(name: str) -> Path | None:
    if name.partition(".")[0] != "normadapt":
        loaded = getattr(sys.modules.get(name), "__file__", None)
        return None if loaded is None else Path(loaded)
    place = _ROOT.joinpath(*name.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@functools.cache
def _imported(name: str, path: Path) -> frozenset[str]:
    """Names of this library's modules that a file imports, wherever in it.

    `from package import module` is an import of the module, not of all that the package's own file imports.
    """
    found: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            there = {each for each in inner if each.startswith("normadapt.") and _file(each) is not None}
            found |= there if there == inner else {base, *there}
    return frozenset(each for each in found if each.partition(".")[0] == "normadapt")
