"""Features of what survives: U3 (lost connections), S-4 and S-9 (killed workers), drain."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from maas.billing.v1 import ledger_pb2
from maas.inference.v1 import generation_service_pb2 as generations

from libs.errors import Code, Reason
from tools.conformance.client import Reading, Refusal, Tenant
from tools.conformance.delivery import PROMPT, SEED
from tools.conformance.frames import Transcript
from tools.conformance.operator import Fleet, Member, NewKey
from tools.conformance.relay import Relay
from tools.conformance.trial import Trial
from tools.conformance.verdict import (
    CannotShow,
    Mismatch,
    expect,
    expect_equal,
    expect_same_text,
)

_DROPS = 20
_TOKENS = 2000
_KILL_AFTER_DROP = 10
_LOCATE_S = 5.0
"""How long load reports may take to show where a stream runs."""
_GONE_S = 30.0
_PREFILL_MIN_S = 1.5
"""A prefill that takes less is over before a worker can be found and killed."""
_DRAINED_SHORT = 400
_DRAINED_LONG = 4000
DETACHED = generations.StreamOptions(on_disconnect=generations.DISCONNECT_POLICY_CONTINUE)


async def one_bill_over_drops_and_a_death(trial: Trial) -> None:
    """U3: 20 lost connections and a killed worker in one stream: the same text, one bill."""
    books = trial.require_books()
    fleet = await trial.require_ready_workers(2)
    if trial.deployment.kill is None:
        raise CannotShow("needs --kill-worker")
    # Made beforehand: afterwards the replay window runs.
    key = None if trial.desk is None else await trial.new_key(of_other_project=True)
    async with trial.tenant() as tenant:
        spec = tenant.spec(PROMPT, _TOKENS, seed=SEED)
        whole = await tenant.read(spec)
        assert whole.finished is not None
        expect_equal(whole.output_tokens, _TOKENS, "tokens of the uninterrupted run")
        await fleet.require_idle("after the uninterrupted run")
        before = await books.posted()
        resumed = await _dropped(trial, fleet)
        await _replay(trial, tenant, resumed, key)
        assert resumed.finished is not None
        expect_same_text(resumed.text, whole.text, "text over drops against uninterrupted")
        expect(resumed.token_ids == whole.token_ids, "token ids differ")
        expect_equal(resumed.finished.usage, whole.finished.usage, "usage")
        expect_equal(resumed.finished.charge, whole.finished.charge, "charge")
        record = await books.record(resumed.generation_id)
        expect_equal(record.charge, whole.finished.charge, "charge of the one usage record")
        expect_equal(record.usage, whole.finished.usage, "usage of the one usage record")
        expect_equal(record.end_cause, ledger_pb2.END_CAUSE_COMPLETED, "end cause")
        taken = before - await books.posted()
        expect_equal(taken, whole.finished.charge.nanos, "nanos taken from the balance")
        trial.show(
            f"text identical, one usage record, {record.usage.input_tokens} prompt tokens and"
            f" {taken} nanos once"
        )
        await _plain_stream_is_not_resumable(trial, tenant)
        await _behind_the_window(trial, tenant, resumed.generation_id)


async def _dropped(trial: Trial, fleet: Fleet) -> Transcript:
    """Streams through a relay that cuts the connection 20 times."""
    killing: asyncio.Task[None] | None = None
    async with Relay(trial.deployment.endpoint) as relay:
        transcript, member = await _first_part(trial, fleet, relay)
        generation_id = transcript.generation_id
        step = max(1, (_TOKENS - transcript.output_tokens) // (_DROPS + 1))
        for drop in range(1, _DROPS + 1):
            wanted = min(transcript.output_tokens + step, _TOKENS - _DROPS + drop - 1)
            if drop == _KILL_AFTER_DROP:
                killing = asyncio.create_task(_kill(trial, fleet, member))
            async with (
                trial.tenant(endpoint=relay.endpoint) as tenant,
                tenant.resume(generation_id, transcript) as reading,
            ):
                await _read_until_cut(relay, reading, wanted)
        async with (
            trial.tenant(endpoint=relay.endpoint) as tenant,
            tenant.resume(generation_id, transcript) as reading,
        ):
            await reading.to_end()
        cuts = relay.cuts
    expect(cuts >= _DROPS + 1, f"only {cuts} connections were cut")
    assert killing is not None
    await killing
    trial.show(f"{cuts} connections cut and {member.name} killed in {_TOKENS} tokens")
    return transcript


async def _first_part(trial: Trial, fleet: Fleet, relay: Relay) -> tuple[Transcript, Member]:
    """Starts the stream, finds out which worker serves it, and cuts the first connection."""
    async with trial.tenant(endpoint=relay.endpoint) as tenant:
        spec = tenant.spec(PROMPT, _TOKENS, seed=SEED)
        async with tenant.stream(spec, options=DETACHED) as reading:
            await reading.until(1)
            locating = asyncio.create_task(_locate(fleet))
            try:
                while not locating.done() and await reading.read() is not None:
                    pass
                member = await locating
            finally:
                locating.cancel()
            await _read_until_cut(relay, reading, 1)
            return reading.transcript, member


async def _locate(fleet: Fleet) -> Member:
    """The worker of the only execution there is.

    Raises:
        CannotShow: the load does not tell.
    """
    member = await fleet.only_busy(_LOCATE_S)
    if member is None:
        raise CannotShow("could not tell which worker serves: is other traffic running?")
    return member


async def _read_until_cut(relay: Relay, reading: Reading, output_tokens: int) -> None:
    """Reads some tokens, cuts the connection under the call, and reads what had come before.

    Raises:
        Mismatch: the stream ended well, so that nothing was interrupted.
    """
    await reading.until(output_tokens)
    expect(reading.transcript.finished is None, "the stream was over before its connection was cut")
    expect(await relay.cut() > 0, "there was no connection to cut")
    refusal = await reading.refusal("a call whose connection was cut")
    expect(refusal.code is Code.UNAVAILABLE, f"a cut connection: {refusal}")


async def _kill(trial: Trial, fleet: Fleet, member: Member) -> None:
    assert trial.deployment.kill is not None
    await trial.deployment.kill(member.name)
    await _require_gone(fleet, member)


async def _require_gone(fleet: Fleet, member: Member) -> None:
    """A process that has died is never listed again: its incarnation is its own.

    Raises:
        CannotShow: it lives, so that nothing was shown.
    """
    if not await fleet.is_gone(member, _GONE_S):
        raise CannotShow(f"{member.name} lives on {_GONE_S:g} s after the command to kill it")


async def _replay(trial: Trial, tenant: Tenant, resumed: Transcript, key: NewKey | None) -> None:
    """Reads all frames once more; another project may not."""
    again = await _replayed(tenant, resumed.generation_id)
    expect_same_text(again.text, resumed.text, "replay of all frames")
    expect_equal(again.sequence, resumed.sequence, "number of the last frame of a replay")
    trial.show("all frames replayed once more")
    if key is None:
        trial.lack("another project's key: needs --admin-endpoint")
        return
    async with trial.tenant(key.secret) as stranger:
        refusal = await _resume_refusal(stranger, resumed.generation_id)
    refusal.expect(Code.PERMISSION_DENIED, Reason.PERMISSION_DENIED, "another project's key")
    trial.show("another project's key is denied")


async def _behind_the_window(trial: Trial, tenant: Tenant, generation_id: str) -> None:
    window_s = trial.deployment.replay_window_s
    await asyncio.sleep(window_s + 1.0)
    refusal = await _resume_refusal(tenant, generation_id)
    refusal.expect(Code.OUT_OF_RANGE, Reason.REPLAY_EXPIRED, "behind the replay window")
    trial.show(f"REPLAY_EXPIRED behind the window of {window_s:g} s")
    await trial.require_books().record(generation_id)


async def _replayed(tenant: Tenant, generation_id: str) -> Transcript:
    transcript = Transcript(with_token_ids=True)
    async with tenant.resume(generation_id, transcript) as reading:
        return await reading.to_end()


async def _resume_refusal(tenant: Tenant, generation_id: str) -> Refusal:
    async with tenant.resume(generation_id, Transcript(with_token_ids=True)) as reading:
        return await reading.refusal("resuming")


async def _plain_stream_is_not_resumable(trial: Trial, tenant: Tenant) -> None:
    async with tenant.stream(tenant.spec(PROMPT, 200, seed=SEED)) as reading:
        await reading.until(1)
        refusal = await _resume_refusal(tenant, reading.transcript.generation_id)
        await reading.to_end()
    refusal.expect(Code.FAILED_PRECONDITION, Reason.NOT_RESUMABLE, "a stream that keeps no frames")
    trial.show("a stream without request_id and CONTINUE is NOT_RESUMABLE")


async def death_before_the_first_token(trial: Trial) -> None:
    """S-4: a worker that dies while it prefills: the client sees a normal stream, one charge."""
    await _survive_death(trial, kill_at=0)


async def death_in_the_middle(trial: Trial) -> None:
    """S-9: a worker that dies at token 50 of 100: the output is that of an uninterrupted run."""
    await _survive_death(trial, kill_at=50)


async def _survive_death(trial: Trial, *, kill_at: int) -> None:
    """Finds the worker while it prefills a long prompt, and kills it at a count of tokens."""
    fleet = await trial.require_ready_workers(2)
    if trial.deployment.kill is None:
        raise CannotShow("needs --kill-worker")
    context = min(member.context_length for member in await fleet.ready())
    async with trial.tenant() as tenant:
        spec = tenant.spec("fox " * (context * 3 // 4), 100, seed=SEED)
        # Twice the same prompt: the second time it has to be prefilled too.
        spec.cache.bypass = True
        async with tenant.stream(spec) as reading:
            started_s = asyncio.get_running_loop().time()
            whole = await reading.to_end()
        assert whole.finished is not None
        prefill_s = reading.arrivals[1].at_s - started_s
        if prefill_s < _PREFILL_MIN_S:
            raise CannotShow(
                f"a prompt of {whole.finished.usage.input_tokens} tokens is prefilled in"
                f" {prefill_s:.2f} s: too quick to find its worker and kill it"
            )
        await fleet.require_idle("after the uninterrupted run")
        before = None if trial.books is None else await trial.books.posted()
        async with tenant.stream(spec) as reading:
            if kill_at == 0:
                survived = await _killed_before_token(trial, fleet, reading)
            else:
                survived = await _killed_at(trial, fleet, reading, kill_at)
    assert survived.finished is not None
    expect_same_text(survived.text, whole.text, "text over a death against uninterrupted")
    expect(survived.token_ids == whole.token_ids, "token ids differ")
    expect_equal(survived.finished.usage, whole.finished.usage, "usage")
    expect_equal(survived.finished.charge, whole.finished.charge, "charge")
    trial.show(f"{survived.output_tokens} tokens, identical to an uninterrupted run")
    if trial.books is None:
        trial.lack("one charge: needs --billing")
        return
    record = await trial.books.record(survived.generation_id)
    expect_equal(record.charge, whole.finished.charge, "charge of the one usage record")
    expect_equal(record.end_cause, ledger_pb2.END_CAUSE_COMPLETED, "end cause")
    assert before is not None
    taken = before - await trial.books.posted()
    expect_equal(taken, whole.finished.charge.nanos, "nanos taken from the balance")
    trial.show(f"one charge of {taken} nanos")


async def _killed_before_token(trial: Trial, fleet: Fleet, reading: Reading) -> Transcript:
    """Kills the worker while it prefills; the stream is read as usual meanwhile.

    Raises:
        CannotShow: the first token was quicker than the kill.
    """
    assert trial.deployment.kill is not None
    loop = asyncio.get_running_loop()
    locating = asyncio.create_task(_locate(fleet))
    try:
        await reading.until(0)
        member = await locating
        await trial.deployment.kill(member.name)
        killed_s = loop.time()
        transcript = await reading.to_end()
    finally:
        locating.cancel()
    first_s = next(item.at_s for item in reading.arrivals if item.output_tokens)
    if first_s <= killed_s:
        raise CannotShow("the first token came before the worker was killed")
    await _require_gone(fleet, member)
    trial.show(f"{member.name} killed {first_s - killed_s:.2f} s before the first token")
    return transcript


async def _killed_at(trial: Trial, fleet: Fleet, reading: Reading, kill_at: int) -> Transcript:
    """Kills the worker, found while it prefilled, as soon as a token has come."""
    assert trial.deployment.kill is not None
    loop = asyncio.get_running_loop()
    locating = asyncio.create_task(_locate(fleet))
    try:
        await reading.until(0)
        member = await locating
        await reading.until(kill_at)
        await trial.deployment.kill(member.name)
        killed_s = loop.time()
        transcript = await reading.to_end()
    finally:
        locating.cancel()
    if reading.arrivals[-1].at_s <= killed_s:
        raise CannotShow("the stream was over before its worker was killed")
    await _require_gone(fleet, member)
    trial.show(f"{member.name} killed at token {kill_at}")
    return transcript


async def drain_loses_nothing(trial: Trial) -> None:
    """Drain: streams of a worker that is told to stop end as if nothing had happened."""
    fleet = await trial.require_ready_workers(2)
    if trial.deployment.drain is None:
        raise CannotShow("needs --drain-worker")
    lengths = [_DRAINED_SHORT] * 8 + [_DRAINED_LONG] * 4
    async with AsyncExitStack() as stack:
        tenants = await stack.enter_async_context(trial.tenants(len(lengths)))
        readings = [
            await stack.enter_async_context(tenant.stream(tenant.spec(PROMPT, length, seed=SEED)))
            for tenant, length in zip(tenants, lengths, strict=True)
        ]
        for reading in readings:
            await reading.until(1)
        running = [asyncio.create_task(reading.to_end()) for reading in readings]
        try:
            drained = await _drain_a_busy_one(trial, fleet)
            transcripts = await asyncio.gather(*running)
        except Refusal as refusal:
            raise Mismatch(f"a stream was lost to a drain: {refusal}") from refusal
        finally:
            for task in running:
                task.cancel()
        if not await fleet.is_gone(drained, _GONE_S):
            raise CannotShow(f"{drained.name} was told to stop and did not")
    longest = transcripts[-1].text
    for transcript, length in zip(transcripts, lengths, strict=True):
        expect_equal(transcript.output_tokens, length, "output tokens")
        expect_same_text(transcript.text, longest[: len(transcript.text)], "text over a drain")
    trial.show(
        f"{drained.name} drained with {drained.busy} of {len(lengths)} streams: all complete and"
        " identical"
    )


async def _drain_a_busy_one(trial: Trial, fleet: Fleet) -> Member:
    """Waits until two workers share the streams, and tells one of them to stop.

    Raises:
        CannotShow: all streams are on one worker, so that nothing could be compared.
    """
    assert trial.deployment.drain is not None
    busy = await fleet.busy(2, _LOCATE_S)
    if not busy:
        raise CannotShow("the streams are not spread over two workers")
    await trial.deployment.drain(busy[0].name)
    return busy[0]
