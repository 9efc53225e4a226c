"""Arms: stable, nested, of the planned size; and batches by rows."""

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from normadapt.pilot.routing import are_ids, arm_of, chosen
from normadapt.pilot.rows import RowsError, count_rows, put_rows, take_rows

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


@pytest.mark.parametrize("ids", [None, "abc", ["a", "b"], ["a", "b", None], ["a", "b", True], {"a", "b", "c"}, 3])
def test_what_are_no_ids_of_three_items(ids):
    assert not are_ids(ids, 3)
    assert are_ids(("a", 2, "c"), 3)


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
