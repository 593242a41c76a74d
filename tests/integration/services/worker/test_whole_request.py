"""The whole request against llama.cpp and our own small model, templates and all."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import jsonschema
import numpy as np
from maas.engine.v1 import engine_pb2
from maas.engine.v1 import engine_service_pb2 as pb
from maas.inference.v1 import embedding_service_pb2, generation_pb2, tools_pb2

from services.worker import templates
from services.worker.engine.llamacpp import LlamaCppEngine
from services.worker.engine.llamacpp_tokenizer import LlamaCppTokenizer
from services.worker.model import TextSettings
from tests.integration.services.worker.harness import (
    MODEL_VERSION,
    Worker,
    execution,
    running_worker,
)

MODEL = Path("services/worker/models/maas-tiny-story.gguf").absolute()
USER = generation_pb2.ROLE_USER
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@asynccontextmanager
async def llamacpp_worker() -> AsyncIterator[Worker]:
    """Our model, with the template that knows tools and thinking."""
    engine = LlamaCppEngine(MODEL, capacity=4, threads=1)
    async with running_worker(
        engine=engine,
        tokenizer=LlamaCppTokenizer(MODEL),
        settings=TextSettings(chat_template=templates.load("chatml_tools")),
    ) as worker:
        yield worker


def asked(lane: int = 1) -> engine_pb2.Execution:
    return execution(lane, tokens=120, chat=[(USER, "Who is there?")])


async def test_a_schema_several_outputs_and_log_probabilities_at_once() -> None:
    async with llamacpp_worker() as worker, worker.gateway() as gateway:
        made = asked()
        made.constraint.json_schema = json.dumps(SCHEMA)
        made.more_lanes.append(2)
        made.output.CopyFrom(
            generation_pb2.OutputOptions(count=2, return_logprobs=True, top_logprobs=3)
        )
        await gateway.send(made)
        await gateway.until_ended(1, 2)

        for lane in (1, 2):
            told = gateway.told[lane]
            assert told.end.reason == generation_pb2.FINISH_REASON_END
            jsonschema.validate(json.loads(told.text), SCHEMA)
            assert len(told.scores.logprobs) == len(told.token_ids)
            assert len(told.scores.top_token_ids) == 3 * len(told.token_ids)


async def test_a_required_call_is_split_from_the_text() -> None:
    async with llamacpp_worker() as worker, worker.gateway() as gateway:
        made = asked()
        made.tools.tools.add(name="greet", parameters_json_schema=json.dumps(SCHEMA))
        made.tools.mode = tools_pb2.TOOL_MODE_REQUIRED
        made.tools.parallel_calls = False
        told = await gateway.run(made)

        calls = [part.tool_call for part in told.segments if part.HasField("tool_call")]
        assert calls[0].name == "greet"
        jsonschema.validate(json.loads("".join(call.arguments_json for call in calls)), SCHEMA)
        assert told.end.reason == generation_pb2.FINISH_REASON_TOOL_CALLS


async def test_inputs_are_embedded_beside_what_is_generated() -> None:
    async with llamacpp_worker() as worker, worker.gateway() as gateway:
        await gateway.send(execution(1, tokens=60))
        texts = ["a fox", "a fox", "the sea at night"]
        answer = await worker.peer.call(
            worker.stub.Embed,
            pb.EmbedRequest(
                execution_id="embed",
                model_version=MODEL_VERSION,
                inputs=[embedding_service_pb2.EmbedInput(text=text) for text in texts],
            ),
        )
        await gateway.until_ended(1)

        vectors = np.frombuffer(answer.vectors, dtype="<f4").reshape(3, answer.dimensions)
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
        assert len(gateway.told[1].token_ids) > 0
