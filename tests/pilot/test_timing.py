"""Time under traffic, whatever the clock does."""

import itertools

import pytest

from normadapt.pilot.timing import TrafficTime


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        if isinstance(self.now, Exception):
            raise self.now
        return self.now


def test_steps_add_up_and_gaps_do_not():
    clock = Clock()
    time = TrafficTime(clock, idle=60.0)
    assert time.tick() == 0
    for now in (1010.0, 1070.0, 1131.0, 1140.0):
        clock.now = now
        time.tick()
    assert time.counted == 79  # 10 + 60, then a gap of 61, then 9
    clock.now = 1200.0
    assert time.gap() == 60
    time.restart()
    assert time.counted == 0


def test_a_clock_that_goes_back_counts_for_nothing_and_is_told_once():
    clock = Clock()
    time = TrafficTime(clock, idle=60.0)
    troubles = []
    for now in (1000.0, 1010.0, 500.0, 510.0, 520.0):
        clock.now = now
        time.tick()
        troubles.append(time.trouble)
    assert time.counted == 30
    assert [trouble is None for trouble in troubles] == [True, True, False, True, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), OSError("no clock"), None])
def test_a_clock_that_fails_stands_still(bad):
    clock = Clock()
    time = TrafficTime(clock, idle=60.0)
    time.tick()
    told = 0
    for now in itertools.chain([bad] * 3, [1005.0, 1010.0]):
        clock.now = now
        time.tick()
        told += time.trouble is not None
    assert time.counted == 10
    assert told == 1
    assert time.gap() == 0


def test_another_process_goes_on():
    clock = Clock()
    time = TrafficTime(clock, idle=60.0)
    time.tick()
    clock.now = 1020.0
    time.tick()
    other = TrafficTime(clock, idle=60.0)
    other.from_dict(time.to_dict())
    clock.now = 1050.0
    assert other.tick() == 30
    assert other.counted == 50
