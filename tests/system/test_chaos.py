"""A short campaign: a whole suite is killed under load again and again, and every token audited."""

from __future__ import annotations

import asyncio

from tools.chaos import campaign, table
from tools.chaos.audit import End
from tools.chaos.options import parse
from tools.chaos.place import own_suite

KILLS = 50
SEED = 4


def test_every_token_is_charged_once_whatever_is_killed() -> None:
    """What is longer is `make chaos`; the seed gives the same strikes, not the same moments."""
    flags = f"--seconds 1 --kills {KILLS} --strikes 9 --pause 0.5 --seed {SEED} --no-points"
    said: list[str] = []

    with own_suite() as place:
        options = parse(flags.split())
        outcome = asyncio.run(campaign.run(place, options, said.append))

    shown = "\n".join(table.lines(outcome))
    assert outcome.faults == [], shown
    assert outcome.kills >= KILLS, shown
    # Else there was nothing to lose.
    assert outcome.audit.ends[End.CLEAN] > 0, shown
    assert outcome.audit.interrupted > 0, shown
