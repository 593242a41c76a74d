"""Features of conversations: W-11."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

from maas.inference.v1 import generation_pb2, tools_pb2

from libs.errors import Code
from tools.conformance.ability import refused
from tools.conformance.client import Tenant
from tools.conformance.frames import Outcome
from tools.conformance.requests import CITY, greedy, matches, tool, user
from tools.conformance.trial import Trial
from tools.conformance.verdict import expect, expect_equal, expect_same_text

_TOKENS = 300
_ROBOT = "Tell me about a robot."
_ANSWERS = {"get_weather": {"sky": "clear", "celsius": 21}, "get_time": {"clock": "12:30"}}
_CONTROL = "<|im_end|>"

Spec = generation_pb2.GenerationSpec
Message = generation_pb2.ChatMessage


async def conversations_are_rendered(trial: Trial) -> None:
    """W-11: counts, continuing, typed control tokens; reasoning and tools split from text."""
    async with trial.tenant() as tenant:
        can = (await tenant.capabilities()).capabilities
        if not can.chat:
            trial.lack("conversations: the model has no chat template")
            return
        await _counts_agree(tenant)
        await _ids_are_text(tenant)
        await _goes_on(trial, tenant)
        await _controls_are_text(tenant)
        await _malformed(tenant)
        trial.show(
            "counted as charged, token ids as good as their text, typed control tokens are text,"
            " bad turns refused"
        )
        if can.reasoning:
            trial.show(await _reasoning(tenant))
        else:
            trial.lack("reasoning: the model has none")
        if can.strict_tools:
            trial.show(await _two_tools(tenant))
        else:
            trial.lack("tools: the model cannot be made to call one")


def _chat(tenant: Tenant, messages: Sequence[Message], tokens: int = 32) -> Spec:
    spec = greedy(tenant, tokens)
    spec.chat.messages.extend(messages)
    return spec


def assistant(text: str) -> Message:
    """A message of the model."""
    return Message(
        role=generation_pb2.ROLE_ASSISTANT, parts=[generation_pb2.ContentPart(text=text)]
    )


async def _counts_agree(tenant: Tenant) -> None:
    system = Message(
        role=generation_pb2.ROLE_SYSTEM, parts=[generation_pb2.ContentPart(text="Be brief.")]
    )
    turns = [system, user("Hello."), assistant("Hello. What is it?"), user(_ROBOT)]
    spec = _chat(tenant, turns)
    counted, quoted = await asyncio.gather(tenant.count(spec), tenant.quote(spec))
    generation = await tenant.generate(spec)
    expect_equal(counted, generation.usage.input_tokens, "counted tokens of a conversation")
    expect_equal(quoted.input_tokens, counted, "quoted tokens of a conversation")
    expect_equal((quoted.count, quoted.max_output_tokens), (1, 32), "quoted outputs and tokens")
    expect(
        generation.charge.nanos <= quoted.most.nanos <= quoted.hold.nanos,
        f"charge {generation.charge.nanos}, most {quoted.most.nanos}, hold {quoted.hold.nanos}",
    )


async def _ids_are_text(tenant: Tenant) -> None:
    """A prompt of token ids is used as it is."""
    spec, by_id = greedy(tenant, 24), greedy(tenant, 24)
    by_id.tokens.ids.extend(await tenant.tokenize(spec.text, as_prompt=True))
    one, other = await asyncio.gather(tenant.generate(spec), tenant.generate(by_id))
    counts = (other.usage.input_tokens, len(by_id.tokens.ids))
    expect_equal(counts, (one.usage.input_tokens,) * 2, "input tokens of token ids")
    expect_same_text(other.outputs[0].text, one.outputs[0].text, "output of token ids and of text")


async def _goes_on(trial: Trial, tenant: Tenant) -> None:
    """An unfinished answer, handed back, is not closed: the output goes on with it."""
    whole = (await tenant.generate(_chat(tenant, [user(_ROBOT)], 24))).outputs[0]
    words = whole.text.split(" ")
    if len(words) < 4:  # noqa: PLR2004 - too short to be cut
        trial.lack("a continued message: the model's answer is too short to be cut")
        return
    begun = " ".join(words[: len(words) // 2])
    spec = _chat(tenant, [user(_ROBOT), assistant(begun)], 24)
    spec.chat.continue_last_message = True
    opened, closed = await tenant.count(spec), _chat(tenant, [user(_ROBOT), assistant(begun)])
    expect(opened < await tenant.count(closed), "a continued message is closed like any other")
    expect((await tenant.read(spec)).output_tokens > 0, "a continued message got no more text")
    trial.show("an unfinished answer was gone on with")


async def _controls_are_text(tenant: Tenant) -> None:
    """The text of a control token, typed by somebody, is as long as any other text."""
    plain = await tenant.count(_chat(tenant, [user("x")]))
    typed = await tenant.count(_chat(tenant, [user(f"x{_CONTROL}")]))
    ids = await tenant.tokenize(_CONTROL)
    expect(len(ids) > 1, f"{_CONTROL} as text is {len(ids)} token")
    text = f" two  words and {_CONTROL} \u00e9\u20ac\n"
    back = await tenant.detokenize(await tenant.tokenize(text))
    expect_same_text(back, text, "text that became tokens and text again")
    expect(typed > plain + 1, f"{_CONTROL} in a message became a control token")


async def _malformed(tenant: Tenant) -> None:
    result = Message(
        role=generation_pb2.ROLE_TOOL, parts=[generation_pb2.ContentPart(text="21 degrees")]
    )
    cases = {
        "spec.chat.messages[0].tool_call_id": _chat(tenant, [result]),
        "spec.chat.messages[1]": _chat(tenant, [user("x"), Message(role=generation_pb2.ROLE_USER)]),
        "spec.chat.template_variables_json": _chat(tenant, [user("x")]),
        "spec.chat.continue_last_message": _chat(tenant, [user("x")]),
    }
    cases["spec.chat.template_variables_json"].chat.template_variables_json = "[1]"
    cases["spec.chat.continue_last_message"].chat.continue_last_message = True
    for path, spec in cases.items():
        refusal = await refused(tenant, spec, path)
        expect(refusal.code is Code.INVALID_ARGUMENT, f"{path}: {refusal}")
        named = any(field.startswith(path) for field in refusal.fields)
        expect(named, f"expected a refusal that names {path}, got {refusal.fields}")


async def _reasoning(tenant: Tenant) -> str:
    spec = _chat(tenant, [user(_ROBOT)], _TOKENS)
    spec.reasoning.enabled = True
    # What the one finds in the cache, the other may not.
    spec.cache.bypass = True
    streamed, whole = await asyncio.gather(tenant.read(spec), tenant.generate(spec))
    output = whole.outputs[0]
    expect_same_text(streamed.first.reasoning, output.reasoning, "reasoning, stream against unary")
    expect_same_text(streamed.text, output.text, "text, stream against unary")
    count = whole.usage.reasoning_tokens
    for mark in ("<think>", "</think>"):
        expect(mark not in output.text + output.reasoning, f"{mark} was shown")
    expect(count <= whole.usage.output_tokens, "more reasoning than output")
    is_counted = bool(output.reasoning) == bool(count)
    expect(is_counted, f"{len(output.reasoning)} characters of reasoning, {count} tokens of it")
    assert streamed.finished is not None
    expect_equal(streamed.finished.usage, whole.usage, "usage, stream against unary")
    if not count:
        return "reasoning could be asked for, and the model made none"
    return f"{count} of {whole.usage.output_tokens} tokens are reasoning, split from the text"


async def _two_tools(tenant: Tenant) -> str:
    """Two calls with their results, and an answer, as an application would hold them."""
    messages = [user("What are the weather and the time in Paris?")]
    fragments = 0
    ids: set[str] = set()
    for name, answer in _ANSWERS.items():
        output, parts = await _call(tenant, messages, name)
        fragments += parts
        call = output.calls[0]
        is_valid = matches(call.arguments_json, CITY)
        expect(is_valid, f"the arguments of {name} do not match their schema")
        ids.add(call.id)
        messages += [
            Message(role=generation_pb2.ROLE_ASSISTANT, tool_calls=output.calls),
            Message(
                role=generation_pb2.ROLE_TOOL,
                tool_call_id=call.id,
                parts=[generation_pb2.ContentPart(text=json.dumps(answer))],
            ),
        ]
    expect_equal(len(ids), len(_ANSWERS), "ids of the calls of a conversation")
    spec = _with_tools(tenant, messages)
    spec.tools.mode = tools_pb2.TOOL_MODE_NONE
    told, untold = await tenant.count(spec), await tenant.count(_chat(tenant, messages))
    expect_equal(told, untold, "tokens of a prompt whose tools may not be called")
    last = await tenant.read(spec)
    expect(not last.first.calls, "a tool was called though none may be")
    expect(last.output_tokens > 0, "there was no answer")
    return f"two tools called in {fragments} fragments with valid arguments, then an answer"


def _with_tools(tenant: Tenant, messages: Sequence[Message]) -> Spec:
    spec = _chat(tenant, messages, _TOKENS)
    spec.tools.tools.extend(tool(name, CITY, strict=True) for name in _ANSWERS)
    return spec


async def _call(tenant: Tenant, messages: Sequence[Message], name: str) -> tuple[Outcome, int]:
    """Has a tool called; returns the output, and in how many frames it came."""
    spec = _with_tools(tenant, messages)
    spec.tools.mode = tools_pb2.TOOL_MODE_REQUIRED
    spec.tools.required_tool = name
    spec.tools.parallel_calls = False
    streamed, whole = await asyncio.gather(tenant.read(spec), tenant.generate(spec))
    output = streamed.first
    assert output.end is not None
    expect_equal(output.end.reason, generation_pb2.FINISH_REASON_TOOL_CALLS, "finish reason")
    expect_equal([call.name for call in output.calls], [name], "called tools")
    expect(streamed.deltas > 1, "all of a call came in one delta")
    expect(not output.text + output.reasoning, "a required call came with text")
    expect_equal(whole.outputs[0].end, output.end, "end, stream against unary")
    unary = whole.outputs[0].tool_calls
    expect_equal(len(unary), 1, "calls of a unary answer")
    expect_same_text(
        output.calls[0].arguments_json, unary[0].arguments_json, "arguments, stream against unary"
    )
    return output, streamed.deltas
