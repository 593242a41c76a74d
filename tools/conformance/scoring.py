"""Features of several outputs, log-probabilities and stop sequences that stay: W-13."""

from __future__ import annotations

import asyncio
import math

from maas.inference.v1 import generation_pb2, scores_pb2

from tools.conformance.client import Tenant
from tools.conformance.delivery import stop_inside
from tools.conformance.requests import begin_alike, greedy
from tools.conformance.trial import Trial
from tools.conformance.verdict import expect, expect_equal, expect_same_text

_OUTPUTS = 4
_TOP = 5
_PADDING = 0xFFFFFFFF
_CLOSE = 1e-4
_BATCH_CLOSE = 1e-2
"""Two runs of an engine that batches add the same numbers in another order."""
_STOP_LENGTH = 9
_LONG = 800
_TIME_MS = 150


async def outputs_share_the_prompt(trial: Trial) -> None:
    """W-13: several outputs for one prompt; scores of each token; a stop that stays."""
    async with trial.tenant() as tenant:
        can = (await tenant.capabilities()).capabilities
        if can.max_outputs >= _OUTPUTS:
            await _several(trial, tenant)
        else:
            trial.lack(f"outputs: at most {can.max_outputs}")
        if can.logprobs:
            top = min(can.max_top_logprobs, _TOP)
            trial.show(await _scores(tenant, top))
        else:
            trial.lack("log-probabilities: the model gives none")
        await _stop_stays(tenant)
        await _stop_token(tenant)
        trial.show("include_stop keeps the stop sequence and counts it, a stop token ends")
        await _filters(tenant)
        trial.show("top_k 1 and the smallest top_p leave the likeliest token")
        await _time_limit(trial, tenant)


async def _several(trial: Trial, tenant: Tenant) -> None:
    spec = greedy(tenant, 40)
    spec.sampling.temperature = 1
    spec.labels["conformance"], spec.end_user = "W-13", "somebody"
    # What the one finds in the cache, the other may not: then their charges differ.
    spec.cache.bypass = True
    one = await tenant.generate(spec)
    spec.output.count = _OUTPUTS
    whole, streamed = await asyncio.gather(tenant.generate(spec), tenant.read(spec))
    usage = whole.usage
    expect_equal(usage.input_tokens, one.usage.input_tokens, "input tokens of several outputs")
    counts = [len(output.token_ids) for output in whole.outputs]
    expect_equal(len(counts), _OUTPUTS, "outputs")
    expect_equal(usage.output_tokens, sum(counts), "output tokens of several outputs")
    texts = [output.text for output in whole.outputs]
    expect(len(set(texts)) == _OUTPUTS, "outputs repeat each other")
    expect_same_text(texts[0], one.outputs[0].text, "output 0 against a single one")
    for output in whole.outputs:
        seen = streamed.outputs[output.index]
        expect_same_text(seen.text, output.text, f"output {output.index}, stream against unary")
        expect(seen.token_ids == list(output.token_ids), "token ids differ")
        expect_equal(seen.end, output.end, f"end of output {output.index}")
    assert streamed.finished is not None
    expect_equal(streamed.finished.charge, whole.charge, "charge of several outputs")
    trial.show(f"{_OUTPUTS} outputs of {counts} tokens, {usage.input_tokens} prompt tokens once")
    if trial.books is None:
        trial.lack("usage record: needs --billing")
        return
    record = await trial.books.record(whole.generation_id)
    expect_equal(record.usage, usage, "usage of the record")
    expect_equal(record.charge, whole.charge, "charge of the record")
    expect_equal(dict(record.labels), dict(spec.labels), "labels of the record")
    expect_equal(record.end_user, spec.end_user, "end user of the record")
    expect(await trial.books.is_priced(record), "the charge is not the price of prompt and outputs")
    trial.show("charged as counted, labels in the record")


async def _scores(tenant: Tenant, top: int) -> str:
    spec = greedy(tenant, 40)
    spec.output.return_logprobs = True
    spec.output.top_logprobs = top
    spec.output.return_token_bytes = True
    plain, whole, streamed = await asyncio.gather(
        tenant.generate(greedy(tenant, 40)), tenant.generate(spec), tenant.read(spec)
    )
    output = whole.outputs[0]
    expect_same_text(output.text, plain.outputs[0].text, "output with scores against one without")
    _check_scores(output, top)
    _check_same(streamed.first.scores, output.scores)
    text = b"".join(output.scores.token_bytes).decode("utf-8", "replace")
    expect_same_text(text, output.text, "bytes of the tokens against the text")
    if top:
        await _before_temperature(tenant, spec, output.scores, top)
    return f"{len(output.token_ids)} log-probabilities with {top} alternatives, bytes make the text"


def _check_scores(output: generation_pb2.Output, top: int) -> None:
    """Each chosen token is the likeliest, with one log-probability; the rest in order."""
    scores, rows = output.scores, len(output.token_ids)
    expect(list(scores.token_ids) == list(output.token_ids), "scores are of other tokens")
    counts = (len(scores.logprobs), len(scores.token_bytes), len(scores.top_token_ids))
    expect_equal(counts, (rows, rows, rows * top), "log-probabilities, bytes and alternatives")
    expect_equal(scores.top_count, top, "alternatives of a token")
    expect_equal(len(scores.top_logprobs), rows * top, "log-probabilities of alternatives")
    for row, chosen in enumerate(scores.logprobs if top else ()):
        place = slice(row * top, (row + 1) * top)
        ids, logs = list(scores.top_token_ids[place]), list(scores.top_logprobs[place])
        expect(ids[0] == scores.token_ids[row], f"token {row} is not the likeliest")
        expect(abs(logs[0] - chosen) < _CLOSE, f"two log-probabilities of token {row}")
        expect(logs == sorted(logs, reverse=True), f"alternatives of token {row} are not in order")
        padded = [log for place, log in zip(ids, logs, strict=True) if place == _PADDING]
        expect(all(log == -math.inf for log in padded), f"padding of token {row}")


def _check_same(streamed: scores_pb2.TokenScores, whole: scores_pb2.TokenScores) -> None:
    """The same columns; numbers may differ as much as those of two batches of an engine."""
    for column in ("token_ids", "top_count", "token_bytes"):
        is_same = getattr(streamed, column) == getattr(whole, column)
        expect(is_same, f"{column} of the scores differ, stream against unary")
    for column in ("logprobs", "top_logprobs"):
        one, other = getattr(streamed, column), getattr(whole, column)
        expect_equal(len(one), len(other), f"{column}, stream against unary")
        is_same = all(
            left == right or abs(left - right) < _BATCH_CLOSE
            for left, right in zip(one, other, strict=True)
        )
        expect(is_same, f"{column} of the scores differ, stream against unary")


async def _before_temperature(
    tenant: Tenant, spec: generation_pb2.GenerationSpec, cool: scores_pb2.TokenScores, top: int
) -> None:
    """Scores are those of the model itself: a temperature changes none of the first token."""
    hot = generation_pb2.GenerationSpec()
    hot.CopyFrom(spec)
    hot.sampling.temperature = 2
    scores = (await tenant.generate(hot)).outputs[0].scores
    far = max(
        abs(left - right)
        for left, right in zip(scores.top_logprobs[:top], cool.top_logprobs[:top], strict=True)
    )
    expect(far < _BATCH_CLOSE, f"a temperature moves log-probabilities by {far:.3f}")


async def _stop_stays(tenant: Tenant) -> None:
    spec = greedy(tenant, 120)
    spec.sampling.temperature = 1
    spec.stop.ignore_eos = (await tenant.capabilities()).capabilities.ignore_eos
    text = (await tenant.generate(spec)).outputs[0].text
    at, stop = stop_inside(text, _STOP_LENGTH)
    spec.stop.stop_sequences.append(stop)
    without = (await tenant.generate(spec)).outputs[0]
    spec.stop.include_stop = True
    kept, streamed = await asyncio.gather(tenant.generate(spec), tenant.read(spec))
    output = kept.outputs[0]
    expect_same_text(without.text, text[:at], "output before the stop sequence")
    expect_same_text(output.text, text[: at + len(stop)], "output with the stop sequence")
    expect_same_text(streamed.text, output.text, "stream against unary")
    expect_equal(output.end.reason, generation_pb2.FINISH_REASON_STOP_SEQUENCE, "finish reason")
    expect(output.end.stop_sequence == stop, "the end names another stop sequence")
    expect(
        len(output.token_ids) > len(without.token_ids),
        "the stop sequence stayed and was not counted",
    )


async def _stop_token(tenant: Tenant) -> None:
    spec = greedy(tenant, 120)
    spec.sampling.temperature = 1
    ids = list((await tenant.generate(spec)).outputs[0].token_ids)
    # One that comes for the first time, somewhere in the middle.
    at = next(place for place in range(len(ids) // 2, -1, -1) if ids.index(ids[place]) == place)
    spec.stop.stop_token_ids.append(ids[at])
    output = (await tenant.generate(spec)).outputs[0]
    expect(list(output.token_ids) == ids[:at], "a stop token id does not end the output before it")
    reason = generation_pb2.FINISH_REASON_STOP_SEQUENCE
    expect_equal(output.end.reason, reason, "finish reason with a stop token")
    expect(output.end.stop_token_id == ids[at], "the end names another stop token")


async def _filters(tenant: Tenant) -> None:
    best = await tenant.generate(greedy(tenant, 40))
    for name, value in (("top_k", 1), ("top_p", 1e-6)):
        spec = greedy(tenant, 40)
        spec.sampling.temperature = 2
        setattr(spec.sampling, name, value)
        is_best = begin_alike(await tenant.generate(spec), best)
        expect(is_best, f"{name} {value} leaves more than the likeliest token")


async def _time_limit(trial: Trial, tenant: Tenant) -> None:
    """A call that has had its time ends well, and pays for what it has got."""
    spec = greedy(tenant, _LONG)
    spec.stop.ignore_eos = (await tenant.capabilities()).capabilities.ignore_eos
    spec.max_duration.FromMilliseconds(_TIME_MS)
    generation = await tenant.generate(spec)
    end, count = generation.outputs[0].end.reason, generation.usage.output_tokens
    if end in {generation_pb2.FINISH_REASON_MAX_TOKENS, generation_pb2.FINISH_REASON_END}:
        trial.lack(f"max_duration: an output of {count} tokens took less than {_TIME_MS} ms")
        return
    expect_equal(end, generation_pb2.FINISH_REASON_TIME_LIMIT, "finish reason at max_duration")
    expect(0 < count < _LONG, f"{count} tokens within max_duration")
    trial.show(f"{count} tokens within a max_duration of {_TIME_MS} ms")
