"""The bank: which domain each instance is of, whatever the batches; what repeated and strange instances do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normadapt.domains.bank import BankSettings, assign, empty_bank
from normadapt.domains.change import Change
from normadapt.domains.places import Places

DIRECTIONS = 5
CENTRES = 25 * np.eye(DIRECTIONS)[[0, 0, 1, 2, 3]] * np.array([[0], [1], [1], [1], [1]])  # the source's first


def places(scatter=100.0):
    none = torch.zeros(0, dtype=torch.float64)
    wide = torch.full((DIRECTIONS,), scatter, dtype=torch.float64)
    classes = torch.zeros(DIRECTIONS, DIRECTIONS, dtype=torch.float64)
    return Places(none, none, none, torch.zeros(0, DIRECTIONS), wide, classes, torch.zeros(0, DIRECTIONS))


def fresh(*, has_source=True):
    return empty_bank(DIRECTIONS, 2, has_source=has_source)


def change():
    return Change(np.zeros((DIRECTIONS, DIRECTIONS)))


def stream(labels, seed=0):
    """Places of instances of these domains."""
    return CENTRES[labels] + np.random.default_rng(seed).standard_normal((len(labels), DIRECTIONS))


def assigned(y, sizes, bank=None, sensible=None, **more):
    """Numbers and admissions of a stream that comes in batches of these sizes, and the bank after it."""
    bank, numbers, admitted, start = bank or fresh(), [], [], 0
    sensible = np.ones(len(y), dtype=bool) if sensible is None else sensible
    for n in sizes:
        part = slice(start, start + n)
        look = np.column_stack((y[part, 0], y[part, 1]))
        found = assign(bank, places(), change(), BankSettings(**more), y[part], look, sensible[part])
        bank, start = found.bank, start + n
        numbers.append(found.numbers)
        admitted.append(found.admitted)
    assert start == len(y)
    return np.concatenate(numbers), np.concatenate(admitted), bank


def equal(one, other):
    """Whether two banks know the same, but for rounding."""
    assert (one.now, one.born, one.stay) == (other.now, other.born, other.stay)
    assert one.seen == other.seen
    assert [one.switches, one.steps] == pytest.approx([other.switches, other.steps])
    torch.testing.assert_close(one.recent, other.recent)
    assert len(one.domains) == len(other.domains)
    for a, b in zip(one.domains, other.domains, strict=True):
        assert (a.number, a.count, a.weight, a.since, a.last) == (b.number, b.count, b.weight, b.since, b.last)
        for x, y in ((a.place, b.place), (a.pull, b.pull), (a.look, b.look)):
            torch.testing.assert_close(x, y)


RUNS = np.repeat([0, 1, 0, 2, 1, 3, 4, 0, 2, 2], [30, 17, 5, 40, 3, 1, 12, 9, 1, 25])
MIXED = np.random.default_rng(5).integers(0, 3, 120)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["runs", "mixed"]))
def test_batches_do_not_matter_where_domains_lie_apart(data, kind):
    y = stream({"runs": RUNS, "mixed": MIXED}[kind])
    sizes, left = [], len(y)
    while left:
        sizes.append(data.draw(st.integers(1, min(left, 64))))
        left -= sizes[-1]
    whole, split = assigned(y, [len(y)]), assigned(y, sizes)
    assert whole[0].tolist() == split[0].tolist()
    assert whole[1].tolist() == split[1].tolist()
    equal(whole[2], split[2])


@pytest.mark.parametrize("labels", [RUNS, MIXED])
def test_every_domain_has_one_number_and_a_returning_one_is_recognized(labels):
    numbers, _, bank = assigned(stream(labels), [1] * len(labels))
    pairs = set(zip(labels.tolist(), numbers.tolist(), strict=True))
    assert len(pairs) == len(set(labels.tolist()))
    assert (0, 0) in pairs
    truth = np.bincount(labels)
    for label, number in pairs:
        domain = bank.domain(number)
        assert domain.count == truth[label]
        if number:
            assert np.linalg.norm(domain.place.numpy() - CENTRES[label]) < 0.2 + 3 * (DIRECTIONS / truth[label]) ** 0.5
        else:
            assert not domain.place.any()  # the source stays where it is


def test_when_a_domain_was_met_and_how_often_the_stream_switches():
    labels = np.repeat([0, 1, 0], [40, 30, 20])
    _, _, bank = assigned(stream(labels), [15] * 6)
    assert [(d.since, d.last, d.count) for d in bank.domains] == [(0, 90, 60), (40, 70, 30)]
    assert (bank.seen, bank.now, bank.stay) == (90, 0, 20)
    calm, busy = (assigned(stream(x), [10] * 12)[2] for x in (np.zeros(120, dtype=int), MIXED))
    assert calm.switches / calm.steps < 0.01
    assert busy.switches / busy.steps > 0.5


def test_a_stream_without_source_data_begins_with_a_domain_that_moves():
    y = stream(np.zeros(50, dtype=int)) + 1.0
    _, _, bank = assigned(y, [10] * 5, fresh(has_source=False))
    assert len(bank.domains) == 1
    torch.testing.assert_close(bank.domains[0].place, torch.from_numpy(y.sum(0) / (50 + 0.01)))


@pytest.mark.parametrize("sizes", [[300], [1] * 300, [7] * 42 + [6]])
def test_a_repeated_frame_counts_once(sizes):
    still, other = stream(np.array([1])), stream(np.array([1]), 3)
    numbers, admitted, bank = assigned(np.repeat(still, 300, 0), sizes)
    assert set(numbers.tolist()) == {1}
    assert admitted.tolist() == [True] + [False] * 299
    _, _, once = assigned(still, [1])
    assert bank.domain(1).count == once.domain(1).count == 1
    assert torch.equal(bank.domain(1).pull, once.domain(1).pull)
    assert bank.seen == 300
    after, _, bank = assigned(other, [1], bank)
    assert after.tolist() == [1]
    assert bank.domain(1).count == 2


def test_frames_in_turn_are_not_repeated():
    two = stream(np.array([0, 0]))
    _, admitted, bank = assigned(np.concatenate([two] * 10), [4] * 5)
    assert admitted.all()
    assert bank.domain(0).count == 20


@pytest.mark.parametrize("size", [1, 4, 40])
def test_absurd_instances_are_no_evidence_and_move_nothing(size):
    y, sensible = stream(np.repeat([0, 1], 20)), np.ones(40, dtype=bool)
    sensible[[0, 3, 25, 39]] = False
    y[~sensible] = 1e6
    numbers, admitted, bank = assigned(y, [size] * (40 // size), sensible=sensible)
    assert admitted.tolist() == sensible.tolist()
    _, _, without = assigned(y[sensible], [36])
    assert [d.count for d in bank.domains] == [d.count for d in without.domains]
    for one, other in zip(bank.domains, without.domains, strict=True):
        torch.testing.assert_close(one.place, other.place)
    assert set(numbers[~sensible].tolist()) <= {0, 1}  # answered by the statistics of where the stream is


@pytest.mark.parametrize("strange", [8.0, 40.0, 1e4])
@pytest.mark.parametrize("size", [1, 5])
def test_one_strange_instance_changes_nothing_for_those_after_it(strange, size):
    y = stream(np.zeros(60, dtype=int))
    y[30] = strange * np.eye(DIRECTIONS)[4]
    numbers, _, bank = assigned(y, [size] * (60 // size))
    assert np.delete(numbers, 30).tolist() == [0] * 59
    assert bank.domain(0).count >= 59
    assert not bank.domain(0).place.any()


def many(count, seed=0):
    """Ten instances each of so many domains, far apart."""
    draw = np.random.default_rng(seed)
    centres = draw.choice([-40, 0, 40], (200, DIRECTIONS))
    centres = np.unique(centres, axis=0)
    centres = centres[(centres != 0).any(1)]
    draw.shuffle(centres)
    return np.repeat(centres[:count], 10, 0) + draw.standard_normal((10 * count, DIRECTIONS))


@pytest.mark.parametrize("size", [1, 10, 100])
def test_where_slots_run_out_the_least_used_goes_and_what_was_named_stays(size):
    y = many(30)
    _, _, bank = assigned(y[:100], [size] * (100 // size), slots=6)
    assert len(bank.domains) == 6
    assert bank.domains[0].number == 0
    named = bank.domains[2]
    bank = bank.with_domain(named._replace(name="night", count=1.0))  # the least used of all
    numbers, _, bank = assigned(y[100:], [size] * (200 // size), bank, slots=6)
    kept = {d.number: d for d in bank.domains}
    assert len(kept) == 6
    assert 0 in kept
    assert kept[named.number].name == "night"
    assert bank.now in kept
    # Every instance was told a domain that exists at the end of its batch.
    assert set(numbers[-size:].tolist()) <= set(kept)


def test_nothing_is_written_into_the_bank_that_was_given():
    y = stream(RUNS)
    _, _, before = assigned(y[:60], [60])
    copies = [(d, d.place.clone(), d.pull.clone(), d.look.clone()) for d in before.domains], before.recent.clone()
    assigned(y[60:], [len(y) - 60], before)
    for domain, place, pull, look in copies[0]:
        assert torch.equal(domain.place, place)
        assert torch.equal(domain.pull, pull)
        assert torch.equal(domain.look, look)
    assert torch.equal(before.recent, copies[1])


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_forgotten_is_unknown(number):
    y = stream(np.repeat([0, 1], 20))
    _, _, bank = assigned(y, [40])
    rest = bank.without(number)
    assert rest.now in {d.number for d in rest.domains}
    if number == 0:
        assert rest.domain(0).count == 0  # the source itself stays, without evidence
    else:
        assert {d.number for d in rest.domains} == {0}
        again, _, later = assigned(stream(np.array([1] * 5), 9), [5], rest)
        assert set(again.tolist()) == {2}  # met anew
        assert later.domain(2).count == 5


def test_a_shift_that_single_instances_do_not_show_is_found_by_their_mean():
    """A little more than three natural deviations: each instance could be the source's, sixteen of them could not."""
    y = stream(np.zeros(200, dtype=int))
    y[100:] += 3.2 / DIRECTIONS**0.5
    wide = places(4.0)
    bank, numbers = fresh(), []
    for part in np.split(y, 20):
        found = assign(bank, wide, change(), BankSettings(founding=1e-9), part, part[:, :2], np.ones(10, dtype=bool))
        bank = found.bank
        numbers += found.numbers.tolist()
    assert set(numbers[:100]) == {0}
    assert numbers[-1] != 0
    last = bank.domain(numbers[-1])
    assert np.linalg.norm(last.place.numpy() - 3.2 / DIRECTIONS**0.5) < 1


def test_a_look_is_the_mean_of_the_domains_own_instances():
    labels = np.repeat([0, 1, 0, 1], [20, 15, 10, 30])
    y = stream(labels)
    numbers, _, bank = assigned(y, [15] * 5)
    for number in (0, 1):
        own = y[numbers == number][:, :2].mean(0)
        torch.testing.assert_close(bank.domain(number).look / bank.domain(number).count, torch.from_numpy(own))
