"""Features of what is paid: U2, B-5."""

from __future__ import annotations

import asyncio
import secrets

from maas.common.v1 import money_pb2
from maas.inference.v1 import generation_pb2

from libs.errors import Code, Reason
from tools.conformance.client import Refusal, Tenant
from tools.conformance.delivery import PROMPT, SEED
from tools.conformance.frames import Transcript
from tools.conformance.operator import Books
from tools.conformance.trial import Trial
from tools.conformance.verdict import (
    CannotShow,
    Mismatch,
    expect,
    expect_equal,
    expect_same_text,
)

_CEILING_TOKENS = 37
_RACERS = 8


async def ceiling_is_kept(trial: Trial) -> None:
    """U2: max_charge ends the output before the token that would exceed it, to the nano."""
    books = trial.require_books()
    async with trial.tenant() as tenant:
        counts = (1, _CEILING_TOKENS, _CEILING_TOKENS + 1)
        one, exact, more = [await _charge_of(tenant, count) for count in counts]
        if not exact.nanos < more.nanos:
            raise CannotShow("needs an offering whose output tokens cost something")
        before = await books.posted()
        spent = 0
        for ceiling, tokens in (
            (exact.nanos, _CEILING_TOKENS),
            (more.nanos - 1, _CEILING_TOKENS),
            (one.nanos, 1),
        ):
            transcript = await tenant.read(_limited(tenant, exact.currency_code, ceiling))
            spent += _check_ceiling(transcript, ceiling, tokens)
        trial.show(
            f"a ceiling of {exact.nanos} nanos, the charge of 37 tokens, and one of"
            f" {more.nanos - 1} give exactly 37; one of {one.nanos} gives 1"
        )
        whole = await tenant.generate(_limited(tenant, exact.currency_code, exact.nanos))
        expect_equal(whole.usage.output_tokens, _CEILING_TOKENS, "output tokens of a unary call")
        expect_equal(whole.charge.nanos, exact.nanos, "charge of a unary call")
        spent += whole.charge.nanos
        for ceiling in (one.nanos - 1, 1):
            await _require_refused(tenant, exact.currency_code, ceiling)
        expect_equal(before - await books.posted(), spent, "nanos taken from the balance")
    trial.show(f"below prompt and one token refused; balance fell by {spent} nanos, no more")
    if trial.fleet is None:
        trial.lack("load: needs --scheduler")
        return
    await trial.fleet.require_idle("after the ceiling")
    trial.show("load is 0 again")


def _limited(tenant: Tenant, currency: str, nanos: int) -> generation_pb2.GenerationSpec:
    spec = _uncached(tenant, 200)
    spec.max_charge.CopyFrom(money_pb2.Money(currency_code=currency, nanos=nanos))
    return spec


async def _charge_of(tenant: Tenant, output_tokens: int) -> money_pb2.Money:
    """What that many tokens cost, as a run of exactly that length was charged."""
    generation = await tenant.generate(_uncached(tenant, output_tokens))
    expect_equal(generation.usage.output_tokens, output_tokens, "output tokens")
    return generation.charge


def _uncached(tenant: Tenant, output_tokens: int) -> generation_pb2.GenerationSpec:
    """A request whose prompt costs the same each time."""
    spec = tenant.spec(PROMPT, output_tokens, seed=SEED)
    spec.cache.bypass = True
    return spec


def _check_ceiling(transcript: Transcript, ceiling: int, tokens: int) -> int:
    """Returns the charge."""
    assert transcript.finished is not None
    assert transcript.end is not None
    charge = transcript.finished.charge.nanos
    expect_equal(transcript.output_tokens, tokens, f"output tokens under {ceiling} nanos")
    expect_equal(transcript.end.reason, generation_pb2.FINISH_REASON_CHARGE_LIMIT, "finish reason")
    expect(charge <= ceiling, f"charge {charge} is above the ceiling {ceiling}")
    return charge


async def _require_refused(tenant: Tenant, currency: str, ceiling: int) -> None:
    async with tenant.stream(_limited(tenant, currency, ceiling)) as reading:
        refusal = await reading.refusal(f"a ceiling of {ceiling} nanos")
    what = f"a ceiling of {ceiling} nanos"
    expect(refusal.code is Code.INVALID_ARGUMENT, f"{what}: expected INVALID_ARGUMENT: {refusal}")
    expect_equal(refusal.fields, ("spec.max_charge",), f"bad field of {what}")


async def repeats_are_one(trial: Trial) -> None:
    """B-5: a repeated request_id joins or replays the first generation; one charge."""
    books = trial.require_books()
    before = await books.posted()
    async with trial.tenant() as tenant:
        stream_id, streamed = await _repeated_stream(trial, tenant)
        await _other_body(trial, tenant, stream_id)
        unary_charge = await _repeated_unary(trial, tenant, books)
        race_charge = await _race(trial, tenant, books)
        assert streamed.finished is not None
        charges = streamed.finished.charge.nanos + unary_charge + race_charge
        record = await books.record(streamed.generation_id)
        expect_equal(record.charge, streamed.finished.charge, "charge of the usage record")
        expect_equal(record.request_id, stream_id, "request_id of the usage record")
        expect_equal(before - await books.posted(), charges, "nanos taken for three generations")
        trial.show(f"three generations took {charges} nanos")
        await _other_project(trial, stream_id)
        await _after_the_window(trial, tenant, stream_id, streamed)
        await books.record(streamed.generation_id)


async def _repeated_stream(trial: Trial, tenant: Tenant) -> tuple[str, Transcript]:
    request_id = new_request_id()
    spec = tenant.spec(PROMPT, 150, seed=SEED)
    async with tenant.stream(spec, request_id=request_id) as reading:
        await reading.until(20)
        joined = asyncio.create_task(tenant.read(spec, request_id=request_id, may_merge=True))
        try:
            first = await reading.to_end()
            second = await joined
        finally:
            joined.cancel()
    third = await tenant.read(spec, request_id=request_id, may_merge=True)
    assert first.started is not None
    expect(not first.started.replayed, "the first request says that it is a repeat")
    for name, repeat in (("joining", second), ("replaying", third)):
        assert repeat.started is not None
        expect(repeat.started.replayed, f"{name}: Started.replayed is not set")
        expect_equal(repeat.generation_id, first.generation_id, f"{name}: generation_id")
        expect_same_text(repeat.text, first.text, f"{name}: text")
        expect_equal(repeat.sequence, first.sequence, f"{name}: number of the last frame")
        expect_equal(repeat.finished, first.finished, f"{name}: finished")
    trial.show("a repeat joined at token 20, another replayed after the end")
    return request_id, first


async def _repeated_unary(trial: Trial, tenant: Tenant, books: Books) -> int:
    request_id = new_request_id()
    spec = tenant.spec(PROMPT, 100, seed=SEED + 1)
    pair = await asyncio.gather(*(tenant.generate(spec, request_id=request_id) for _ in range(2)))
    answers = [*pair, await tenant.generate(spec, request_id=request_id)]
    ids = {answer.generation_id for answer in answers}
    expect_equal(len(ids), 1, "generations of three unary calls")
    for answer in answers[1:]:
        expect_equal(answer.charge, answers[0].charge, "charge of a repeated unary call")
        expect_same_text(answer.outputs[0].text, answers[0].outputs[0].text, "repeated answer")
    record = await books.record(ids.pop())
    expect_equal(record.charge, answers[0].charge, "charge of the unary usage record")
    trial.show("three unary calls, one generation")
    return answers[0].charge.nanos


async def _race(trial: Trial, tenant: Tenant, books: Books) -> int:
    """Repeats that arrive together: exactly one of them starts something."""
    request_id = new_request_id()
    spec = tenant.spec(PROMPT, 30, seed=SEED + 2)
    racers = await asyncio.gather(
        *(tenant.read(spec, request_id=request_id, may_merge=True) for _ in range(_RACERS))
    )
    starts = [racer.started for racer in racers if racer.started is not None]
    firsts = sum(not start.replayed for start in starts)
    expect_equal(firsts, 1, f"requests of {_RACERS} at once that are not repeats")
    expect_equal(len({racer.generation_id for racer in racers}), 1, "generations of the race")
    expect_equal(len({racer.text for racer in racers}), 1, "different texts of the race")
    record = await books.record(racers[0].generation_id)
    trial.show(f"{_RACERS} at once, one generation")
    return record.charge.nanos


async def _other_body(trial: Trial, tenant: Tenant, request_id: str) -> None:
    spec = tenant.spec(PROMPT, 150, seed=SEED + 9)
    async with tenant.stream(spec, request_id=request_id) as reading:
        refusal = await reading.refusal("a used request_id with another body")
    refusal.expect(Code.INVALID_ARGUMENT, Reason.REQUEST_ID_REUSED, "another body, stream")
    try:
        await tenant.generate(spec, request_id=request_id)
    except Refusal as other:
        other.expect(Code.INVALID_ARGUMENT, Reason.REQUEST_ID_REUSED, "another body, unary")
    else:
        raise Mismatch("another body under a used request_id was answered")
    trial.show("another body is refused")


async def _other_project(trial: Trial, request_id: str) -> None:
    if trial.desk is None:
        trial.lack("the same request_id of another project: needs --admin-endpoint")
        return
    key = await trial.new_key(of_other_project=True)
    async with trial.tenant(key.secret) as stranger:
        own = await stranger.read(stranger.spec(PROMPT, 10, seed=SEED), request_id=request_id)
    assert own.started is not None
    expect(not own.started.replayed, "another project's request joined a foreign generation")
    trial.show("another project's same request_id is its own")


async def _after_the_window(
    trial: Trial, tenant: Tenant, request_id: str, first: Transcript
) -> None:
    window_s = trial.deployment.replay_window_s
    await asyncio.sleep(window_s + 1.0)
    spec = tenant.spec(PROMPT, 150, seed=SEED)
    async with tenant.stream(spec, request_id=request_id) as reading:
        refusal = await reading.refusal("a repeat behind the replay window")
    refusal.expect(Code.ALREADY_EXISTS, Reason.GENERATION_SETTLED, "behind the replay window")
    assert first.finished is not None
    wanted = {
        "requestId": request_id,
        "generationId": first.generation_id,
        "inputTokens": str(first.finished.usage.input_tokens),
        "outputTokens": str(first.finished.usage.output_tokens),
        "chargeNanos": str(first.finished.charge.nanos),
        "currency": first.finished.charge.currency_code,
    }
    expect_equal(refusal.metadata, wanted, "metadata of GENERATION_SETTLED")
    trial.show(f"behind the window of {window_s:g} s GENERATION_SETTLED with the counts")


def new_request_id() -> str:
    """An idempotency key that nobody has used."""
    return f"conformance-{secrets.token_hex(8)}"
