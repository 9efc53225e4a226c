"""Settings of guards and their tables; what is measured from outputs."""

import math
import tomllib

import pytest
import torch
from torch import nn

import normadapt as na
from normadapt.errors import PlanError
from normadapt.pilot.guard_tables import KINDS, guard_from_table, guard_to_table
from normadapt.pilot.guards import (
    ClassConcentration,
    ConfidenceCollapse,
    Disagreement,
    LabelledError,
    Latency,
    NonFinite,
    Score,
    VarianceRatio,
)
from normadapt.pilot.signals import answers, labelled_signals, signals, variance_ratio

NAN = math.nan


def first_class_share(outputs, inputs):
    """A score that can be named: how probable class 0 is."""
    return outputs.softmax(1)[:, 0]


def logits(*rows):
    return torch.tensor(rows, dtype=torch.float32)


SURE, UNSURE, OTHER = (9.0, 0.0, 0.0), (0.1, 0.0, 0.0), (0.0, 9.0, 0.0)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_guard_survives_its_table(kind):
    values = {"function": "math:hypot"} if kind == "score" else {}
    guard = KINDS[kind](**values)
    table = guard_to_table(guard)
    assert table["kind"] == kind
    assert all(type(value) in (str, int, float, bool) for value in table.values())
    assert guard_from_table(table) == guard
    assert guard.hard == (kind in ("non_finite", "variance_ratio", "latency"))


def test_a_table_may_come_from_toml_with_whole_numbers_for_fractions():
    table = tomllib.loads('kind = "latency"\nseconds = 2\nrequests = 5')
    guard = guard_from_table(table)
    assert guard == Latency(seconds=2.0, requests=5)
    assert isinstance(guard.seconds, float)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "a guard needs kind = one of 'disagreement'"),
        ({"kind": "entropy"}, "got 'entropy'"),
        ({"kind": ["disagreement"]}, "a guard needs kind"),
        ({"kind": "disagreement", "margn": 0.1}, "does not know 'margn' -> it has margin, confident"),
        ({"kind": "disagreement", "margin": "0.1"}, "margin must be a float, got '0.1'"),
        ({"kind": "disagreement", "margin": True}, "margin must be a float"),
        ({"kind": "latency", "requests": 2.5}, "requests must be a int"),
        ({"kind": "disagreement", "margin": 1.5, "confident": -1}, r"margin must be .* \[0, 1\].*; confident"),
        ({"kind": "disagreement", "margin": NAN}, "margin must be"),
        ({"kind": "confidence_collapse", "tail": 0.5}, r"tail must be a number in \(0, 0.5\)"),
        ({"kind": "class_concentration", "memory": 0}, "memory must be"),
        ({"kind": "variance_ratio", "low": 2.0}, "low and high must be below and above 1"),
        ({"kind": "latency", "seconds": 0.0}, "seconds must be"),
        ({"kind": "score"}, "function must be a function or its name"),
        ({"kind": "score", "function": "no_such_module:x"}, "cannot be imported"),
        ({"kind": "score", "function": "math:no_such"}, "cannot be imported"),
        ({"kind": "score", "function": "math:pi"}, "is a float, which cannot be called"),
        ({"kind": "score", "function": "math:hypot", "name": ""}, "name must be a word"),
    ],
)
def test_wrong_tables_are_refused_with_what_is_wrong(table, message):
    with pytest.raises(PlanError, match=message):
        guard_from_table(table)


def test_a_function_without_a_name_cannot_be_written():
    with pytest.raises(PlanError, match="must be importable"):
        guard_to_table(Score(function=lambda outputs, inputs: outputs[:, 0]))
    assert guard_to_table(Score(function=math.hypot))["function"] == "math:hypot"


def test_disagreement_looks_at_items_of_which_the_source_is_sure():
    source, adapted = logits(SURE, SURE, UNSURE), logits(SURE, OTHER, OTHER)
    assert signals([Disagreement()], source, adapted) == {"disagreement": [0.0, 1.0]}
    assert signals([Disagreement(confident=0.0)], source, adapted) == {"disagreement": [0.0, 1.0, 1.0]}


def test_confidences_are_those_of_a_softmax():
    output = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) * 5
    found = answers(output)
    assert found.confidences == pytest.approx(output.softmax(1).amax(1).tolist(), rel=1e-5)
    assert found.classes == output.argmax(1).tolist()
    mapped = answers({"logits": output}, lambda o: o["logits"].softmax(1))
    assert mapped.classes == found.classes
    assert mapped.confidences == pytest.approx(found.confidences, rel=1e-5)
    assert answers(output.half()).classes == output.half().argmax(1).tolist()


def test_a_batch_is_the_sum_of_its_items():
    generator = torch.Generator().manual_seed(0)
    source, adapted = torch.randn(9, 4, generator=generator) * 4, torch.randn(9, 4, generator=generator) * 4
    guards = [
        Disagreement(),
        ClassConcentration(),
        ConfidenceCollapse(),
        NonFinite(),
        Score(function=first_class_share),
    ]
    whole = signals(guards, source, adapted)
    parts = [signals(guards, source[i : i + 1], adapted[i : i + 1]) for i in range(9)]
    for key, row in whole.items():
        assert row == pytest.approx([x for part in parts for x in part[key]], rel=1e-6)


@pytest.mark.parametrize("predictions", [None, lambda output: output.softmax(1)])
def test_an_adapted_nan_is_the_worst_and_a_source_nan_says_nothing(predictions):
    source, adapted = logits(SURE, (NAN, 0, 0), SURE), logits((NAN, 0, 0), SURE, SURE)
    guards = [Disagreement(), ClassConcentration(), ConfidenceCollapse(), NonFinite()]
    rows = signals(guards, source, adapted, predictions=predictions)
    assert rows["disagreement"] == [1.0, 0.0]
    assert rows["class_concentration"] == [0.0]
    assert math.isnan(rows["confidence_collapse"][0])
    assert len(rows["confidence_collapse"]) == len(rows["confidence_collapse/source"]) == 2
    assert rows["non_finite"] == [1.0, 0.0, 0.0]


def test_infinite_logits_are_not_finite_but_a_masked_class_is_no_fault():
    output = logits((math.inf, 0, 0), (-math.inf, 1, 0), (-math.inf,) * 3)
    assert signals([NonFinite()], None, output)["non_finite"] == [1.0, 0.0, 1.0]


def test_only_what_adapting_did_is_harm():
    adapted, source = logits((NAN, 0, 0), (NAN, 0, 0), SURE), logits(SURE, (NAN, 0, 0), SURE)
    assert signals([NonFinite()], source, adapted) == {
        "non_finite": [1.0, 0.0, 0.0],
        "non_finite/source": [0.0, 1.0, 0.0],
    }
    assert signals([NonFinite()], None, adapted)["non_finite"] == [1.0, 1.0, 0.0]
    assert signals([NonFinite(own_only=False)], source, adapted) == {"non_finite": [1.0, 1.0, 0.0]}


@pytest.mark.parametrize("predictions", [None, lambda output: output["logits"].softmax(1)])
def test_every_tensor_of_an_output_is_looked_at(predictions):
    good = {"logits": logits(SURE, SURE), "boxes": torch.zeros(2, 4)}
    bad = {**good, "boxes": torch.tensor([[0.0] * 4, [NAN] * 4])}
    found = signals([NonFinite()], good, bad, torch.zeros(2, 3), predictions=predictions)
    assert found["non_finite"] == [0.0, 1.0]
    assert signals([NonFinite()], None, bad, predictions=predictions)["non_finite"] == [0.0, 1.0]


def test_lists_of_answers_of_different_lengths_are_looked_at():
    found = signals([NonFinite()], None, [{"boxes": torch.zeros(1, 4)}, {"boxes": torch.full((2, 4), NAN)}])
    assert found["non_finite"] == [0.0, 1.0]


def test_a_masked_class_is_no_fault_in_one_part_of_an_output_either():
    output = {"logits": logits((-math.inf, 1, 0), (math.inf, 0, 0))}
    found = signals([NonFinite()], None, output, predictions=lambda o: o["logits"].softmax(1))
    assert found["non_finite"] == [0.0, 1.0]


@pytest.mark.parametrize(
    "make", [lambda: Latency(requests=2.5), lambda: VarianceRatio(every=2.5), lambda: ClassConcentration(memory=9.5)]
)
def test_counts_are_whole_numbers(make):
    with pytest.raises(PlanError, match="whole number"):
        make()


def test_outputs_that_give_no_probabilities_leave_what_needs_none():
    boxes = {"boxes": torch.tensor([[1.0, 2.0], [NAN, 0.0]]), "labels": torch.tensor([1, 2]), "note": "x"}
    guards = [Disagreement(), ClassConcentration(), ConfidenceCollapse(), NonFinite()]
    assert signals(guards, boxes, boxes) == {"non_finite": [0.0, 0.0], "non_finite/source": [0.0, 1.0]}
    assert signals(guards, None, boxes) == {"non_finite": [0.0, 1.0]}
    assert signals(guards, "words", "words") == {"non_finite": []}
    assert signals([NonFinite()], None, (torch.tensor([1.0, NAN]), torch.tensor(3.0)))["non_finite"] == [0.0, 1.0]


def test_unpaired_and_empty_batches():
    guards = [
        Disagreement(),
        ClassConcentration(),
        ConfidenceCollapse(),
        Score(function=first_class_share),
        NonFinite(),
    ]
    assert signals(guards, None, logits(SURE)) == {"non_finite": [0.0]}
    assert not any(row for row in signals(guards, torch.empty(0, 3), torch.empty(0, 3)).values())
    alone = Score(function=first_class_share, paired=False)
    assert signals([alone], None, logits((0.0, 0.0)))["score"] == pytest.approx([0.5])
    with pytest.raises(ValueError, match="of the same items"):
        signals(guards, logits(SURE, SURE), logits(SURE))


def test_scores_are_bounded_and_paired():
    source, adapted = logits((0, 0), (0, 0), (0, 0)), logits((1, 0), (NAN, 0), (7, 0))
    rows = signals([Score(function=lambda outputs, inputs: outputs[:, 0])], source, adapted)
    assert rows["score"] == [1.0, 1.0, 1.0]  # 1; NaN is the worst; 7 is cut to 1
    equal = signals([Score(function=first_class_share)], adapted[:1], adapted[:1])
    assert equal["score"] == [0.5]
    with pytest.raises(ValueError, match="one number for each item"):
        signals([Score(function=lambda outputs, inputs: outputs)], source, adapted)


def test_labels_compare_the_two_models():
    assert labelled_signals([NonFinite(), LabelledError()], [True, True, False, False], [True, False, True, False]) == {
        "labelled_error": [0.5, 1.0, 0.0, 0.5]
    }
    assert labelled_signals([NonFinite()], [True], [False]) == {}


def test_variance_ratio_is_that_of_the_statistics_in_use_with_eps():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3)).eval()
    model[0].running_var = torch.tensor([1.0, 0.0])
    adapted = na.adapt(model)
    assert variance_ratio(adapted) == (1.0, 1.0)
    site = adapted._hooks[1].site
    site.write(site.buffers()[0], torch.tensor([1.0, 5.0, 0.25]))
    assert variance_ratio(adapted) == pytest.approx((0.25, 5.0), rel=1e-4)
    site.write(site.buffers()[0], torch.tensor([1.0, NAN, 1.0]))
    assert all(math.isnan(end) for end in variance_ratio(adapted))
    assert signals([VarianceRatio(), Latency()], None, None, seconds=0.5, variance=(0.1, 2.0)) == {
        "variance_ratio": [0.1, 2.0],
        "latency": [0.5],
    }
