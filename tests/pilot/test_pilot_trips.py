"""The way back: harm is answered by the source at once, then by the last good snapshot, then by the source again."""

import time

import pytest
import torch

from normadapt.pilot import LabelledError, Latency, Score, Stage, StageRule, VarianceRatio
from normadapt.pilot.verdict import QUIET, Outcome
from normadapt.store import Store
from pilot.stories import GUARDS, Follow, Story, make_plan, nan, poison


def test_nan_trips_at_once_and_the_request_is_answered_by_the_source_to_the_bit():
    story = Story().until("canary")
    output, expected, count = story.until_trip(n=16, change=nan)
    assert count == 1
    assert torch.equal(output.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert story.pilot.stage is Stage.ROLLED_BACK
    assert story.pilot.verdict().outcome is Outcome.FAIL
    assert story.pilot.verdict().reasons[0].startswith("non_finite: ")


def test_an_inner_nan_that_the_source_does_not_have_trips_and_the_source_answers():
    story = Story().until("full")

    def only_ours(module, args, output):
        mean = story.pilot.adapted.model[1].running_mean
        return output if torch.equal(mean, story.model[1].running_mean) else output * float("nan")

    story.pilot.adapted.model[5].register_forward_hook(only_ours)
    output, expected, count = story.until_trip()
    assert count == 1
    assert torch.equal(output, expected)


@pytest.mark.parametrize("stage", ["canary", "full"])
def test_a_poisoned_stream_trips_and_the_head_is_what_answers(stage, tmp_path):
    plan = make_plan(canary=(StageRule(400, 10.0, share=0.5),))
    story = Story(store=Store(tmp_path), plan=plan).until(stage)
    for _ in range(40):  # what was kept just before harm began would not be gone back to
        story.send()
    share = story.pilot.share
    output, expected, count = story.until_trip(change=poison)
    assert torch.equal(output, expected)
    assert 1 < count < 120
    assert story.pilot.share == share
    head = story.pilot.store.head().number
    assert story.pilot.serving == f"snapshot {head}"
    state = story.pilot.adapted.snapshot()
    good = story.pilot.store.load(head)
    assert all(torch.equal(state[key], good[key]) for key in good)
    kinds = [event.kind for event in story.pilot.store.history()]
    assert "trip" in kinds
    assert "rollback" in kinds
    for _ in range(5):  # held: the snapshot does not move
        story.send()
    state = story.pilot.adapted.snapshot()
    assert all(torch.equal(state[key], good[key]) for key in good)
    assert story.pilot.status()["answered"]["snapshot"] > 0
    assert story.pilot.store.verify().ok


def test_what_was_kept_while_harm_was_growing_is_not_gone_back_to(tmp_path):
    """Harm that only labels see, and slowly: several snapshots are kept meanwhile, and no guard is loud."""
    plan = make_plan(guards=(LabelledError(margin=0.02),), full=StageRule(10_000, 10.0), commit_every=50)
    story = Story(store=Store(tmp_path), plan=plan, policy=Follow(rate=0.01)).until("full", labelled=True)
    for _ in range(40):
        story.send(labelled=True)
    before = story.pilot.status()["snapshot"]
    began = story.pilot.store.head().created
    _, _, count = story.until_trip(labelled=True, change=poison)
    kept = [snapshot for snapshot in story.pilot.store.snapshots() if snapshot.created > began]
    assert count > 1
    (gone,) = [event.facts["numbers"] for event in story.pilot.events if event.kind == "snapshots distrusted"]
    assert set(gone) >= {snapshot.number for snapshot in kept[1:]}  # the first was taken before, and proven after
    assert 0 < story.pilot.status()["snapshot"] <= before + 1
    assert story.pilot.store.head().number == story.pilot.status()["snapshot"]


def test_after_the_cool_down_the_canary_begins_again_from_the_last_good_snapshot():
    story = Story().until("full")
    story.until_trip(change=poison)
    for _ in range(25):
        story.send()
    assert story.pilot.stage is Stage.ROLLED_BACK
    story.until("canary", limit=15)
    assert story.pilot.share == 0.25
    assert story.pilot.position.rollbacks == 1
    story.until("full")
    assert story.pilot.position.rollbacks == 1
    for _ in range(60):
        story.send()
    assert story.pilot.position.rollbacks == 0  # full has passed


def test_a_cool_down_without_traffic_does_not_count():
    story = Story().until("canary")
    story.until_trip(change=nan)
    story.clock.now += 10_000
    story.send()
    assert story.pilot.stage is Stage.ROLLED_BACK


def test_a_trip_while_held_goes_to_the_source_and_waits_for_an_operator():
    story = Story().until("canary")
    story.until_trip(change=nan)
    assert story.pilot.share == 0.25
    story.until_trip(change=nan)
    assert story.pilot.share == 0
    assert story.pilot.serving == "source"
    for _ in range(60):
        assert torch.equal(story.send(), story.last[3])
    assert story.pilot.status()["waits_for_operator"]
    story.pilot.promote("ann")
    assert story.pilot.position.stage is Stage.CANARY
    assert story.pilot.position.rollbacks == 0
    assert story.pilot.verdict().outcome is Outcome.INCONCLUSIVE


def test_a_second_trip_after_the_cool_down_waits_too():
    story = Story().until("canary")
    story.until_trip(change=nan)
    story.until("canary")
    story.until_trip(change=nan)
    assert story.pilot.share == 0
    assert story.pilot.position.waits


def test_without_a_good_snapshot_the_source_answers():
    story = Story()
    story.until_trip(change=nan)
    assert story.pilot.serving == "source"
    assert torch.equal(story.send(), story.last[3])
    story.until("shadow")  # nothing was learned, so it learns
    story.until("canary")


def test_slow_answers_trip():
    plan = make_plan(guards=(*GUARDS, Latency(seconds=0.02, requests=3)))
    story = Story(plan=plan).until("canary")

    def slow(module, args):
        if story.pilot.stage is Stage.CANARY:
            time.sleep(0.03)

    story.pilot.adapted.model[1].register_forward_pre_hook(slow)
    output, expected, count = story.until_trip(n=16)
    assert torch.equal(output, expected)
    assert count <= 4
    assert "latency" in story.pilot.verdict().reasons[0]


def test_statistics_out_of_bounds_trip():
    plan = make_plan(guards=(*GUARDS, VarianceRatio(low=0.5, high=2.0, every=1)))
    story = Story(plan=plan).until("canary")
    story.until_trip(n=16, change=lambda x: x * 20)
    assert "variance_ratio" in story.pilot.verdict().reasons[0]


@pytest.mark.parametrize("stage", ["shadow", "canary", "full"])
def test_an_exception_of_the_adapted_model_trips_and_nobody_sees_it(stage):
    story = Story().until(stage)
    if stage == "shadow":
        story.send()
    Follow.broken.append("out of order")
    try:
        output, expected, count = story.until_trip(n=16)
    finally:
        Follow.broken.clear()
    assert torch.equal(output, expected)
    assert count == 1
    assert "out of order" in story.pilot.verdict().reasons[0]


@pytest.mark.parametrize("stage", ["shadow", "canary", "full"])
def test_what_the_model_itself_raises_is_the_callers(stage):
    story = Story().until(stage)
    position = story.pilot.position
    with pytest.raises(RuntimeError):
        story.pilot(torch.zeros(16, 5, 4, 4), ids=list(range(16)))
    assert story.pilot.position == position
    story.send()


def test_a_guard_that_cannot_judge_is_no_guard():
    calls = []

    def fussy(outputs, inputs):
        calls.append(len(outputs))
        if len(calls) > 40:
            raise KeyError("calibration table")
        return torch.zeros(len(outputs))

    story = Story(plan=make_plan(guards=(*GUARDS, Score(function=fussy, name="fussy"))))
    output, expected, _ = story.until_trip()
    assert torch.equal(output, expected)
    assert "could not judge" in story.pilot.verdict().reasons[0]


def test_labels_alone_can_trip():
    """No other guard: the labels say that the adapted model is wrong where the source is right."""
    story = Story(plan=make_plan(guards=GUARDS[1:])).until("full")
    before = story.pilot.status()["answered"]["requests"]
    for _ in range(100):
        if story.pilot.stage is Stage.ROLLED_BACK:
            break
        story.send(change=poison)
        for id_, label in zip(story.last[2], story.last[3].argmax(1).tolist(), strict=True):
            story.pilot.label(id_, label)
    assert story.pilot.verdict().reasons[0].startswith("labelled_error: ")
    assert story.pilot.status()["answered"]["requests"] - before < 60
    assert story.told[-1].cause.value == "tripped"


def test_labels_of_an_earlier_era_say_nothing_of_the_model_in_use():
    story = Story().until("canary")
    for _ in range(10):
        story.send()
    kept = list(story.pilot._trial.labels._answered)
    story.until_trip(change=nan)
    assert story.pilot.label(kept[-1], 0)
    assert story.pilot.status()["labels"]["outdated"] == 1
    assert story.pilot.status()["guards"]["labelled_error"]["items"] == 0


def test_a_quiet_guard_lets_snapshots_be_good_and_a_loud_one_does_not(tmp_path):
    story = Story(store=Store(tmp_path)).until("full")
    for _ in range(50):
        story.send()
    notes = [event.facts["note"] for event in story.pilot.store.history(kinds="commit")]
    assert notes[:4] == ["the source", "shadow passed", "canary passed", "canary passed"]
    assert notes[4:] == ["full, 208 items", "full, 312 items"]  # each proven by the 100 items after it
    while story.pilot.watch.level < 0.6:
        story.send(change=poison)
    before = story.pilot.store.head().number
    while story.pilot.stage is Stage.FULL:
        story.send(change=poison)
        if story.pilot.watch.level > 0.6:
            assert story.pilot.store.head().number == before


def test_a_state_that_a_guard_was_loud_after_is_not_good():
    """A guard's alarm that passes by itself: what was under consideration before it is dropped all the same."""
    story = Story(plan=make_plan(full=StageRule(10_000, 10.0))).until("full")
    keeper, trial = story.pilot._keeper, story.pilot._trial
    while keeper.candidate is None or trial.since_commit > 40:
        story.send()
    considered = keeper.candidate
    while story.pilot.watch.level <= QUIET:
        story.send(change=poison)
    assert keeper.candidate is None
    story.pilot.watch.restart()  # it is quiet again
    while keeper.candidate is None:
        story.send()
    while trial.since_commit > 40:
        story.send()
    assert all(good.held is not considered.held for good in keeper._good)


def test_another_snapshot_behind_the_arm_begins_evidence_anew(tmp_path):
    story = Story(store=Store(tmp_path), plan=make_plan(cool_down=10_000.0)).until("full")
    story.until_trip(change=nan)
    guard = story.pilot.watch.states["disagreement"]
    for number in (1, 2):
        guard._processes[0][1].take([1.0] * 4)
        assert story.pilot.watch.level > QUIET
        story.pilot.rollback("ann", to=number)
        assert story.pilot.watch.level == 0
        assert story.pilot.status()["items"] == 0


def test_an_operators_rollback_waits_for_an_operator(tmp_path):
    story = Story(store=Store(tmp_path)).until("full")
    story.pilot.rollback("ann", to=1, reason="odd reports")
    assert story.pilot.serving == "snapshot 1"
    assert story.pilot.store.head().number == 1
    for _ in range(60):
        story.send()
    assert story.pilot.stage is Stage.ROLLED_BACK
    story.pilot.rollback("ann", to=2)
    assert story.pilot.serving == "snapshot 2"
    assert story.pilot.store.head().number == 2
    with pytest.raises(ValueError, match="no snapshot 99"):
        story.pilot.rollback("ann", to=99)
    with pytest.raises(ValueError, match="number of a snapshot"):
        story.pilot.rollback("ann", to="2")
    story.pilot.rollback("ann", to=0)
    assert story.pilot.serving == "source"
    story.pilot.resume("ben")
    assert story.pilot.stage is Stage.CANARY


def test_an_operators_rollback_without_a_store():
    story = Story().until("canary")
    with pytest.raises(ValueError, match="needs a store"):
        story.pilot.rollback("ann", to=7)
    story.pilot.rollback("ann")
    assert story.pilot.serving == "snapshot 1"
