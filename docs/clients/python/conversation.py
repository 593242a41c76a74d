"""A conversation with two tools over gRPC, through the client generated from protos/.

    . .maas/dev.env && .venv/bin/python docs/clients/python/conversation.py

The model is made to call each tool once, with arguments that match the tool's schema; their results
go back to it, and it answers in words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import grpc
from maas.common.v1 import usage_pb2
from maas.inference.v1 import generation_pb2, generation_service_pb2, tools_pb2
from maas.inference.v1.generation_service_pb2_grpc import GenerationServiceStub

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
)

Work = Callable[[dict[str, str]], dict[str, object]]

# What the application can do: a description for the model, and the work itself.
TOOLS: dict[str, tuple[str, Work]] = {
    "get_weather": (
        "Gets the weather of a city.",
        lambda arguments: {**arguments, "sky": "clear", "celsius": 21},
    ),
    "get_time": ("Gets the time in a city.", lambda arguments: {**arguments, "clock": "12:30"}),
}

Message = generation_pb2.ChatMessage


def text(role: generation_pb2.Role.ValueType, words: str, tool_call_id: str = "") -> Message:
    """A message of text."""
    parts = [generation_pb2.ContentPart(text=words)]
    return Message(role=role, parts=parts, tool_call_id=tool_call_id)


class Conversation:
    """Messages so far, and the model that they are held with."""

    def __init__(self, channel: grpc.Channel, key: str, model: str) -> None:
        self.messages: list[Message] = []
        self._stub = GenerationServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._model = model

    def turn(
        self, mode: tools_pb2.ToolMode.ValueType, required_tool: str = ""
    ) -> tuple[str, list[tools_pb2.ToolCall], usage_pb2.TokenUsage]:
        """Streams one turn; the deltas of its text and of its tool calls are put together."""
        spec = generation_pb2.GenerationSpec(
            model=self._model,
            chat=generation_pb2.ChatInput(messages=self.messages),
            sampling=generation_pb2.SamplingOptions(temperature=0),
            stop=generation_pb2.StopOptions(max_output_tokens=200),
            tools=tools_pb2.ToolOptions(
                tools=[
                    tools_pb2.Tool(
                        name=name,
                        description=description,
                        parameters_json_schema=SCHEMA,
                        strict=True,
                    )
                    for name, (description, _) in TOOLS.items()
                ],
                mode=mode,
                required_tool=required_tool,
                parallel_calls=False,
            ),
        )
        request = generation_service_pb2.StreamGenerateRequest(spec=spec)
        words = ""
        calls: list[tools_pb2.ToolCall] = []
        usage: usage_pb2.TokenUsage | None = None
        for response in self._stub.StreamGenerate(request, metadata=self._metadata, timeout=60):
            if response.frame.HasField("finished"):
                usage = response.frame.finished.usage
            for output in response.frame.delta.outputs:
                words += output.text
                if output.HasField("tool_call"):
                    part = output.tool_call
                    if part.call_index == len(calls):
                        calls.append(tools_pb2.ToolCall(id=part.id, name=part.name))
                    calls[part.call_index].arguments_json += part.arguments_json
        if usage is None:
            raise RuntimeError("the stream was cut on its way")
        return words, calls, usage


def main() -> None:
    """Holds the conversation with what `make run` has started."""
    with grpc.insecure_channel(os.environ["MAAS_ENDPOINT"]) as channel:
        talk = Conversation(channel, os.environ["MAAS_API_KEY"], os.environ["MAAS_MODEL"])
        question = "What are the weather and the time in Paris?"
        talk.messages.append(text(generation_pb2.ROLE_USER, question))
        for name in TOOLS:
            _, calls, _ = talk.turn(tools_pb2.TOOL_MODE_REQUIRED, name)
            talk.messages.append(Message(role=generation_pb2.ROLE_ASSISTANT, tool_calls=calls))
            for call in calls:
                _, work = TOOLS[call.name]
                result = json.dumps(work(json.loads(call.arguments_json)))
                print(f"{call.name}({call.arguments_json}) -> {result}")
                talk.messages.append(text(generation_pb2.ROLE_TOOL, result, call.id))
        words, _, usage = talk.turn(tools_pb2.TOOL_MODE_NONE)
        print(f"answer: {words.strip()}")
        print(f"usage of the last turn: {usage.input_tokens} in, {usage.output_tokens} out")


if __name__ == "__main__":
    main()
