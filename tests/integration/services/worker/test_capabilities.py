"""What a worker says that it can do, and the refusal of what it cannot: for each flag."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from maas.common.v1 import capabilities_pb2
from maas.engine.v1 import engine_pb2
from maas.engine.v1 import engine_service_pb2 as pb
from maas.inference.v1 import constraint_pb2, generation_pb2, tools_pb2

from libs.errors import InvalidArgument, Reason
from services.worker.engine.base import EngineAbilities, StepBatch
from services.worker.model import TextSettings
from tests.integration.services.worker.harness import (
    MODEL_VERSION,
    TOKENIZER,
    Worker,
    eventually,
    execution,
    running_worker,
)
from tests.integration.services.worker.scripted import CAPACITY, DIMENSIONS, ScriptedEngine

USER = generation_pb2.ROLE_USER
Change = Callable[[engine_pb2.Execution], object]


def chat(made: engine_pb2.Execution) -> None:
    made.chat.messages.add(role=USER).parts.add(text="x")


def tools(made: engine_pb2.Execution) -> tools_pb2.Tool:
    chat(made)
    return made.tools.tools.add(name="f")


def required(made: engine_pb2.Execution) -> None:
    tools(made)
    made.tools.mode = tools_pb2.TOOL_MODE_REQUIRED


def strict(made: engine_pb2.Execution) -> None:
    tools(made).strict = True


def reasoning(made: engine_pb2.Execution) -> None:
    chat(made)
    made.reasoning.enabled = True


def adapter(made: engine_pb2.Execution) -> None:
    made.adapter.name = "adapters/a"
    made.adapter.path = "a"
    made.adapter.digest = "sha256:" + "0" * 64


NEEDS: dict[str, tuple[str, Change]] = {
    "spec.reasoning": ("reasoning", reasoning),
    "spec.adapter": ("adapters", adapter),
    "spec.sampling.min_p": ("min_p", lambda made: setattr(made.sampling, "min_p", 0.5)),
    "spec.sampling.frequency_penalty": (
        "penalties",
        lambda made: setattr(made.sampling, "frequency_penalty", 0.5),
    ),
    "spec.sampling.repetition_penalty": (
        "repetition_penalty",
        lambda made: setattr(made.sampling, "repetition_penalty", 1.5),
    ),
    "spec.sampling.logit_bias": (
        "logit_bias",
        lambda made: made.sampling.logit_bias.update({5: 1.0}),
    ),
    "spec.stop.min_output_tokens": (
        "min_output_tokens",
        lambda made: setattr(made.stop, "min_output_tokens", 2),
    ),
    "spec.stop.ignore_eos": ("ignore_eos", lambda made: setattr(made.stop, "ignore_eos", True)),
    "spec.output.return_logprobs": (
        "logprobs",
        lambda made: setattr(made.output, "return_logprobs", True),
    ),
    "spec.output.return_prompt_logprobs": (
        "prompt_logprobs",
        lambda made: setattr(made.output, "return_prompt_logprobs", True),
    ),
    "spec.constraint.json_object": (
        "json_object",
        lambda made: made.constraint.json_object.CopyFrom(constraint_pb2.JsonObject()),
    ),
    "spec.constraint.json_schema": (
        "json_schema",
        lambda made: setattr(made.constraint, "json_schema", "{}"),
    ),
    "spec.constraint.regex": ("regex", lambda made: setattr(made.constraint, "regex", "a+")),
    "spec.constraint.grammar": (
        "grammar",
        lambda made: setattr(made.constraint, "grammar", 'root ::= "a"'),
    ),
    "spec.constraint.choices": (
        "choices",
        lambda made: made.constraint.choices.values.append("a"),
    ),
    "spec.tools.mode": ("strict_tools", required),
    "spec.tools.tools[0].strict": ("strict_tools", strict),
}


async def capabilities(worker: Worker) -> capabilities_pb2.Capabilities:
    answer = await worker.peer.call(worker.stub.GetEngineInfo, pb.GetEngineInfoRequest())
    assert isinstance(answer, pb.GetEngineInfoResponse)
    return answer.info.capabilities


async def test_engine_and_template_together_say_what_can_be_done() -> None:
    engine = ScriptedEngine(TOKENIZER.vocabulary_size)
    async with running_worker(engine=engine) as worker:
        found = await capabilities(worker)

        for field in capabilities_pb2.Capabilities.DESCRIPTOR.fields:
            assert getattr(found, field.name), field.name
        assert found.max_outputs == CAPACITY
        assert found.embedding_dimensions == DIMENSIONS
        assert found.max_top_logprobs == 20


async def test_without_a_template_there_are_no_chats_and_nothing_that_needs_one() -> None:
    engine = ScriptedEngine(TOKENIZER.vocabulary_size)
    async with running_worker(engine=engine, chat_template="") as worker:
        found = await capabilities(worker)

        flags = (found.chat, found.tool_calls, found.strict_tools, found.reasoning)
        assert flags == (False, False, False, False)
        assert found.logprobs


@pytest.mark.parametrize("path", NEEDS)
async def test_what_is_false_is_refused_by_its_public_field(path: str) -> None:
    flag, change = NEEDS[path]
    engine = ScriptedEngine(TOKENIZER.vocabulary_size, abilities=EngineAbilities())
    # Knows tools and no reasoning, so that it is the engine that cannot.
    template = "{% if tools %}<tool_call>{% endif %}{{ messages[0].content }}"
    async with (
        running_worker(engine=engine, chat_template=template) as worker,
        worker.gateway() as gateway,
    ):
        assert not getattr(await capabilities(worker), flag)
        made = execution(1)
        change(made)

        told = await gateway.run(made)

        assert told.reason == "FEATURE_UNSUPPORTED"
        assert told.failure.metadata["feature"] == flag
        assert told.failure.message.startswith(f"{path}:")
        assert engine.requests == {}


async def test_embedding_that_is_switched_off_is_refused() -> None:
    engine = ScriptedEngine(TOKENIZER.vocabulary_size)
    off = TextSettings(disabled=frozenset({"embedding_dimensions"}))
    async with running_worker(engine=engine, settings=off) as worker:
        assert not (await capabilities(worker)).embedding_dimensions
        asked = pb.EmbedRequest(execution_id="e", model_version=MODEL_VERSION)
        asked.inputs.add(text="x")

        with pytest.raises(InvalidArgument) as caught:
            await worker.peer.call(worker.stub.Embed, asked)

        assert caught.value.reason is Reason.FEATURE_UNSUPPORTED


async def test_reasoning_that_is_switched_off_is_not_split_from_the_text() -> None:
    engine = ScriptedEngine(TOKENIZER.vocabulary_size)
    off = TextSettings(disabled=frozenset({"reasoning"}))
    text = b"<think>a</think>b"
    async with (
        running_worker(engine=engine, settings=off) as worker,
        worker.gateway() as gateway,
    ):
        made = execution(1, tokens=400)
        chat(made)
        await gateway.send(made)
        await eventually(lambda: bool(engine.running))
        (lane,) = engine.running
        for token_id in text:
            engine.say(StepBatch(lanes=[lane], token_ids=[token_id]))
        engine.end(lane)
        await gateway.until_ended(1)

        assert gateway.told[1].text == text.decode()


async def test_tools_need_a_template_that_shows_them() -> None:
    engine = ScriptedEngine(TOKENIZER.vocabulary_size)
    async with (
        running_worker(engine=engine, chat_template="{{ messages[0].content }}") as worker,
        worker.gateway() as gateway,
    ):
        made = execution(1)
        tools(made)

        assert (await gateway.run(made)).failure.metadata["feature"] == "tool_calls"


async def test_what_goes_to_the_engine_is_what_was_asked_for() -> None:
    engine = ScriptedEngine(TOKENIZER.vocabulary_size)
    async with running_worker(engine=engine) as worker, worker.gateway() as gateway:
        made = execution(1, tokens=50)
        made.sampling.min_p = 0.25
        made.sampling.frequency_penalty = 0.5
        made.sampling.presence_penalty = -0.5
        made.sampling.repetition_penalty = 1.5
        made.sampling.logit_bias.update({9: -1.0, 3: 2.0})
        made.stop.min_output_tokens = 5
        made.cache_salt = b"salt"
        made.bypass_cache = True
        made.priority = generation_pb2.PRIORITY_CLASS_BACKGROUND
        await gateway.send(made, execution(2))
        await gateway.read()

        rich, plain = (engine.requests[lane] for lane in sorted(engine.requests))
        sampling = rich.sampling
        assert (sampling.min_p, sampling.frequency_penalty) == (0.25, 0.5)
        assert (sampling.presence_penalty, sampling.repetition_penalty) == (-0.5, 1.5)
        assert sampling.logit_bias == ((3, 2.0), (9, -1.0))
        assert (rich.min_output_tokens, rich.cache_salt) == (5, b"salt")
        assert (rich.reads_cache, rich.is_background) == (False, True)
        assert plain.sampling.repetition_penalty == 1.0
        assert (plain.reads_cache, plain.is_background) == (True, False)
        assert plain.sampling.logit_bias == ()
