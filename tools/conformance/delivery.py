"""Features of how output arrives: W-1, W-3, W-5, W-6, frames."""

from __future__ import annotations

import asyncio
import itertools
import statistics

from google.protobuf import duration_pb2
from maas.billing.v1 import ledger_pb2
from maas.inference.v1 import generation_pb2
from maas.inference.v1 import generation_service_pb2 as generations

from libs.errors import Code, Reason
from tools.conformance.client import Reading, Tenant
from tools.conformance.frames import Transcript
from tools.conformance.trial import Trial
from tools.conformance.verdict import Mismatch, expect, expect_equal, expect_same_text

PROMPT = "Once upon a time"
SEED = 20_260_101
_REPLACEMENT = "\ufffd"
_STOP_LENGTH = 11
_STALLED_TOKENS = 4000
_DETACHED_TOKENS = 1000
_INTERVAL_TOKENS_MIN = 4
_ALONE_FACTOR_MAX = 2.0
_CONCURRENT = 32
_CONCURRENT_FACTOR_MAX = 8.0


def stop_inside(text: str, length: int) -> tuple[int, str]:
    """Finds a piece of a text that could be a stop sequence; returns its place and the piece.

    It lies in the second half, stands there for the first time, and spans several words, so that
    it comes in several tokens.

    Raises:
        Mismatch: there is none, so the text repeats itself.
    """
    for at in range(len(text) // 2, len(text) - length):
        piece = text[at : at + length]
        if text.find(piece) == at and piece.strip() == piece and " " in piece:
            return at, piece
    raise Mismatch("the output has no piece that could be a stop sequence")


async def deltas_make_the_answer(trial: Trial) -> None:
    """W-1: numbered frames whose deltas are the unary answer; stop sequences never half shown."""
    async with trial.tenant() as tenant:
        spec = tenant.spec(PROMPT, 300, seed=SEED)
        whole, other = await asyncio.gather(
            tenant.generate(spec), tenant.generate(tenant.spec(PROMPT, 300, seed=SEED + 1))
        )
        text = whole.outputs[0].text
        expect(other.outputs[0].text != text, "two seeds gave the same output: seeds do nothing")
        streamed = await tenant.read(spec)
        expect_same_text(streamed.text, text, "deltas against the unary answer")
        expect(streamed.token_ids == list(whole.outputs[0].token_ids), "token ids differ")
        expect(_REPLACEMENT not in streamed.text, "a character was cut: U+FFFD in the output")
        expect(streamed.deltas > 1, "all output came in one delta")
        trial.show(
            f"{streamed.output_tokens} tokens in {streamed.frames} frames equal the unary answer"
        )
        at, stop = stop_inside(text, _STOP_LENGTH)
        await _stop_is_hidden(tenant, text, at, stop)
        trial.show(f"stop sequence at character {at} never shown")
        await _no_stop_is_released(tenant, text, stop)
        trial.show("a stop sequence that did not complete is delivered")


async def _stop_is_hidden(tenant: Tenant, text: str, at: int, stop: str) -> None:
    async with tenant.stream(tenant.spec(PROMPT, 300, seed=SEED, stops=[stop])) as reading:
        while await reading.read() is not None:
            shown = reading.transcript.text
            expect(len(shown) <= at, f"{len(shown) - at} characters of a stop sequence were shown")
        expect_same_text(reading.transcript.text, text[:at], "text before the stop sequence")
        end = reading.transcript.end
        assert end is not None
        expect_equal(end.reason, generation_pb2.FINISH_REASON_STOP_SEQUENCE, "finish reason")
        expect(end.stop_sequence == stop, "the end names another stop sequence")


async def _no_stop_is_released(tenant: Tenant, text: str, stop: str) -> None:
    """Begins like the output and never completes: the text has to come all the same."""
    spec = tenant.spec(PROMPT, 300, seed=SEED, stops=[stop[:-1] + "\x07"])
    expect_same_text((await tenant.read(spec)).text, text, "text that only began like a stop")


async def unary_is_the_stream(trial: Trial) -> None:
    """W-3: the same result and the same charge."""
    async with trial.tenant() as tenant:
        spec = tenant.spec(PROMPT, 120, seed=SEED)
        whole, streamed = await tenant.generate(spec), await tenant.read(spec)
    finished, output = streamed.finished, whole.outputs[0]
    assert finished is not None
    assert streamed.started is not None
    expect_same_text(streamed.text, output.text, "stream against unary")
    expect_equal(len(whole.outputs), 1, "outputs")
    expect(streamed.token_ids == list(output.token_ids), "token ids differ")
    expect_equal(streamed.end, output.end, "end")
    expect_equal(finished.usage, whole.usage, "usage")
    expect_equal(finished.charge, whole.charge, "charge")
    expect_equal(streamed.started.model_version, whole.model_version, "model version")
    expect(streamed.generation_id != whole.generation_id, "two requests had one generation")
    trial.show(f"{whole.usage.output_tokens} tokens and {whole.charge.nanos} nanos either way")
    if trial.books is None:
        trial.lack("usage records: needs --billing")
        return
    for generation_id in (whole.generation_id, streamed.generation_id):
        record = await trial.books.record(generation_id)
        expect_equal(record.charge, whole.charge, "charge of the usage record")
        expect_equal(record.usage, whole.usage, "usage of the usage record")
        expect_equal(record.end_cause, ledger_pb2.END_CAUSE_COMPLETED, "end cause")
    trial.show("two usage records say the same")


async def streams_share_the_engine(trial: Trial) -> None:
    """W-5: 32 streams at once take less than eight times as long as one."""
    loop = asyncio.get_running_loop()
    async with trial.tenants(_CONCURRENT) as tenants:
        specs = [
            tenant.spec(PROMPT, 128, seed=SEED + number) for number, tenant in enumerate(tenants)
        ]
        await tenants[0].read(specs[0])
        started_s = loop.time()
        await tenants[0].read(specs[0])
        one_s = loop.time() - started_s
        started_s = loop.time()
        everything = await asyncio.gather(
            *(tenant.read(spec) for tenant, spec in zip(tenants, specs, strict=True))
        )
        all_s = loop.time() - started_s
    counts = {item.output_tokens for item in everything}
    expect_equal(counts, {128}, "tokens of the streams")
    factor = all_s / one_s
    text = f"32 streams {all_s:.2f} s, one {one_s:.2f} s: {factor:.1f} times"
    expect(factor < _CONCURRENT_FACTOR_MAX, f"expected less than 8 times, got {text}")
    trial.show(text)


async def stalled_reader_harms_nobody(trial: Trial) -> None:
    """W-6: a client that stops reading is cut off and pays; others keep their pace."""
    books = trial.require_books()
    limit_s = trial.deployment.stall_limit_s
    loop = asyncio.get_running_loop()
    async with trial.tenant(is_narrow=True) as slow, trial.tenant() as quick:
        alone_s = await _duration(quick)
        async with slow.stream(slow.spec(PROMPT, _STALLED_TOKENS, seed=SEED)) as reading:
            await reading.until(10)
            stopped_s = loop.time()
            beside_s = statistics.median([await _duration(quick) for _ in range(3)])
            expect(
                beside_s < _ALONE_FACTOR_MAX * alone_s,
                f"another stream took {alone_s:.2f} s alone and {beside_s:.2f} s beside the stall",
            )
            # The server looks eight times in a limit; the rest is for a busy machine.
            await asyncio.sleep(max(0.0, stopped_s + 1.25 * limit_s + 1.0 - loop.time()))
            record = await books.record(reading.transcript.generation_id)
            expect_equal(record.end_cause, ledger_pb2.END_CAUSE_STALLED, "end cause")
            refusal = await reading.refusal("a client that stopped reading")
            refusal.expect(Code.ABORTED, Reason.CONSUMER_STALLED, "a client that stopped reading")
            received = reading.transcript.output_tokens
    life_s = record.end_time.ToNanoseconds() / 1e9 - record.start_time.ToNanoseconds() / 1e9
    expect(life_s >= limit_s, f"cut off after {life_s:.2f} s, before the limit of {limit_s:g} s")
    billed = record.usage.output_tokens
    expect(
        received <= billed < _STALLED_TOKENS,
        f"received {received} of {billed} billed, all asked for",
    )
    expect(record.charge.nanos > 0, "a stalled client was not charged")
    trial.show(
        f"cut off {life_s:.1f} s after its start (limit {limit_s:g} s), {billed} tokens billed,"
        f" {received} read at last; another stream {alone_s:.2f} s alone, {beside_s:.2f} s beside"
    )
    await _stalled_detached(trial)


async def _stalled_detached(trial: Trial) -> None:
    """With CONTINUE the reader is cut off too, but the generation goes on and can be read."""
    detached = generations.StreamOptions(on_disconnect=generations.DISCONNECT_POLICY_CONTINUE)
    limit_s = trial.deployment.stall_limit_s
    async with trial.tenant(is_narrow=True) as slow, trial.tenant() as quick:
        spec = slow.spec(PROMPT, _DETACHED_TOKENS, seed=SEED)
        async with slow.stream(spec, options=detached) as reading:
            await reading.until(10)
            await asyncio.sleep(1.25 * limit_s + 1.0)
            generation_id = reading.transcript.generation_id
            refusal = await reading.refusal("a detached client that stopped reading")
            refusal.expect(Code.ABORTED, Reason.CONSUMER_STALLED, "a detached stalled client")
        again = Transcript(with_token_ids=True)
        async with quick.resume(generation_id, again) as reading:
            await reading.to_end()
        expect_equal(again.output_tokens, _DETACHED_TOKENS, "tokens of the resumed generation")
    trial.show(f"with CONTINUE all {_DETACHED_TOKENS} tokens were resumed")


async def _duration(tenant: Tenant) -> float:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    await tenant.read(tenant.spec(PROMPT, 100, seed=SEED))
    return loop.time() - started_s


INTERVAL_S = 0.08
_SLOW_READ_S = 0.02
_TOKENS = 400


async def frames_follow_interval_and_reader(trial: Trial) -> None:
    """Frames: one token each for a quick reader, one an interval where asked, more for a slow one.

    The rate of tokens is measured first: what an interval holds follows from it.
    """
    async with trial.tenant() as tenant, trial.tenant(is_narrow=True) as narrow:
        spec = tenant.spec(PROMPT, _TOKENS, seed=SEED)
        async with tenant.stream(spec) as reading:
            plain = await reading.to_end()
            rate = _rate(reading)
        await _interval_is_kept(trial, tenant, plain, rate)
        await _bad_intervals_are_refused(trial, tenant)
        await _slow_reader_gets_more(trial, narrow, plain)


async def _interval_is_kept(trial: Trial, tenant: Tenant, plain: Transcript, rate: float) -> None:
    expect(
        plain.deltas > plain.output_tokens / 2,
        f"expected about a token a frame, got {plain.output_tokens} in {plain.deltas} deltas",
    )
    options = generations.StreamOptions(frame_interval=_duration_to_pb(INTERVAL_S))
    async with tenant.stream(tenant.spec(PROMPT, _TOKENS, seed=SEED), options=options) as reading:
        packed = await reading.to_end()
    expect_same_text(packed.text, plain.text, "text with a frame_interval")
    # From the first delta on; the last one may come early.
    times = [item.at_s for item in reading.arrivals[1:-1]]
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    gap_s = statistics.median(gaps)
    wanted = plain.output_tokens / (rate * INTERVAL_S)
    facts = (
        f"{packed.deltas} deltas, {gap_s * 1e3:.0f} ms apart, where {wanted:.0f} were due in"
        f" {plain.output_tokens / rate:.2f} s"
    )
    if rate * INTERVAL_S < _INTERVAL_TOKENS_MIN:
        trial.lack(f"frame_interval: at {rate:.0f} tokens/s an interval holds too few tokens")
        return
    expect(0.6 * INTERVAL_S <= gap_s <= 1.6 * INTERVAL_S, f"expected 80 ms, got {facts}")
    expect(wanted / 2 <= packed.deltas <= 1.5 * wanted + 2, f"80 ms frames: {facts}")
    trial.show(
        f"{plain.deltas} deltas for {plain.output_tokens} tokens; with an interval of 80 ms {facts}"
    )


async def _bad_intervals_are_refused(trial: Trial, tenant: Tenant) -> None:
    for seconds in (-0.1, 1.5):
        options = generations.StreamOptions(frame_interval=_duration_to_pb(seconds))
        async with tenant.stream(tenant.spec(PROMPT, 5, seed=SEED), options=options) as reading:
            refusal = await reading.refusal(f"frame_interval of {seconds} s")
        refusal.expect(Code.INVALID_ARGUMENT, Reason.INVALID_FIELD, f"interval of {seconds} s")
        expect_equal(refusal.fields, ("stream.frame_interval",), "bad field")
    trial.show("intervals of -0.1 s and 1.5 s are refused")


async def _slow_reader_gets_more(trial: Trial, narrow: Tenant, plain: Transcript) -> None:
    async with narrow.stream(narrow.spec(PROMPT, _TOKENS, seed=SEED)) as reading:
        for _ in range(_TOKENS + 3):
            if await reading.read() is None:
                break
            await asyncio.sleep(_SLOW_READ_S)
    slow = reading.transcript
    expect_same_text(slow.text, plain.text, "text of a slow reader")
    expect(
        slow.deltas < 0.75 * plain.deltas,
        f"a slow reader got {slow.deltas} deltas, a quick one {plain.deltas}: nothing was packed",
    )
    trial.show(f"a reader that takes 50 frames a second got the same text in {slow.deltas} deltas")


def _rate(reading: Reading) -> float:
    """Tokens a second between the first and the last delta."""
    first, last = reading.arrivals[1], reading.arrivals[-1]
    return (last.output_tokens - first.output_tokens) / (last.at_s - first.at_s)


def _duration_to_pb(seconds: float) -> duration_pb2.Duration:
    message = duration_pb2.Duration()
    message.FromNanoseconds(round(seconds * 1e9))
    return message
