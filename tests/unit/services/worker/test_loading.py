"""How long an engine may be silent, from what is configured and what was measured."""

from __future__ import annotations

import asyncio
import signal

import pytest

from services.worker.config import WorkerSection
from services.worker.loading import patience_of, unless_stopped


def section(**fields: object) -> WorkerSection:
    values = {"name": "w", "endpoint": "h:1", "model_version": "models/m/versions/1"}
    return WorkerSection.model_validate({**values, "engine": "sim", **fields})


def test_a_fast_engine_gets_what_is_configured() -> None:
    got = patience_of(section(canary_every="1s", silent_within="3s", abort_within="7s"), 0.1)

    assert (got.canary_after_s, got.silent_within_s, got.abort_within_s) == (1.0, 3.0, 7.0)


def test_the_defaults_notice_a_hung_engine_within_ten_seconds() -> None:
    assert patience_of(section(), 0.1).silent_within_s < 9.5


def test_a_slow_engine_may_be_silent_for_longer_than_its_longest_step() -> None:
    """A canary may come just before the step begins: only the time behind it is the step's."""
    got = patience_of(section(), 12.0)

    assert got.silent_within_s - got.canary_after_s == 36.0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("turns", range(4))
async def test_a_signal_at_the_very_end_of_loading_is_not_lost(
    number: signal.Signals, turns: int
) -> None:
    """Until the server waits for signals, which is some time after that."""
    heard: list[str] = []

    async def work() -> str:
        if turns == 0:
            signal.raise_signal(number)
        return "loaded"

    try:
        found = await unless_stopped(
            work(), lambda: heard.append("while it loaded"), lambda: heard.append("afterwards")
        )
        for turn in range(1, 4):
            if turn == turns:
                signal.raise_signal(number)
            await asyncio.sleep(0.001)
    finally:
        for one in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(one)

    assert heard == (["while it loaded"] if found is None else ["afterwards"])
    assert turns == 0 or found == "loaded"


async def test_a_signal_ends_what_loads() -> None:
    heard: list[str] = []

    async def work() -> str:
        signal.raise_signal(signal.SIGTERM)
        try:
            await asyncio.Event().wait()
        finally:
            heard.append("ended")
        return "loaded"

    assert await unless_stopped(work(), lambda: heard.append("stopped"), heard.clear) is None
    assert heard == ["stopped", "ended"]
