"""The commands around a trial: what they do to its store, what they print, and what they say about mistakes."""

import json
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from normadapt import cli, pilot_command
from normadapt.pilot import Cause, Pilot, Plan, Position, Transition
from normadapt.pilot.drill import DrillResult
from normadapt.pilot.example_plan import GUARDS
from normadapt.pilot.rehearsal import Step
from normadapt.pilot.traffic import SteppedClock, send_traffic
from normadapt.pilot_tables import drill_table, history_table, moves_table, status_table
from normadapt.store import Store
from pilot import stories

SPEC_FILE = """
import torch
from pilot.stories import images, make_model as model

def target():
    for i in range(20):
        yield images(16, seed=i)

def unlabelled():
    for i in range(20):
        yield images(16, seed=i)[0]

def nothing():
    return []
"""

PLAN = """
minimum_labels = 20
label_margin = 0.2
cool_down = 30.0
idle = 60.0
save_every = 50
commit_every = 100
[shadow]
items = 100
bake = 10.0
[[canary]]
share = 0.25
items = 20
bake = 10.0
[[canary]]
share = 0.5
items = 40
bake = 10.0
[full]
items = 60
bake = 20.0
[[guards]]
kind = "disagreement"
margin = 0.1
[[guards]]
kind = "non_finite"
own_only = false
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(SPEC_FILE)
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path


def call(*arguments, code=0):
    outcome = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, [str(argument) for argument in arguments])
    assert outcome.exit_code == code, outcome.output
    return outcome


def run(*options, data="target", code=0):
    fixed = ["--plan", "plan.toml", "--store", "store", "--tick", 1, "--json"]
    outcome = call("pilot", "run", "own.py:model", f"own.py:{data}", *fixed, *options, code=code)
    return json.loads(outcome.stdout) if code == 0 else outcome


def rendered(renderable, width=80):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_a_trial_goes_on_where_the_last_run_ended_and_labels_let_it_on(spec):
    first = run("--items", 300)
    assert first["traffic"]["items"] == 300
    assert first["status"]["stage"] == "canary"
    second = run("--items", 1500)
    assert second["status"]["stage"] == "full"
    assert second["status"]["answered"]["items"] == 1800
    assert [move["to"] for move in first["moves"] + second["moves"]] == ["shadow", "canary", "canary", "full"]
    assert second["traffic"]["labels"] == 1500
    assert second["traffic"]["accuracy"] > 0.9
    assert second["status"]["labels"]["used"] > 0
    told = json.loads(call("pilot", "status", "--store", "store", "--json").stdout)
    assert told.pop("saved") > 0
    assert told["stage"] == "full"
    assert told["answered"] == second["status"]["answered"]


def test_without_labels_nothing_is_let_on(spec):
    for data, options in (("target", ["--labels", "none"]), ("unlabelled", [])):
        told = run("--items", 400, "--store", data, *options, data=data)
        assert told["traffic"]["labels"] == 0
        assert told["status"]["stage"] == "shadow"
        assert (told["traffic"]["accuracy"] is None) == (data == "unlabelled")


def test_a_fault_rolls_back_and_the_log_tells_it(spec):
    run("--items", 1500)
    told = run("--items", 300, "--inject", "nan@100-108")
    assert next(move["cause"] for move in told["moves"]) == "tripped"
    assert 96 <= told["moves"][0]["item"] <= 112
    assert told["moves"][0]["serving"].startswith("snapshot ")
    text = call("history", "--store", "store").stdout
    assert "non_finite in full" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80
    newest = json.loads(call("history", "--store", "store", "--limit", 3, "--json").stdout)
    assert len(newest) == 3
    assert newest[-1]["seq"] == newest[0]["seq"] + 2


def test_a_fault_beyond_the_run_is_refused_before_it_starts(spec):
    outcome = run("--items", 300, "--inject", "nan@10", "--inject", "noise@300-400", code=2)
    assert "noise would begin at item 300, after the last of --items 300" in " ".join(outcome.output.split())
    assert not (spec / "store").exists()
    fixed = ["--plan", "plan.toml", "--store", "store", "--tick", 1, "--inject", "nan@320"]
    outcome = call("pilot", "run", "own.py:model", "own.py:target", *fixed)
    assert "nan@320 never happened: DATA ended after 320 items" in " ".join(outcome.stderr.split())


def test_what_people_wrote_is_shown_as_they_wrote_it(spec):
    run("--items", 600)
    call("rollback", "--store", "store", "--by", "ann", "--reason", "see [/var/log/x] [red]")
    run("--items", 16)
    assert "see [/var/log/x] [red]" in " ".join(call("history", "--store", "store").stdout.split())
    move = Transition(0.0, Cause.ROLLED_BACK, Position(), Position(), "source", "a[/b]", "see [/x]")
    assert "a[/b]: see [/x]" in rendered(moves_table([(3, move)]))
    step = Step(0, "a", "[/expected]", "[/got]", True)
    assert "[/got]" in rendered(drill_table(DrillResult((step,), 0, 0, 0.0, 0.0, "")), 120)
    status = json.loads(call("pilot", "status", "--store", "store", "--json").stdout)
    status["guards"]["[/score]"] = status["guards"]["disagreement"]
    assert "[/score]" in rendered(status_table(status))


def test_guards_that_compare_are_shown_as_differences(spec):
    guard = {"hard": False, "normal": 0.51, "mean": 0.508, "recent": 0.6, "scale": 0.5, "items": 5, "log_value": 1.0}
    guard |= {"threshold": 8.0, "blind": False}
    run("--items", 16)
    status = json.loads(call("pilot", "status", "--store", "store", "--json").stdout)
    text = rendered(status_table({**status, "guards": {"labelled_error": guard}}))
    assert "labelled_error   +0.200   +0.016   +0.020" in text


def test_operators_commands_reach_the_next_run(spec):
    run("--items", 320, "--labels", "none")
    said = call("pilot", "promote", "--store", "store", "--by", "ann", "--force").stdout
    assert "command 1 (promote) is left" in said
    told = run("--items", 16, "--labels", "none")
    assert [(move["to"], move["by"]) for move in told["moves"]] == [("canary", "ann")]
    call("pilot", "pause", "--store", "store", "--by", "bob")
    assert run("--items", 16)["status"]["paused"] is True
    call("pilot", "resume", "--store", "store", "--by", "bob")
    assert run("--items", 16)["status"]["paused"] is False


def test_rollback_moves_the_head_and_the_next_run_follows(spec):
    run("--items", 1500)
    with Store("store") as store:
        head = store.head().number
    assert head > 1
    text = call("rollback", "--store", "store", "--to", 1, "--by", "ann", "--reason", "just so").stdout
    assert f"from snapshot {head} to 1" in text
    told = run("--items", 16)
    assert told["status"]["stage"] == "rolled_back"
    assert told["status"]["serving"] == "snapshot 1"
    assert told["status"]["failure"] == "rolled back by ann: just so"
    assert json.loads(call("rollback", "--store", "store", "--json").stdout)["to"] == 0
    assert "no snapshot 99" in call("rollback", "--store", "store", "--to", 99, code=2).stderr


def test_who_commands_while_nobody_runs_is_told_so_and_a_roll_back_makes_it_void(spec):
    run("--items", 320, "--labels", "none")
    said = call("pilot", "promote", "--store", "store", "--by", "ann", "--force").stdout
    assert "command 1 (promote) is left for the next pilot: none runs on this store now, the last one saved" in said
    call("rollback", "--store", "store", "--to", 0, "--by", "ben")
    said = " ".join(call("pilot", "status", "--store", "store").stdout.split())
    assert "No pilot runs on this store now" in said
    assert "ben has rolled back to snapshot 0, which a pilot has to follow" in said
    assert "Commands that wait for a pilot: 1 (promote)." in said
    told = json.loads(call("pilot", "status", "--store", "store", "--json").stdout)
    assert told["running"] is False
    assert [command["command"] for command in told["waiting_commands"]] == ["promote"]
    assert told["moved_head"] == {"to": 0, "by": "ben"}
    after = run("--items", 64)["status"]
    assert after["stage"] == "rolled_back"
    assert after["serving"] == "source"
    told = json.loads(call("pilot", "status", "--store", "store", "--json").stdout)
    assert told["waiting_commands"] == []
    assert told["moved_head"] is None


def test_who_commands_a_running_pilot_is_told_so(spec):
    with Pilot(stories.make_model(), store="store", plan=stories.make_plan(), policy=stories.Follow()) as pilot:
        pilot(stories.images(4)[0])
        said = call("pilot", "pause", "--store", "store", "--by", "ann").stdout
        assert "left for the pilot, which takes it within a second" in said
        assert json.loads(call("pilot", "status", "--store", "store", "--json").stdout)["running"] is True
        assert "another pilot runs on the store" in run(code=2).stderr


def test_a_roll_back_goes_to_the_last_good_snapshot_that_status_names(spec):
    run("--items", 1500)
    named = json.loads(call("pilot", "status", "--store", "store", "--json").stdout)["snapshot"]
    assert named > 1
    done = json.loads(call("rollback", "--store", "store", "--json").stdout)
    assert done["to"] == named
    again = json.loads(call("rollback", "--store", "store", "--json").stdout)
    assert again["to"] == named - 1
    assert run("--items", 16)["status"]["serving"] == f"snapshot {named - 1}"


def test_verify_says_all_is_well_until_it_is_not(spec):
    run("--items", 300)
    assert call("verify", "--store", "store").stdout.startswith("all is well: ")
    for path in (spec / "store" / "snapshots").glob("*.safetensors"):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    text = call("verify", "--store", "store", code=1).stdout
    assert "snapshot 0" in text
    told = json.loads(call("verify", "--store", "store", "--json", code=1).stdout)
    assert told["ok"] is False
    assert told["problems"]


def test_the_example_plan_is_the_default_with_all_guards(tmp_path):
    file = tmp_path / "new" / "plan.toml"
    assert f"written: {file}" in call("pilot", "plan", "--out", file).stdout.replace("\n", "")
    assert Plan.from_toml(file) == Plan(guards=GUARDS)
    assert "is there already" in call("pilot", "plan", "--out", file, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--inject", "fog@3"], "there is no fault 'fog'"),
        (["--inject", "nan"], "expected NAME@ITEM"),
        (["--plan", "own.py"], "own.py is no TOML file"),
    ],
)
def test_mistakes_get_a_paragraph(spec, arguments, said):
    outcome = run(*arguments, code=2)
    assert outcome.stderr.startswith("error: ")
    assert said in outcome.stderr
    assert not (spec / "store").exists()


def test_a_store_that_is_none_is_not_made(spec):
    for command in (["history"], ["verify"], ["rollback"], ["pilot", "status"], ["pilot", "pause", "--by", "a"]):
        outcome = call(*command, "--store", "nowhere", code=2)
        assert "there is no store at" in outcome.stderr
        assert not (spec / "nowhere").exists()
    Store("empty").close()
    assert "no pilot has run" in call("pilot", "status", "--store", "empty", code=2).stderr
    assert "DATA gave no item" in run(data="nothing", code=2).stderr


def test_the_text_of_a_run_says_where_it_stands(spec):
    options = ["--plan", "plan.toml", "--store", "store", "--tick", 1, "--items", 300]
    text = call("pilot", "run", "own.py:model", "own.py:target", *options).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert "canary, step 1 of 2" in text
    assert "adapted answers 25% of the ids" in text
    assert "300 items sent, 300 labels came back; " in text
    assert call("pilot", "status", "--store", "store").stdout.count("canary, step 1 of 2") == 1


@pytest.mark.parametrize("stage", ["shadow", "canary", "full", "rolled_back"])
def test_every_stage_fits_a_terminal(stage, tmp_path):
    story = stories.Story(store=Store(tmp_path)).until("full" if stage == "rolled_back" else stage)
    story.send()
    if stage == "rolled_back":
        story.until_trip(change=stories.nan)
    status = story.pilot.status()
    text = rendered(status_table({**status, "saved": 1000.0}, 1000.0 + 7300))
    assert max(map(len, text.splitlines())) <= 80
    assert stage.replace("_", " ") in text
    assert "2 h ago" in text
    assert status["verdict"]["outcome"] in text
    assert "…" not in text
    events = rendered(history_table(story.pilot.store.history()))
    assert max(map(len, events.splitlines())) <= 80
    assert "…" not in events


def small_drill(*, ok):
    steps = (
        Step(0, "shadow", "this", "that", True),
        Step(16, "fault: constant", "a guard trips within 2,000", "confidence_collapse after 1,232", ok),
        Step(32, "fault: frozen", "no guard trips", "none in 1,504 images", True, gap=True),
    )
    return DrillResult(steps, 3, 48, 1.0, 4.0, "store")


def test_drill_writes_its_results_and_fails_with_a_step(tmp_path, monkeypatch):
    asked = []

    def run_drill(store, *, seed, progress, opened):
        asked.append((store.exists(), seed))
        progress(16, "shadow")
        Store(store).close()
        return small_drill(ok=len(asked) < 3)

    monkeypatch.setattr(pilot_command, "run_drill", run_drill)
    text = call("drill", "--out", tmp_path, "--seed", 3).stdout
    assert "3 of 3 steps went as expected" in text
    assert f"written: {tmp_path / 'report.html'}" in text.replace("\n", "")
    assert "A drill: the trial of USPSNet" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "drill.json").read_text()) == small_drill(ok=True).to_dict()
    assert json.loads(call("drill", "--out", tmp_path, "--json").stdout)["ok"] is True
    assert "FAIL" in call("drill", "--out", tmp_path, code=1).stdout
    assert asked == [(False, 3), (False, 0), (False, 0)]  # each on a fresh store
    (tmp_path / "other" / "drill-store").mkdir(parents=True)
    (tmp_path / "other" / "drill-store" / "mine.txt").write_text("dear")
    assert "no store of an earlier drill" in call("drill", "--out", tmp_path / "other", code=2).stderr
    assert (tmp_path / "other" / "drill-store" / "mine.txt").exists()


def test_the_time_line_fits_a_terminal():
    text = rendered(drill_table(small_drill(ok=False)))
    assert max(map(len, text.splitlines())) <= 80
    assert [word in text for word in ("FAIL", "gap", "ok", "confidence_collapse", "…")] == [True] * 4 + [False]


def test_traffic_is_cut_to_the_number_of_items_and_begun_again():
    sizes, given = [], []
    pilot = Pilot(stories.make_model(), plan=stories.make_plan(), policy=stories.Follow())
    pilot.register_forward_pre_hook(lambda module, args, kwargs: sizes.append(len(args[0])), with_kwargs=True)
    pilot.register_forward_pre_hook(lambda module, args, kwargs: given.extend(kwargs["ids"]), with_kwargs=True)
    data = [stories.images(6)[0], stories.images(6, seed=1)[0]]
    assert send_traffic(pilot, data, items=20).items == 20
    assert sizes == [6, 6, 6, 2]
    assert send_traffic(pilot, data, batch_size=5).requests == 3
    assert sizes[4:] == [5, 5, 2]
    assert given == list(range(32))


def test_late_labels_come_late_and_all():
    pilot = Pilot(
        stories.make_model(), plan=stories.make_plan(), policy=stories.Follow(), clock=(clock := SteppedClock(2))
    )
    came = []
    pilot.label = lambda id_, label: came.append((int(id_), label, pilot.status()["answered"]["items"]))
    data = [stories.images(16, seed=seed) for seed in range(20)]
    begin = clock.now
    traffic = send_traffic(pilot, data, clock=clock)
    assert clock.now == begin + 40
    assert traffic.labels == 320
    assert [id_ for id_, _, _ in came] == list(range(320))
    assert [label for _, label, _ in came] == torch.cat([y for _, y in data]).tolist()
    assert all(now - id_ >= 160 for id_, _, now in came[:160])
