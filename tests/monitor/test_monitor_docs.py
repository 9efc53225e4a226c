"""What docs/MONITOR.md shows runs as it stands, and what it names is there."""

import re
from pathlib import Path

from typer.testing import CliRunner

from normadapt.cli import app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "MONITOR.md").read_text(encoding="utf-8")


def test_the_python_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "report.html").stat().st_size > 1e6
    assert any(getattr(route, "path", "") == "/normadapt" for route in names["service"].routes)
    names["pilot"].close()


def test_files_and_options_that_the_docs_name_exist():
    for target in re.findall(r"\]\(([\w./-]+)\)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
    for picture in ("live-page.png", "report.png"):
        assert (ROOT / "docs" / picture).stat().st_size < 300_000
    shown = CliRunner().invoke(app, ["dashboard", "--help"], env={"COLUMNS": "200"}).output
    for option in ("--store", "--host", "--port", "--token", "NORMADAPT_TOKEN"):
        assert option in shown
