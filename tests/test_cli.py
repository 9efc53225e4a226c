"""The command line: what it writes, what machines read, and what it says about mistakes."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import normadapt as na
from normadapt import cli, demo
from normadapt.monitor import Recorder

SPEC_FILE = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

def plain():
    return nn.Sequential(nn.Linear(4, 3))

def other():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))

def images(seed, shift, count=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(12, 1, 8, 8, generator=generator) + shift for _ in range(count)]

def source():
    return images(1, 0.0, 20)

def target():
    generator = torch.Generator().manual_seed(3)
    for x in images(2, 1.0):
        yield x, torch.randint(0, 3, (12,), generator=generator)

def mixed():
    return [torch.cat([one[:6], other[:6]]) for one, other in zip(images(4, 5.0), images(5, -5.0))]

def unlabelled():
    return images(2, 1.0)

def broken():
    raise KeyError("a mistake of the user's own")

def coloured():
    return [torch.zeros(5, 3, 8, 8)]

def blank():
    return [torch.full((5, 1, 8, 8), float("nan")), torch.zeros(3, 1, 8, 8)]

class Mistaken(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x):
        return self.norm(x) + {}["a mistake of the model's own"]

def mistaken():
    return Mistaken()
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """Writes the spec file; `spec(name)` names one of its callables."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.py"
    path.write_text(SPEC_FILE)
    return lambda name: f"{path}:{name}"


def call(*arguments, code=0):
    outcome = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert outcome.exit_code == code, outcome.output
    return outcome


def own(name):
    namespace = {}
    exec(SPEC_FILE, namespace)
    return namespace[name]()


def test_run_writes_what_the_library_computes(spec, tmp_path):
    outcome = call("run", spec("model"), spec("target"), "--out", tmp_path / "out")
    adapted = na.adapt(own("model"))
    items = list(own("target"))
    with torch.no_grad():
        outputs = torch.cat([adapted(x) for x, _ in items])
    with np.load(tmp_path / "out" / "predictions.npz") as saved:
        np.testing.assert_array_equal(saved["outputs"], outputs.numpy())
        np.testing.assert_array_equal(saved["predictions"], outputs.argmax(1).numpy())
        np.testing.assert_array_equal(saved["targets"], torch.cat([y for _, y in items]).numpy())
    statistics = load_file(tmp_path / "out" / "statistics.safetensors")
    assert sorted(statistics) == ["1.running_mean", "1.running_var"]
    model = own("model").eval()
    assert not model.load_state_dict(statistics, strict=False).unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(model(items[0][0]), adapted.freeze()(items[0][0]), rtol=0, atol=0)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["report"] == json.loads(json.dumps(adapted.report().to_dict()))
    assert (report["instances"], report["batches"]) == (96, 8)
    assert f"{report['source_accuracy']:.1%}" in outcome.stdout
    assert f"{report['accuracy']:.1%}" in outcome.stdout
    for name in ("predictions.npz", "report.json", "statistics.safetensors"):
        assert f"written: {tmp_path / 'out' / name}" in outcome.stdout


def test_run_without_targets_prints_no_accuracy(spec, tmp_path):
    outcome = call("run", spec("model"), spec("unlabelled"))
    assert "accuracy" not in outcome.stdout
    with np.load(tmp_path / "normadapt-out" / "predictions.npz") as saved:
        assert sorted(saved) == ["outputs", "predictions"]


@pytest.mark.parametrize("policy", list(cli.PolicyName))
def test_every_policy_has_its_name(spec, policy):
    outcome = call("run", spec("model"), spec("target"), "--policy", policy.value, "--json")
    assert json.loads(outcome.stdout)["policy"] == policy.value


def test_the_former_policy_is_told_by_what_it_is_replaced(spec):
    for name, words in (("track", "'track' is gone; domains takes its place"), ("magic", "'magic' is no policy")):
        said = call("run", spec("model"), spec("target"), "--policy", name, code=2).stderr
        assert words in " ".join(re.sub("[│╭╮╰╯─]", " ", said).split())
    assert "domains" in call("run", "--help").stdout


def test_the_source_policy_answers_as_the_source(spec):
    told = json.loads(call("run", spec("model"), spec("target"), "--policy", "source", "--json").stdout)
    assert told["accuracy"] == told["source_accuracy"]


def test_batch_size_resplits(spec, tmp_path):
    told = json.loads(call("run", spec("model"), spec("target"), "--batch-size", 5, "--json").stdout)
    assert (told["batches"], told["instances"]) == (20, 96)
    adapted = na.adapt(own("model"))
    with torch.no_grad():
        outputs = torch.cat([adapted(x) for x in torch.cat([x for x, _ in own("target")]).split(5)])
    with np.load(tmp_path / "normadapt-out" / "predictions.npz") as saved:
        np.testing.assert_array_equal(saved["outputs"], outputs.numpy())


def test_run_with_source_data_uses_a_profile(spec):
    told = json.loads(call("run", spec("model"), spec("target"), "--source", spec("source"), "--json").stdout)
    assert told["report"]["profiled"] is True
    assert json.loads(call("run", spec("model"), spec("target"), "--json").stdout)["report"]["profiled"] is False
    shown = call("run", spec("model"), spec("target"), "--source", spec("source"))
    assert [domain["is_present"] for domain in told["report"]["domains"]].count(True) == 1
    assert "its inputs" in shown.stdout
    assert "Warning" not in shown.stderr


def test_a_last_batch_of_several_domains_is_told_of(spec, tmp_path):
    arguments = ("run", spec("model"), spec("mixed"), "--source", spec("source"), "--out", tmp_path)
    said = " ".join(call(*arguments).stdout.split())
    assert "the last batch held several domains; the file has the present one's statistics" in said
    report = json.loads((tmp_path / "report.json").read_text())["report"]
    assert report["sites"][0]["status"].endswith("per instance")
    assert len(report["domains"]) >= 2


@pytest.mark.filterwarnings("ignore:the 240 source inputs are unlike")
def test_profile_is_the_library_s_and_serves_recalibrate(spec, tmp_path):
    outcome = call("profile", spec("model"), spec("source"), "--out", tmp_path / "new" / "p.safetensors")
    assert "1 layers measured on 240 instances and under 20 changes of them" in outcome.stdout
    assert "the 240 source inputs are unlike what the model was trained on" in outcome.stderr
    assert "UserWarning" not in outcome.stderr
    profile = na.SourceProfile.load(tmp_path / "new" / "p.safetensors")
    direct = na.profile_source(own("model"), own("source"))
    assert profile.fingerprint == direct.fingerprint
    torch.testing.assert_close(profile.sites["1"].mean, direct.sites["1"].mean, rtol=0, atol=0)
    options = ["--profile", tmp_path / "new" / "p.safetensors", "--out", tmp_path / "r.safetensors"]
    call("recalibrate", spec("model"), spec("unlabelled"), *options)
    expected = na.recalibrate(own("model"), own("unlabelled"), direct).state_dict()
    found = load_file(tmp_path / "r.safetensors")
    assert sorted(found) == ["1.running_mean", "1.running_var"]
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    call("recalibrate", spec("other"), spec("unlabelled"), *options, code=2)


def test_recalibrate_says_how_it_went(spec, tmp_path):
    told = call("recalibrate", spec("model"), spec("target"), "--out", tmp_path / "r.st", "--json")
    outcome = json.loads(told.stdout)["recalibration"]
    # DATA is a generator: it is made anew for every pass.
    assert outcome["tracked"] is False
    assert outcome["converged"] is True
    assert outcome["count"] == 96
    said = call("recalibrate", spec("model"), spec("target"), "--out", tmp_path / "r.st", "--max-passes", 1).stdout
    assert "not converged after 1 pass" in said
    assert "converged after 2 passes" in call(
        "recalibrate", spec("model"), spec("target"), "--out", tmp_path / "r.st", "--max-passes", 5
    ).stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "own.py:modle", "own.py:target"], "did you mean model?"),
        (["run", "own.py:model", "own.py:nothing"], "has no 'nothing'"),
        (["run", "own.py:target", "own.py:target"], "expected a callable that returns a torch.nn.Module"),
        (["run", "own.py:plain", "own.py:target"], "found no layer to adapt"),
        (["profile", "own.py:plain", "own.py:source", "--out", "p.st"], "found no layer to adapt"),
        (["recalibrate", "own.py:plain", "own.py:source", "--out", "p.st"], "found no layer to adapt"),
        (["run", "own.py:model", "own.py:target", "--out", "own.py"], "cannot be made a folder"),
        (["profile", "own.py:model", "own.py:source", "--out", "."], "expected a file, got the folder ."),
        (
            ["recalibrate", "own.py:model", "own.py:source", "--profile", "own.py", "--out", "r.st"],
            "not a source profile",
        ),
    ],
)
def test_mistakes_get_a_paragraph_and_exit_code_2(spec, arguments, said):
    outcome = call(*arguments, code=2)
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: ")
    assert said in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) <= 3


def test_an_error_of_the_user_s_code_keeps_its_traceback(spec):
    for model, data in (("broken", "target"), ("mistaken", "blank")):
        outcome = call("run", spec(model), spec(data), code=1)
        assert isinstance(outcome.exception, KeyError)


@pytest.mark.parametrize("verb", ["run", "profile", "recalibrate"])
def test_data_that_do_not_fit_the_model_get_a_paragraph(spec, verb):
    out = [] if verb == "run" else ["--out", "file.st"]
    outcome = call(verb, spec("model"), spec("coloured"), *out, code=2)
    assert outcome.stdout == ""
    assert "MODEL raised RuntimeError for a batch of shape (5, 3, 8, 8) of float32" in outcome.stderr
    assert "expected input[5, 3, 8, 8] to have 1 channels" in outcome.stderr  # torch's own words
    assert "Traceback" not in outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) <= 3


def test_an_error_of_our_own_within_a_call_of_the_model_keeps_its_traceback(spec, monkeypatch):
    monkeypatch.setattr(na.Domains, "step", lambda *_: torch.nn.Linear(3, 3)(torch.zeros(2)))
    assert isinstance(call("run", spec("model"), spec("target"), code=1).exception, RuntimeError)


def test_instances_that_moved_nothing_are_told_of(spec):
    said = call("run", spec("model"), spec("blank")).stdout
    assert "8 instances in 2 batches" in said
    assert "5 of them moved no statistics: NaN or Inf at a layer" in said
    assert "moved no" not in call("run", spec("model"), spec("target")).stdout


def test_nothing_but_json_reaches_stdout_even_with_a_terminal_s_progress(spec, tmp_path):
    command = [sys.executable, "-m", "normadapt.cli", "run", spec("model"), spec("target"), "--json"]
    forced = {**os.environ, "FORCE_COLOR": "1"}  # rich then takes the pipe for a terminal
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=forced)
    assert json.loads(done.stdout)["instances"] == 96
    assert "run" in done.stderr  # the progress bar


def test_version():
    assert call("--version").stdout == f"normadapt {na.__version__}\n"


def test_demo_prints_its_results_and_writes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = demo.run_demo(images=60, single_images=5, seed=2, record=Recorder)
    asked = []

    def run_demo(*, seed, progress, record):
        asked.append(seed)
        progress(1, 2)
        return small

    monkeypatch.setattr(cli, "run_demo", run_demo)
    text = call("demo", "--seed", 2).stdout
    assert asked == [2]
    written = json.loads((tmp_path / "normadapt-out" / "demo.json").read_text())
    assert written == small.to_dict()
    assert "written: normadapt-out/demo.json" in text
    assert "written: normadapt-out/report.html" in text
    page = (tmp_path / "normadapt-out" / "report.html").read_text(encoding="utf-8")
    assert "trained on USPS digits, answers 60 MNIST digits in batches of 16" in page
    history = small.report.history
    assert history.items.sum() == 60
    assert [mark.text for mark in history.marks] == list(demo.CONDITIONS)
    assert history.agreement is not None
    for row in small.rows:
        assert row.stream in text
        assert f"{100 * row.accuracy['normadapt']:.1f}" in text
    assert "features.5" in text
    assert re.search(r"blur: (gains|loses|no difference)", text)
    assert json.loads(call("demo", "--json", "--out", "elsewhere").stdout) == written
    assert json.loads((tmp_path / "elsewhere" / "demo.json").read_text()) == written


def test_simulate_writes_numbers_and_an_offline_page(tmp_path):
    result = CliRunner().invoke(cli.app, ["simulate", "--experiment", "distribution", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "claim" in result.output
    found = json.loads((tmp_path / "simulate.json").read_text())
    assert list(found["experiments"]) == ["distribution"]
    page = (tmp_path / "simulate.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # nothing is fetched
    machine = CliRunner().invoke(
        cli.app, ["simulate", "--experiment", "distribution", "--out", str(tmp_path), "--json"]
    )
    assert json.loads(machine.stdout)["seed"] == 0


def test_simulate_names_what_it_knows(tmp_path):
    result = CliRunner().invoke(cli.app, ["simulate", "--experiment", "magic", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "expected one of risk, distribution, coverage, skewness, tail, got 'magic'" in " ".join(
        result.output.split()
    )


def test_run_reads_what_profile_wrote(spec, tmp_path):
    model, data = spec("model"), spec("source")
    file = tmp_path / "profile.safetensors"
    assert CliRunner().invoke(cli.app, ["profile", model, data, "--out", str(file)]).exit_code == 0
    arguments = ["run", model, data, "--profile", str(file), "--out", str(tmp_path), "--json"]
    outcome = CliRunner().invoke(cli.app, arguments)
    assert json.loads(outcome.stdout)["report"]["profiled"] is True
    both = CliRunner().invoke(cli.app, [*arguments, "--source", data])
    assert both.exit_code == 2
    assert "give one of them" in both.output
