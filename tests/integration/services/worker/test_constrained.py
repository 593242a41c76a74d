"""Constraints, calls and reasoning from the contract to the simulated engine and back."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
from maas.engine.v1 import engine_pb2
from maas.engine.v1 import engine_service_pb2 as pb
from maas.inference.v1 import generation_pb2, tools_pb2

from libs.errors import InvalidArgument, Reason
from tests.integration.services.worker.harness import Told, execution, running_worker

USER = generation_pb2.ROLE_USER
END = generation_pb2.FINISH_REASON_END
TOKENS = 200
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def asked(lane: int = 1) -> engine_pb2.Execution:
    return execution(lane, tokens=TOKENS, chat=[(USER, "What is the weather like?")])


def with_tools(made: engine_pb2.Execution, *, strict: bool = False) -> engine_pb2.Execution:
    for name in ("weather", "clock"):
        made.tools.tools.add(name=name, parameters_json_schema=json.dumps(SCHEMA), strict=strict)
    return made


def calls_of(told: Told) -> list[tuple[str, str]]:
    """Name and arguments of each call."""
    calls: dict[int, tuple[str, str]] = {}
    for part in told.segments:
        if part.HasField("tool_call"):
            name, arguments = calls.get(part.tool_call.call_index, ("", ""))
            calls[part.tool_call.call_index] = (
                name + part.tool_call.name,
                arguments + part.tool_call.arguments_json,
            )
    return [calls[index] for index in sorted(calls)]


async def test_an_output_matches_its_schema_and_others_are_free() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        made = asked()
        made.constraint.json_schema = json.dumps(SCHEMA)
        await gateway.send(made, execution(2, tokens=20))
        await gateway.until_ended(1, 2)

        jsonschema.validate(json.loads(gateway.told[1].text), SCHEMA)
        assert gateway.told[1].end.reason == END
        assert len(gateway.told[2].token_ids) == 20


async def test_every_output_of_a_request_matches() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        made = execution(1, tokens=TOKENS, more_lanes=[2, 3])
        made.constraint.regex = "(yes|no), [a-f]{3,5}!"
        await gateway.send(made)
        await gateway.until_ended(1, 2, 3)

        for lane in (1, 2, 3):
            assert re.fullmatch(made.constraint.regex, gateway.told[lane].text)


async def test_a_required_call_is_made_and_nothing_else_is_said() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        made = with_tools(asked())
        made.tools.mode = tools_pb2.TOOL_MODE_REQUIRED
        made.tools.required_tool = "clock"
        made.tools.parallel_calls = False
        told = await gateway.run(made)

        ((name, arguments),) = calls_of(told)
        assert name == "clock"
        jsonschema.validate(json.loads(arguments), SCHEMA)
        assert not told.text
        assert told.end.reason == generation_pb2.FINISH_REASON_TOOL_CALLS


async def test_a_bad_schema_is_refused_by_its_field_and_harms_nobody() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        made = asked()
        made.constraint.json_schema = '{"type": "nonsense"}'
        await gateway.send(made, execution(2, tokens=20))
        await gateway.until_ended(1, 2)

        assert gateway.told[1].reason == "BAD_OUTPUT_CONSTRAINT"
        assert gateway.told[1].failure.metadata["field"] == "spec.constraint.json_schema"
        assert len(gateway.told[2].token_ids) == 20


async def test_a_count_compiles_the_constraint_too() -> None:
    async with running_worker() as worker:
        made = asked()
        made.constraint.regex = "(unclosed"
        with pytest.raises(InvalidArgument) as caught:
            await worker.peer.call(worker.stub.CountTokens, pb.CountTokensRequest(execution=made))

        assert caught.value.reason is Reason.BAD_OUTPUT_CONSTRAINT


async def test_the_simulator_thinks_when_it_is_told_to() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        made = asked()
        made.reasoning.enabled = True
        made.output.return_logprobs = True
        told = await gateway.run(made)

        reasoning = "".join(part.reasoning for part in told.segments)
        assert reasoning
        assert "<think>" not in reasoning
        assert "</think>" not in told.text
        assert 0 < told.reasoning_tokens < len(told.token_ids)
        assert len(told.scores.logprobs) == len(told.token_ids)


async def test_the_second_of_two_equal_prompts_finds_the_first_in_the_cache() -> None:
    prompt = list(range(65, 65 + 64))
    async with running_worker() as worker, worker.gateway() as gateway:
        found = []
        for lane, salt in enumerate((b"mine", b"mine", b"other"), start=1):
            made = execution(lane, ids=prompt, tokens=4)
            made.cache_salt = salt
            found.append((await gateway.run(made)).cached_tokens)
        bypassing = execution(9, ids=prompt, tokens=4)
        bypassing.cache_salt = b"mine"
        bypassing.bypass_cache = True
        found.append((await gateway.run(bypassing)).cached_tokens)

        first, second, other, bypassed = found
        assert first is None
        assert second is not None
        assert 0 < second < len(prompt)
        assert (other, bypassed) == (None, None)


async def test_an_adapter_changes_what_the_simulator_says() -> None:
    async with running_worker() as worker, worker.gateway() as gateway:
        plain = await gateway.run(execution(1, tokens=20))
        adapted = execution(2, tokens=20)
        adapted.adapter.CopyFrom(
            engine_pb2.AdapterRef(name="adapters/a", path="a", digest="sha256:" + "ab" * 32)
        )
        told = await gateway.run(adapted)

        assert told.token_ids != plain.token_ids
        assert worker.engine.load().resident_adapters == ("adapters/a",)
