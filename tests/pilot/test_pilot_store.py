"""What happens between a pilot and its store: operators' roll backs, commits that fail, and who may write at all."""

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from normadapt import Domains
from normadapt.baselines import BatchStatistics
from normadapt.errors import PlanError, SnapshotError, StoreLockedError
from normadapt.pilot import Disagreement, LabelledError, NonFinite, Stage, StageRule, Trip
from normadapt.pilot.lease import runs_on
from normadapt.store import Store
from pilot.stories import Follow, Story, killed, make_plan, nan, poison

SLOW = {"guards": (LabelledError(margin=0.02),), "full": StageRule(10_000, 10.0), "commit_every": 50}


def restarted(story, **options):
    """Another process, after a kill."""
    killed(story)
    options = {"plan": story.pilot.plan, "policy": Follow(), **options}
    return Story(store=Store(story.pilot.store.path), model=story.model, clock=story.clock, **options)


def kinds(store):
    return [event.kind for event in store.history()]


def locked(store):
    """Another writer, until it is closed."""
    other = sqlite3.connect(store.path / "store.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return closing(other)


# -- an operator's roll back, done in the store ------------------------------------------------------------------------


def test_a_roll_back_to_the_present_head_is_followed(tmp_path):
    story = Story(store=Store(tmp_path)).until("full")
    operator = Store(tmp_path)
    head = operator.head().number
    operator.rollback(head, by="ann", reason="bad answers")
    story.pilot.poll()
    assert story.pilot.serving == f"snapshot {head}"
    assert story.pilot.position.waits
    assert story.pilot.verdict().reasons == ("rolled back by ann: bad answers",)


def test_a_commit_before_the_next_look_does_not_hide_a_roll_back(tmp_path):
    """The pilot commits every 100 items and looks once a second; here both fall into the same second."""
    story = Story(store=Store(tmp_path), plan=make_plan(commit_every=100)).until("full")
    story.pilot.poll()
    operator = Store(tmp_path)
    operator.rollback(1, by="ann")
    for _ in range(40):
        story.send()
    assert story.pilot.serving == "snapshot 1"
    assert operator.head().number == 1
    after = kinds(operator)[kinds(operator).index("rollback") :]
    assert "commit" not in after
    assert story.pilot.store.verify().ok


def test_a_roll_back_is_followed_although_the_last_commit_met_a_lock(tmp_path):
    story = Story(store=Store(tmp_path)).until("full")
    with locked(story.pilot.store):
        story.pilot._trial._commit("periodic")
    assert story.pilot.status()["snapshot"] is None
    operator = Store(tmp_path)
    operator.rollback(1, by="ann")
    operator.send("promote", by="ann")
    story.pilot.poll()  # long before the store is tried again: it is read all the same
    assert story.pilot.serving == "snapshot 1"
    story.pilot._keeper._outbox.hurry()
    story.pilot.poll()
    assert story.pilot.stage is Stage.CANARY
    assert operator.head().number == 1


def test_a_trip_does_not_undo_an_operators_roll_back(tmp_path):
    story = Story(store=Store(tmp_path)).until("full")
    story.pilot.poll()
    operator = Store(tmp_path)
    operator.rollback(1, by="ann")
    story.pilot._keeper._next_poll = float("inf")
    story.until_trip(change=nan)
    assert operator.head().number == 1
    story.pilot.poll()
    assert story.pilot.serving == "snapshot 1"
    assert story.pilot.position.waits
    assert operator.head().number == 1


def test_a_roll_back_that_was_not_followed_before_a_kill_is_followed_after(tmp_path):
    story = Story(store=Store(tmp_path)).until("full")
    story.pilot.poll()
    Store(tmp_path).rollback(1, by="ann")
    story.pilot._keeper._next_poll = float("inf")
    story.pilot.pause("bob")  # an event and a state of the pilot's come after it
    other = restarted(story)
    assert other.pilot.serving == "snapshot 1"
    assert other.pilot.position.waits
    other.pilot.promote("ann")
    again = restarted(other)
    assert again.pilot.stage is Stage.CANARY


def test_a_moved_head_that_cannot_be_used_leaves_the_source(tmp_path):
    story = Story(store=Store(tmp_path)).until("full")
    operator = Store(tmp_path)
    target = operator.rollback(1, by="ann")
    file = next(path for path in (tmp_path / "snapshots").iterdir() if target.digest in path.name)
    file.chmod(0o644)
    file.write_bytes(b"x")
    story.pilot.poll()
    assert story.pilot.stage is Stage.ROLLED_BACK
    assert story.pilot.serving == "source"
    assert "roll back refused" in kinds(operator)
    assert operator.head().number == 0


def test_a_roll_back_makes_older_words_to_go_on_void(tmp_path):
    story = Story(store=Store(tmp_path)).until("canary")
    story.pilot.close()
    operator = Store(tmp_path)
    operator.send("promote", by="ann", force=True)
    operator.send("resume", by="ann")
    operator.rollback(0, by="ben")
    other = restarted(story)
    other.send()
    assert other.pilot.stage is Stage.ROLLED_BACK
    assert [event.facts["command"] for event in operator.history(kinds="command refused")] == ["promote", "resume"]
    operator.send("promote", by="ann")
    other.pilot.poll()
    assert other.pilot.stage is Stage.CANARY


def test_a_roll_back_that_was_sent_and_a_trip_make_older_words_void_too(tmp_path):
    story = Story(store=Store(tmp_path)).until("canary")
    operator = Store(tmp_path)
    operator.send("promote", by="ann", force=True)
    operator.send("rollback", by="ben")
    story.pilot.poll()
    assert [move.after.stage for move in story.told[-2:]] == [Stage.CANARY, Stage.ROLLED_BACK]
    operator.send("promote", by="ann", force=True)
    story.pilot.poll()
    operator.send("promote", by="ann", force=True)
    story.pilot._keeper._next_poll = float("inf")
    story.until_trip(change=nan)
    story.pilot.poll()
    assert story.pilot.stage is Stage.ROLLED_BACK


# -- a store that refuses ----------------------------------------------------------------------------------------------


def test_a_good_state_whose_snapshot_was_pruned_is_kept_again(tmp_path):
    story = Story(store=Store(tmp_path, retain=2), plan=make_plan(**SLOW), policy=Follow(rate=0.01))
    story.until("full", labelled=True)
    for _ in range(40):
        story.send(labelled=True)
    story.until_trip(labelled=True, change=poison)
    status, store = story.pilot.status(), Store(tmp_path, retain=2)
    assert status["store"] == {"path": str(tmp_path), "trouble": None, "waiting": 0}
    assert store.head().number == status["snapshot"]
    state, kept = story.pilot.adapted.snapshot(), store.load(status["snapshot"])
    assert all((state[key] == kept[key]).all() for key in kept)
    assert "snapshot kept again" in kinds(store)
    other = restarted(story, policy=Follow(rate=0.01))
    assert other.pilot.stage is Stage.ROLLED_BACK
    assert other.pilot.serving == f"snapshot {status['snapshot']}"
    assert store.verify().ok


def test_a_damaged_snapshot_does_not_keep_a_trip_from_the_store(tmp_path):
    story = Story(store=Store(tmp_path)).until("full")
    head = story.pilot.store.head()
    file = next(path for path in (tmp_path / "snapshots").iterdir() if head.digest in path.name)
    file.chmod(0o644)
    file.write_bytes(b"x" * 10)
    story.until_trip(change=nan)
    assert story.pilot.status()["store"]["waiting"] == 0
    other = restarted(story)
    assert other.pilot.stage is Stage.ROLLED_BACK
    assert other.pilot.share == story.pilot.share
    assert {"trip", "transition", "snapshot kept again"} <= set(kinds(other.pilot.store))
    assert other.pilot.store.verify().ok


def test_what_is_distrusted_does_not_serve_after_a_restart(tmp_path):
    """The last good state met a lock when it was to be kept; the head is a later one, which is distrusted."""
    plan = make_plan(full=StageRule(10_000, 10.0), commit_every=20, guards=(Disagreement(margin=0.1), NonFinite()))
    story = Story(store=Store(tmp_path), plan=plan).until("full")
    keeper = story.pilot._keeper
    for _ in range(10):
        story.send()
    with locked(story.pilot.store):
        while keeper.number is not None:
            story.send()
    keeper._outbox.hurry()
    taken = keeper._good[-1].taken
    for _ in range(12):
        story.send()
    assert keeper.number is not None
    story.pilot._trial._lowest["disagreement"] = (0.0, (taken + keeper.moment) // 2)
    story.pilot._trial.trip(Trip("disagreement", 9.0, 8.0, 40, "made up"))
    story.pilot.poll()
    (gone,) = [event.facts["numbers"] for event in story.pilot.events if event.kind == "snapshots distrusted"]
    assert len(gone) > 1
    assert story.told[-1].serving == "snapshot in memory"
    head = story.pilot.store.head().number
    assert story.pilot.status()["snapshot"] == head
    assert head not in gone
    state, there = story.pilot.adapted.snapshot(), story.pilot.store.load(head)
    assert all((state[key] == there[key]).all() for key in there)
    assert restarted(story).pilot.serving == f"snapshot {head}"


def test_events_that_a_store_in_trouble_could_not_take_are_counted(tmp_path):
    story = Story(store=Store(tmp_path)).until("canary")
    story.pilot._keeper._outbox._next_try = float("inf")
    for number in range(1010):
        story.pilot._keeper.note("example", number=number)
    story.pilot._keeper._outbox.hurry()
    story.pilot._keeper.flush()
    (lost,) = story.pilot.store.history(kinds="events lost")
    written = story.pilot.store.history(kinds="example")
    assert lost.facts["count"] == 10
    assert len(written) == 1000
    story.pilot._keeper.note("example")
    story.pilot._keeper.flush()
    assert len(story.pilot.store.history(kinds="events lost")) == 1


def test_trouble_with_the_store_is_warned_of_once_and_the_end_says_what_is_lost(tmp_path, caplog):
    story = Story(store=Store(tmp_path)).until("canary")
    story.pilot.store.path.rename(tmp_path.with_name("elsewhere"))
    story.until_trip(change=nan)
    for _ in range(3):
        story.pilot._keeper._outbox.hurry()
        story.send()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "deleted or replaced" in caplog.text
    lost = story.pilot.close()
    assert lost == story.pilot.status()["store"]["waiting"] > 0
    assert f"closed with {lost} writes" in caplog.records[-1].getMessage()
    assert story.pilot.close() == lost
    tmp_path.with_name("elsewhere").rename(tmp_path)


def test_the_end_says_that_all_is_written(tmp_path, caplog):
    story = Story(store=Store(tmp_path)).until("canary")
    assert story.pilot.close() == 0
    assert Story().pilot.close() == 0
    assert caplog.records == []


# -- who may write -----------------------------------------------------------------------------------------------------


def test_a_second_pilot_on_a_store_is_refused(tmp_path):
    story = Story(store=Store(tmp_path))
    for _ in range(2):
        with pytest.raises(StoreLockedError, match=r"another pilot runs on the store .*this process.* -> close\(\)"):
            Story(store=tmp_path, model=story.model)
    assert runs_on(tmp_path)
    operator = Store(tmp_path)
    operator.send("pause", by="ann")
    assert operator.verify().ok
    story.pilot.close()
    assert not runs_on(tmp_path)
    Story(store=tmp_path, model=story.model).pilot.close()


def test_a_pilot_that_could_not_be_made_keeps_nobody_out(tmp_path):
    ceiling = make_plan(full=StageRule(1, 0.0, max_weight=0.5))
    with pytest.raises(PlanError):
        Story(store=Store(tmp_path / "other"), plan=ceiling, policy=BatchStatistics())
    assert not runs_on(tmp_path / "other")
    Story(store=tmp_path).pilot.close()
    with pytest.raises(SnapshotError):
        Story(store=Store(tmp_path), policy=Domains())
    assert not runs_on(tmp_path)


HOLDER = """
import os, sys, time
from normadapt.pilot.lease import Lease
from pathlib import Path
lease = Lease(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_the_lock_ends_with_the_process_however_it_ends_and_not_with_its_forks(tmp_path):
    Store(tmp_path).close()
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        with pytest.raises(StoreLockedError, match=f"process {process.pid}"):
            Story(store=Store(tmp_path))
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 10
        while runs_on(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(child, 0)  # still there, and holds nothing
        Story(store=Store(tmp_path)).pilot.close()
    finally:
        process.kill()
        process.stdout.close()
        os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_of_a_pilot_answers_and_writes_nothing(tmp_path):
    story = Story(store=Store(tmp_path)).until("canary")
    before = len(story.pilot.store.history())
    tripped, trips = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            story.until_trip(change=nan)
            os.write(trips, b"!")
            deadline = time.monotonic() + 20
            while story.pilot.serving != "source" and time.monotonic() < deadline:  # a roll back is followed by all
                story.send()
                time.sleep(0.01)
            ok = story.pilot.serving == "source"
            ok = ok and story.pilot.status()["store"]["trouble"] is not None and story.pilot.close() > 0
        except BaseException:
            ok = False
        os._exit(0 if ok else 1)
    assert os.read(tripped, 1) == b"!"
    assert len(story.pilot.store.history()) == before
    assert story.pilot.stage is Stage.CANARY
    story.pilot.rollback("ann", to=0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(tripped)
    os.close(trips)
    assert runs_on(tmp_path)
    story.pilot.promote("ann")
    story.until("full")
    assert story.pilot.close() == 0


# -- what another process goes on from ---------------------------------------------------------------------------------


def test_another_setting_of_the_policy_begins_in_shadow_again(tmp_path):
    story = Story(store=Store(tmp_path), policy=Follow(rate=0.02)).until("full")
    same = restarted(story, policy=Follow(rate=0.02))
    assert same.pilot.stage is Stage.FULL
    other = restarted(same, policy=Follow(rate=1.0))
    assert other.pilot.stage is Stage.SHADOW
    reason = other.pilot.store.history(limit=1, kinds="transition")[0].facts["reason"]
    assert "rate=0.02" in reason
    assert "rate=1.0" in reason


def test_the_ceiling_of_a_stage_is_no_other_setting(tmp_path):
    canary = (StageRule(2000, 10.0, 0.25, share=0.5),)
    story = Story(store=Store(tmp_path), plan=make_plan(canary=canary)).until("canary")
    assert story.pilot.adapted.policy.max_weight == 0.25
    assert restarted(story).pilot.stage is Stage.CANARY


@pytest.mark.parametrize("whole", [False, True])
def test_labels_that_were_used_before_a_kill_are_used_once(whole, tmp_path):
    plan = make_plan(promote_without_labels=False, save_every=1, shadow=StageRule(100_000, 0.0))
    story = Story(store=Store(tmp_path), plan=plan)
    for _ in range(20):
        story.send()
    story.pilot._trial.save(whole=True)
    ids = list(story.pilot._trial.labels._answered)
    assert all(story.pilot.label(id_, 0) for id_ in ids[:50])
    if whole:
        story.pilot._trial.save(whole=True)
        story.pilot.label(ids[50], 0)
    other = restarted(story)
    assert other.pilot.status()["labels"]["of_this_stage"] == story.pilot.status()["labels"]["of_this_stage"]
    assert not any(other.pilot.label(id_, 0) for id_ in ids[: 51 if whole else 50])
    assert all(other.pilot.label(id_, 0) for id_ in ids[51:])


def test_many_used_labels_make_the_answers_be_written_anew(tmp_path):
    plan = make_plan(promote_without_labels=False, shadow=StageRule(100_000, 0.0), remember=5000)
    story = Story(store=Store(tmp_path), plan=plan)
    for _ in range(24):
        story.send(n=50, labelled=True)
    state = story.pilot.store.read_state("pilot")
    assert len(state["labels"]["used"]) < 500
    assert story.pilot.status()["labels"]["used"] == 1200
