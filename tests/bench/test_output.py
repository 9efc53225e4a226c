"""The three outputs, and the command that writes them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.fake import Absent, Control, Fake
from normadapt import bench_command, bench_tables
from normadapt.bench.cells import read_cells
from normadapt.bench.markdown import table
from normadapt.bench.suites import Suite
from normadapt.cli import app

SUITES: Mapping[str, Suite] = {suite.name: suite for suite in (Fake(), Control(), Absent())}
METHODS = "BatchStatistics,EMA(0.1),Domains,Domains + profile"
SMALL = ["--jobs", "1", "--scale", "0.05", "--batch-size", "16,64", "--methods", METHODS]


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench_command, bench_tables):
        monkeypatch.setattr(module, "SUITES", SUITES)
    monkeypatch.setenv("COLUMNS", "120")


def _run(*words: str) -> Any:
    return CliRunner().invoke(app, ["bench", *words])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two suites."""
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        for module in (bench_command, bench_tables):
            patch.setattr(module, "SUITES", SUITES)
        patch.setenv("COLUMNS", "120")
        found = _run(*SMALL, "--out", str(out), "--markdown", str(out / "B.md"), "--seed", "3", "--scale", "0.3")
    assert found.exit_code == 0, found.output
    (out / "stdout").write_text(found.stdout)
    (out / "stderr").write_text(found.stderr)
    return out


def test_the_terminal_shows_tables_and_files(done: Path) -> None:
    text = (done / "stdout").read_text()
    assert "fake: fake/0, fake/1" in text
    assert "control (negative control)" in text
    assert re.search(r"^Domains \+ profile +\d+\.\d", text, re.M)
    assert re.search(r"^limit +\d+\.\d +[+-]\d+\.\d ±\d", text, re.M)
    assert "The targets" in text
    for name in ("results.json", "bench.html", "B.md"):
        assert f"written: {done / name}" in text
        assert (done / name).is_file()
    assert "absent needs something -> python -m pip install something" in (done / "stderr").read_text()
    assert max(map(len, text.splitlines())) <= max(120, len(str(done)) + 30)


def test_json_has_every_cell(done: Path) -> None:
    values = json.loads((done / "results.json").read_text())
    assert (values["split"], values["seed"], values["batch_sizes"]) == ("report", 3, [16, 64])
    assert {task["name"] for task in values["tasks"]} == {"fake/0", "fake/1", "control/0", "control/1"}
    methods = [m["name"] for m in values["methods"]]
    assert methods == ["Source", "BatchStatistics", "EMA(0.1)", "Domains", "Domains + profile", "ceiling", "limit"]
    assert len(values["cells"]) == 2 * (7 + 6) * 11 * 2  # no profile in the control
    assert set(values["summaries"]) == {"fake", "control"}
    assert len(values["targets"]) == 18
    cells = read_cells(done / "cells.jsonl")
    entry = next(c for c in values["cells"] if c["method"] == "Domains" and c["stream"] == "mixed" and c["n"] == 16)
    same = next(c for k, c in cells.items() if (k.task, k.stream, k.n, k.method) == ("fake/0", "mixed", 16, "Domains"))
    assert entry["accuracy"] == pytest.approx(same.bits.mean(), abs=1e-5)
    assert entry["instances"] == len(same.bits)
    about = values["about"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", about["date"])
    assert set(about["versions"]) == {"normadapt", "torch", "numpy", "Python"}
    assert "/" not in about["machine"]
    words = "normadapt bench --suite fake --suite control --methods "
    assert about["command"].startswith(words)
    assert "--scale 0.3 --seed 3" in about["command"]


def test_the_command_in_the_report_makes_the_same_report(done: Path, tmp_path: Path) -> None:
    first = json.loads((done / "results.json").read_text())
    words = shlex.split(first["about"]["command"])[2:]
    (tmp_path / "cells.jsonl").write_text((done / "cells.jsonl").read_text())
    found = _run(*words, "--jobs", "1", "--resume", "--out", str(tmp_path), "--json")
    assert found.exit_code == 0, found.output
    second = json.loads(found.stdout)
    assert second["about"]["computed"] == 0
    for values in (first, second):
        del values["about"]
    assert first == second


def test_markdown_says_what_is_needed(done: Path) -> None:
    text = (done / "B.md").read_text()
    for words in ("# Benchmarks", "seed 3", "normadapt bench --suite fake", "## `fake`", "## `control`",
                  "negative control", "| **Domains + profile** |", "### By stream", "### Cost",
                  "### Batches to recover after a jump",
                  "Hyper-parameters of ours were chosen on dev only", "**regret**", "## The targets"):  # fmt: skip
        assert words in text
    assert "--markdown docs/BENCHMARKS.md" in text
    assert str(done) not in text
    widths = {line.count("|") for line in text.split("### By stream")[1].split("###")[0].splitlines() if "|" in line}
    assert widths == {13}


def test_a_markdown_table_keeps_bars_inside_cells() -> None:
    assert table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_needs_nothing_else(done: Path) -> None:
    text = (done / "bench.html").read_text()
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.references == []
    assert not re.search(r"https?://|url\(|@import|fetch\(|import\(", text)
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text


def test_the_page_holds_maps_curves_averages_and_targets(done: Path) -> None:
    text = (done / "bench.html").read_text()
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert match is not None
    data = json.loads(match[1])
    values = json.loads((done / "results.json").read_text())
    scope = next(s for s in data["scopes"] if s["name"] == "fake")
    place = scope["streams"].index("mixed")
    wanted = [("fake/0", "mixed", 16, "Domains"), ("fake/1", "mixed", 16, "Domains")]
    cells = [c["accuracy"] for c in values["cells"] if (c["task"], c["stream"], c["n"], c["method"]) in wanted]
    assert scope["accuracy"]["16"]["Domains"][place] == pytest.approx(10_000 * sum(cells) / 2, abs=1)
    curve = next(c for c in data["curves"] if (c["task"], c["stream"], c["n"]) == ("fake/0", "continual", 16))
    assert [name for _, name in curve["marks"]] == ["bright", "faint"] * 4
    assert set(curve["lines"]) >= {"Source", "Domains + profile", "limit"}
    assert 'data-scope="control"' in text
    assert "not run" in text


def test_json_on_the_terminal_and_nothing_else(tmp_path: Path) -> None:
    found = _run(
        *SMALL, "--suite", "fake", "--streams", "clean,mixed", "--split", "dev", "--out", str(tmp_path), "--json"
    )
    assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)
    assert (values["split"], values["streams"]) == ("dev", ["mixed", "clean"])
    page = (tmp_path / "bench.html").read_text()
    assert "The development split: not to be reported." in page


def test_quick_is_short(tmp_path: Path) -> None:
    found = _run("--quick", "--jobs", "1", "--suite", "fake", "--out", str(tmp_path), "--json")
    assert found.exit_code == 0, found.output
    values = json.loads(found.stdout)
    assert values["about"]["command"] == "normadapt bench --quick --suite fake --seed 0"
    assert max(c["instances"] for c in values["cells"]) <= 400
    assert "These streams are too short to judge them." in (tmp_path / "bench.html").read_text()


def test_a_failing_method_is_in_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no [such] thing")

    monkeypatch.setattr("normadapt.baselines.EMA.step", broken)
    found = _run(*SMALL, "--suite", "fake", "--streams", "clean", "--out", str(tmp_path), "--markdown",
                 str(tmp_path / "B.md"))  # fmt: skip
    assert found.exit_code == 0, found.output
    assert re.search(r"^EMA\(0\.1\) +failed \(4\)", found.stdout, re.M)
    assert "EMA(0.1) failed at fake/0 clean n=16 and 3 more: RuntimeError: no [such] thing" in found.stdout
    assert "- EMA(0.1) (RuntimeError: no [such] thing)" in (tmp_path / "B.md").read_text()
    assert "failed (4)" in (tmp_path / "bench.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--suite", "nope"], "no suite 'nope'"), (["--streams", "nope"], "no stream 'nope'"),
     (["--methods", "nope"], "no method 'nope'"), (["--batch-size", "0"], "at least 1; got '0'"),
     (["--batch-size", "x"], "got 'x'")],
)  # fmt: skip
def test_wrong_words_are_said_with_a_remedy(words: list[str], message: str, tmp_path: Path) -> None:
    found = _run(*words, "--out", str(tmp_path))
    assert found.exit_code == 2
    assert message in found.stderr
    assert "\n  -> " in found.stderr


def test_a_missing_suite_alone_is_an_error_with_its_command(tmp_path: Path) -> None:
    found = _run("--suite", "absent", "--out", str(tmp_path))
    assert found.exit_code == 2
    assert "absent needs something\n  -> python -m pip install something" in found.stderr


def test_list_names_suites_methods_and_how_to_install() -> None:
    text = _run("list").stdout
    assert re.search(r"^fake +ready", text, re.M)
    assert re.search(r"^absent +missing", text, re.M)
    assert "-> python -m pip install something" in text
    assert "SchneiderPrior(16)" in text
    assert re.search(r"^ +Domains, no shares *$", text, re.M)  # one to a line: their names have commas
    values = json.loads(_run("list", "--json").stdout)
    assert [s["ready"] for s in values["suites"]] == [True, True, False]
    assert values["streams"].keys() >= {"iid", "mixed"}
