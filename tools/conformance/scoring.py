"""Features of several outputs, log-probabilities and stop sequences that stay: W-13."""

from __future__ import annotations

import asyncio
import math

from maas.inference.v1 import generation_pb2

from tools.conformance.client import Tenant
from tools.conformance.delivery import stop_inside
from tools.conformance.probes import greedy
from tools.conformance.trial import Trial
from tools.conformance.verdict import expect, expect_equal, expect_same_text

_OUTPUTS = 4
_TOP = 5
_PADDING = 0xFFFFFFFF
_CLOSE = 1e-4
_STOP_LENGTH = 9


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
        trial.show("include_stop keeps the stop sequence and counts it")


async def _several(trial: Trial, tenant: Tenant) -> None:
    spec = greedy(tenant, 40)
    spec.sampling.temperature = 1
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
    scores = output.scores
    expect_equal(list(scores.token_ids), list(output.token_ids), "tokens of the scores")
    expect_equal(streamed.first.scores, scores, "scores, stream against unary")
    for row, chosen in enumerate(scores.logprobs):
        ids = list(scores.top_token_ids[row * top : (row + 1) * top])
        logs = list(scores.top_logprobs[row * top : (row + 1) * top])
        if not ids:
            continue
        expect_equal(ids[0], scores.token_ids[row], f"likeliest token at position {row}")
        expect(abs(logs[0] - chosen) < _CLOSE, f"two log-probabilities of token {row}")
        padded = [log for place, log in zip(ids, logs, strict=True) if place == _PADDING]
        expect(all(log == -math.inf for log in padded), f"padding of token {row}")
    text = b"".join(scores.token_bytes).decode("utf-8", "replace")
    expect_same_text(text, output.text, "bytes of the tokens against the text")
    return f"{len(scores.logprobs)} log-probabilities with {top} alternatives, bytes make the text"


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
    expect_equal(output.end.stop_sequence, stop, "stop sequence that the end names")
    expect(
        len(output.token_ids) > len(without.token_ids),
        "the stop sequence stayed and was not counted",
    )
