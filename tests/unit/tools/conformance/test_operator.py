"""Checks whose subject ends at midnight do not run across it."""

from __future__ import annotations

import asyncio

import pytest

from libs.testing import FakeClock
from tools.conformance.operator import past_midnight

DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("second", "waits_s"),
    [
        pytest.param(DAY_S / 2, 0, id="noon"),
        pytest.param(DAY_S - 90, 0, id="just enough is left"),
        pytest.param(DAY_S - 89, 91, id="too little is left"),
        pytest.param(31 * DAY_S - 1, 3, id="the end of the month"),
        pytest.param(DAY_S, 2, id="midnight, and perhaps not there"),
        pytest.param(DAY_S + 2, 0, id="a new day everywhere"),
    ],
)
async def test_window_does_not_end_under_a_check(second: float, waits_s: float) -> None:
    clock = FakeClock()
    clock.advance(second)

    waiting = asyncio.create_task(past_midnight(clock, 90))
    await asyncio.sleep(0)
    for _ in range(int(waits_s)):
        assert not waiting.done()
        clock.advance(1)
        await asyncio.sleep(0)
    await asyncio.sleep(0)

    assert waiting.done()
