"""Plans: what is refused and how, files there and back, and the verdict on a stage."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from normadapt.errors import PlanError
from normadapt.pilot import Disagreement, Latency, NonFinite, Outcome, Plan, Score, Stage, StageRule, VarianceRatio
from normadapt.pilot.example_plan import EXAMPLE
from normadapt.pilot.example_plan import GUARDS as EXAMPLE_GUARDS
from normadapt.pilot.verdict import Findings, judge
from pilot import stories

ROOT = Path(__file__).parents[2]

GUARDS = (Disagreement(), NonFinite())


def flat_score(outputs, inputs):
    """A function at the top level of a module, which a file can name."""
    return torch.zeros(len(outputs))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"guards": ()}, "no guard, no pilot"),
        ({"guards": [Disagreement()]}, "expected a tuple"),
        ({"guards": ("disagreement",)}, r"guards\[0\]: expected a guard"),
        ({"guards": (NonFinite(), NonFinite())}, "non_finite is there twice"),
        ({"alpha": 0.0}, "alpha: expected a number above 0 to 0.5"),
        ({"alpha": True}, "alpha"),
        ({"cool_down": -1.0}, "cool_down"),
        ({"cool_down": math.nan}, "cool_down"),
        ({"paired_share": 1.5}, "paired_share"),
        ({"minimum_labels": 0}, "minimum_labels: expected a whole number"),
        ({"unit": "user"}, 'unit: expected "request" or "stream"'),
        ({"salt": None}, "salt"),
        ({"promote_without_labels": 1}, "promote_without_labels"),
        ({"canary": ()}, "at least one step"),
        ({"canary": [StageRule(1, 0.0, share=0.1)]}, "at least one step"),
        ({"canary": (StageRule(1, 0.0),)}, r"canary\[0\].share"),
        ({"canary": (StageRule(1, 0.0, share=1.0),)}, r"canary\[0\].share"),
        ({"canary": (StageRule(1, 0.0, share=0.5), StageRule(1, 0.0, share=0.5))}, "must rise"),
        ({"canary": (StageRule(1, 0.0, share=0.5), StageRule(1, 0.0, share=0.1))}, "must rise"),
        ({"shadow": StageRule(0, 0.0)}, "shadow.items"),
        ({"shadow": StageRule(1, -1.0)}, "shadow.bake"),
        ({"shadow": StageRule(1, 0.0, max_weight=1.1)}, "shadow.max_weight"),
        ({"shadow": StageRule(1, 0.0, share=0.5)}, "shadow.share: is 0 always"),
        ({"full": StageRule(1, 0.0, share=0.5)}, "full.share: is 1 always"),
        ({"full": 3}, "full: expected a StageRule"),
        ({"commit_every": 2.5}, "commit_every"),
        ({"paired_share": 0}, "paired_share: expected a number above 0"),
        ({"salt": "\ud800"}, "salt: expected a text"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(PlanError, match=words):
        Plan(**{"guards": GUARDS, **changes})


def test_all_problems_are_named_at_once():
    with pytest.raises(PlanError) as caught:
        Plan(guards=(), alpha=2.0, canary=(), idle=-1.0)
    assert len(str(caught.value).splitlines()) == 5


FILE = """
alpha = 0.0005
cool_down = 1800
unit = "stream"
salt = "line 3"
minimum_labels = 300
promote_without_labels = false

[shadow]
items = 1000
bake = 600

[[canary]]
share = 0.02
items = 200
bake = 3600
max_weight = 0.5

[[canary]]
share = 0.2
items = 2000
bake = 3600

[full]
items = 10000
bake = 86400

[[guards]]
kind = "disagreement"
margin = 0.03

[[guards]]
kind = "variance_ratio"
high = 100

[[guards]]
kind = "latency"
seconds = 0.05

[[guards]]
kind = "score"
function = "torch:zeros_like"
name = "sharpness"
"""


def written(tmp_path, text):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return path


def test_a_file_says_all_of_it(tmp_path):
    plan = Plan.from_toml(written(tmp_path, FILE))
    assert plan.shares == (0.02, 0.2)
    assert plan.canary[0] == StageRule(200, 3600.0, 0.5, 0.02)
    assert plan.guards[:3] == (Disagreement(margin=0.03), VarianceRatio(high=100.0), Latency(seconds=0.05))
    assert plan.cool_down == 1800.0
    assert Plan.from_toml(written(tmp_path, plan.to_toml())) == plan


def test_what_a_file_leaves_out_is_the_default(tmp_path):
    assert Plan.from_toml(written(tmp_path, '[[guards]]\nkind = "non_finite"')) == Plan(guards=(NonFinite(),))


def test_a_stage_in_a_file_may_leave_out_what_has_a_default(tmp_path):
    text = '[shadow]\nitems = 7\n[full]\nbake = 5\n[[canary]]\nshare = 0.1\nitems = 9\n[[guards]]\nkind = "non_finite"'
    plan, usual = Plan.from_toml(written(tmp_path, text)), Plan(guards=(NonFinite(),))
    assert plan.shadow == dataclasses.replace(usual.shadow, items=7)
    assert plan.full == dataclasses.replace(usual.full, bake=5.0)
    assert plan.canary == (StageRule(9, 3600.0, 1.0, 0.1),)


def test_whole_numbers_make_the_same_plan_as_floats():
    one = Plan(guards=(Disagreement(margin=0),), cool_down=600, shadow=StageRule(7, 60), idle=30)
    other = Plan(guards=(Disagreement(margin=0.0),), cool_down=600.0, shadow=StageRule(7, 60.0), idle=30.0)
    assert one == other
    assert one.digest == other.digest
    assert one.to_toml() == other.to_toml()


@pytest.mark.parametrize("salt", ["\U0001f600 ü", "a\x7f\x01\t", "\u2028", ""])
def test_any_salt_survives_a_file(tmp_path, salt):
    plan = Plan(guards=GUARDS, salt=salt)
    path = tmp_path / "plan.toml"
    path.write_text(plan.to_toml(), encoding="utf-8")
    assert Plan.from_toml(path) == plan


def test_there_and_back_with_a_function(tmp_path):
    plan = Plan(guards=(Score(function=f"{__name__}:flat_score"), *GUARDS), salt='a "quoted" ü\n')
    assert Plan.from_toml(written(tmp_path, plan.to_toml())) == plan


def test_a_function_without_a_name_cannot_be_written_but_the_plan_has_a_digest():
    plan = Plan(guards=(Score(function=lambda outputs, inputs: outputs),))
    with pytest.raises(PlanError, match="importable"):
        plan.to_toml()
    assert plan.digest != Plan(guards=(Score(function=flat_score),)).digest


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Plan)])
def test_the_digest_differs_where_plans_differ(field):
    changes = {
        "guards": GUARDS[:1],
        "alpha": 1e-4,
        "shadow": StageRule(7, 7.0),
        "canary": (StageRule(7, 7.0, share=0.7),),
        "full": StageRule(7, 7.0),
        "unit": "stream",
        "salt": "x",
        "promote_without_labels": True,
        "cusum": True,
    }
    old = Plan(guards=GUARDS)
    value = changes.get(field, 0.25 if isinstance(getattr(old, field), float) else 7)
    assert dataclasses.replace(old, **{field: value}).digest != old.digest
    assert dataclasses.replace(old).digest == old.digest


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("alpha =", "alhpa =", ["alhpa: unknown key -> known are guards, alpha"]),
        ("bake = 600", "bakes = 600", ["shadow.bakes: unknown key -> known are items, bake, max_weight, share"]),
        ("items = 200\n", "", ["canary[0].items: is missing -> say how many items", "items = 200"]),
        ("share = 0.2\n", "", ["canary[1].share: is missing -> say the share of the ids"]),
        ("items = 200\n", "items = 2.5\n", [r"canary[0].items: expected a whole number; got 2.5"]),
        ("items = 200\n", 'items = "many"\n', [r"canary[0].items: expected a whole number; got 'many'"]),
        ("share = 0.2\n", "share = 0.01\n", ["canary: shares must rise"]),
        ('unit = "stream"', 'unit = "user"', ["unit: expected 'request' or 'stream'; got 'user'"]),
        (
            "promote_without_labels = false",
            "promote_without_labels = 0",
            ["promote_without_labels: expected true or false"],
        ),
        ("margin = 0.03", "margni = 0.03", ["guards[0]: guard 'disagreement' does not know 'margni'"]),
        ('kind = "latency"', 'kind = "lateness"', ["guards[2]: a guard needs kind"]),
        ("torch:zeros_like", "torch:no_such", ["guards[3]: ", "no_such"]),
        ("[full]", "[fully]", ["fully: unknown key"]),
        ("[[canary]]\nshare = 0.02", "[[canary]]\n[canary.x]", ["canary[0].x: unknown key"]),
        ("[shadow]", "[[shadow]]", ["shadow: expected a table"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_place(tmp_path, old, new, words):
    assert old in FILE
    with pytest.raises(PlanError) as caught:
        Plan.from_toml(written(tmp_path, FILE.replace(old, new, 1)))
    for word in words:
        assert word in str(caught.value)


def test_all_that_is_wrong_in_a_file_is_named_at_once(tmp_path):
    text = 'alpha = 3\nidle = "x"\ncanray = 1\n[shadow]\nitems = 0\nbake = 1'
    with pytest.raises(PlanError) as caught:
        Plan.from_toml(written(tmp_path, text))
    lines = str(caught.value).splitlines()
    for word in ("alpha:", "idle:", "canray:", "shadow.items:", "guards: no guard"):
        assert sum(line.strip().startswith(word) for line in lines) == 1, lines


def test_types_and_ranges_of_every_part_are_named_at_once(tmp_path):
    text = """
        alpha = "x"
        paired_share = 0
        [shadow]
        items = 0
        bake = "long"
        [[canary]]
        share = 3
        items = "many"
        [[canary]]
        share = 0.5
        items = -1
        colour = 1
        [[guards]]
        kind = "disagreement"
        margin = 7.0
        confidant = 1
        confident = "very"
    """
    with pytest.raises(PlanError) as caught:
        Plan.from_toml(written(tmp_path, text))
    lines = [line.strip() for line in str(caught.value).splitlines()]
    wanted = ["alpha:", "paired_share:", "shadow.items:", "shadow.bake:", "canary[0].share:", "canary[0].items:"]
    for word in [*wanted, "canary[1].items:", "canary[1].colour:", "guards[0]:"]:
        assert sum(line.startswith(word) for line in lines) == 1, (word, lines)
    for word in (
        "margin must be a number in [0, 1], got 7.0",
        "does not know 'confidant'",
        "confident must be a float",
    ):
        assert word in str(caught.value)
    assert "None" not in str(caught.value)


def test_the_example_and_the_documents_say_what_the_code_takes(tmp_path):
    assert Plan.from_toml(written(tmp_path, EXAMPLE)) == Plan(guards=EXAMPLE_GUARDS)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "PILOT.md").read_text(), flags=re.S)
    assert len(blocks) == 1
    names = {"model": stories.make_model()}
    exec(blocks[0].replace('store="trial", ', ""), names)
    assert names["plan"].shares == (0.05, 0.5)


def test_a_file_without_guards_is_told_what_to_write_in_it(tmp_path):
    path = written(tmp_path, "alpha = 0.001")
    with pytest.raises(PlanError) as caught:
        Plan.from_toml(path)
    assert str(path) in str(caught.value)
    assert '[[guards]] and below it kind = "disagreement"' in str(caught.value)
    assert "Disagreement()" not in str(caught.value)


def test_no_toml_and_no_file(tmp_path):
    with pytest.raises(PlanError, match="is no TOML file"):
        Plan.from_toml(written(tmp_path, "alpha = = 3"))
    with pytest.raises(OSError, match="absent"):
        Plan.from_toml(tmp_path / "absent.toml")


RULE = StageRule(100, 60.0)
PLAN = Plan(guards=GUARDS)
GOOD = {"stage": Stage.CANARY, "items": 100, "baked": 60.0, "gap": 1.0, "labels": 100, "label_evidence": 3.0}


def verdict(plan=PLAN, **changes):
    return judge(Findings(**{**GOOD, **changes}), RULE, plan, 3.0)


@pytest.mark.parametrize(
    ("changes", "outcome", "words"),
    [
        ({}, Outcome.PASS, "complete"),
        ({"items": 99}, Outcome.INCONCLUSIVE, "99 of 100 items"),
        ({"baked": 59.0}, Outcome.INCONCLUSIVE, "59 of 60 s"),
        ({"gap": 301.0}, Outcome.INCONCLUSIVE, "no traffic for 301 s"),
        ({"loudness": 0.6, "loudest": "disagreement"}, Outcome.INCONCLUSIVE, "disagreement is at 60%"),
        ({"labels": 99}, Outcome.INCONCLUSIVE, "99 of 100 labels"),
        ({"label_evidence": 2.9}, Outcome.INCONCLUSIVE, "do not show yet"),
        ({"paused": True}, Outcome.INCONCLUSIVE, "paused"),
        ({"stage": Stage.FULL, "labels": 0}, Outcome.PASS, "complete"),
        ({"stage": Stage.OFF}, Outcome.INCONCLUSIVE, "nothing is tried"),
        ({"stage": Stage.ROLLED_BACK, "failure": "it burnt"}, Outcome.FAIL, "it burnt"),
    ],
)
def test_the_verdict(changes, outcome, words):
    found = verdict(**changes)
    assert found.outcome is outcome
    assert words in found.reasons[0]


def test_without_labels_only_if_the_plan_says_so():
    plan = dataclasses.replace(PLAN, promote_without_labels=True)
    assert verdict(plan, labels=0, label_evidence=0.0).outcome is Outcome.PASS


def test_everything_that_is_missing_is_named():
    assert len(verdict(items=0, baked=0.0, gap=999.0, labels=0, paused=True).reasons) == 5
