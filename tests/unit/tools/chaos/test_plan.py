"""A plan follows from its seed, and misses nobody."""

from __future__ import annotations

import itertools

from libs.failpoints import Action, Point
from tools.chaos import plan
from tools.chaos.plan import Means


def test_same_seed_gives_the_same_plan() -> None:
    first, again, other = (
        list(itertools.islice(plan.rounds(seed, 4, 1.0), 50)) for seed in (5, 5, 6)
    )

    assert first == again
    assert first != other
    assert plan.rules(5, plan.GATEWAY_POINTS) == plan.rules(5, plan.GATEWAY_POINTS)


def test_every_target_is_killed_and_halted_in_the_long_run() -> None:
    strikes = [
        strike
        for round_ in itertools.islice(plan.rounds(1, 4, 1.0), 2000)
        for strike in round_.strikes
    ]

    assert {(item.target, item.means) for item in strikes} == set(
        itertools.product(plan.TARGETS, Means)
    )


def test_round_strikes_a_target_once_and_pauses() -> None:
    for round_ in itertools.islice(plan.rounds(2, 5, 3.0), 500):
        targets = [strike.target for strike in round_.strikes]
        assert 4 <= len(targets) <= 5
        assert len(set(targets)) == len(targets)
        assert 1.5 <= round_.pause_s <= 4.5
        for strike in round_.strikes:
            assert (strike.stop_s > 0) == (strike.means is Means.STOP)


def test_every_point_kills_once() -> None:
    points = (*plan.GATEWAY_POINTS, *plan.BILLING_POINTS)

    rules = plan.rules(3, points)

    assert [rule.point for rule in rules] == list(points)
    assert set(points) == set(Point)
    assert {rule.action for rule in rules} == {Action.KILL}


def test_points_of_a_start_act_at_once() -> None:
    rules = plan.rules(3, [Point.REPLAY_READ, Point.REPLAY_SETTLED])

    assert [rule.time for rule in rules] == [1, 1]
