"""Credit at admission: exactly what it pays for, from the purse that a spend limit names."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from libs.errors import FailedPrecondition, MaasError, Reason, ResourceExhausted
from services.gateway.limits import Limit, Limits, Rate
from services.gateway.slices import Purse
from tests.integration.services.gateway.client import Wish, refusal
from tests.integration.services.gateway.harness import World, gateway
from tests.integration.services.gateway.neighbours import ALICE, BOB, NANOS_PER_TOKEN, Caller
from tests.integration.services.gateway.richly import Rich, Spec

RACERS = 256
TOKENS = [1, 2, 3, 4]
MOST = 6
HOLD = (len(TOKENS) + MOST) * NANOS_PER_TOKEN


def token_ids(spec: Spec) -> None:
    """Asks with token ids, whose number is known to the token."""
    spec.tokens.ids.extend(TOKENS)


async def accept_all(world: World) -> None:
    while True:
        await world.accepted(input_tokens=len(TOKENS))


@pytest.mark.parametrize("slice_nanos", [1, 7 * HOLD // 2, 10**9])
async def test_racers_are_admitted_as_far_as_the_credit_goes(
    tmp_path: Path, slice_nanos: int
) -> None:
    affordable = 23
    async with gateway(
        tmp_path,
        available=affordable * HOLD,
        generations_max=RACERS,
        slice_nanos=slice_nanos,
    ) as world:
        accepting = asyncio.create_task(accept_all(world))
        clients = [world.dial() for _ in range(4)]
        wish = Rich(change=token_ids, most=MOST)
        streams = [clients[number % 4].stream(wish) for number in range(RACERS)]

        ends = await asyncio.gather(
            *(stream.until(0) for stream in streams), return_exceptions=True
        )

        admitted = [end for end in ends if not isinstance(end, BaseException)]
        refused = [end for end in ends if isinstance(end, FailedPrecondition)]
        assert len(admitted) == affordable
        assert len(refused) == RACERS - affordable
        assert {error.reason for error in refused} == {Reason.INSUFFICIENT_CREDIT}
        assert world.billing.available == 0
        accepting.cancel()
        for client in clients:
            await client.drop()
        # All credit but that for the prompts of those who left is there again.
        await world.settlements(affordable)
        await world.book.close_all()
        prompts = affordable * len(TOKENS) * NANOS_PER_TOKEN
        assert world.billing.available == affordable * HOLD - prompts


def spend(scope: str, *, is_deleted: bool = False) -> Limit:
    """A spend limit of organization "o"."""
    return Limit(
        name=f"limits/{scope.replace('/', '-')}",
        account="accounts/o",
        scope=scope,
        rate=None,
        is_deleted=is_deleted,
    )


def change(limits: Limits, *changes: Limit) -> None:
    """Tells the gateway of a change, as billing's watch would."""
    limits.apply(changes, is_snapshot=False, is_complete=False)


async def purse_of(world: World, caller: Caller) -> Purse:
    """Returns the purse that a request of a caller has spent from."""
    known = len(world.billing.acquired)
    client = world.dial(caller)
    stream = client.stream()
    await world.accepted()
    await stream.until(0)
    await client.drop()
    await world.settlements(len(world.billing.settled) + 1)
    await world.book.close_all()
    ((purse, _, _),) = world.billing.acquired[known:]
    return purse


async def test_the_purse_is_the_smallest_that_a_spend_limit_names(tmp_path: Path) -> None:
    alice = f"apiKeys/{ALICE.key_id}"
    async with gateway(tmp_path) as world:
        assert await purse_of(world, ALICE) == Purse("accounts/o")
        change(world.limits, spend("accounts/o"), spend(alice))
        assert await purse_of(world, ALICE) == Purse(
            "accounts/o", "projects/p", alice, is_limited=True
        )
        assert await purse_of(world, BOB) == Purse("accounts/o", is_limited=True)
        change(world.limits, spend("projects/p"), spend(alice, is_deleted=True))
        for caller in (ALICE, BOB):
            assert await purse_of(world, caller) == Purse(
                "accounts/o", "projects/p", is_limited=True
            )
        # Another account's limit of that name is none of theirs, and a new listing is the whole.
        foreign = Limit(name="limits/x", account="accounts/o2", scope="projects/p", rate=None)
        world.limits.begin()
        world.limits.apply([foreign], is_snapshot=True, is_complete=False)
        assert world.limits.purse_of("accounts/o", "projects/p", alice).project == "projects/p"
        world.limits.apply((), is_snapshot=True, is_complete=True)
        assert await purse_of(world, ALICE) == Purse("accounts/o")


def test_a_rate_limit_makes_no_purse() -> None:
    limits = Limits()
    rate = Limit(name="limits/r", account="accounts/o", scope="projects/p", rate=Rate(requests=1))
    limits.apply([rate], is_snapshot=True, is_complete=True)

    assert limits.purse_of("accounts/o", "projects/p", "apiKeys/k") == Purse("accounts/o")


async def test_a_spend_limit_that_is_reached_is_told_with_the_end_of_its_window(
    tmp_path: Path,
) -> None:
    metadata = {
        "limit": "limits/l",
        "requiredNanos": "10",
        "availableNanos": "3",
        "currency": "USD",
    }
    async with gateway(tmp_path) as world:
        world.billing.refusal = ResourceExhausted(
            "limits/l has no room",
            reason=Reason.SPEND_LIMIT_REACHED,
            metadata=metadata,
            retry_after_s=77.0,
        )

        unary = await refusal(world.client.unary(Wish()))
        stream = await world.client.stream().failure()

        for error in (unary, stream):
            assert isinstance(error, MaasError)
            assert (error.reason, error.metadata) == (Reason.SPEND_LIMIT_REACHED, metadata)
            assert error.retry_after_s == 77.0
        await world.no_settlement()
