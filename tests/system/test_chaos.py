"""A short campaign: a whole suite is killed under load again and again, and every token audited."""

from __future__ import annotations

import asyncio

from tools.chaos import campaign, plan, table
from tools.chaos.audit import End
from tools.chaos.options import parse
from tools.chaos.place import own_suite

KILLS = 50
GATEWAYS = 2
SEED = 4


def test_every_token_is_charged_once_whatever_is_killed() -> None:
    """What is longer is `make chaos`; the seed gives the same strikes, not the same moments."""
    flags = f"--seconds 1 --kills {KILLS} --strikes 9 --pause 0.5 --seed {SEED} --no-points"
    options = parse([*flags.split(), "--gateways", str(GATEWAYS)])
    said: list[str] = []

    with own_suite(options.gateways, has_network=options.has_network) as place:
        outcome = asyncio.run(campaign.run(place, options, said.append))

    shown = "\n".join(table.lines(outcome))
    assert outcome.faults == [], shown
    assert outcome.kills >= KILLS, shown
    # Else there was nothing to lose.
    assert outcome.audit.ends[End.CLEAN] > 0, shown
    assert outcome.audit.interrupted > 0, shown
    assert {item.gateway for item in outcome.attempts if item.end is End.CLEAN} == set(
        plan.gateways(GATEWAYS)
    ), shown
    assert outcome.striker.jams, shown
