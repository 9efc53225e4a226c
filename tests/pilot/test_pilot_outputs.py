"""Models whose outputs are of other shapes and types, and answers that are not finite."""

from collections import defaultdict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from normadapt.pilot import Disagreement, LabelledError, NonFinite, Pilot, Stage, StageRule, VarianceRatio
from normadapt.pilot.signals import variance_ratio
from pilot.stories import Clock, Follow, Story, images, make_model, make_plan, nan

AT_ONCE = {"shadow": StageRule(1, 0.0), "canary": (StageRule(10_000, 0.0, share=0.5),)}
OWN = (Disagreement(margin=0.1), LabelledError(margin=0.05), NonFinite())


class Wrapped(nn.Module):
    """The model with its output made into something else."""

    def __init__(self, wrap):
        super().__init__()
        self.body = make_model()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.body(x))


@dataclass
class Output:
    logits: object


def in_canary(wrap, **options):
    pilot = Pilot(Wrapped(wrap).eval(), plan=make_plan(**{"guards": (NonFinite(),), **AT_ONCE, **options}))
    with torch.no_grad():
        pilot(images(16)[0])
    assert pilot.stage is Stage.CANARY
    return pilot


@pytest.mark.parametrize(
    "wrap",
    [
        Output,
        lambda o: o.numpy(),
        lambda o: defaultdict(list, logits=o),
        lambda o: o.topk(2),
        lambda o: (o, "text"),
    ],
    ids=["dataclass", "numpy", "defaultdict", "topk", "tuple"],
)
def test_outputs_of_many_types_are_served_from_both_arms(wrap):
    pilot = in_canary(wrap)
    with torch.no_grad():
        output = pilot(images(16)[0], ids=range(16))
    assert type(output) is type(wrap(torch.eye(3)))
    assert pilot.stage is Stage.CANARY
    assert set(pilot.status()["counts"]) <= {"transition", "labels cannot come"}
    assert 0 < pilot.status()["answered"]["adapted"] < 16


class Awkward:
    """Comparing it raises."""

    def __eq__(self, other):
        raise RuntimeError("no")

    __hash__ = None


@pytest.mark.parametrize(
    "wrap",
    [lambda o: [o, o.exp()], lambda o: {"logits": o, "loss": o.sum()}, lambda o: Awkward(), lambda o: o.repeat(2, 1)],
    ids=["list of parts", "a scalar", "an object", "two rows an item"],
)
def test_answers_that_cannot_be_put_together_are_the_sources_and_count_for_nothing(wrap):
    pilot = in_canary(wrap)
    for i in range(30):
        with torch.no_grad():
            pilot(images(16, seed=i)[0], ids=range(16))
    status = pilot.status()
    assert pilot.stage is Stage.CANARY
    assert status["counts"]["answers without rows"] == 30
    assert status["answered"]["adapted"] == 0
    assert status["items"] == 0


@pytest.mark.parametrize("stage", ["canary", "full"])
def test_several_rows_an_item_are_compared_and_labels_for_them_are_an_event(stage):
    """A model of sequences that returns (n * T, K): guards see its rows, labels cannot."""
    clock = Clock()
    guards = (Disagreement(margin=0.1), NonFinite())
    plan = make_plan(guards=guards, canary=AT_ONCE["canary"])
    pilot = Pilot(Wrapped(lambda o: o.repeat_interleave(2, 0)).eval(), plan=plan, policy=Follow(), clock=clock)
    with torch.no_grad():
        for i in range(40):
            clock.now += 1
            pilot(images(16, seed=i)[0], ids=range(16))
            if stage == "full" and pilot.stage is Stage.CANARY:
                pilot.promote("ann", force=True)
    assert pilot.stage.value == stage
    assert pilot.status()["counts"]["labels cannot come"] > 10
    assert pilot.status()["guards"]["disagreement"]["items"] > 0
    assert "trip" not in [event.kind for event in pilot.events]


def test_an_id_that_cannot_be_hashed_costs_no_answer(monkeypatch):
    story = Story(plan=make_plan(**AT_ONCE))
    story.send()
    monkeypatch.setattr("normadapt.pilot.answering.route", lambda *_: 1 / 0)
    assert torch.equal(story.send(), story.last[3])
    assert story.pilot.status()["counts"]["routing trouble"] == 1


# -- answers that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "pixel"), [("shadow", False), ("shadow", True), ("canary", False), ("full", False), ("full", True)]
)
def test_what_neither_model_can_answer_is_no_harm_and_teaches_nothing(stage, pixel):
    story = Story(plan=make_plan(guards=OWN)).until(stage)
    for _ in range(3):
        story.send()
    assert story.pilot.stage.value == stage
    before, items = story.pilot.adapted.snapshot(), story.pilot.status()["items"]

    def broken(x):
        x = x.clone()
        x[0, 0, 0, 0] = float("nan")
        return x if pixel else nan(x)

    for count in range(1, 4):
        output = story.send(n=16, change=broken)
        assert torch.equal(output.nan_to_num(7.0), story.last[3].nan_to_num(7.0))
        assert story.pilot.stage.value == stage
        assert story.pilot.status()["counts"]["answers not finite"] == count
    assert story.pilot.status()["items"] == items
    assert not story.pilot.label(story.last[2][3], 0)
    after = story.pilot.adapted.snapshot()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    story.until("full")


def test_a_number_too_large_for_both_models_teaches_nothing_either():
    """Finite at the first layer, whose statistics would follow it, and not at the output."""
    story = Story(plan=make_plan(guards=(*OWN, VarianceRatio(low=0.1, high=10.0, every=1)))).until("full")
    story.pilot.adapted.model[5].register_forward_hook(lambda module, args, output: output * float("inf"))
    before = story.pilot.adapted.snapshot()
    with torch.no_grad():
        assert not story.pilot(images(16)[0] * 1e6, ids=range(16)).isfinite().any()
    assert story.pilot.stage is Stage.FULL
    after = story.pilot.adapted.snapshot()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_nan_boxes_beside_good_predictions_trip_when_they_are_the_adapted_models():
    broken = []

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = make_model()

        def forward(self, x):
            boxes = x.flatten(1)[:, :4].clone()
            if broken and not torch.equal(self.body[1].running_mean, source):
                boxes[:] = float("nan")
            return {"logits": self.body(x), "boxes": boxes}

    model = Detector().eval()
    source = model.body[1].running_mean.clone()
    plan = make_plan(guards=OWN, paired_share=0.01)
    story = Story(plan=plan, model=model, predictions=lambda output: output["logits"].softmax(1))
    story.until("full")
    broken.append(True)
    output = story.send(n=16)
    assert output["boxes"].isfinite().all()
    assert story.pilot.stage is Stage.ROLLED_BACK
    assert "non_finite" in story.pilot.verdict().reasons[0]


def test_what_adapting_alone_did_trips_even_beside_what_nobody_could_answer():
    story = Story(plan=make_plan(guards=OWN)).until("full")

    def only_ours(module, args, output):
        output = output.clone()
        output[0] = float("nan")
        if not torch.equal(story.pilot.adapted.model[1].running_mean, story.model[1].running_mean):
            output[1] = float("nan")
        return output

    story.pilot.adapted.model[5].register_forward_hook(only_ours)
    output = story.send(n=16)
    assert story.pilot.stage is Stage.ROLLED_BACK
    assert story.pilot.verdict().reasons[0].startswith("non_finite: 1 of ")
    assert torch.equal(output[1:], story.last[3][1:])


# -- the statistics of every stream ---------------------------------------------------------------------------------


def test_every_streams_statistics_are_looked_at():
    """Two cameras in turn, each at half of the items from one look to the next: one of them was never looked at."""
    plan = make_plan(guards=(NonFinite(), VarianceRatio(low=0.5, high=2.0)))
    story = Story(plan=plan, policy=Follow(rate=0.2)).until("full", n=16, stream="A")
    story.send(n=16, stream="A")
    for _ in range(6):
        if story.pilot.stage is Stage.FULL:
            story.send(change=lambda x: 10 * x, stream="B")
            story.send(stream="A")
    assert story.pilot.stage is Stage.ROLLED_BACK
    assert "variance_ratio" in story.pilot.verdict().reasons[0]
    assert variance_ratio(story.pilot.adapted)[1] < 2.0
