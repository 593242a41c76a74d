"""One request for each flag of Capabilities, and what has to be seen when it is true."""

from __future__ import annotations

import json
import math
import re
from asyncio import gather
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from maas.common.v1 import capabilities_pb2
from maas.inference.v1 import constraint_pb2, embedding_service_pb2, generation_pb2, tools_pb2

from tools.conformance.client import Tenant
from tools.conformance.requests import (
    CITY,
    CONSTRAINED_TOKENS,
    PROMPT,
    SEED,
    TOKENS,
    Request,
    Spec,
    begin_alike,
    constrained,
    greedy,
    matches,
    tool,
    user,
)
from tools.conformance.verdict import CannotShow, expect, expect_equal

OUTPUTS_MAX = 16
"""Most outputs of a request, whatever the flag says: the contract has no more."""
_LONG = 300
_SEEDS = 12
"""Outputs of _LONG tokens, of which one has to end before by itself."""
_UNIT = 1e-3
_FORCED = 100.0

Whole = generation_pb2.Generation


@dataclass(frozen=True, slots=True)
class Probe:
    """How a flag is shown.

    Attributes:
        path: of the field that a refusal names.
        show: uses the flag and looks at what comes; takes the number of a flag that is one.
        make: the request whose field depends on the flag, with the number; None where no field
            does: such a flag is information.
        under: other flags that this request depends on, in the order of the contract's fields: the
            first of them that is false is the one that is refused.
        also: requests whose refusal names another field that depends on the flag, by its path.
    """

    path: str
    show: Callable[[Tenant, int], Awaitable[None]]
    make: Callable[[Tenant, int], Request] | None
    under: tuple[str, ...] = ()
    also: Mapping[str, Callable[[Tenant], Request]] = field(default_factory=dict)


def _whole(generation: Whole, what: str) -> str:
    """Text of an output that ended by itself."""
    output = generation.outputs[0]
    expect_equal(output.end.reason, generation_pb2.FINISH_REASON_END, f"finish reason of {what}")
    return output.text


def _chat(tenant: Tenant, _: int = 0) -> Spec:
    spec = greedy(tenant)
    spec.chat.messages.append(user("What is the weather in Paris?"))
    return spec


async def _show_chat(tenant: Tenant, _: int) -> None:
    generation = await tenant.generate(_chat(tenant))
    typed = await tenant.tokenize("What is the weather in Paris?")
    expect(
        generation.usage.input_tokens > len(typed),
        "a conversation has no more tokens than its text",
    )


def _tools(tenant: Tenant, _: int = 0) -> Spec:
    spec = _chat(tenant)
    spec.tools.tools.append(tool("get_weather", CITY, strict=False))
    return spec


async def _show_tools(tenant: Tenant, _: int) -> None:
    told, untold = await tenant.count(_tools(tenant)), await tenant.count(_chat(tenant))
    expect(told > untold, "a tool adds no token to the prompt")
    for call in (await tenant.generate(_tools(tenant))).outputs[0].tool_calls:
        expect_equal(call.name, "get_weather", "name of the called tool")


def _strict(tenant: Tenant, _: int = 0) -> Spec:
    spec = _chat(tenant)
    spec.stop.max_output_tokens = CONSTRAINED_TOKENS
    spec.tools.tools.append(tool("get_weather", CITY, strict=True))
    spec.tools.mode = tools_pb2.TOOL_MODE_REQUIRED
    spec.tools.parallel_calls = False
    return spec


async def _show_strict(tenant: Tenant, _: int) -> None:
    output = (await tenant.generate(_strict(tenant))).outputs[0]
    expect_equal(output.end.reason, generation_pb2.FINISH_REASON_TOOL_CALLS, "finish reason")
    expect_equal(len(output.tool_calls), 1, "calls")
    is_valid = matches(output.tool_calls[0].arguments_json, CITY)
    expect(is_valid, "the arguments do not match their schema")
    expect(not output.text.strip(), "a required call came with text")


def _reasoning(tenant: Tenant, _: int = 0) -> Spec:
    spec = _chat(tenant)
    spec.stop.max_output_tokens = CONSTRAINED_TOKENS
    spec.reasoning.enabled = True
    return spec


async def _show_reasoning(tenant: Tenant, _: int) -> None:
    spec = _reasoning(tenant)
    shown = await tenant.generate(spec)
    counted = shown.usage.reasoning_tokens
    length = len(shown.outputs[0].reasoning)
    expect(length > 0 and counted > 0, f"reasoning of {length} characters, {counted} tokens")
    spec.output.return_reasoning = False
    hidden = await tenant.generate(spec)
    expect(not hidden.outputs[0].reasoning, "reasoning was shown that nobody asked for")
    expect_equal(hidden.usage.reasoning_tokens, counted, "hidden reasoning is counted")


def _hidden_reasoning(tenant: Tenant) -> Spec:
    spec = greedy(tenant)
    spec.output.return_reasoning = False
    return spec


def _json_object(tenant: Tenant, _: int = 0) -> Spec:
    kind = constraint_pb2.OutputConstraint(json_object=constraint_pb2.JsonObject())
    return constrained(tenant, kind)


async def _show_json_object(tenant: Tenant, _: int) -> None:
    spec = _json_object(tenant)
    # Objects may be of any size: most models end theirs soon, and a beginning is allowed too.
    output = (await tenant.generate(spec)).outputs[0]
    if output.end.reason == generation_pb2.FINISH_REASON_END:
        expect(matches(output.text, {"type": "object"}), "the output is no JSON object")
    expect(output.text.lstrip().startswith("{"), "the output does not begin like a JSON object")


def _json_schema(tenant: Tenant, _: int = 0) -> Spec:
    return constrained(tenant, constraint_pb2.OutputConstraint(json_schema=json.dumps(CITY)))


async def _show_json_schema(tenant: Tenant, _: int) -> None:
    text = _whole(await tenant.generate(_json_schema(tenant)), "a JSON schema")
    expect(matches(text, CITY), "the output does not match its schema")


_REGEX = r"[a-c]{3}-[0-9]{2,4}"


def _regex(tenant: Tenant, _: int = 0) -> Spec:
    return constrained(tenant, constraint_pb2.OutputConstraint(regex=_REGEX))


async def _show_regex(tenant: Tenant, _: int) -> None:
    text = _whole(await tenant.generate(_regex(tenant)), "a regular expression")
    expect(re.fullmatch(_REGEX, text) is not None, "the output does not match the expression")


_GRAMMAR = 'root ::= "(" inner ")"\ninner ::= "x" | "y" | "(" "z" ")"\n'
_GRAMMAR_SAYS = ("(x)", "(y)", "((z))")


def _grammar(tenant: Tenant, _: int = 0) -> Spec:
    return constrained(tenant, constraint_pb2.OutputConstraint(grammar=_GRAMMAR))


async def _show_grammar(tenant: Tenant, _: int) -> None:
    text = _whole(await tenant.generate(_grammar(tenant)), "a grammar")
    expect(text in _GRAMMAR_SAYS, "the grammar does not make the output")


_CHOICES = ("red", "green", "dark green")


def _choices(tenant: Tenant, _: int = 0) -> Spec:
    kind = constraint_pb2.OutputConstraint(choices=constraint_pb2.Choices(values=_CHOICES))
    return constrained(tenant, kind)


async def _show_choices(tenant: Tenant, _: int) -> None:
    text = _whole(await tenant.generate(_choices(tenant)), "choices")
    expect(text in _CHOICES, "the output is none of the choices")


def _min_p(tenant: Tenant, _: int = 0) -> Spec:
    spec = greedy(tenant)
    spec.sampling.temperature = 2
    spec.sampling.min_p = 1
    return spec


async def _show_min_p(tenant: Tenant, _: int) -> None:
    only_best, best = await tenant.generate(_min_p(tenant)), await tenant.generate(greedy(tenant))
    expect(begin_alike(only_best, best), "min_p 1 leaves more than the likeliest token")


def _penalties(tenant: Tenant, _: int = 0) -> Spec:
    spec = greedy(tenant)
    spec.sampling.frequency_penalty = 2
    spec.sampling.presence_penalty = 2
    return spec


def _most_repeated(generation: Whole) -> int:
    return max(Counter(generation.outputs[0].token_ids).values(), default=0)


async def _show_penalties(tenant: Tenant, _: int) -> None:
    rewarded = greedy(tenant)
    rewarded.sampling.frequency_penalty = -2
    rewarded.sampling.presence_penalty = -2
    few = _most_repeated(await tenant.generate(_penalties(tenant)))
    many = _most_repeated(await tenant.generate(rewarded))
    expect(few < many, f"penalised, a token came {few} times; rewarded, {many} times")
    for name in ("frequency_penalty", "presence_penalty"):
        outputs = []
        for penalty in (2, -2):
            spec = greedy(tenant)
            setattr(spec.sampling, name, penalty)
            outputs.append(list((await tenant.generate(spec)).outputs[0].token_ids))
        expect(outputs[0] != outputs[1], f"{name} by itself changes nothing")


def _presence(tenant: Tenant) -> Spec:
    spec = greedy(tenant)
    spec.sampling.presence_penalty = 1
    return spec


def _repetition(tenant: Tenant, _: int = 0) -> Spec:
    spec = greedy(tenant)
    spec.sampling.repetition_penalty = 10
    return spec


async def _show_repetition(tenant: Tenant, _: int) -> None:
    rewarded = greedy(tenant)
    rewarded.sampling.repetition_penalty = 0.1
    few = _most_repeated(await tenant.generate(_repetition(tenant)))
    many = _most_repeated(await tenant.generate(rewarded))
    expect(few < many, f"penalised, a token came {few} times; rewarded, {many} times")


def _bias(tenant: Tenant, _: int = 0) -> Spec:
    spec = greedy(tenant)
    spec.sampling.logit_bias[3] = -_FORCED
    return spec


async def _show_bias(tenant: Tenant, _: int) -> None:
    plain = list((await tenant.generate(greedy(tenant))).outputs[0].token_ids)
    wanted = plain[0]
    forced, forbidden = greedy(tenant), greedy(tenant)
    forced.stop.ignore_eos = True
    forced.sampling.logit_bias[wanted] = _FORCED
    forbidden.sampling.logit_bias[wanted] = -_FORCED
    only = (await tenant.generate(forced)).outputs[0].token_ids
    never = (await tenant.generate(forbidden)).outputs[0].token_ids
    expect(set(only) == {wanted}, "a bias of 100 does not force a token")
    expect(wanted not in never, "a bias of -100 does not forbid a token")


def _min_tokens(tenant: Tenant, _: int = 0) -> Spec:
    spec = greedy(tenant)
    spec.stop.min_output_tokens = TOKENS
    return spec


async def _ending(tenant: Tenant) -> tuple[Spec, int]:
    """A request whose output ends by itself, and after how many tokens.

    Raises:
        CannotShow: the model has more to say, whatever the seed.
    """
    specs = [greedy(tenant, _LONG) for _ in range(_SEEDS)]
    for number, spec in enumerate(specs):
        spec.sampling.temperature = 1
        spec.sampling.seed = SEED + number
    for spec, generation in zip(specs, await gather(*map(tenant.generate, specs)), strict=True):
        if generation.outputs[0].end.reason == generation_pb2.FINISH_REASON_END:
            return spec, generation.usage.output_tokens
    raise CannotShow(f"no output of {_SEEDS} ended by itself within {_LONG} tokens")


async def _show_min_tokens(tenant: Tenant, _: int) -> None:
    spec, ended = await _ending(tenant)
    spec.stop.min_output_tokens = min(ended + 20, _LONG)
    usage = (await tenant.generate(spec)).usage
    least = spec.stop.min_output_tokens
    expect(usage.output_tokens >= least, f"{usage.output_tokens} tokens, not {least} at least")


def _ignore_eos(tenant: Tenant, _: int = 0) -> Spec:
    spec = greedy(tenant)
    spec.stop.ignore_eos = True
    return spec


async def _show_ignore_eos(tenant: Tenant, _: int) -> None:
    spec, _ended = await _ending(tenant)
    spec.stop.ignore_eos = True
    usage = (await tenant.generate(spec)).usage
    expect_equal(usage.output_tokens, _LONG, "output tokens past the end of sequence")


def _count(tenant: Tenant, number: int) -> Spec:
    spec = greedy(tenant, 8)
    spec.sampling.temperature = 1
    spec.output.count = min(number, OUTPUTS_MAX)
    return spec


async def _show_count(tenant: Tenant, number: int) -> None:
    wanted = min(number, OUTPUTS_MAX)
    generation = await tenant.generate(_count(tenant, wanted))
    expect_equal([output.index for output in generation.outputs], list(range(wanted)), "outputs")
    counts = [len(output.token_ids) for output in generation.outputs]
    expect_equal(generation.usage.output_tokens, sum(counts), "output tokens of all outputs")


def _logprobs(tenant: Tenant, _: int = 0) -> Spec:
    spec = greedy(tenant)
    spec.output.return_logprobs = True
    return spec


async def _show_logprobs(tenant: Tenant, _: int) -> None:
    output = (await tenant.generate(_logprobs(tenant))).outputs[0]
    expect(list(output.scores.token_ids) == list(output.token_ids), "scores are of other tokens")
    expect_equal(len(output.scores.logprobs), len(output.token_ids), "log-probabilities")
    expect(all(-math.inf < item <= _UNIT for item in output.scores.logprobs), "one is out of range")


def _top_logprobs(tenant: Tenant, number: int) -> Spec:
    spec = _logprobs(tenant)
    spec.output.top_logprobs = number
    return spec


async def _show_top_logprobs(tenant: Tenant, number: int) -> None:
    output = (await tenant.generate(_top_logprobs(tenant, number))).outputs[0]
    scores, rows = output.scores, len(output.token_ids)
    expect_equal(scores.top_count, number, "alternatives of a token")
    expect_equal(len(scores.top_token_ids), rows * number, "alternatives")
    for row in range(rows):
        place = slice(row * number, (row + 1) * number)
        top = list(scores.top_logprobs[place])
        expect(top == sorted(top, reverse=True), f"alternatives of token {row} are not in order")
        expect(sum(map(math.exp, top)) <= 1 + _UNIT, f"those of token {row} are more than all")
        is_first = scores.top_token_ids[place][0] == output.token_ids[row]
        expect(is_first, f"token {row} is not the likeliest of its alternatives")


def _prompt_logprobs(tenant: Tenant, _: int = 0) -> Spec:
    spec = greedy(tenant, 4)
    spec.output.return_prompt_logprobs = True
    return spec


async def _show_prompt_logprobs(tenant: Tenant, _: int) -> None:
    spec = _prompt_logprobs(tenant)
    generation, streamed = await gather(tenant.generate(spec), tenant.read(spec))
    scores = generation.prompt_scores.scores
    found = list(scores.logprobs)
    expect_equal(len(found), generation.usage.input_tokens, "log-probabilities of the prompt")
    expect(math.isnan(found[0]), "the first token of the prompt has a log-probability")
    expect(all(item <= _UNIT for item in found[1:]), "one of the prompt is above 0")
    ids = list(scores.token_ids)
    is_prompt = ids == await tenant.tokenize(PROMPT, as_prompt=True)
    expect(is_prompt, "scores of the prompt are of other tokens")
    is_same = list(streamed.prompt_scores.token_ids) == ids
    expect(is_same, "scores of the prompt, stream against unary")
    expect_equal(len(streamed.prompt_scores.logprobs), len(found), "the same, streamed")


def _adapter(tenant: Tenant, _: int = 0) -> Spec:
    spec = greedy(tenant)
    spec.adapter = "adapters/none-such"
    return spec


async def _show_adapter(tenant: Tenant, _: int) -> None:
    """Shown by W-17, which has an adapter: here, one that is not there is no unknown feature."""
    del tenant


def _embed(_: Tenant, number: int) -> embedding_service_pb2.EmbedRequest:
    return embedding_service_pb2.EmbedRequest(
        inputs=[embedding_service_pb2.EmbedInput(text=PROMPT)], dimensions=number
    )


def _embed_as_made(_: Tenant) -> embedding_service_pb2.EmbedRequest:
    return embedding_service_pb2.EmbedRequest(
        inputs=[embedding_service_pb2.EmbedInput(text=PROMPT)]
    )


async def _show_embed(tenant: Tenant, number: int) -> None:
    values = (await tenant.embed(_embed(tenant, number))).embeddings[0].values
    expect_equal(len(values), number, "numbers of an embedding")
    expect(abs(math.hypot(*values) - 1) < _UNIT, "the length of an embedding is not 1")


async def _show_cache(tenant: Tenant, _: int) -> None:
    spec = greedy(tenant, 4)
    spec.text = " ".join(f"{PROMPT} {number}." for number in range(16))
    # Each worker has a cache of its own.
    spec.cache.affinity_key = "conformance"
    first, second = await tenant.generate(spec), await tenant.generate(spec)
    expect(second.usage.cached_input_tokens > 0, "the same prompt again found nothing in the cache")
    same = list(first.outputs[0].token_ids) == list(second.outputs[0].token_ids)
    expect(same, "a cached prompt gives another output")


async def _show_deterministic(tenant: Tenant, _: int) -> None:
    spec = greedy(tenant)
    spec.sampling.temperature = 1
    one, other = await tenant.generate(spec), await tenant.generate(spec)
    same = list(one.outputs[0].token_ids) == list(other.outputs[0].token_ids)
    expect(same, "the same seed gave another output")


PROBES: Mapping[str, Probe] = MappingProxyType(
    {
        "chat": Probe("spec.chat", _show_chat, _chat),
        "tool_calls": Probe("spec.tools", _show_tools, _tools, ("chat",)),
        "strict_tools": Probe(
            "spec.tools.tools[0].strict", _show_strict, _strict, ("chat", "tool_calls")
        ),
        "reasoning": Probe(
            "spec.reasoning",
            _show_reasoning,
            _reasoning,
            ("chat",),
            {"spec.output.return_reasoning": _hidden_reasoning},
        ),
        "json_object": Probe("spec.constraint.json_object", _show_json_object, _json_object),
        "json_schema": Probe("spec.constraint.json_schema", _show_json_schema, _json_schema),
        "regex": Probe("spec.constraint.regex", _show_regex, _regex),
        "grammar": Probe("spec.constraint.grammar", _show_grammar, _grammar),
        "choices": Probe("spec.constraint.choices", _show_choices, _choices),
        "min_p": Probe("spec.sampling.min_p", _show_min_p, _min_p),
        "penalties": Probe(
            "spec.sampling.frequency_penalty",
            _show_penalties,
            _penalties,
            also={"spec.sampling.presence_penalty": _presence},
        ),
        "repetition_penalty": Probe(
            "spec.sampling.repetition_penalty", _show_repetition, _repetition
        ),
        "logit_bias": Probe("spec.sampling.logit_bias", _show_bias, _bias),
        "min_output_tokens": Probe("spec.stop.min_output_tokens", _show_min_tokens, _min_tokens),
        "ignore_eos": Probe("spec.stop.ignore_eos", _show_ignore_eos, _ignore_eos),
        "max_outputs": Probe("spec.output.count", _show_count, _count),
        "logprobs": Probe("spec.output.return_logprobs", _show_logprobs, _logprobs),
        "max_top_logprobs": Probe(
            "spec.output.top_logprobs", _show_top_logprobs, _top_logprobs, ("logprobs",)
        ),
        "prompt_logprobs": Probe(
            "spec.output.return_prompt_logprobs", _show_prompt_logprobs, _prompt_logprobs
        ),
        "adapters": Probe("spec.adapter", _show_adapter, _adapter),
        "embedding_dimensions": Probe(
            "dimensions", _show_embed, _embed, also={"model": _embed_as_made}
        ),
        "prompt_cache": Probe("", _show_cache, None),
        "deterministic": Probe("", _show_deterministic, None),
    }
)
"""By flag; one for each."""

assert set(PROBES) == set(capabilities_pb2.Capabilities.DESCRIPTOR.fields_by_name)
