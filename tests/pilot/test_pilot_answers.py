"""Requests of every shape, strange ids and labels, callbacks, and torch's own protocols."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from normadapt.pilot import NonFinite, Pilot, Plan, Stage, StageRule, arm_of
from pilot.stories import Follow, Story, images, make_model, make_plan

AT_ONCE = {"shadow": StageRule(1, 0.0), "canary": (StageRule(10_000, 0.0, share=0.5),)}


class ManyParts(nn.Module):
    """Takes two tensors and an option by keyword, answers with a dict, a tuple and a list in it."""

    def __init__(self):
        super().__init__()
        self.body = make_model()

    def forward(self, image, *, scale, times=1.0, name="x"):
        logits = self.body(image * times) * scale[:, None]
        return {"logits": logits, "parts": (logits[:, :1], list(logits)), "name": name}


def test_parts_of_an_answer_keep_the_order_of_rows():
    pilot = Pilot(ManyParts().eval(), plan=make_plan(guards=(NonFinite(),), **AT_ONCE), policy=Follow(rate=0.5))
    x = images(16)[0]
    scale = torch.arange(1.0, 17.0)
    with torch.no_grad():
        pilot(x + 2, scale=scale)
        assert pilot.stage is Stage.CANARY
        expected = ManyParts().eval()(x, scale=scale, times=0.5)
        output = pilot(x, scale=scale, times=0.5, ids=list(range(16)))
    arm = [row for row in range(16) if arm_of(row, pilot.plan.salt) < 0.5]
    assert 2 < len(arm) < 14
    for row in range(16):
        logits = output["logits"][row]
        assert torch.equal(output["parts"][0][row], logits[:1])
        assert torch.equal(output["parts"][1][row], logits)
        assert torch.equal(logits, expected["logits"][row]) == (row not in arm)
    assert output["name"] == "x"
    assert pilot.status()["stage"] == "canary"


@pytest.mark.parametrize("stage", ["shadow", "canary", "full"])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 64])
def test_batches_of_any_size(stage, n):
    story = Story().until(stage)
    assert story.send(n=n).shape == (n, 3)
    assert story.pilot.status()["counts"].get("strange ids", 0) == 0


def test_an_answer_without_rows_is_the_sources():
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, x):
            return self.body(x).sum()

    pilot = Pilot(Summed().eval(), plan=make_plan(guards=(NonFinite(),), **AT_ONCE), policy=Follow())
    x = images(16)[0]
    with torch.no_grad():
        pilot(x)
        assert torch.equal(pilot(x), Summed().eval()(x))
    assert pilot.status()["counts"]["answers without rows"] == 1
    assert pilot.status()["items"] == 0  # nobody was answered by the adapted model


def test_without_a_tensor_a_request_is_one_item():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, seed):
            return self.body(images(2, seed)[0])

    pilot = Pilot(Reads().eval(), plan=make_plan(guards=(NonFinite(),), **AT_ONCE), policy=Follow())
    with torch.no_grad():
        assert pilot(3, ids=["a"]).shape == (2, 3)
        assert pilot(4, ids=["b"]).shape == (2, 3)
    assert pilot.status()["answered"]["items"] == 2
    assert pilot.stage is Stage.CANARY
    assert pilot.status()["counts"] == {"transition": 2, "labels cannot come": 2}  # two answers to one item
    assert not pilot.label("a", 0)


def test_one_id_is_on_one_side_whatever_comes_with_it_and_the_share_is_the_planned_one():
    story = Story(plan=make_plan(**AT_ONCE))
    story.send()
    assert story.pilot.share == 0.5
    sides = {}
    for turn in range(3):
        for start in range(0, 600, 60):
            ids = [
                f"user {number}" for number in torch.randperm(60, generator=torch.Generator().manual_seed(turn)) + start
            ]
            output = story.send(n=60, ids=ids)
            for id_, is_source in zip(ids, (output == story.last[3]).all(1).tolist(), strict=True):
                assert sides.setdefault(id_, is_source) == is_source
    assert 0.42 < sum(sides.values()) / len(sides) < 0.58


@pytest.mark.parametrize("ids", [["a"], "abcdefgh", [None] * 8, 5, {"a": 1}, [1.5] * 8, [10**5000] * 8])
def test_strange_ids_are_an_event_and_the_request_is_answered(ids):
    story = Story(plan=make_plan(**AT_ONCE))
    story.send()
    assert story.send(ids=ids).shape == (8, 3)
    assert story.pilot.status()["counts"]["strange ids"] == 1
    assert story.pilot.events[-1].kind == "strange ids"
    assert any(words in story.pilot.events[-1].facts["reason"] for words in ("ids for 8", "expected", "the id of"))


def test_a_strange_stream_is_an_event():
    story = Story()
    story.send(stream=7)
    assert story.pilot.status()["counts"]["strange stream"] == 1


def test_without_ids_the_share_is_kept():
    story = Story(plan=make_plan(**AT_ONCE))
    story.send()
    for _ in range(50):
        story.send(ids=None)
    answered = story.pilot.status()["answered"]
    assert 0.4 < answered["adapted"] / (answered["items"] - 8) < 0.6


def test_labels_that_find_nothing_are_counted_not_raised():
    story = Story(plan=make_plan(remember=10))
    for _ in range(3):
        story.send()
    assert story.pilot.label("2-0", 1)
    assert not story.pilot.label("2-0", 1)  # once
    assert not story.pilot.label("0-0", 1)  # forgotten
    assert not story.pilot.label("nobody", 1)
    for label in (None, "dog", 1.5, True, float("nan"), torch.zeros(2)):
        assert not story.pilot.label("2-1", label)
    assert not story.pilot.label(None, 1)
    assert story.pilot.label("2-1", torch.tensor(2))
    counts = story.pilot.status()["counts"]
    assert counts["label for nothing"] == 3
    assert counts["strange label"] == 7
    assert story.pilot.status()["labels"]["remembered"] == 8


def test_late_labels_count_for_the_stage_that_gave_the_answer_alone():
    story = Story(plan=make_plan(promote_without_labels=False))
    for _ in range(40):
        story.send()
    kept = list(story.pilot._trial.labels._answered)[-40:]
    story.pilot.promote("ann")
    assert story.pilot.share == 0.25
    for id_ in kept:
        assert story.pilot.label(id_, 0)
    status = story.pilot.status()
    assert status["labels"]["of_this_stage"] == 0  # not a word for the canary
    assert status["guards"]["labelled_error"]["items"] == 40  # but harm would have been seen


def test_frequent_events_are_noted_at_powers_of_ten():
    story = Story()
    for _ in range(120):
        story.pilot.label("nobody", 1)
    noted = [event.facts["count"] for event in story.pilot.events if event.kind == "label for nothing"]
    assert noted == [1, 10, 100]
    assert story.pilot.status()["counts"]["label for nothing"] == 120


def test_callbacks_come_outside_the_lock_and_may_raise():
    seen = []

    def tell(move):
        other = threading.Thread(target=lambda: seen.append(story.pilot.status()["stage"]))
        other.start()
        other.join(5)
        assert not other.is_alive()
        raise RuntimeError("pager is down")

    story = Story(on_transition=tell)
    story.until("full")
    assert seen == ["shadow", "canary", "canary", "full"]
    assert story.pilot.status()["counts"]["callback trouble"] == 4


def test_a_callback_may_act_on_the_pilot():
    story = Story(on_transition=lambda move: story.pilot.pause("robot") if move.after.stage is Stage.CANARY else None)
    story.until("canary")
    assert story.pilot.position.paused


def test_torchs_protocols():
    story = Story().until("canary")
    pilot, model = story.pilot, story.model
    assert list(pilot.state_dict()) == list(model.state_dict())
    model.load_state_dict(pilot.state_dict())
    assert [id(p) for p in pilot.parameters()] == [id(p) for p in model.parameters()]
    before = pilot.adapted.training, [m.training for m in pilot.adapted.model.modules()]
    assert pilot.train().training
    assert before == (pilot.adapted.training, [m.training for m in pilot.adapted.model.modules()])
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(pilot)
    with pytest.raises(TypeError, match="cannot be copied"):
        pickle.dumps(pilot)
    with pytest.raises(TypeError, match="under the trial"):
        pilot.load_state_dict(model.state_dict())


def test_moving_to_another_dtype_goes_on():
    story = Story(plan=make_plan(commit_every=50)).until("canary")
    story.pilot.double()
    with torch.no_grad():
        assert story.pilot(images(8)[0].double(), ids=list(range(8))).dtype == torch.float64
        for _ in range(3):
            story.pilot(images(16)[0].double() * float("nan"))
    assert story.pilot.stage is Stage.ROLLED_BACK
    assert story.model[0].weight.dtype == torch.float32


def test_gradients_and_inference_mode():
    story = Story().until("canary")
    x = images(8)[0].requires_grad_()
    story.pilot(x, ids=list(range(8))).sum().backward()
    assert x.grad.isfinite().all()
    with torch.inference_mode():
        story.pilot(images(8)[0], ids=list(range(8)))
    story.until("full")


def test_a_plan_is_small():
    assert Plan(guards=(NonFinite(),)).shares == (0.01, 0.05, 0.25, 0.5)
