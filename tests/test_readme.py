"""What the README shows runs as it stands."""

import re
from pathlib import Path

import torch
import typer
from torch import nn

from normadapt import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it makes a store
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    names = {
        "model": model,
        "images": torch.randn(16, 1, 8, 8),
        "source_loader": [torch.randn(32, 1, 8, 8) for _ in range(4)],
        "target_loader": [torch.randn(32, 1, 8, 8) + 1 for _ in range(4)],
    }
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (16, 3)
    assert names["adapted"].policy.__class__.__name__ == "EqualShares"
    assert type(names["plain"]) is type(names["fixed"]) is nn.Sequential


def test_the_policy_of_the_readme_takes_ten_lines_and_is_the_one_of_the_examples():
    shown = re.search(r"(class EqualShares.*?)\n\nadapted", README, flags=re.S)
    assert shown is not None
    lines = [line for line in shown[1].splitlines() if line.strip()]
    assert len(lines) <= 10
    example = (ROOT / "examples" / "own_policy.py").read_text()
    assert [line for line in lines if line not in example.splitlines()] == []


def test_files_and_make_targets_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make ([\w-]+)", README, flags=re.M):
        assert f"\n{command}:" in makefile, command


def test_the_options_that_the_readme_names_exist():
    text = README.replace("\\\n", " ")
    for line in re.findall(r"^\.venv/bin/normadapt ([^#\n]+)", text, flags=re.M):
        words = line.split()
        names = [words.pop(0)]
        command = typer.main.get_command(cli.app).commands[names[0]]
        while hasattr(command, "commands") and words and words[0] in command.commands:
            names.append(words.pop(0))
            command = command.commands[names[-1]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert [word for word in words if word.startswith("--") and word not in known] == [], names
