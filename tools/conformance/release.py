"""Features of how work ends before its time: W-2, W-10, U5."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from google.protobuf import duration_pb2
from maas.billing.v1 import ledger_pb2
from maas.inference.v1 import generation_service_pb2 as generations

from libs.errors import Code, Reason
from tools.conformance.client import CALL_S, Reading, Refusal, Tenant
from tools.conformance.delivery import PROMPT, SEED
from tools.conformance.trial import Trial
from tools.conformance.verdict import CannotShow, Mismatch, expect, expect_equal

FREE_WITHIN_S = 0.2
CUT_WITHIN_S = 2.0
BILLED_AHEAD_MAX = 64
"""Tokens that may be billed and not received, on a connection that is read."""
_PLACES_MAX = 256
_PLACES_WAIT_S = 0.5
_ATTEMPTS = 3
_LONG = 4000
_REVOKED_STREAMS = 50
_WORDS_MAX = 250_000

Leave = Callable[[Tenant, Reading], Awaitable[None]]
"""Ends a running stream in one way or another; returns once the client knows that it is over."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to end a stream.

    Attributes:
        name: for people.
        leave: does it.
        cause: what the usage record says.
        timeout_s: deadline of the stream.
    """

    name: str
    leave: Leave
    cause: ledger_pb2.EndCause.ValueType
    timeout_s: float = CALL_S


async def _cancel_rpc(_tenant: Tenant, reading: Reading) -> None:
    reading.cancel()


async def _pass_deadline(_tenant: Tenant, reading: Reading) -> None:
    refusal = await reading.refusal("a stream behind its deadline")
    expect(refusal.code is Code.DEADLINE_EXCEEDED, f"expected DEADLINE_EXCEEDED, got {refusal}")


async def _cancel_generation(tenant: Tenant, reading: Reading) -> None:
    generation_id = reading.transcript.generation_id
    await tenant.cancel(generation_id)
    refusal = await reading.refusal("a cancelled generation")
    refusal.expect(Code.ABORTED, Reason.GENERATION_CANCELLED, "a cancelled generation")
    # Once more: what has just ended stays ended.
    await tenant.cancel(generation_id)


WAYS = (
    Way("rpc cancel", _cancel_rpc, ledger_pb2.END_CAUSE_CLIENT_CANCELLED),
    Way("deadline", _pass_deadline, ledger_pb2.END_CAUSE_DEADLINE, timeout_s=1.2),
    Way("CancelGeneration", _cancel_generation, ledger_pb2.END_CAUSE_CLIENT_CANCELLED),
)


async def leaving_frees_the_place(trial: Trial) -> None:
    """W-2: with every place taken, one that is left gives the next its first token in 200 ms."""
    fleet = trial.require_fleet()
    await fleet.require_idle("before the test")
    places = sum(member.capacity for member in await fleet.ready())
    if not 1 <= places <= _PLACES_MAX:
        raise CannotShow(f"{places} places: this test fills 1 to {_PLACES_MAX}")
    figures = []
    async with AsyncExitStack() as stack:
        tenants = await stack.enter_async_context(trial.tenants(places))
        tenant = await stack.enter_async_context(trial.tenant())
        # All but one are only there to take a place: few frames are enough for them.
        await asyncio.gather(*(_occupy(stack, other) for other in tenants[1:]))
        for way in WAYS:
            waits = [await _free_one(trial, tenant, way) for _ in range(_ATTEMPTS)]
            wait_s = statistics.median(waits)
            figures.append(f"{way.name} {wait_s * 1e3:.0f} ms")
            expect(
                wait_s <= FREE_WITHIN_S,
                f"after {way.name} the next had its first token in {wait_s * 1e3:.0f} ms",
            )
    trial.show(f"{places} places full, next first token after {', '.join(figures)}")
    await fleet.require_idle("after all streams were left")
    trial.show("load is 0 again")
    await _others_cannot_cancel(trial)


async def _occupy(stack: AsyncExitStack, tenant: Tenant) -> None:
    interval = duration_pb2.Duration(seconds=1)
    options = generations.StreamOptions(frame_interval=interval)
    spec = tenant.spec(PROMPT, _LONG * 2, seed=SEED)
    spec.output.return_token_ids = False
    reading = await stack.enter_async_context(tenant.stream(spec, options=options))
    await reading.read()


async def _free_one(trial: Trial, tenant: Tenant, way: Way) -> float:
    """Takes the last place, shows that no other is left, leaves it; seconds until the next."""
    loop = asyncio.get_running_loop()
    spec = tenant.spec(PROMPT, _LONG, seed=SEED)
    async with tenant.stream(spec, timeout_s=way.timeout_s) as reading:
        await reading.until(10)
        await _require_full(tenant, reading)
        await way.leave(tenant, reading)
        left_s = loop.time()
        async with tenant.stream(spec) as following:
            await following.until(1)
            wait_s = loop.time() - left_s
    if trial.books is None:
        return wait_s
    record = await trial.books.record(reading.transcript.generation_id)
    expect_equal(record.end_cause, way.cause, f"end cause after {way.name}")
    ahead = record.usage.output_tokens - reading.transcript.output_tokens
    expect(
        0 <= ahead <= BILLED_AHEAD_MAX,
        f"after {way.name} {ahead} more tokens were billed than received",
    )
    return wait_s


async def _require_full(tenant: Tenant, reading: Reading) -> None:
    """Shows that one more request gets no place, while a stream is read as it comes."""
    asking = asyncio.create_task(_ask_for_a_place(tenant))
    try:
        while not asking.done():
            expect(await reading.read() is not None, "the stream was over too soon")
        await asking
    finally:
        asking.cancel()


async def _ask_for_a_place(tenant: Tenant) -> None:
    try:
        async with tenant.stream(
            tenant.spec(PROMPT, 5, seed=SEED), timeout_s=_PLACES_WAIT_S
        ) as reading:
            await reading.until(1)
    except Refusal as refusal:
        if refusal.code not in {Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED}:
            raise Mismatch(f"with all places taken: {refusal}") from refusal
        return
    raise CannotShow("the places could not be filled: workers run more than they say")


async def _others_cannot_cancel(trial: Trial) -> None:
    async with trial.tenant() as tenant:
        try:
            await tenant.cancel("gen_none_00000000000000000000000000")
        except Refusal as refusal:
            refusal.expect(Code.NOT_FOUND, Reason.GENERATION_NOT_FOUND, "an unknown generation")
        else:
            raise Mismatch("cancelling an unknown generation: expected NOT_FOUND, got OK")
    if trial.books is None:
        trial.lack("end causes and billed counts: needs --billing")
    if trial.desk is None:
        trial.lack("cancelling with another project's key: needs --admin-endpoint")
        return
    key = await trial.new_key(of_other_project=True)
    async with (
        trial.tenant() as tenant,
        trial.tenant(key.secret) as stranger,
        tenant.stream(tenant.spec(PROMPT, 100, seed=SEED)) as reading,
    ):
        await reading.until(1)
        try:
            await stranger.cancel(reading.transcript.generation_id)
        except Refusal as refusal:
            is_hidden = refusal.code in {Code.NOT_FOUND, Code.PERMISSION_DENIED}
            expect(is_hidden, f"another project's key: {refusal}")
        else:
            raise Mismatch("another project's key cancelled a generation")
        await reading.to_end()
    trial.show("another project's key cancels nothing")


async def long_prompt_costs_nothing(trial: Trial) -> None:
    """W-10: a prompt that does not fit is refused before money or engine see it."""
    words = _WORDS_MAX
    if trial.fleet is not None:
        context = max((member.context_length for member in await trial.fleet.ready()), default=0)
        if context >= _WORDS_MAX:
            raise CannotShow(f"a context of {context} tokens is too long to be exceeded here")
    before = None if trial.books is None else await trial.books.posted()
    async with trial.tenant() as tenant:
        spec = tenant.spec("fox " * words, 1, seed=SEED)
        async with tenant.stream(spec) as reading:
            refusals = [await reading.refusal("a prompt that does not fit")]
        try:
            await tenant.generate(spec)
        except Refusal as unary:
            refusals.append(unary)
        else:
            raise Mismatch("a prompt that does not fit: expected a refusal, got an answer")
    for refusal in refusals:
        refusal.expect(Code.INVALID_ARGUMENT, Reason.CONTEXT_LENGTH_EXCEEDED, "prompt too long")
        expect_equal(refusal.fields, ("spec.text",), "bad field")
    trial.show(f"{words} words refused, stream and unary")
    if trial.books is None:
        trial.lack("balance: needs --billing")
        return
    expect_equal(await trial.books.posted(), before, "balance")
    trial.show("balance unchanged")


async def revoking_cuts_streams(trial: Trial) -> None:
    """U5: 50 live streams end within two seconds of RevokeApiKey, each settled once."""
    desk, books = trial.require_desk(), trial.require_books()
    loop = asyncio.get_running_loop()
    key = await trial.new_key()
    async with AsyncExitStack() as stack, trial.tenant() as own:
        readings = await _live_streams(stack, trial, key.secret)
        bystander = await stack.enter_async_context(own.stream(own.spec(PROMPT, _LONG, seed=SEED)))
        await bystander.until(1)
        ends = [asyncio.create_task(_cut(reading)) for reading in readings]
        try:
            await asyncio.sleep(_PLACES_WAIT_S)
            expect(not any(end.done() for end in ends), "a stream ended before the key was revoked")
            await desk.revoke(key)
            revoked_s = loop.time()
            _, late = await asyncio.wait(ends, timeout=CUT_WITHIN_S)
            expect(not late, f"{len(late)} of {len(ends)} streams go on after {CUT_WITHIN_S:g} s")
            last_s = max(end.result() for end in ends) - revoked_s
        finally:
            for end in ends:
                end.cancel()
        await bystander.until(bystander.transcript.output_tokens + 10)
    trial.show(f"{len(readings)} streams cut, the last {last_s * 1e3:.0f} ms after the reply")
    for reading in readings:
        record = await books.record(reading.transcript.generation_id)
        expect_equal(record.end_cause, ledger_pb2.END_CAUSE_REVOKED, "end cause")
        ahead = record.usage.output_tokens - reading.transcript.output_tokens
        expect(0 <= ahead <= BILLED_AHEAD_MAX, f"{ahead} more tokens billed than received")
        expect(record.charge.nanos > 0, "a revoked key's stream was not charged")
    trial.show("each settled once as REVOKED, another key's stream went on")
    if trial.fleet is None:
        trial.lack("load: needs --scheduler")
        return
    await trial.fleet.require_idle("after the revocation")
    trial.show("load is 0 again")


async def _live_streams(stack: AsyncExitStack, trial: Trial, key: str) -> list[Reading]:
    tenants = await stack.enter_async_context(trial.tenants(_REVOKED_STREAMS, key))

    async def begin(number: int, tenant: Tenant) -> Reading:
        spec = tenant.spec(PROMPT, _LONG * 2, seed=SEED + number)
        reading = await stack.enter_async_context(tenant.stream(spec))
        await reading.until(1)
        return reading

    return await asyncio.gather(*(begin(number, item) for number, item in enumerate(tenants)))


async def _cut(reading: Reading) -> float:
    """Reads until the stream is cut for its key; when that was, on the loop's clock."""
    refusal = await reading.refusal("a stream of a revoked key")
    at_s = asyncio.get_running_loop().time()
    refusal.expect(Code.UNAUTHENTICATED, Reason.CREDENTIALS_REVOKED, "a revoked key's stream")
    return at_s
