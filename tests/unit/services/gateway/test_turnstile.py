"""How many calls pass at a time."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from libs.errors import ResourceExhausted, Unavailable
from services.gateway.turnstile import Turnstile


def test_a_project_gets_a_quarter_and_all_together_no_more_than_there_is() -> None:
    turnstile = Turnstile("calls", 8)
    with ExitStack() as stack:
        for project in ("a", "a", "b", "b", "c", "c", "d"):
            stack.enter_context(turnstile.passing(project))
        with pytest.raises(ResourceExhausted, match="the project has 2 calls") as of_project:
            stack.enter_context(turnstile.passing("a"))
        stack.enter_context(turnstile.passing("e"))
        with pytest.raises(ResourceExhausted, match="too many calls") as of_all:
            stack.enter_context(turnstile.passing("f"))
        assert turnstile.inside == 8

    assert turnstile.inside == 0
    assert of_project.value.retry_after_s == of_all.value.retry_after_s == 1.0


def test_however_few_there_may_be_a_project_gets_one() -> None:
    turnstile = Turnstile("calls", 1)
    with turnstile.passing("a"), pytest.raises(ResourceExhausted), turnstile.passing("b"):
        pass
    with turnstile.passing("b"):
        assert turnstile.inside == 1


def test_a_call_that_fails_leaves_too() -> None:
    turnstile = Turnstile("calls", 4)
    with pytest.raises(KeyError), turnstile.passing("a"):
        raise KeyError

    assert turnstile.inside == 0


async def test_a_drain_lets_nobody_in_and_waits_for_those_inside() -> None:
    turnstile = Turnstile("calls", 4)
    with ExitStack() as stack:
        stack.enter_context(turnstile.passing("a"))
        draining = asyncio.create_task(turnstile.drain())
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            stack.enter_context(turnstile.passing("a"))
        assert not draining.done()
    async with asyncio.timeout(5):
        await draining
