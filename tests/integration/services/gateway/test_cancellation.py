"""A caller may go at every moment of an admission: then nothing of it stays taken."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sized
from pathlib import Path
from typing import ParamSpec, TypeVar

from maas.inference.v1.embedding_service_pb2 import EmbedResponse

from libs.auth import Principal, Role
from libs.errors import MaasError, unavailable
from libs.rpc import Call
from libs.rpc.policy import policy_of
from services.gateway.__main__ import EMBEDDINGS
from services.gateway.admission import Asked
from services.gateway.domain import EndCause
from services.gateway.limits import Limit, Rate, RateLimit
from services.gateway.quotas import Metric
from services.gateway.running import Generation
from tests.integration.services.gateway.client import Wish
from tests.integration.services.gateway.client_unary import embed_request
from tests.integration.services.gateway.harness import World, gateway
from tests.integration.services.gateway.neighbours import ALICE
from tests.integration.services.gateway.neighbours_unary import abilities

AVAILABLE = 10**9
# Of the event loop: at each of so many first ones somebody goes, and then until some were in time.
TURNS = 60
IN_TIME = 3
TURNS_MAX = 10_000
INPUT_TOKENS = 3
NAMES = ("limits/account", "limits/project", "limits/key")
SCOPES = ("accounts/o", "projects/p", f"apiKeys/{ALICE.key_id}")
RATE = Rate(requests=10_000, input_tokens=100_000, output_tokens=100_000, generations=1)

PRINCIPAL = Principal(
    key_id=ALICE.key_id, role=Role.TENANT, project=ALICE.project, organization=ALICE.organization
)

P = ParamSpec("P")
T = TypeVar("T")


def suspending(
    ask: Callable[P, Awaitable[T]], *, may_be_lost: bool = False
) -> Callable[P, Awaitable[T]]:
    """Makes a question one that takes its time, as over a network; and its answer, if asked to."""

    async def asked(*args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(2):
            await asyncio.sleep(0)
        answer = await ask(*args, **kwargs)
        if may_be_lost:
            await asyncio.sleep(0)
        return answer

    return asked


def limited(world: World) -> None:
    """Limits everything of Alice's, thrice, by rates and in money; no time passes for quota."""
    quota = world.billing.quota
    quota.now_s = lambda: 0.0
    for name, scope in zip(NAMES, SCOPES, strict=True):
        rate = Limit(name=name, account="accounts/o", scope=scope, rate=RATE)
        spend = Limit(name=f"{name}.spend", account="accounts/o", scope=scope, rate=None)
        world.limits.apply([rate, spend], is_snapshot=False, is_complete=False)
        quota.add(RateLimit(name, RATE))
    world.places._hold = suspending(quota.hold, may_be_lost=True)
    # Quota whose answer is lost flows back by itself; no time passes here.
    world.quotas._take_quota = suspending(quota.take)
    world.book._acquire = suspending(world.billing.acquire, may_be_lost=True)
    for placer in (world.generations._admission._placer, world.embeddings._placer):
        placer._acquire = suspending(world.scheduler.acquire)


def asked() -> Asked:
    return Asked(
        spec=Wish(text="hello", most=100).spec(),
        request_id="",
        request_sha256="",
        lives_on=False,
        is_unary=False,
        principal=PRINCIPAL,
        arrived_s=0.0,
        deadline_s=None,
    )


async def accepts(world: World) -> None:
    """A worker that takes whatever comes."""
    while True:
        await world.accepted(input_tokens=INPUT_TOKENS)


def moments(in_time: Sized) -> Iterator[int]:
    """Counts turns of the event loop, later ones in larger steps, until some have been in time."""
    turns = 1
    while turns < TURNS or len(in_time) < IN_TIME:
        assert turns < TURNS_MAX
        yield turns
        turns += 1 + turns // TURNS


async def after_turns(work: Awaitable[T], turns: int) -> T | None:
    """Cancels work after so many turns of the event loop; returns what came of it before."""
    task = asyncio.ensure_future(work)
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    (outcome,) = await asyncio.gather(task, return_exceptions=True)
    if isinstance(outcome, asyncio.CancelledError | MaasError):
        return None
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


async def nothing_is_taken(world: World, *, but_for: int, input_tokens: int) -> None:
    """Sees that only those that have ended well have used something."""
    await world.quotas.flush()
    assert [gate.in_use for gate in world.places._gates.values()] == [0] * len(NAMES)
    used = {Metric.REQUESTS: but_for, Metric.INPUT_TOKENS: input_tokens, Metric.OUTPUT_TOKENS: 0}
    for name in NAMES:
        for metric, count in used.items():
            share = world.quotas._shares.get((name, metric))
            at_hand = share.free if share is not None else 0
            assert world.billing.quota.level((name, metric)) - at_hand == count
    await world.settler.flush()
    await world.book.close_idle(0.0)
    # Nor is anything remembered of who has nothing.
    assert (world.book.open_ids(), world.book._entries) == ([], {})
    owed = sum(item.owed for item in world.billing.settled)
    assert world.billing.available == AVAILABLE - owed


async def test_a_caller_that_goes_at_any_moment_leaves_nothing_taken(tmp_path: Path) -> None:
    async with gateway(tmp_path, available=AVAILABLE) as world:
        limited(world)
        worker = asyncio.create_task(accepts(world))
        admitted: list[Generation] = []
        for turns in moments(admitted):
            generation = await after_turns(world.generations._admit(asked()), turns)
            if generation is not None:
                admitted.append(generation)
                generation.end(unavailable("gateway"), EndCause.GATEWAY_LOST)
            await nothing_is_taken(
                world, but_for=len(admitted), input_tokens=len(admitted) * INPUT_TOKENS
            )
        worker.cancel()
        # Every question of an admission was left once before its answer: also the last one.
        assert len(world.scheduler.asked) > len(admitted)


async def test_a_caller_that_goes_while_it_embeds_leaves_nothing_taken(tmp_path: Path) -> None:
    async with gateway(tmp_path, available=AVAILABLE, capabilities=abilities()) as world:
        limited(world)
        world.table.complete()
        call = Call(
            policy=policy_of(EMBEDDINGS.methods_by_name["Embed"]),
            request_id="",
            started_s=0.0,
            deadline_s=None,
            principal=PRINCIPAL,
        )
        made: list[EmbedResponse] = []
        for turns in moments(made):
            response = await after_turns(
                world.embeddings.embed(embed_request("hello"), call), turns
            )
            if response is not None:
                made.append(response)
            input_tokens = sum(item.usage.input_tokens for item in made)
            await nothing_is_taken(world, but_for=len(made), input_tokens=input_tokens)
        assert len(world.billing.settled) == len(made)
        assert len(world.scheduler.asked) > len(made)
