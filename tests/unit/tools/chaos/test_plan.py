"""A plan follows from its seed, and misses nobody."""

from __future__ import annotations

import itertools

from libs.failpoints import Action, Point
from tools.chaos import plan
from tools.chaos.network import LASTING, Trouble
from tools.chaos.plan import Means

GATEWAYS = 3


def drawn(seed: int, count: int, *, strikes_max: int = 4, pause_s: float = 1.0) -> list[plan.Round]:
    ground = plan.Ground(
        targets=plan.targets(GATEWAYS),
        links=list(plan.links(GATEWAYS)),
        strikes_max=strikes_max,
        pause_s=pause_s,
    )
    return list(itertools.islice(plan.rounds(seed, ground), count))


def test_same_seed_gives_the_same_plan() -> None:
    assert drawn(5, 50) == drawn(5, 50) != drawn(6, 50)
    first, again = (plan.rules(5, "gateway", plan.GATEWAY_POINTS) for _ in range(2))
    assert first == again


def test_every_target_is_killed_and_halted_in_the_long_run() -> None:
    strikes = [strike for round_ in drawn(1, 2000) for strike in round_.strikes]

    assert {(item.target, item.means) for item in strikes} == set(
        itertools.product(plan.targets(GATEWAYS), Means)
    )
    long = {item.target for item in strikes if item.stop_s > plan.LEASE_S + plan.GRACE_S}
    assert long == set(plan.targets(GATEWAYS))


def test_every_link_has_every_trouble_in_the_long_run() -> None:
    jams = [jam for round_ in drawn(1, 2000) for jam in round_.jams]

    assert {(jam.link, jam.trouble) for jam in jams} == set(
        itertools.product(plan.links(GATEWAYS), Trouble)
    )


def test_round_strikes_a_target_once_and_pauses() -> None:
    for round_ in drawn(2, 500, strikes_max=5, pause_s=3.0):
        targets = [strike.target for strike in round_.strikes]
        assert 4 <= len(targets) <= 5
        assert len(set(targets)) == len(targets)
        assert 1.5 <= round_.pause_s <= 4.5
        for strike in round_.strikes:
            assert (strike.stop_s > 0) == (strike.means is Means.STOP)
        for jam in round_.jams:
            assert (jam.seconds > 0) == (jam.trouble in LASTING)


def test_links_lead_to_processes_that_are_there() -> None:
    assert set(plan.links(GATEWAYS).values()) <= set(plan.targets(GATEWAYS))


def test_without_links_nothing_is_jammed() -> None:
    ground = plan.Ground(targets=plan.targets(1), links=(), strikes_max=4, pause_s=1.0)

    assert not any(round_.jams for round_ in itertools.islice(plan.rounds(1, ground), 50))


def test_every_point_kills_once() -> None:
    points = (*plan.GATEWAY_POINTS, *plan.BILLING_POINTS)

    rules = plan.rules(3, "gateway", points)

    assert [rule.point for rule in rules] == list(points)
    assert set(points) == set(Point)
    assert {rule.action for rule in rules} == {Action.KILL}


def test_points_of_a_start_act_at_once() -> None:
    rules = plan.rules(3, "gateway-2", [Point.REPLAY_READ, Point.REPLAY_SETTLED])

    assert [rule.time for rule in rules] == [1, 1]
