"""Requests with a request_id: one generation and one charge, however often they come."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest

from libs.errors import AlreadyExists, InvalidArgument, Reason, Unavailable
from libs.testing import eventually
from services.gateway.domain import EndCause
from tests.integration.services.gateway.client import (
    CONTINUE,
    Client,
    Reading,
    Wish,
    answer,
    refusal,
)
from tests.integration.services.gateway.harness import World, gateway
from tests.integration.services.gateway.neighbours import BOB, EVE, NANOS_PER_TOKEN

KEYED = Wish(request_id="r-1")


async def begun(world: World, wish: Wish = KEYED) -> tuple[Reading, int]:
    """Starts a generation and reads its first token; returns its stream and lane."""
    stream = world.client.stream(wish)
    execution = await world.accepted()
    world.workers[0].say(execution.lane, "a")
    return await stream.until(1), execution.lane


async def finished(world: World, wish: Wish = KEYED) -> Reading:
    """Runs a generation of two tokens to its end."""
    stream, lane = await begun(world, wish)
    world.workers[0].say(lane, "b", first=1)
    world.workers[0].end(lane)
    return await stream.rest()


async def test_a_repeat_joins_what_is_running(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, world.dial(BOB) as bob:
        first, lane = await begun(world)
        repeat = await bob.stream(KEYED).until(1)
        call = bob.unary(KEYED)
        world.workers[0].say(lane, "b", first=1)
        world.workers[0].end(lane)

        await first.rest()
        await repeat.rest()
        generation = await answer(call)

        assert first.text == repeat.text == generation.outputs[0].text == "ab"
        assert first.generation_id == repeat.generation_id == generation.generation_id
        assert first.sequences == repeat.sequences
        assert not first.frames[0].started.replayed
        assert repeat.frames[0].started.replayed
        assert (await world.only_settlement()).owed == (3 + 2) * NANOS_PER_TOKEN
        assert world.workers[0].requests.empty()


async def test_a_repeat_of_what_has_ended_replays_it(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        first = await finished(world)
        await world.only_settlement()

        repeat = await world.client.stream(KEYED).rest()
        generation = await answer(world.client.unary(KEYED))

        assert repeat.text == generation.outputs[0].text == "ab"
        assert repeat.generation_id == generation.generation_id == first.generation_id
        assert repeat.frames[0].started.replayed
        assert repeat.last == first.last
        assert generation.charge.nanos == first.last.finished.charge.nanos
        await world.only_settlement()
        assert world.workers[0].requests.empty()


async def test_a_stream_repeats_a_unary_call(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        call = world.client.unary(KEYED)
        execution = await world.accepted()
        world.workers[0].say(execution.lane, "a", "b")
        world.workers[0].end(execution.lane)
        generation = await answer(call)

        repeat = await world.client.stream(KEYED).rest()

        assert repeat.generation_id == generation.generation_id
        assert repeat.text == generation.outputs[0].text == "ab"
        await world.only_settlement()


async def test_delivery_is_no_part_of_what_was_asked_for(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        first = await finished(world)

        other = dataclasses.replace(KEYED, on_disconnect=CONTINUE, interval_s=0.05)
        repeat = await world.client.stream(other).rest()

        assert repeat.generation_id == first.generation_id


@pytest.mark.parametrize("when", ["running", "ended", "forgotten"])
async def test_another_spec_with_the_same_key_is_a_mistake(tmp_path: Path, when: str) -> None:
    window_s = 0.05 if when == "forgotten" else 60.0
    async with gateway(tmp_path, replay_window_s=window_s) as world:
        stream, lane = await begun(world)
        if when != "running":
            world.workers[0].end(lane)
            await stream.rest()
            await world.only_settlement()
        if when == "forgotten":
            await eventually(lambda: world.budget.used == 0)
        refused = world.client.unary(dataclasses.replace(KEYED, text="another"))
        if when == "forgotten":
            await world.accepted()
        error = await refusal(refused)

        assert isinstance(error, InvalidArgument)
        assert error.reason is Reason.REQUEST_ID_REUSED
        assert error.metadata == {"requestId": "r-1"}
        stream.call.cancel()


async def test_a_key_belongs_to_its_project(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, world.dial(EVE) as eve:
        mine = await finished(world)
        theirs = eve.stream(dataclasses.replace(KEYED, text="another"))
        execution = await world.accepted()
        world.workers[0].end(execution.lane)
        await theirs.rest()

        assert theirs.generation_id != mine.generation_id
        assert not theirs.frames[0].started.replayed
        accounts = [item.opening.account for item in await world.settlements(2)]
        assert accounts == ["accounts/o", "accounts/o2"]


async def test_after_the_window_a_repeat_is_told_what_was_charged(tmp_path: Path) -> None:
    async with gateway(tmp_path, replay_window_s=0.05) as world:
        first = await finished(world)
        await world.only_settlement()
        await eventually(lambda: world.budget.used == 0)

        call = world.client.unary(KEYED)
        execution = await world.accepted()
        error = await refusal(call)

        assert isinstance(error, AlreadyExists)
        assert error.reason is Reason.GENERATION_SETTLED
        assert error.metadata == {
            "requestId": "r-1",
            "generationId": first.generation_id,
            "inputTokens": "3",
            "outputTokens": "2",
            "chargeNanos": str(5 * NANOS_PER_TOKEN),
            "currency": "USD",
        }
        assert await world.workers[0].next_abort() == execution.lane
        await world.only_settlement()


async def test_what_is_forgotten_and_not_yet_settled_is_not_run_again(tmp_path: Path) -> None:
    """Billing does not know of it yet; the queue of settlements does."""
    async with gateway(tmp_path, replay_window_s=0.05) as world:
        first = await finished(world)
        await eventually(lambda: world.budget.used == 0)
        assert world.settler.queued == 1

        call = world.client.unary(KEYED)
        await world.accepted()
        error = await refusal(call)

        assert error.reason is Reason.GENERATION_SETTLED
        assert error.metadata["generationId"] == first.generation_id
        assert error.metadata["chargeNanos"] == str(5 * NANOS_PER_TOKEN)
        await world.only_settlement()


async def test_what_ended_by_our_fault_runs_anew(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream, lane = await begun(world)
        world.workers[0].fail(lane, 13, "ENGINE_FAILURE")
        await stream.failure()

        repeat = await finished(world)

        assert repeat.generation_id != stream.generation_id
        assert not repeat.frames[0].started.replayed
        causes = [item.closing.cause for item in await world.settlements(2)]
        assert causes == [EndCause.ENGINE_FAILURE, EndCause.COMPLETED]
        # The failed one can still be read, by its own name.
        again = world.client.resume(stream.generation_id)
        assert (await again.failure()).reason is Reason.ENGINE_FAILURE
        assert again.text == "a"


async def test_what_the_client_stopped_is_charged_and_so_not_run_anew(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream, _ = await begun(world)
        await world.client.cancel(stream.generation_id)
        await stream.failure()

        repeat = world.client.stream(KEYED)
        error = await repeat.failure()

        assert error.reason is Reason.GENERATION_CANCELLED
        assert repeat.text == "a"
        assert (await world.only_settlement()).owed == (3 + 1) * NANOS_PER_TOKEN


async def test_two_first_requests_at_once_start_one_execution(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world, world.dial(BOB) as bob:
        calls = [client.unary(KEYED) for client in (world.client, bob) for _ in range(3)]
        execution = await world.accepted()
        world.workers[0].say(execution.lane, "a")
        world.workers[0].end(execution.lane)

        generations = [await answer(call) for call in calls]

        assert len({generation.generation_id for generation in generations}) == 1
        await world.only_settlement()
        assert world.workers[0].requests.empty()
        assert world.billing.lookups == ["r-1"]


async def test_a_refusal_leaves_the_key_free_and_reaches_everyone(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        calls = [world.client.unary(KEYED) for _ in range(2)]
        execution = await world.workers[0].next_start()
        await waiting(world, 2)
        world.workers[0].fail(execution.lane, 3, "CONTEXT_LENGTH_EXCEEDED")

        errors = [await refusal(call) for call in calls]
        after = await finished(world)

        assert [error.reason for error in errors] == [Reason.CONTEXT_LENGTH_EXCEEDED] * 2
        assert after.text == "ab"
        await world.only_settlement()


async def waiting(world: World, count: int) -> None:
    """Waits until that many calls wait for the one admission there is."""
    entries = world.generations._requests._by_key
    await eventually(lambda: [entry.waiting for entry in entries.values()] == [count])


async def test_the_only_caller_takes_its_admission_along(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        call = world.client.stream(KEYED)
        execution = await worker.next_start()

        call.call.cancel()

        assert await worker.next_abort() == execution.lane
        await world.no_settlement()
        assert (await finished(world)).text == "ab"


async def test_an_admission_stays_while_somebody_waits_for_it(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        first = world.client.stream(KEYED)
        execution = await worker.next_start()
        second = asyncio.create_task(world.client.stream(KEYED).rest())
        await waiting(world, 2)

        first.call.cancel()
        await waiting(world, 1)
        worker.accept(execution.lane)
        worker.say(execution.lane, "a")
        worker.end(execution.lane)

        assert (await second).text == "a"
        assert (await world.only_settlement()).closing.cause is EndCause.COMPLETED


async def test_who_comes_as_an_admission_is_given_up_starts_another(tmp_path: Path) -> None:
    """In the same turn of the event loop: the one that ends must not take the new one along."""
    async with gateway(tmp_path) as world, world.dial() as client:
        (worker,) = world.workers
        requests = world.generations._requests
        first = world.client.stream(KEYED)
        given_up = await worker.next_start()
        (entry,) = requests._by_key.values()
        stopping = entry.stop
        second: list[asyncio.Task[Reading]] = []

        def stop() -> None:
            second.append(asyncio.create_task(finished_with(client, world)))
            assert not requests._by_key
            assert stopping is not None
            stopping()

        entry.stop = stop
        first.call.cancel()
        assert await worker.next_abort() == given_up.lane

        assert (await second[0]).text == "ab"
        await world.only_settlement()


async def finished_with(client: Client, world: World) -> Reading:
    """Runs a generation of two tokens for another client."""
    stream = client.stream(KEYED)
    execution = await world.accepted()
    world.workers[0].say(execution.lane, "a", "b")
    world.workers[0].end(execution.lane)
    return await stream.rest()


async def test_the_first_request_says_whether_its_admission_goes_on_alone(
    tmp_path: Path,
) -> None:
    detached = dataclasses.replace(KEYED, on_disconnect=CONTINUE)
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        first = world.client.stream(detached)
        execution = await worker.next_start()
        second = world.client.stream(KEYED)
        await waiting(world, 2)

        first.call.cancel()
        await waiting(world, 1)
        second.call.cancel()
        await waiting(world, 0)
        worker.accept(execution.lane)
        worker.end(execution.lane)

        assert (await world.only_settlement()).closing.cause is EndCause.COMPLETED


async def test_without_billing_a_key_that_is_not_known_here_is_refused(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        (worker,) = world.workers
        known = await finished(world, dataclasses.replace(KEYED, request_id="r-0"))
        world.billing.is_away = True
        plain = world.client.stream()
        execution = await world.accepted()
        worker.end(execution.lane)
        await plain.rest()
        call = world.client.unary(KEYED)
        execution = await world.accepted()

        error = await refusal(call)

        assert isinstance(error, Unavailable)
        assert error.metadata == {"dependency": "billing"}
        assert await worker.next_abort() == execution.lane
        repeat = await world.client.stream(dataclasses.replace(KEYED, request_id="r-0")).rest()
        assert repeat.text == known.text
        world.billing.is_away = False
        ids = {item.opening.generation_id for item in await world.settlements(2)}
        assert ids == {known.generation_id, plain.generation_id}
