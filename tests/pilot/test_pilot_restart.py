"""What outlives a process, and what a store in trouble does to the answers: nothing."""

import os
import shutil
import sqlite3
import threading

import pytest
import torch
from typer.testing import CliRunner

from normadapt import cli
from normadapt.errors import SnapshotError
from normadapt.pilot import Score, Stage, StageRule
from normadapt.pilot.keeper import STATE
from normadapt.pilot.resuming import document
from normadapt.store import Store
from pilot.stories import GUARDS, Story, killed, make_model, make_plan, nan, poison
from store.tiny import ended, fork


def restarted(story, tmp_path, plan=None):
    """Another process: the clock and the traffic go on, everything else comes from the store."""
    killed(story)
    other = Story(store=Store(tmp_path), plan=plan or story.pilot.plan, model=story.model, clock=story.clock)
    other.sent = story.sent
    return other


def everything(pilot):
    """All that a trial knows, without what the last moments before the end added."""
    state = document(pilot._trial)
    del state["counts"]
    return state


@pytest.mark.parametrize("stage", ["shadow", "canary", "full", "rolled_back"])
def test_a_new_process_goes_on_exactly_where_the_old_one_was_closed(stage, tmp_path):
    story = Story(store=Store(tmp_path)).until("canary" if stage == "rolled_back" else stage)
    if stage == "rolled_back":
        story.until_trip(change=nan)
    for _ in range(3):
        story.send(labelled=True)
    story.pilot.close()
    other = restarted(story, tmp_path)
    assert everything(other.pilot) == everything(story.pilot)
    assert other.pilot.serving == story.pilot.serving
    head = other.pilot.store.load(other.pilot.store.head().number)
    state = other.pilot.adapted.snapshot()
    assert all(torch.equal(state[key], head[key]) for key in head)
    assert other.pilot._trial.labels._answered == story.pilot._trial.labels._answered
    assert other.pilot.adapted.policy == story.pilot.adapted.policy
    other.send()
    assert other.pilot.status()["items"] >= story.pilot.status()["items"]
    if stage != "full":
        other.until("full")


def test_the_same_traffic_gives_the_same_evidence_with_a_restart_in_between(tmp_path):
    """Held at a snapshot, where nothing adapts, every later number is the same to the bit."""
    plan = make_plan(cool_down=10_000.0)
    stories = [Story(store=Store(tmp_path / name), plan=plan).until("canary") for name in ("a", "b")]
    for story in stories:
        story.until_trip(change=nan)
        story.send()
    stories[1].pilot.close()
    stories[1] = restarted(stories[1], tmp_path / "b")
    for _ in range(20):
        outputs = [story.send(labelled=True) for story in stories]
        assert torch.equal(outputs[0], outputs[1])
    states = [everything(story.pilot) for story in stories]
    assert states[0] == states[1]


def test_a_process_that_is_killed_loses_no_transition(tmp_path):
    story = Story(store=Store(tmp_path)).until("full")
    other = restarted(story, tmp_path)  # the old one was not closed
    assert other.pilot.stage is Stage.FULL
    other.until_trip(change=poison)
    third = restarted(other, tmp_path)
    assert third.pilot.stage is Stage.ROLLED_BACK
    assert third.pilot.serving == other.pilot.serving


def test_another_plan_begins_in_shadow_again(tmp_path):
    story = Story(store=Store(tmp_path)).until("canary")
    story.pilot.close()
    other = restarted(story, tmp_path, make_plan(alpha=1e-4))
    assert other.pilot.stage is Stage.SHADOW
    assert [e.facts["cause"] for e in other.pilot.store.history(kinds="transition")][-1] == "plan changed"
    assert other.pilot.store.head().number == 1  # what was good stays good


def test_a_plan_with_a_function_that_has_no_name_resumes(tmp_path):
    plan = make_plan(guards=(*GUARDS, Score(function=lambda outputs, inputs: torch.zeros(len(outputs)), name="own")))
    story = Story(store=Store(tmp_path), plan=plan).until("canary")
    story.pilot.close()
    assert restarted(story, tmp_path, plan).pilot.stage is Stage.CANARY


def test_a_state_that_makes_no_sense_is_refused_and_noted(tmp_path):
    story = Story(store=Store(tmp_path)).until("canary")
    state = story.pilot.store.read_state(STATE)
    for spoiled in ({**state, "watch": {}}, {**state, "format": 99}, {**state, "position": {"stage": "dreaming"}}):
        story.pilot.store.write_state(STATE, spoiled)
        story = restarted(story, tmp_path)
        assert story.pilot.events[-1].kind == "state refused"
        story.send()
        assert story.pilot.stage is Stage.SHADOW


def test_a_store_of_another_model_is_refused(tmp_path):
    Story(store=tmp_path).pilot.close()
    other = make_model()
    with torch.no_grad():
        other[0].weight.mul_(2)
    with pytest.raises(SnapshotError, match="is of Sequential"):
        Story(store=tmp_path, model=other)


def test_a_store_deleted_under_the_process_does_not_stop_the_answers(tmp_path):
    story = Story(store=Store(tmp_path / "store")).until("canary")
    shutil.rmtree(tmp_path / "store")
    for _ in range(30):
        story.send()
    output, expected, _ = story.until_trip(change=nan)
    assert torch.equal(output.nan_to_num(7.0), expected.nan_to_num(7.0))
    status = story.pilot.status()
    assert "deleted or replaced" in status["store"]["trouble"]
    assert status["store"]["waiting"] > 0
    assert status["counts"]["store trouble"] == 1
    assert story.pilot.stage is Stage.ROLLED_BACK
    story.pilot.poll()
    story.pilot.close()


def test_a_request_after_the_end_is_answered_from_memory(tmp_path):
    with Story(store=tmp_path).pilot as pilot:
        pass
    story = Story(store=Store(tmp_path)).until("canary")
    story.pilot.close()
    story.until("full")
    assert "closed" in story.pilot.status()["store"]["trouble"]
    assert pilot.status()["store"]["trouble"] is None


def test_a_locked_store_is_waited_for_briefly_and_catches_up(tmp_path):
    plan = make_plan(canary=(StageRule(400, 10.0, share=0.5),))
    story = Story(store=Store(tmp_path), plan=plan).until("canary")
    lock = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    story.until_trip(change=poison)
    assert "another writer" in story.pilot.status()["store"]["trouble"]
    assert story.pilot.stage is Stage.ROLLED_BACK
    lock.execute("ROLLBACK")
    lock.close()
    story.pilot._keeper._outbox._next_try = 0.0  # a second or so later
    story.send()
    assert story.pilot.status()["store"] == {"path": str(tmp_path), "trouble": None, "waiting": 1}
    story.pilot._keeper.flush()
    kinds = [event.kind for event in story.pilot.store.history()]
    for kind in ("trip", "rollback", "transition", "store trouble", "store back"):
        assert kind in kinds
    assert story.pilot.store.read_state(STATE)["position"]["stage"] == "rolled_back"
    assert story.pilot.store.verify().ok


def test_a_roll_back_that_waited_for_the_store_does_not_undo_a_later_commit(tmp_path):
    story = Story(store=Store(tmp_path)).until("canary")
    keeper = story.pilot._keeper
    keeper._outbox._next_try = float("inf")
    story.pilot.rollback("ann")
    keeper._outbox._next_try = 0.0
    assert keeper.commit("later")
    assert story.pilot.store.head().number == keeper.number == 2
    keeper.flush()
    assert story.pilot.store.head().number == 2


def test_commands_from_another_process(tmp_path):
    story = Story(store=Store(tmp_path), plan=make_plan(promote_without_labels=False))
    for _ in range(40):
        story.send()
    operator = Store(tmp_path)
    operator.send("promote", by="ann")
    story.pilot.poll()
    assert story.pilot.share == 0.25
    operator.send("promote", by="ann")  # too early
    operator.send("dance", by="ann")
    operator.send("pause", by="ann")
    story.pilot.poll()
    refused = [event.facts["command"] for event in operator.history(kinds="command refused")]
    assert refused == ["promote", "dance"]
    assert story.pilot.position.paused
    operator.send("rollback", by="ann", to=0)
    story.pilot.poll()
    assert story.pilot.serving == "source"
    assert operator.head().number == 0


def test_a_head_moved_by_another_process_is_followed(tmp_path):
    story = Story(store=Store(tmp_path)).until("full")
    operator = Store(tmp_path)
    operator.rollback(1, by="ann", reason="odd")
    story.pilot.poll()
    assert story.pilot.serving == "snapshot 1"
    assert story.pilot.position.waits
    state, kept = story.pilot.adapted.snapshot(), operator.load(1)
    assert all(torch.equal(state[key], kept[key]) for key in kept)
    events = len(operator.history(kinds="rollback"))
    story.pilot.poll()
    assert len(operator.history(kinds="rollback")) == events


def test_a_head_moved_while_no_process_ran_is_followed_at_the_start(tmp_path):
    story = Story(store=Store(tmp_path)).until("full")
    story.pilot.close()
    Store(tmp_path).rollback(1, by="ann", reason="odd")
    other = restarted(story, tmp_path)
    assert other.pilot.serving == "snapshot 1"
    assert other.pilot.position.waits
    assert other.pilot.verdict().reasons == ("rolled back by ann: odd",)
    other.pilot.close()
    again = restarted(other, tmp_path)
    assert again.pilot.serving == "snapshot 1"
    again.pilot.resume("ann")
    again.pilot.close()
    assert restarted(again, tmp_path).pilot.stage is Stage.CANARY


def test_a_clock_that_goes_back_or_fails_is_an_event(tmp_path):
    story = Story(store=Store(tmp_path)).until("canary")
    baked = story.pilot.status()["seconds"]
    story.clock.now -= 100_000
    story.send(n=1)
    story.send(n=1)
    assert story.pilot.status()["seconds"] <= baked + 1
    assert story.pilot.status()["counts"]["clock trouble"] == 1
    story.clock.now = float("nan")
    story.send(n=1)
    story.clock.now = 5.0
    story.until("full")


def test_threads_share_one_pilot(tmp_path):
    story = Story(store=Store(tmp_path), plan=make_plan(shadow=StageRule(100, 0.0)))
    errors = []

    def work(number):
        try:
            for turn in range(25):
                ids = [f"{number}-{turn}-{place}" for place in range(4)]
                x = torch.full((4, 3, 4, 4), 0.1 * number)
                with torch.no_grad():
                    assert story.pilot(x, ids=ids, stream=f"camera {number}").shape == (4, 3)
                story.pilot.label(ids[0], 0)
                story.pilot.status()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert story.pilot.status()["answered"]["items"] == 400
    assert story.pilot.store.verify().ok


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_command_line_in_another_process_does_not_cut_a_pilot_off(tmp_path):
    """The pilot has two handles on its store; opening the second must not take the locks of the first away."""
    go = os.pipe()

    def look():  # forked before anything is open here
        os.read(go[0], 1)
        outcome = CliRunner().invoke(cli.app, ["history", "--store", str(tmp_path)])
        assert outcome.exit_code == 0, outcome.output

    stranger = fork(look)
    story = Story(store=Store(tmp_path))
    story.send()
    with story.pilot.store.transaction():
        story.pilot.store.record("acknowledged")
        os.write(go[1], b"x")
        assert ended(stranger) == 0
    story.until("canary")
    story.pilot._keeper.flush()
    assert story.pilot.status()["store"]["trouble"] is None
    story.pilot.close()
    with Store(tmp_path) as store:
        assert store.history(kinds=["acknowledged"])
        assert store.history(kinds=["transition"])
        assert store.verify().ok


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_pilot_goes_on_when_its_process_forks(tmp_path):
    """As for the workers of a loader."""
    story = Story(store=Store(tmp_path))
    for _ in range(3):
        story.send()
        assert ended(fork(story.pilot.store.history)) == 0
    story.until("canary")
    assert story.pilot.status()["store"]["trouble"] is None
    story.pilot.close()
    with Store(tmp_path) as store:
        assert store.verify().ok
