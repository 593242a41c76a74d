"""services/worker/engine_time.py: shares of the engine's time."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.testing import FakeClock
from services.worker.engine_time import EngineTime

MOST = 3


def test_outputs_that_run_together_share_the_time() -> None:
    clock = FakeClock()
    shares = EngineTime(clock, MOST)
    shares.enter(1)
    clock.advance(3.0)
    shares.enter(2)
    clock.advance(4.0)

    assert shares.leave(2) == pytest.approx(2.0)
    clock.advance(1.0)
    assert shares.leave(1) == pytest.approx(3.0 + 2.0 + 1.0)


def test_a_call_to_embed_shares_the_time_with_the_outputs_beside_it() -> None:
    clock = FakeClock()
    shares = EngineTime(clock, MOST)
    shares.enter(1)
    clock.advance(3.0)
    with shares.passing("embed-1") as took:
        clock.advance(4.0)
    clock.advance(1.0)

    assert took.seconds == pytest.approx(2.0)
    assert shares.leave(1) == pytest.approx(3.0 + 2.0 + 1.0)


def test_a_call_to_embed_that_fails_takes_no_more_of_the_time() -> None:
    clock = FakeClock()
    shares = EngineTime(clock, MOST)
    shares.enter(1)
    with contextlib.suppress(ValueError), shares.passing("embed-1"):
        clock.advance(2.0)
        raise ValueError
    clock.advance(5.0)

    assert shares.leave(1) == pytest.approx(1.0 + 5.0)


def test_a_time_without_work_is_nobodys() -> None:
    clock = FakeClock()
    shares = EngineTime(clock, MOST)
    shares.enter(1)
    clock.advance(1.0)
    shares.leave(1)
    clock.advance(100.0)
    shares.enter(2)
    clock.advance(2.0)

    assert shares.leave(2) == pytest.approx(2.0)


def test_who_waits_for_the_batch_takes_no_time() -> None:
    clock = FakeClock()
    shares = EngineTime(clock, 1)
    shares.enter(1)
    shares.enter(2)
    clock.advance(5.0)

    assert shares.leave(1) == pytest.approx(5.0)
    clock.advance(2.0)
    assert shares.leave(2) == pytest.approx(2.0)


def test_who_gives_up_waiting_took_nothing_and_leaves_once() -> None:
    clock = FakeClock()
    shares = EngineTime(clock, 1)
    shares.enter(1)
    shares.enter(2)
    clock.advance(5.0)

    assert shares.leave(2) == 0.0
    assert shares.leave(1) == pytest.approx(5.0)
    assert shares.leave(1) == 0.0


@given(st.lists(st.tuples(st.integers(1, 8), st.floats(0, 10)), max_size=60))
def test_shares_sum_to_the_time_in_which_there_was_work(moves: list[tuple[int, float]]) -> None:
    clock = FakeClock()
    shares = EngineTime(clock, MOST)
    inside: set[int] = set()
    busy_s = taken_s = 0.0
    for lane, seconds in moves:
        if lane in inside:
            inside.remove(lane)
            taken_s += shares.leave(lane)
        else:
            inside.add(lane)
            shares.enter(lane)
        clock.advance(seconds)
        busy_s += seconds if inside else 0.0
    for lane in inside:
        taken_s += shares.leave(lane)

    assert taken_s == pytest.approx(busy_s)
