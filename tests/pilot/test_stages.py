"""The state machine: every cause at every kind of position, and what can never happen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normadapt.pilot.stages import Cause, Position, Stage, advance

SHARES = (0.01, 0.05, 0.25, 0.5)
SHADOW = Position(Stage.SHADOW)
FIRST = Position(Stage.CANARY, 0, 0.01, learned=True)
THIRD = Position(Stage.CANARY, 2, 0.25, learned=True)
LAST = Position(Stage.CANARY, 3, 0.5, learned=True)
FULL = Position(Stage.FULL, 0, 1.0, learned=True)
HELD = Position(Stage.ROLLED_BACK, 0, 0.25, rollbacks=1, learned=True)
SOURCE = Position(Stage.ROLLED_BACK, 0, 0.0, rollbacks=1, learned=True)
WAITING = Position(Stage.ROLLED_BACK, 0, 0.0, rollbacks=2, learned=True, waits=True)


def go(position, *causes, good=True, shares=SHARES):
    for cause in causes:
        position = advance(position, cause, shares=shares, good=good)
    return position


def test_a_trial_goes_through_every_stage():
    passed = [Position(), SHADOW, FIRST, Position(Stage.CANARY, 1, 0.05, learned=True), THIRD, LAST, FULL]
    position = passed[0]
    for place, expected in enumerate(passed[1:]):
        position = go(position, Cause.PASSED if place else Cause.STARTED)
        assert position == expected


@pytest.mark.parametrize(
    ("before", "cause", "after"),
    [
        (Position(), Cause.PASSED, Position()),
        (Position(), Cause.TRIPPED, Position()),
        (Position(), Cause.PROMOTED, SHADOW),
        (Position(), Cause.RESUMED, SHADOW),
        (Position(), Cause.PAUSED, Position()),
        (Position(), Cause.ROLLED_BACK, Position()),
        (SHADOW, Cause.STARTED, SHADOW),
        (SHADOW, Cause.TRIPPED, Position(Stage.ROLLED_BACK, rollbacks=1)),
        (SHADOW, Cause.COOLED, SHADOW),
        (THIRD, Cause.TRIPPED, HELD),
        (THIRD, Cause.STOPPED, Position(waits=True)),
        (Position(waits=True), Cause.STARTED, Position(waits=True)),
        (Position(waits=True), Cause.RESUMED, SHADOW),
        (THIRD, Cause.REPLANNED, SHADOW),
        (THIRD, Cause.RESUMED, THIRD),
        (FULL, Cause.TRIPPED, Position(Stage.ROLLED_BACK, 0, 1.0, 1, True)),
        (FULL, Cause.PROMOTED, FULL),
        (HELD, Cause.TRIPPED, WAITING),
        (HELD, Cause.COOLED, Position(Stage.CANARY, 0, 0.01, rollbacks=1, learned=True)),
        (HELD, Cause.PROMOTED, FIRST),
        (HELD, Cause.PASSED, HELD),
        (SOURCE, Cause.TRIPPED, SOURCE),
        (SOURCE, Cause.COOLED, Position(Stage.CANARY, 0, 0.01, rollbacks=1, learned=True)),
        (WAITING, Cause.COOLED, WAITING),
        (WAITING, Cause.PROMOTED, FIRST),
        (WAITING, Cause.RESUMED, FIRST),
    ],
)
def test_where_a_cause_leads(before, cause, after):
    assert go(before, cause) == after


def test_without_a_good_snapshot_the_source_answers_at_once_and_the_cool_down_starts_again():
    assert go(THIRD, Cause.TRIPPED, good=False) == SOURCE


def test_a_trip_in_shadow_learns_again_after_the_cool_down():
    assert go(SHADOW, Cause.TRIPPED, Cause.COOLED) == Position(Stage.SHADOW, rollbacks=1)


def test_a_second_trip_after_a_cool_down_goes_to_the_source_and_waits():
    assert go(THIRD, Cause.TRIPPED, Cause.COOLED, Cause.TRIPPED) == WAITING


def test_passing_full_forgets_roll_backs():
    position = go(THIRD, Cause.TRIPPED, Cause.COOLED, *[Cause.PASSED] * 4)
    assert position == Position(Stage.FULL, 0, 1.0, rollbacks=1, learned=True)
    assert go(position, Cause.PASSED).rollbacks == 0


def test_an_operators_roll_back_waits_for_an_operator():
    position = go(THIRD, Cause.ROLLED_BACK)
    assert position.share == 0.25
    assert position.waits
    assert go(position, Cause.COOLED) == position
    assert go(position, Cause.RESUMED) == FIRST


def test_a_pause_holds_the_stage_and_nothing_but_a_word_or_a_trip_ends_it():
    paused = go(THIRD, Cause.PAUSED)
    assert go(paused, Cause.PASSED) == paused
    assert go(paused, Cause.RESUMED) == THIRD
    assert go(paused, Cause.PROMOTED) == LAST
    tripped = go(paused, Cause.TRIPPED)
    assert tripped.stage is Stage.ROLLED_BACK
    assert go(tripped, Cause.COOLED) == tripped


@given(st.lists(st.tuples(st.sampled_from(Cause), st.booleans()), max_size=40))
def test_whatever_happens_the_position_makes_sense(story):
    position = Position()
    for cause, good in story:
        before, position = position, advance(position, cause, shares=SHARES, good=good)
        match position.stage:
            case Stage.OFF | Stage.SHADOW:
                assert position.share == 0
            case Stage.CANARY:
                assert position.share == SHARES[position.step]
                assert position.learned
            case Stage.FULL:
                assert position.share == 1
            case Stage.ROLLED_BACK:
                assert position.rollbacks > 0
                assert position.share in (0, 1, *SHARES)
        if position.share > before.share:  # more is answered only after evidence, a word, or a cool-down
            assert cause in (Cause.PASSED, Cause.PROMOTED, Cause.RESUMED, Cause.COOLED)
        if cause in (Cause.TRIPPED, Cause.ROLLED_BACK):
            assert position.share <= before.share
            assert position.stage in (Stage.OFF, Stage.ROLLED_BACK)
