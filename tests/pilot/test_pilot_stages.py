"""The way in: shadow, canary, full; on labels or on a word, never on neither, and not without traffic."""

import json

import pytest
import torch

from normadapt import Domains
from normadapt.errors import PlanError
from normadapt.pilot import (
    ConfidenceCollapse,
    Disagreement,
    LabelledError,
    NonFinite,
    Pilot,
    Plan,
    Stage,
    StageRule,
    arm_of,
)
from normadapt.pilot.verdict import Outcome
from pilot.stories import GUARDS, Follow, Story, images, make_model, make_plan, make_profile, nan, poison

NEEDS_LABELS = {"promote_without_labels": False}


def test_the_whole_way_in_on_labels():
    story = Story(plan=make_plan(**NEEDS_LABELS))
    assert story.pilot.stage is Stage.OFF
    story.until("full", labelled=True)
    places = [(move.after.stage.value, move.after.share, move.cause.value) for move in story.told]
    assert places == [
        ("shadow", 0.0, "started"),
        ("canary", 0.25, "passed"),
        ("canary", 0.5, "passed"),
        ("full", 1.0, "passed"),
    ]
    assert story.pilot.status()["labels"]["for_nothing"] > 0  # items that the source alone had answered
    story.until("full")
    assert story.pilot.serving == "adapted"


def test_without_labels_a_stage_does_not_pass_however_well_it_looks():
    story = Story(plan=make_plan(**NEEDS_LABELS))
    for _ in range(60):
        story.send()
    assert story.pilot.stage is Stage.SHADOW
    verdict = story.pilot.verdict()
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.reasons == ("0 of 20 labels",)


def test_an_operators_word_is_enough_where_the_stage_is_complete_and_not_before():
    story = Story(plan=make_plan(**NEEDS_LABELS))
    story.send(n=0)
    with pytest.raises(ValueError, match="nothing was learned"):
        story.pilot.promote("ann", force=True)
    story.send()
    with pytest.raises(ValueError, match=r"shadow is not complete: .* items.* -> wait, or force=True"):
        story.pilot.promote("ann")
    with pytest.raises(ValueError, match="name of who wants it"):
        story.pilot.promote("")
    for _ in range(60):
        story.send()
    story.pilot.promote("ann")
    assert story.pilot.share == 0.25
    assert story.told[-1].by == "ann"
    story.send()
    story.pilot.promote("ann", force=True)
    assert story.pilot.share == 0.5


def test_a_loud_guard_refuses_a_word_that_is_not_forced():
    story = Story(plan=make_plan(**NEEDS_LABELS))
    for _ in range(40):
        story.send()
    story.pilot.promote("ann")
    for _ in range(30):
        story.send()
    while story.pilot.watch.level < 0.6:
        story.send(change=poison)
    level = story.pilot.watch.level
    with pytest.raises(ValueError, match=r"canary is not complete: guard disagreement is at \d+% of its threshold"):
        story.pilot.promote("ann")
    assert story.pilot.share == 0.25
    assert story.pilot.watch.level == level
    story.pilot.promote("ann", force=True)
    assert story.pilot.share == 0.5


def test_a_word_to_go_on_from_the_last_stage_is_refused():
    story = Story().until("full")
    with pytest.raises(ValueError, match="full is the last stage"):
        story.pilot.promote("ann", force=True)
    story.pilot.pause("ann")
    story.pilot.promote("ann", force=True)  # it ends a pause
    assert not story.pilot.position.paused
    story.until_trip(change=nan)
    story.until("full")
    story.pilot.promote("ann", force=True)  # and forgets roll backs
    assert story.pilot.position.rollbacks == 0


def test_events_can_be_cut():
    story = Story().until("canary")
    assert [event.kind for event in story.pilot.events[-2:]] == ["short shadow", "transition"]


def test_labels_that_do_not_show_it_promote_nothing():
    """Right as often as the source, but too few labels to say so within the margin."""
    story = Story(plan=make_plan(**NEEDS_LABELS, label_margin=0.01))
    for _ in range(40):
        story.send(labelled=True)
    assert story.pilot.stage is Stage.SHADOW
    assert "do not show yet" in story.pilot.verdict().reasons[0]


def test_a_stage_needs_its_items_and_its_time():
    quick = Story()
    quick.send(seconds=0.0)
    while quick.pilot.status()["items"] < 150:
        quick.send(seconds=0.0)
    assert quick.pilot.verdict().reasons == ("0 of 30 s under traffic",)
    slow = Story()
    slow.send(n=1)
    for _ in range(50):
        slow.send(n=1)
    assert slow.pilot.verdict().reasons == ("51 of 100 items",)


def test_no_traffic_is_inconclusive_and_does_not_bake():
    story = Story()
    for _ in range(10):
        story.send()
    before = story.pilot.status()["seconds"]
    story.clock.now += 3600
    assert story.pilot.verdict().outcome is Outcome.INCONCLUSIVE
    assert "no traffic for 3600 s" in story.pilot.verdict().reasons
    with pytest.raises(ValueError, match="no traffic"):
        story.pilot.promote("ann")
    story.send()
    assert story.pilot.status()["seconds"] == before
    assert not any("no traffic" in reason for reason in story.pilot.verdict().reasons)


def test_shadow_serves_the_source_to_the_bit_while_the_other_adapts():
    story = Story()
    for _ in range(5):
        assert torch.equal(story.send(), story.last[3])
    x = images(4)[0]
    with torch.no_grad(), story.pilot.adapted.paused():
        assert not torch.equal(story.pilot.adapted(x), story.model(x))


def test_in_the_canary_the_arm_is_answered_by_the_adapted_model_and_all_others_by_the_source_to_the_bit():
    story = Story().until("canary")
    share, salt = story.pilot.share, story.pilot.plan.salt
    seen = 0
    for _ in range(20):
        before = story.pilot.adapted.snapshot()
        output = story.send()
        if story.pilot.share != share:
            break
        _, _, ids, expected = story.last
        arm = [place for place, id_ in enumerate(ids) if arm_of(id_, salt) < share]
        rest = [place for place in range(8) if place not in arm]
        assert torch.equal(output[rest], expected[rest])
        if arm:
            twin = Story(model=story.model).pilot.adapted
            twin.restore(before)
            with torch.no_grad():
                assert torch.equal(output[arm], twin(story.last[0][arm]))
            assert not torch.equal(output[arm], expected[arm])
        seen += len(arm)
    assert seen > 10


def test_the_adapted_model_sees_its_own_items_only():
    story = Story().until("canary")
    seen = []
    story.pilot.adapted.model[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    before = story.pilot.status()["items"]
    story.send()
    arm = story.pilot.status()["items"] - before
    assert sorted(seen) == sorted([8, *([arm] if arm else [])])


def test_in_full_the_source_answers_the_paired_share_alone():
    story = Story().until("full")
    counts = []
    story.pilot.adapted.model[0].register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    for _ in range(100):
        story.send()
    assert story.pilot.serving == "adapted"
    assert 0.2 < (sum(counts) - 800) / 800 < 0.4  # 0.3 of them
    assert story.pilot.status()["guards"]["disagreement"]["items"] < 400


def test_a_pause_holds_statistics_and_stage():
    story = Story().until("canary")
    story.pilot.pause("ann")
    before = {key: value.clone() for key, value in story.pilot.adapted.snapshot().items()}
    for _ in range(60):
        story.send()
    after = story.pilot.adapted.snapshot()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert story.pilot.share == 0.25
    assert "paused by an operator" in story.pilot.verdict().reasons
    story.pilot.resume("ann")
    story.until("full")


def test_off_asks_the_source_alone_and_begins_again_in_shadow():
    story = Story().until("canary")
    story.pilot.stop("ann")
    asked = []
    story.pilot.adapted.model[0].register_forward_pre_hook(lambda module, args: asked.append(len(args[0])))
    assert torch.equal(story.send(), story.last[3])
    assert asked == [8]
    assert story.pilot.stage is Stage.OFF
    story.pilot.resume("ann")
    assert story.pilot.stage is Stage.SHADOW
    assert not story.pilot.watch.frozen


def test_the_weights_ceiling_grows_with_the_stage():
    rules = {
        "shadow": StageRule(100, 30.0, max_weight=0.0),
        "canary": (StageRule(20, 10.0, 0.25, share=0.25), StageRule(40, 10.0, 0.5, share=0.5)),
    }
    story = Story(plan=make_plan(**rules), policy=Follow(max_weight=0.9))
    story.send()
    ceilings = [story.pilot.adapted.policy.max_weight]
    x = images(4)[0]
    with torch.no_grad(), story.pilot.adapted.paused():
        assert torch.equal(story.pilot.adapted(x), story.model(x))
    while story.pilot.stage is not Stage.FULL:
        story.send()
        if story.pilot.adapted.policy.max_weight != ceilings[-1]:
            ceilings.append(story.pilot.adapted.policy.max_weight)
    assert ceilings == [0.0, 0.25, 0.5, 0.9]


def test_the_real_policy_keeps_to_its_ceiling_after_a_tenth_of_its_window():
    rules = {
        "shadow": StageRule(100, 30.0),
        "canary": (StageRule(60, 10.0, 0.25, share=0.25), StageRule(100, 10.0, 0.5, share=0.5)),
    }
    model = make_model()
    story = Story(plan=make_plan(**rules), model=model, profile=make_profile(model), policy=Domains())
    seen = {}
    for _ in range(400):
        story.send(change=lambda x: 0.5 * x + 1)
        if story.pilot.status()["items"] > 40 or story.pilot.stage is Stage.SHADOW:
            moved = story.pilot.adapted.state_dict()["1.running_mean"] - model.state_dict()["1.running_mean"]
            seen.setdefault((story.pilot.stage, story.pilot.position.step), []).append(float(moved.norm()))
        if story.pilot.stage is Stage.FULL and len(seen.get((Stage.FULL, 0), [])) > 20:
            break
    whole = seen[Stage.SHADOW, 0][-1]
    assert whole > 1
    assert max(seen[Stage.CANARY, 0]) <= 0.26 * whole
    assert 0.45 * whole < max(seen[Stage.CANARY, 1]) <= 0.51 * whole
    assert min(seen[Stage.FULL, 0][-5:]) > 0.95 * whole


def test_the_default_plan_begins_cautiously():
    plan = Plan(guards=GUARDS)
    ceilings = [rule.max_weight for rule in (*plan.canary, plan.full)]
    assert ceilings == sorted(ceilings) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert plan.shadow.max_weight == 1.0  # what is normal is learned from what full will do
    assert plan.shadow.items == 3000


@pytest.mark.parametrize(("items", "said"), [(100, ["short shadow"]), (3000, [])])
def test_a_short_shadow_is_told(items, said):
    story = Story(plan=make_plan(guards=(LabelledError(), ConfidenceCollapse()), shadow=StageRule(items, 0.0)))
    story.until("canary", n=200)
    assert [event.kind for event in story.pilot.events if event.kind in ("short shadow", "blind guards")] == said


@pytest.mark.parametrize("cusum", [False, True])
def test_guards_in_full_are_cusums_if_the_plan_says_so(cusum):
    story = Story(plan=make_plan(cusum=cusum)).until("canary")
    assert story.pilot.watch.cusum is False
    story.until("full")
    assert story.pilot.watch.cusum is cusum
    story.until_trip(change=nan)
    assert story.pilot.watch.cusum is False


def test_a_ceiling_for_a_policy_without_one_is_refused():
    from normadapt.baselines import BatchStatistics

    with pytest.raises(PlanError, match="BatchStatistics does not have"):
        Story(plan=make_plan(full=StageRule(1, 0.0, max_weight=0.5)), policy=BatchStatistics())


@pytest.mark.parametrize("plan", [None, "plan.toml", NonFinite()])
def test_without_a_plan_there_is_no_pilot(plan):
    with pytest.raises(PlanError, match="at least one guard"):
        Pilot(make_model(), plan=plan)


def test_by_stream_a_stream_is_on_one_side():
    story = Story(plan=make_plan(unit="stream")).until("canary")
    names = [f"camera {number}" for number in range(40)]
    share = story.pilot.share
    for name in names:
        output = story.send(n=4, stream=name)
        if story.pilot.share != share:
            break
        inside = arm_of(name, story.pilot.plan.salt) < share
        assert torch.equal(output, story.last[3]) != inside
        assert (name in story.pilot.adapted.streams) or not inside


def test_streams_do_not_mix():
    story = Story()
    for _ in range(4):
        story.send(stream="left")
        story.send(stream="right", change=lambda x: x + 3)
    adapted = story.pilot.adapted
    means = []
    for name in ("left", "right"):
        with adapted.stream(name):
            means.append(adapted.state_dict()["1.running_mean"])
    assert (means[0] - means[1]).abs().max() > 0.1


def test_a_guard_that_shadow_taught_nothing_is_named():
    story = Story(plan=make_plan(guards=(Disagreement(confident=1.0), NonFinite()))).until("canary")
    assert story.pilot.status()["blind"] == ["disagreement"]
    assert [event.facts for event in story.pilot.events if event.kind == "blind guards"] == [
        {"guards": ["disagreement"]}
    ]


def test_the_default_policy_with_a_profile_goes_all_the_way_in_and_back():
    model = make_model()
    story = Story(model=model, profile=make_profile(model), policy=Domains()).until("full")
    story.until_trip(n=16, change=nan)
    story.until("canary")


def test_status_is_json_and_names_what_is_missing():
    story = Story()
    for stage in ("shadow", "canary", "full"):
        story.until(stage)
        status = json.loads(json.dumps(story.pilot.status(), allow_nan=False))
        assert status["stage"] == stage
        assert status["verdict"]["outcome"] == "inconclusive"
        assert status["guards"]["disagreement"]["threshold"] > 0
    assert status["answered"]["items"] == 8 * story.sent
    assert sum(status["answered"][key] for key in ("source", "adapted", "snapshot")) == 8 * story.sent
