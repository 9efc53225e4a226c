"""The drill on fewer images: every step is checked against what really happened, and a step that fails is told."""

import json

import pytest
import torch

from normadapt.pilot import drill, rehearsal, story
from normadapt.pilot.drill import DrillResult, Size, run_drill
from normadapt.pilot.faults import FAULTS
from normadapt.pilot.rehearsal import Step
from normadapt.pilot.story import EXPECTED
from normadapt.store import Store

SMALL = Size(1000, ((0.25, 100), (0.5, 150)), 300, ("drift", "frozen", "nan", "constant", "inverted"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drill") / "store"


@pytest.fixture(scope="module")
def result(folder):
    return run_drill(folder, seed=1, size=SMALL)


def named(result, name):
    return [step for step in result.steps if step.name == name]


def test_every_step_goes_as_expected(result):
    assert [(step.name, step.got) for step in result.steps if not step.ok] == []
    assert result.ok
    names = [step.name for step in result.steps]
    assert names[:5] == ["shadow", "canary 25%", "canary 50%", "full", "restart"]
    assert names[-5:] == ["fault: inverted", "inverted goes on", "repaired", "promote", "verify"]
    assert [step.at for step in result.steps] == sorted(step.at for step in result.steps)


def test_the_store_tells_the_same_story(result, folder):
    # An operator goes back after every fault that lasted and that no guard saw.
    unseen = [step for step in result.steps if step.facts.get("caught") is False and step.name != "fault: nan"]
    with Store(folder, create=False) as store:
        assert store.verify().ok
        events = store.history()
    trips = [event.facts["guard"] for event in events if event.kind == "trip"]
    told = [step.facts["guard"] for step in result.steps if step.facts.get("caught")]
    assert trips == [*told, trips[-1]]  # the last fault trips twice
    moves = [(e.facts["from"], e.facts["to"], e.facts["cause"]) for e in events if e.kind == "transition"]
    assert moves[:4] == [
        ("off", "shadow", "started"),
        ("shadow", "canary", "passed"),
        ("canary", "canary", "passed"),
        ("canary", "full", "passed"),
    ]
    assert [move[0] for move in moves if move[2] == "tripped"][-1] in ("rolled_back", "canary")  # it goes on
    assert ("rolled_back", "canary", "cooled down") in moves
    assert [e.facts["by"] for e in events if e.kind == "rollback" and e.facts["by"] == "the drill"] == [
        "the drill"
    ] * len(unseen)


def test_faults_that_nobody_sees_are_told_as_gaps(result):
    (frozen,) = named(result, "fault: frozen")
    if not frozen.facts["caught"]:
        assert frozen.gap
    (constant,) = named(result, "fault: constant")
    if not constant.facts["caught"]:
        assert constant.gap
        assert "statistics as before" in constant.got
    (inverted,) = named(result, "fault: inverted")
    assert not inverted.gap
    assert inverted.facts["snapshot"] > 0


def test_statistics_that_follow_frames_without_a_picture_fail_the_drill(tmp_path, monkeypatch):
    statistics = iter({"mean": torch.tensor(float(place))} for place in range(100))
    monkeypatch.setattr(drill.Story, "_statistics", lambda _: next(statistics))
    failed = run_drill(tmp_path / "store", seed=1, size=Size(1000, ((0.5, 100),), 50, ("constant", "inverted")))
    (constant,) = named(failed, "fault: constant")
    assert not constant.ok
    assert "statistics CHANGED" in constant.got


def test_what_no_model_can_answer_rolls_nothing_back(result):
    (nan,) = named(result, "fault: nan")
    assert (nan.ok, nan.gap, nan.facts["images"]) == (True, False, 160)
    after = result.steps[result.steps.index(nan) + 1]
    assert (after.name, after.facts["serving"]) == ("repaired", "adapted")


def test_plain_data_survive_json(result):
    told = result.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["ok"] is True
    assert set(told["faults"]) == set(EXPECTED) == set(FAULTS)


def test_a_guard_that_is_asleep_fails_the_drill(tmp_path, monkeypatch):
    from normadapt.pilot.watch import Watch

    monkeypatch.setattr(Watch, "update", lambda self, rows: None)
    failed = run_drill(tmp_path / "store", seed=1, size=Size(1000, ((0.5, 100),), 50, ("inverted",)))
    assert not failed.ok
    assert next(step.name for step in failed.steps if not step.ok) == "fault: inverted"


def test_a_fault_that_goes_on_shows_the_same_frame_as_before_the_first_trip(tmp_path, monkeypatch):
    shown = {}
    send = drill.Story.send

    def record(self, tally=None, change=None, legible=1):
        outcome = send(self, tally, change, legible)
        if change is not None:
            shown.setdefault(self.doing, []).append(change(torch.arange(4.0).view(1, 1, 2, 2)))
        return outcome

    monkeypatch.setattr(drill.Story, "send", record)
    run_drill(tmp_path / "store", seed=1, size=Size(1000, ((0.5, 100),), 50, ("inverted",)))
    before, after = shown["fault: inverted"], shown["it goes on"]
    assert all(torch.equal(frame, before[0]) for frame in before + after)
    assert float(before[0].flatten()[0]) != 3.0  # its range is the first faulty batch's, not the probe's


def test_a_trial_that_does_not_move_on_ends_the_drill(tmp_path, monkeypatch):
    monkeypatch.setattr(drill.Story, "send", lambda self, *_: (setattr(self, "sent", self.sent + 5000), None))
    stuck = run_drill(tmp_path / "store", size=SMALL)
    assert not stuck.ok
    assert stuck.steps[-1].name == "shadow"


def test_a_result_is_as_good_as_its_worst_step():
    good, bad = Step(0, "a", "x", "x", True), Step(0, "b", "x", "y", False)
    assert DrillResult((good, good), 0, 0, 0.0, 0.0, "").ok
    assert not DrillResult((good, bad), 0, 0, 0.0, 0.0, "").ok


def test_answers_are_compared_to_the_bit():
    x = torch.tensor([1.0, float("nan")])
    assert rehearsal.are_equal(x, x.clone())
    assert not rehearsal.are_equal(x, torch.tensor([1.0 + 2e-7, float("nan")]))


def going_on_with(monkeypatch, tmp_path, change):
    """The step in which a fault goes on, with other inputs in its place."""
    second_trip = drill.Story.second_trip

    def changed(self, name):
        self.change = change
        second_trip(self, name)

    monkeypatch.setattr(story, "_GOES_ON", 1600)  # the cool-down takes 960 of them
    monkeypatch.setattr(drill.Story, "second_trip", changed)
    result = run_drill(
        tmp_path / "store", seed=1, size=Size(1000, ((0.2, 60), (0.3, 60), (0.4, 60), (0.5, 60)), 50, ("inverted",))
    )
    (step,) = named(result, "inverted goes on")
    return step, result


def test_frames_that_the_canary_answers_as_the_source_does_are_a_gap(tmp_path, monkeypatch):
    step, result = going_on_with(monkeypatch, tmp_path, lambda inputs: torch.full_like(inputs, 1.0))
    assert (step.ok, step.gap, step.facts["images"]) == (True, True, 1600)
    assert [s.name for s in result.steps[result.steps.index(step) :]] == ["inverted goes on", "verify"]
    assert result.ok


def test_answers_of_another_class_that_trip_nothing_fail_the_drill(tmp_path, monkeypatch):
    step, _ = going_on_with(monkeypatch, tmp_path, lambda inputs: inputs)
    assert (step.ok, step.gap) == (False, False)
    assert "answers were of another class" in step.got
