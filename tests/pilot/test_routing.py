"""Arms: stable, nested, of the planned size; and batches by rows."""

import subprocess
import sys
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch

from normadapt.pilot.routing import IdsError, arm_of, chosen, read_ids, route
from normadapt.pilot.rows import RowsError, are_rows, bad_rows, count_rows, put_rows, take_rows
from normadapt.pilot.stages import Position, Stage

IDS = [f"request-{number}" for number in range(10_000)]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.5])
@pytest.mark.parametrize("ids", [IDS, list(range(10_000))], ids=["texts", "numbers"])
def test_the_share_is_within_one_percent_of_the_plan(share, ids):
    assert abs(len(chosen(ids, share, "normadapt")) / len(ids) - share) < 0.01


def test_rising_shares_only_add_ids():
    before = set()
    for share in (0.0, 0.01, 0.05, 0.25, 0.5, 1.0):
        now = set(chosen(IDS, share, "normadapt"))
        assert before <= now
        before = now
    assert len(before) == len(IDS)


def test_places_do_not_depend_on_process_or_version():
    places = [arm_of("request-1", "normadapt"), arm_of(7, ""), arm_of("\ud800 ü", "s")]
    assert places == [PLACES[0], PLACES[1], PLACES[2]]
    code = "from normadapt.pilot.routing import arm_of; print(arm_of('request-1', 'normadapt').hex())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float.fromhex(out.strip()) == places[0]


PLACES = (0.392750380390938, 0.09408258665251579, 0.20790651830751528)


def test_salts_choose_independently_and_do_not_run_into_ids():
    both = set(chosen(IDS, 0.5, "a")) & set(chosen(IDS, 0.5, "b"))
    assert abs(len(both) / len(IDS) - 0.25) < 0.02
    assert arm_of("bc", "a") != arm_of("c", "ab")
    assert arm_of(7, "a") == arm_of("7", "a")


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (None, "got a NoneType"),
        ("abc", "got a str"),
        (b"abc", "got a bytes"),
        ({"a", "b", "c"}, "got a set"),
        (3, "got a int"),
        ((i for i in range(3)), "got a generator"),
        (["a", "b"], "2 ids for 3 items"),
        (np.arange(4), "4 ids for 3 items"),
        (["a", "b", None], "the id of item 2 is a NoneType"),
        (["a", True, "b"], "the id of item 1 is a bool"),
        (np.array([0.5, 1.0, 2.0]), "the id of item 0 is a float"),
        (torch.zeros(3, 2, dtype=torch.long), "the id of item 0 is a list"),
        ([10**5000, 1, 2], "is a number of 16610 bits"),
        (np.array(3), "got a ndarray"),
    ],
)
def test_what_are_no_ids_of_three_items_is_named(ids, reason):
    with pytest.raises(IdsError, match=reason):
        read_ids(ids, 3)


@pytest.mark.parametrize(
    "ids",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        np.array([1, 2, 3]),
        torch.tensor([1, 2, 3]),
        deque([1, 2, 3]),
        [np.int32(1), torch.tensor(2), 3],
    ],
)
def test_any_sequence_of_names_is_read_as_plain_ids(ids):
    read = read_ids(ids, 3)
    assert list(read) == [1, 2, 3]
    assert all(type(id_) is int for id_ in read)
    assert read_ids(np.array(["a", "b"]), 2) == ["a", "b"]


def test_the_pairs_of_full_do_not_depend_on_the_arms():
    """Else ids that the canary answered first would be the ones that guards look at in full."""
    full = Position(stage=Stage.FULL, share=1.0)
    paired = set(route(full, IDS, IDS, 0.5, "normadapt").paired)
    both = paired & set(chosen(IDS, 0.5, "normadapt"))
    assert abs(len(both) / len(IDS) - 0.25) < 0.02


class Pair(NamedTuple):
    first: object
    second: object


def doubled(tree):
    if isinstance(tree, torch.Tensor):
        return tree * 2
    if isinstance(tree, dict):
        return {key: doubled(value) for key, value in tree.items()}
    if hasattr(tree, "_fields"):
        return type(tree)(*map(doubled, tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map(doubled, tree))
    return tree


@pytest.mark.parametrize("rows", [[], [0], [3, 1], [0, 1, 2, 3]])
def test_rows_come_back_in_order(rows):
    x = torch.arange(8.0).reshape(4, 2)
    tree = {"a": x, "b": (x[:, 0], Pair(x, "text")), "c": [t + 1 for t in x], "d": None}
    assert count_rows((), tree) == 4
    part = doubled(take_rows(tree, rows, 4))
    whole = put_rows(tree, part, rows, 4)
    for row in range(4):
        factor = 2 if row in rows else 1
        assert torch.equal(whole["a"][row], factor * x[row])
        assert torch.equal(whole["b"][0][row], factor * x[row, 0])
        assert torch.equal(whole["b"][1].first[row], factor * x[row])
        assert torch.equal(whole["c"][row], factor * (x[row] + 1))
    assert whole["b"][1].second == "text"
    assert whole["d"] is None


def test_what_has_no_rows_passes_through_and_cannot_be_put_together():
    scalar = torch.tensor(3.0)
    assert take_rows((scalar, "a"), [0], 4) == (scalar, "a")
    for whole, part in [(scalar, scalar), (torch.zeros(4, 2), torch.zeros(1, 3)), ("a", "b"), ([1], [1]), ({}, [])]:
        with pytest.raises(RowsError):
            put_rows(whole, part, [0], 4)
    assert count_rows((scalar, 3), {"name": "x"}) is None


def test_gradients_pass_through_rows():
    x = torch.ones(3, 2, requires_grad=True)
    put_rows(x * 2, take_rows(x, [1], 3) * 5, [1], 3).sum().backward()
    assert x.grad[:, 0].tolist() == [2, 5, 2]


@dataclass
class Boxed:
    """As detection and language models return them."""

    logits: object
    note: str = "same"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x.numpy(),
        lambda x: Boxed(x),
        lambda x: Boxed({"deep": x.numpy()}),
        lambda x: defaultdict(list, logits=x),
        lambda x: OrderedDict(logits=x),
        lambda x: MappingProxyType({"logits": x}),
        lambda x: x.topk(2),
    ],
    ids=["numpy", "dataclass", "nested", "defaultdict", "ordered", "frozen mapping", "topk"],
)
def test_answers_of_many_types_are_cut_and_put_together(wrap):
    x = torch.arange(8.0).reshape(4, 2)
    whole, other = wrap(x), wrap(x + 100)
    assert are_rows(whole, 4)
    part = take_rows(other, [3, 1], 4)
    joined = put_rows(whole, part, [3, 1], 4)
    assert type(joined) is type(whole)
    for row in range(4):
        wanted = take_rows(other if row in (3, 1) else whole, [row], 4)
        assert repr(take_rows(joined, [row], 4)) == repr(wanted)


def test_torchs_return_types_keep_their_names():
    found = take_rows(torch.eye(4).topk(2), [1], 4)
    assert found.values.shape == found.indices.shape == (1, 2)


def test_rows_that_are_not_items_are_known():
    x = torch.zeros(2, 3)
    assert are_rows({"a": x, "scalar": torch.tensor(1.0), "text": "x"}, 2)
    assert are_rows([{"boxes": torch.zeros(5, 4)}, {"boxes": torch.zeros(1, 4)}], 2)
    for tree in (torch.zeros(4, 3), (x, torch.zeros(4, 3)), {"a": np.zeros((3, 1))}, Boxed(torch.zeros(3)), [x, x]):
        assert not are_rows(tree, 2)


def test_any_tensor_that_is_not_finite_is_found():
    x, bad = torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [0, float("nan"), 0]])
    assert bad_rows((x, bad), 2) == [False, True]
    assert bad_rows(Boxed(bad.numpy()), 2) == [False, True]
    assert bad_rows([x, bad], 2) == [False, True]  # two parts, not two items
    assert bad_rows({"x": x, "loss": torch.tensor(float("inf"))}, 2) == [True, True]  # everybody's
    assert bad_rows({"x": x, "anchors": bad.repeat(3, 1)}, 2) == [True, True]
    assert bad_rows({"x": x.long(), "n": np.arange(2), "t": "nan"}, 2) == [False, False]
    masked = torch.tensor([[-torch.inf, 0.0], [torch.inf, 0.0]])
    assert bad_rows(masked, 2) == [True, True]
    assert bad_rows(masked, 2, masked=True) == [False, True]
    assert bad_rows(torch.zeros(0, 3), 0) == []
    assert bad_rows({"boxes": torch.zeros(2, 0)}, 2) == [False, False]
