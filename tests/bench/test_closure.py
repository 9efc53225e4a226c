"""Which files an answer depends on, so that `--resume` does not reuse answers of changed code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from normadapt.bench import closure as closures
from normadapt.bench.cells import fingerprint
from normadapt.bench.closure import closure
from normadapt.bench.methods import ABLATIONS, METHODS

FASHION = "normadapt.bench.suites.fashion"


def test_imports_are_followed_wherever_they_stand() -> None:
    found = closure(["normadapt.baselines.balanced"])
    assert found.keys() >= {
        "normadapt.baselines.balanced", "normadapt.layers.policy", "normadapt.layers.moments", "normadapt.types"
    }  # fmt: skip
    assert not [
        name for name in found if not name.startswith(("normadapt.layers", "normadapt.baselines", "normadapt.t"))
    ]
    assert all(path.is_file() for path in found.values())


def test_importing_a_module_of_a_package_is_not_importing_all_of_it() -> None:
    rule = closure(["normadapt.adapted.rule"])
    assert "normadapt.domains.class_draws" in rule  # from normadapt.domains import class_draws
    assert "normadapt" not in rule


def test_an_end_counts_itself_only() -> None:
    whole = closure(["normadapt.adapted._adapt"])
    assert "normadapt.adapted.rule" in whole
    assert closure(["normadapt.adapted._adapt"], ["normadapt.adapted._adapt"]).keys() == {"normadapt.adapted._adapt"}


def test_modules_of_others_count_where_they_are_loaded() -> None:
    assert closure([__name__])[__name__] == Path(__file__)
    assert closure(["nobody.knows"]) == {}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A library of three modules in a row: a imports b within a function, b imports c relatively."""
    monkeypatch.setattr(closures, "_ROOT", tmp_path)
    folder = tmp_path / "normadapt"
    folder.mkdir()
    (folder / "a.py").write_text("def f():\n    from normadapt.b import g\n")
    (folder / "b.py").write_text("from . import c\n")
    (folder / "c.py").write_text("import numpy\n")
    (folder / "d.py").write_text("")
    _forget()
    yield folder
    _forget()


def _forget() -> None:
    closures.digest.cache_clear()
    closures._imported.cache_clear()


def test_a_change_anywhere_in_the_closure_is_a_change(package: Path) -> None:
    assert set(closure(["normadapt.a"])) == {"normadapt.a", "normadapt.b", "normadapt.c"}
    before = closures.digest(("normadapt.a",))
    for name, changes in (("d", False), ("c", True), ("b", True), ("a", True)):
        with (package / f"{name}.py").open("a") as file:
            file.write("# more\n")
        _forget()
        after = closures.digest(("normadapt.a",))
        assert (after != before) is changes, name
        before = after


def _files(method: str) -> set[str]:
    """Names of the modules that a method's answers to fashion-c depend on."""
    seen: dict[str, Path] = {}

    def note(modules: tuple[str, ...], ends: tuple[str, ...]) -> str:
        seen.update(closure(modules, ends))
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normadapt.bench.cells.digest", note)
        fingerprint({**METHODS, **ABLATIONS}[method], FASHION)
    return set(seen)


def test_what_counts_for_which_method() -> None:
    core = {"normadapt.adapted.rule", "normadapt.weights.matrix", "normadapt.domains.bank"}
    passes = {"normadapt.adapted._adapt", "normadapt.adapted.forward", "normadapt.layers.hooks"}
    everywhere = {"normadapt.bench.streams", "normadapt.bench.workshop", FASHION, "normadapt.bench.models"}
    ours, profiled, ema, tent = map(_files, ("Domains", "Domains + profile", "EMA(0.1)", "Tent"))
    assert ours >= core | passes | everywhere
    assert profiled >= ours | {"normadapt.profiles._profile_source", "normadapt.profiles.rehearsals"}
    assert ema >= passes | everywhere | {"normadapt.baselines.running"}
    assert not ema & (core | {"normadapt.baselines.fixed", "normadapt.bench.gradient"})
    assert tent >= everywhere | {"normadapt.bench.gradient"}
    assert not tent & (core | passes - {"normadapt.layers.hooks"})
    assert "normadapt.bench.ablations" in _files("Domains, no skewness")
    assert _files("ceiling") >= passes | {"normadapt.bench.ceiling"}
    assert _files("limit") >= {"normadapt.bench.limit"}
    assert _files("Source") >= everywhere
    for found in (ours, ema, tent):
        assert "normadapt.bench.suites.crepe" not in found


def test_fingerprints_tell_methods_and_suites_apart() -> None:
    marks = {
        fingerprint(METHODS[name], FASHION) for name in ("Domains", "Domains + profile", "EMA(0.1)", "Tent", "limit")
    }
    assert len(marks) == 5
    assert fingerprint(METHODS["EMA(0.1)"], "normadapt.bench.suites.crepe") not in marks
