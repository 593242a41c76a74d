"""What goes on with another worker when its own is lost, and what ends instead, free of charge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from libs.errors import Reason
from services.gateway.domain import EndCause
from tests.integration.services.gateway.client import answer
from tests.integration.services.gateway.harness import gateway
from tests.integration.services.gateway.neighbours import NANOS_PER_TOKEN
from tests.integration.services.gateway.richly import (
    Rich,
    Spec,
    chat,
    constrained,
    lanes_of,
    score,
    score_prompt,
    scored,
    scores_of,
    several,
    tell,
    text_of,
    thought,
)


def prompted(spec: Spec) -> None:
    scored(spec)
    spec.output.return_prompt_logprobs = True


def conversation(spec: Spec) -> None:
    chat(spec)
    spec.ClearField("tools")


async def test_scored_text_goes_on_behind_what_was_sent(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        stream = world.client.stream(Rich(change=prompted, with_ids=True))
        lane = (await world.accepted()).lane
        score_prompt(first, lane, 0, 8, 9)
        score(first, lane, "ab", 1, 2)
        await stream.until(2)

        first.break_stream()
        after = await world.accepted(second)
        # It computes the prompt anew, and says so.
        score_prompt(second, after.lane, 0, 8, 9)
        score(second, after.lane, "c", 3)
        second.end(after.lane)
        await stream.rest()

        assert list(after.continue_token_ids) == [1, 2]
        assert text_of(stream) == "abc"
        assert stream.token_ids == [1, 2, 3]
        assert stream.kinds.count("prompt_scores") == 1
        assert stream.frames[1].prompt_scores.scores == scores_of(8, 9)
        assert (await world.only_settlement()).owed == (3 + 3) * NANOS_PER_TOKEN


async def test_a_conversation_goes_on_while_nothing_of_it_was_split(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        stream = world.client.stream(Rich(change=conversation))
        first.say((await world.accepted()).lane, "a", "b")
        await stream.until(2)

        first.break_stream()
        after = await world.accepted(second)
        second.say(after.lane, "c", first=2)
        second.end(after.lane)
        await stream.rest()

        assert list(after.continue_token_ids) == [0, 1]
        assert text_of(stream) == "abc"


@pytest.mark.parametrize("change", [several(2), chat, constrained], ids=lambda f: f.__name__)
async def test_what_token_ids_do_not_bring_back_ends_clearly_and_is_free(
    tmp_path: Path, change: Callable[[Spec], object]
) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        stream = world.client.stream(Rich(change=change))
        world.workers[0].say((await world.accepted()).lane, "a")
        await stream.until(1)

        world.workers[0].break_stream()

        assert (await stream.failure()).reason is Reason.WORKER_LOST
        assert world.workers[1].requests.empty()
        settled = await world.only_settlement()
        assert (settled.closing.cause, settled.owed) == (EndCause.WORKER_LOST, 0)
        assert settled.closing.output_tokens == 1


async def test_reasoning_is_not_gone_on_with(tmp_path: Path) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        stream = world.client.stream(Rich(change=conversation))
        lane = (await world.accepted()).lane
        tell(world.workers[0], lane, thought("hm"), reasoning_tokens=1)
        world.workers[0].say(lane, "so")
        await stream.until(2)

        world.workers[0].break_stream()

        assert (await stream.failure()).reason is Reason.WORKER_LOST
        assert world.workers[1].requests.empty()


@pytest.mark.parametrize("change", [several(2), chat, constrained], ids=lambda f: f.__name__)
async def test_what_nobody_has_seen_begins_anew(
    tmp_path: Path, change: Callable[[Spec], object]
) -> None:
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        call = world.client.unary(Rich(change=change))
        first.say(lanes_of(await world.accepted())[-1], "lost")

        first.break_stream()
        after = await world.accepted(second)
        for lane in lanes_of(after):
            second.say(lane, "a", "b")
            second.end(lane)
        whole = await answer(call)

        assert not after.continue_token_ids
        assert {output.text for output in whole.outputs} == {"ab"}
        tokens = 2 * len(whole.outputs)
        assert whole.usage.output_tokens == tokens
        assert (await world.only_settlement()).owed == (3 + tokens) * NANOS_PER_TOKEN


async def test_a_worker_that_drains_loses_all_outputs(tmp_path: Path) -> None:
    """One output is refused to go on; the others of its execution are stopped."""
    async with gateway(tmp_path, worker_count=2) as world:
        first, second = world.workers
        stream = world.client.stream(Rich(change=several(2)))
        lanes = lanes_of(await world.accepted())
        await stream.until(0)

        first.fail(lanes[0], 14, "WORKER_DRAINING")
        after = await world.accepted(second)
        for lane in lanes_of(after):
            second.say(lane, "a")
            second.end(lane)
        await stream.rest()

        assert await first.next_abort() == lanes[1]
        assert [text_of(stream, index) for index in range(2)] == ["a", "a"]
        await world.only_settlement()
