"""What labels say of a stage: of its present state, of classes that there are, and not of an earlier stage."""

import numpy as np
import pytest

from normadapt.pilot import Stage, StageRule
from normadapt.pilot.late_labels import LateLabels
from pilot.stories import Follow, Story, make_plan, poison

ON_LABELS = {"promote_without_labels": False}


def harmed(**changes):
    """In shadow, labelled: good for 35 requests, then poisoned; labels are what the source says."""
    plan = make_plan(shadow=StageRule(2000, 30.0), label_margin=0.05, **changes)
    story = Story(plan=plan, policy=Follow(rate=0.05))
    for number in range(125):
        story.send(n=16, change=poison if number >= 35 else None)
        for id_, label in zip(story.last[2], story.last[3].argmax(1).tolist(), strict=True):
            story.pilot.label(id_, label)
    return story


@pytest.mark.parametrize("without", [False, True])
def test_labels_that_were_good_once_do_not_let_a_harmful_model_on(without):
    story = harmed(promote_without_labels=without)
    assert story.pilot.status()["items"] >= 2000
    assert story.pilot.stage is Stage.SHADOW
    (reason,) = [reason for reason in story.pilot.verdict().reasons if "show that" in reason]
    assert reason == "2000 labels show that it is worse by more than 0.05"
    with pytest.raises(ValueError, match="worse by more than"):
        story.pilot.promote("ann")
    story.pilot.promote("ann", force=True)
    assert story.pilot.stage is Stage.CANARY


def test_evidence_is_what_it_is_now():
    labels = LateLabels(10, 0.05, 0.05)
    for _ in range(200):
        labels.weigh(adapted_wrong=False, source_wrong=False)
    assert labels.evidence > labels.threshold
    assert labels.against < 0
    for _ in range(200):
        labels.weigh(adapted_wrong=True, source_wrong=False)
    assert labels.evidence < 0
    assert labels.against > labels.threshold


def test_labels_of_one_stage_let_no_other_one_on():
    story = Story(plan=make_plan(**ON_LABELS)).until("canary", labelled=True)
    assert story.pilot.status()["labels"]["of_this_stage"] == 0
    assert story.pilot.status()["labels"]["evidence"] == 0
    for _ in range(40):
        story.send()
    assert story.pilot.share == 0.25
    assert story.pilot.verdict().reasons == ("0 of 20 labels",)


def test_what_is_no_class_of_the_model_is_refused_and_told():
    story = Story()
    story.send()
    _, _, (first, second, *_), _ = story.last
    assert [story.pilot.label(first, y) for y in (3, 99, -1, 1.5, "cat", None, True)] == [False] * 7
    assert story.pilot.status()["labels"]["used"] == 0
    event = next(event for event in story.pilot.events if event.kind == "strange label")
    assert event.facts["reason"] == "expected a class from 0 to 2; got 3"
    assert story.pilot.status()["counts"]["strange label"] == 7
    assert story.pilot.label(first, 2)  # it was not used up
    assert story.pilot.label(second, 0)


def test_one_and_the_text_one_are_the_same_id():
    story = Story()
    story.send(n=2, ids=[1, "2"])
    assert story.pilot.label("1", 0)
    assert story.pilot.label(2, 0)
    assert not story.pilot.label(1, 0)


def test_a_restart_forgets_what_labels_said():
    labels = LateLabels(10, 0.05, 0.05)
    for _ in range(50):
        labels.weigh(adapted_wrong=True, source_wrong=False)
    labels.restart()
    assert (labels.count, labels.evidence, labels.against) == (0, 0, 0)


def test_labels_take_the_ids_that_requests_take():
    story = Story().until("canary")
    told = story.pilot.status()["counts"].get("strange label", 0)
    assert not story.pilot.label(np.int64(10**9), 1)  # unknown, and no strange one
    assert story.pilot.status()["counts"].get("strange label", 0) == told
    assert not story.pilot.label(10**5000, 1)
    assert story.pilot.status()["counts"]["strange label"] == told + 1
