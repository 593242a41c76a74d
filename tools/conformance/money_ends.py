"""Features of how generations end: B-4 (who pays), B-10 (no output), U1 (kills)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from google.protobuf import duration_pb2
from maas.billing.v1 import ledger_pb2
from maas.inference.v1 import generation_service_pb2 as generations

from libs.errors import Code, Reason
from tools.conformance import operator
from tools.conformance.client import CALL_S, Reading, Refusal, Tenant
from tools.conformance.delivery import PROMPT, SEED
from tools.conformance.frames import Transcript
from tools.conformance.money_customer import Customer, customer, exact_spec, prompt_ids
from tools.conformance.release import BILLED_AHEAD_MAX
from tools.conformance.trial import Trial
from tools.conformance.verdict import CannotShow, Mismatch, expect, expect_equal

_LONG = 6000
_BACK_S = 60.0
"""How long a gateway that was killed may take to serve again."""
_LOCATE_S = 5.0
_KILLS_MAX = 8
_STREAMS = 24
_SHORT_TOKENS = 250
_LONG_TOKENS = 4000
_INTERVAL = duration_pb2.Duration(nanos=50_000_000)
_BETWEEN_KILLS_S = 0.7
_FIRST_FREE = ledger_pb2.END_CAUSE_WORKER_LOST
"""Causes from here on are ours; the contract's comment says so."""


@dataclass(frozen=True, slots=True)
class _End:
    """How a generation ended, as its client saw it.

    Attributes:
        cause: that the record has to have.
        generation_id: of it.
        received: tokens that its client read.
    """

    cause: ledger_pb2.EndCause.ValueType
    generation_id: str
    received: int


_Way = Callable[[Customer, list[int]], Awaitable[_End]]


async def every_end_has_its_charge(trial: Trial) -> None:
    """B-4: each end cause is charged as the written table says, or is free."""
    async with customer(trial) as buyer:
        async with buyer.caller() as tenant:
            ids = await prompt_ids(tenant)
            await _refused_is_free(trial, buyer, tenant)
        before = (await buyer.at_rest()).posted.nanos
        ends = list(await asyncio.gather(*(way(buyer, ids) for way in _WAYS)))
        for name, needed, way in (
            ("WORKER_LOST", trial.deployment.kill, _worker_lost),
            ("GATEWAY_LOST", trial.deployment.kill_gateway, _gateway_lost),
        ):
            if needed is None:
                trial.lack(f"{name}: needs --kill-{name.partition('_')[0].lower()}")
            else:
                ends.append(await way(buyer, ids))
        total = 0
        for end in ends:
            total += await _require_charged(trial, buyer, end)
        expect_equal(before - (await buyer.at_rest()).posted.nanos, total, "nanos taken in all")
        await buyer.require_sum()
    trial.show("ENGINE_FAILURE cannot be made from outside")


async def _refused_is_free(trial: Trial, buyer: Customer, tenant: Tenant) -> None:
    before = (await buyer.balance()).posted.nanos
    spec = tenant.spec(PROMPT, 5, seed=SEED)
    spec.sampling.temperature = -1
    try:
        await tenant.generate(spec)
    except Refusal as refusal:
        expect(refusal.code is Code.INVALID_ARGUMENT, f"a bad request: {refusal}")
    else:
        raise Mismatch("a negative temperature was accepted")
    expect_equal((await buyer.balance()).posted.nanos, before, "nanos after a refusal")
    expect_equal(await buyer.records(), [], "records of what was refused")
    trial.show("refused: no record")


async def _require_charged(trial: Trial, buyer: Customer, end: _End) -> int:
    """Compares a record with the table and with what its client read; the charge in nanos."""
    record = await _record(buyer, end.generation_id)
    name = ledger_pb2.EndCause.Name(end.cause)[10:]
    expect_equal(ledger_pb2.EndCause.Name(record.end_cause)[10:], name, "end cause")
    ahead = record.usage.output_tokens - end.received
    most = _LONG if end.cause == ledger_pb2.END_CAUSE_STALLED else BILLED_AHEAD_MAX
    expect(0 <= ahead <= most, f"{name}: {ahead} tokens more in the record than were received")
    if end.cause >= _FIRST_FREE:
        expect_equal(record.charge.nanos, 0, f"charge of {name}")
    else:
        await buyer.require_priced(record)
    trial.show(
        f"{name}: {record.usage.output_tokens} tokens recorded, {end.received} received,"
        f" {record.charge.nanos} nanos"
    )
    return record.charge.nanos


async def _record(buyer: Customer, generation_id: str) -> ledger_pb2.UsageRecord:
    """The one record, where a gateway may have to come back first."""

    async def is_there() -> bool:
        return bool(await buyer.books.records(generation_id))

    await operator.within(_BACK_S, is_there)
    return await buyer.books.record(generation_id)


def _end(cause: ledger_pb2.EndCause.ValueType, reading: Reading) -> _End:
    transcript = reading.transcript
    return _End(cause, transcript.generation_id, transcript.output_tokens)


async def _completed(buyer: Customer, ids: list[int]) -> _End:
    async with buyer.caller() as tenant, tenant.stream(exact_spec(tenant, ids, 30)) as reading:
        await reading.to_end()
        return _end(ledger_pb2.END_CAUSE_COMPLETED, reading)


async def _left(buyer: Customer, ids: list[int]) -> _End:
    async with buyer.caller() as tenant, tenant.stream(exact_spec(tenant, ids, _LONG)) as reading:
        await reading.until(20)
        reading.cancel()
        return _end(ledger_pb2.END_CAUSE_CLIENT_CANCELLED, reading)


async def _cancelled(buyer: Customer, ids: list[int]) -> _End:
    async with buyer.caller() as tenant, tenant.stream(exact_spec(tenant, ids, _LONG)) as reading:
        await reading.until(20)
        await tenant.cancel(reading.transcript.generation_id)
        refusal = await reading.refusal("a cancelled generation")
        refusal.expect(Code.ABORTED, Reason.GENERATION_CANCELLED, "a cancelled generation")
        return _end(ledger_pb2.END_CAUSE_CLIENT_CANCELLED, reading)


async def _overdue(buyer: Customer, ids: list[int]) -> _End:
    async with buyer.caller() as tenant:
        spec = exact_spec(tenant, ids, _LONG)
        async with tenant.stream(spec, timeout_s=1.5) as reading:
            refusal = await reading.refusal("a stream behind its deadline")
            expect(refusal.code is Code.DEADLINE_EXCEEDED, f"a deadline: {refusal}")
            return _end(ledger_pb2.END_CAUSE_DEADLINE, reading)


async def _revoked(buyer: Customer, ids: list[int]) -> _End:
    key = await buyer.new_key()
    async with (
        buyer.caller(key) as tenant,
        tenant.stream(exact_spec(tenant, ids, _LONG)) as reading,
    ):
        await reading.until(20)
        await buyer.revoke(key)
        refusal = await reading.refusal("a stream of a revoked key")
        refusal.expect(Code.UNAUTHENTICATED, Reason.CREDENTIALS_REVOKED, "a revoked key")
        return _end(ledger_pb2.END_CAUSE_REVOKED, reading)


async def _stalled(buyer: Customer, ids: list[int]) -> _End:
    """Reads a little, then nothing: what the connection had taken is billed, and still comes."""
    async with (
        buyer.trial.tenant(buyer.key.secret, is_narrow=True) as tenant,
        tenant.stream(exact_spec(tenant, ids, _LONG)) as reading,
    ):
        await reading.until(10)
        # The server looks eight times in a limit; the rest is for a busy machine.
        await asyncio.sleep(1.25 * buyer.trial.deployment.stall_limit_s + 1.0)
        refusal = await reading.refusal("a client that stopped reading")
        refusal.expect(Code.ABORTED, Reason.CONSUMER_STALLED, "a client that stopped reading")
        return _end(ledger_pb2.END_CAUSE_STALLED, reading)


_WAYS: Sequence[_Way] = (_completed, _left, _cancelled, _overdue, _revoked, _stalled)


async def _worker_lost(buyer: Customer, ids: list[int]) -> _End:
    """Two outputs cannot go on elsewhere once somebody has seen a part of them."""
    trial = buyer.trial
    fleet = await trial.require_ready_workers(1)
    async with buyer.caller() as tenant:
        if (await tenant.capabilities()).capabilities.max_outputs <= 1:
            raise CannotShow("WORKER_LOST: the engine makes one output only")
        spec = exact_spec(tenant, ids, _LONG)
        spec.output.count = 2
        async with tenant.stream(spec, options=_paced()) as reading:
            await reading.until(4)
            reader = asyncio.create_task(reading.refusal("a stream of a killed worker"))
            try:
                await _kill_the_busy(trial, fleet)
                refusal = await reader
            finally:
                reader.cancel()
            refusal.expect(Code.UNAVAILABLE, Reason.WORKER_LOST, "a stream of a killed worker")
            return _end(ledger_pb2.END_CAUSE_WORKER_LOST, reading)


async def _gateway_lost(buyer: Customer, ids: list[int]) -> _End:
    trial = buyer.trial
    kill = trial.deployment.kill_gateway
    assert kill is not None
    async with (
        buyer.caller() as tenant,
        tenant.stream(exact_spec(tenant, ids, _LONG), options=_paced()) as reading,
    ):
        await reading.until(20)
        await kill()
        refusal = await reading.refusal("a stream of a killed gateway")
        expect(refusal.code is Code.UNAVAILABLE, f"a killed gateway: {refusal}")
        end = _end(ledger_pb2.END_CAUSE_GATEWAY_LOST, reading)
    await _gateway_is_back(buyer)
    return end


def _paced() -> generations.StreamOptions:
    """Few frames: many streams are read at a time."""
    return generations.StreamOptions(frame_interval=_INTERVAL)


async def _kill_the_busy(
    trial: Trial, fleet: operator.Fleet, locate_s: float = _LOCATE_S
) -> operator.Member:
    """Kills the only worker that has work.

    Raises:
        CannotShow: the load does not tell which, or it lives on.
    """
    assert trial.deployment.kill is not None
    busy = await fleet.busy(1, locate_s)
    if len(busy) != 1:
        raise CannotShow("could not tell which worker serves: is other traffic running?")
    await trial.deployment.kill(busy[0].name)
    if not await fleet.is_gone(busy[0], _BACK_S):
        raise CannotShow(f"{busy[0].name} lives on after the command to kill it")
    return busy[0]


async def _gateway_is_back(buyer: Customer) -> None:
    async def is_back() -> bool:
        # A new connection each time: an old one waits longer and longer.
        async with buyer.caller() as tenant:
            try:
                await tenant.capabilities()
            except Refusal:
                return False
            return True

    if not await operator.within(_BACK_S, is_back):
        raise Mismatch(f"the gateway did not serve again within {_BACK_S:g} s")


async def nothing_costs_nothing(trial: Trial) -> None:
    """B-10: workers killed before the first token, until the gateway gives up: no charge."""
    if trial.deployment.kill is None:
        raise CannotShow("needs --kill-worker")
    fleet = await trial.require_ready_workers(1)
    context = min(member.context_length for member in await fleet.ready())
    async with customer(trial) as buyer, buyer.caller() as tenant:
        spec = tenant.spec("fox " * (context * 3 // 4), 2, seed=SEED)
        spec.cache.bypass = True
        before = (await buyer.at_rest()).posted.nanos
        async with tenant.stream(spec, timeout_s=CALL_S) as reading:
            reader = asyncio.create_task(reading.refusal("a stream whose workers are killed"))
            try:
                kills = await _kill_until(trial, fleet, reader)
                refusal = await reader
            finally:
                reader.cancel()
        expect_equal(reading.transcript.output_tokens, 0, "tokens received")
        expect(refusal.code is Code.UNAVAILABLE, f"a stream whose workers are killed: {refusal}")
        left = (await buyer.at_rest()).posted.nanos
        expect_equal(before - left, 0, "nanos taken")
        records = await buyer.records()
        charges = [(item.charge.nanos, item.usage.output_tokens) for item in records]
        expect(len(records) <= 1, f"{len(records)} records of one generation")
        expect(all(pair == (0, 0) for pair in charges), f"charge and tokens: {charges}")
        trial.show(
            f"{kills} workers killed while they prefilled, then {refusal.reason}: 0 tokens, 0"
            f" nanos, {len(records)} record"
        )


async def _kill_until(trial: Trial, fleet: operator.Fleet, reader: asyncio.Task[Refusal]) -> int:
    """Kills each worker that gets the generation; how many it took.

    Raises:
        CannotShow: it outlives them all.
    """
    for kills in range(_KILLS_MAX):
        # A worker that was killed before may have to come back first.
        busy = asyncio.create_task(_kill_the_busy(trial, fleet, _BACK_S))
        try:
            await asyncio.wait({busy, reader}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                return kills
            await busy
        finally:
            busy.cancel()
    raise CannotShow(f"the generation outlives {_KILLS_MAX} killed workers")


async def kills_leave_exact_books(trial: Trial) -> None:
    """U1: worker and gateway killed in the middle of streams: billed is received, once."""
    place = trial.deployment
    if place.kill is None or place.kill_gateway is None:
        raise CannotShow("needs --kill-worker and --kill-gateway")
    fleet = await trial.require_ready_workers(2)
    async with customer(trial) as buyer:
        before = (await buyer.at_rest()).posted.nanos
        outcomes = await _stream_through_kills(trial, buyer, fleet)
        await _gateway_is_back(buyer)
        left = (await buyer.at_rest()).posted.nanos
        charged, facts = await _require_exact(buyer, outcomes)
        expect_equal(before - left, charged, "nanos taken, against what clean streams were told")
        await buyer.require_sum()
        violations, _ = await buyer.reconcile()
        named = [f"{item.invariant} {item.resource}" for item in violations[:3]]
        expect_equal(named, [], "violations after the kills")
        trial.show(f"{facts}; {charged} nanos taken, nothing held, no invariant broken")


async def _stream_through_kills(
    trial: Trial, buyer: Customer, fleet: operator.Fleet
) -> list[Transcript]:
    """Streams of two lengths; a worker is killed, then the gateway. What their clients have."""
    place = trial.deployment
    assert place.kill is not None
    assert place.kill_gateway is not None
    async with AsyncExitStack() as stack:
        tenant = await stack.enter_async_context(buyer.caller())
        ids = await prompt_ids(tenant)
        readings = [
            await stack.enter_async_context(
                tenant.stream(
                    exact_spec(
                        tenant, ids, _LONG_TOKENS if number % 2 else _SHORT_TOKENS, number + 1
                    ),
                    options=_paced(),
                )
            )
            for number in range(_STREAMS)
        ]
        await asyncio.gather(*(reading.until(1) for reading in readings))
        tasks = [asyncio.create_task(_to_some_end(reading)) for reading in readings]
        try:
            victim = (await fleet.busy(1, _LOCATE_S))[0]
            await place.kill(victim.name)
            await asyncio.sleep(_BETWEEN_KILLS_S)
            shorts = [task for number, task in enumerate(tasks) if not number % 2]
            await asyncio.wait(shorts, timeout=_BACK_S)
            await place.kill_gateway()
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
    return [reading.transcript for reading in readings]


async def _to_some_end(reading: Reading) -> None:
    """Reads until it is over; a lost gateway is one way to be.

    Raises:
        Mismatch: it ended in another way.
    """
    try:
        await reading.to_end()
    except Refusal as refusal:
        if refusal.code is not Code.UNAVAILABLE:
            raise Mismatch(f"a stream through kills ended as {refusal}") from refusal


async def _require_exact(buyer: Customer, outcomes: Sequence[Transcript]) -> tuple[int, str]:
    """Compares each generation with its one record; the sum of charges, and facts."""
    charged = 0
    ahead: list[int] = []
    ends: Counter[str] = Counter()
    for outcome in outcomes:
        record = await _record(buyer, outcome.generation_id)
        billed = record.usage.output_tokens
        if outcome.finished is not None:
            expect_equal(record.usage, outcome.finished.usage, "usage of a clean stream")
            expect_equal(billed, len(outcome.token_ids), "tokens of a clean stream")
            expect_equal(record.charge, outcome.finished.charge, "charge of a clean stream")
            charged += record.charge.nanos
            ends["clean"] += 1
            continue
        ahead.append(billed - outcome.output_tokens)
        is_near = 0 <= ahead[-1] <= BILLED_AHEAD_MAX
        expect(is_near, f"{ahead[-1]} tokens more recorded than were received")
        cause = ledger_pb2.EndCause.Name(record.end_cause)[10:]
        expect(record.end_cause >= _FIRST_FREE, f"a stream that we lost was recorded as {cause}")
        expect_equal(record.charge.nanos, 0, "charge of a stream that we lost")
        ends[cause] += 1
    expect(bool(ahead) and ends["clean"] > 0, f"not both clean and cut streams: {dict(ends)}")
    expect_equal(len(await buyer.records()), len(outcomes), "records of all streams")
    told = ", ".join(f"{count} {name}" for name, count in ends.items())
    return charged, f"{told}; clean ones exact, cut ones ahead by at most {max(ahead)} tokens"
