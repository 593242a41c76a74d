"""Streams one answer of the local suite to the terminal, and what it cost: the least client.

    python -m tools.ask "Once upon a time"
    python -m tools.ask --chat "Tell me a story about a fox in the snow"

Reads key, model and address from the state directory, as `. .maas/dev.env` does for a shell.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shlex
import sys

import grpc
from maas.inference.v1 import generation_pb2
from maas.inference.v1.generation_pb2 import ChatInput, ChatMessage, ContentPart, GenerationSpec
from maas.inference.v1.generation_service_pb2 import StreamGenerateRequest
from maas.inference.v1.generation_service_pb2_grpc import GenerationServiceStub

from tools.local.options import state_argument
from tools.local.place import State

TIMEOUT_S = 600.0
NANOS_PER_UNIT = 1_000_000_000


def read_variables(state: State) -> dict[str, str]:
    """Reads dev.env."""
    lines = state.environment.read_text(encoding="utf-8").splitlines()
    pairs = (re.fullmatch(r"export (\w+)=(.*)", line) for line in lines)
    return {pair[1]: shlex.split(pair[2])[0] for pair in pairs if pair is not None}


def spec_of(model: str, text: str, max_output_tokens: int, *, is_chat: bool) -> GenerationSpec:
    """Makes the request: a text to continue, or the first message of a conversation."""
    stop = generation_pb2.StopOptions(max_output_tokens=max_output_tokens)
    if not is_chat:
        return GenerationSpec(model=model, text=text, stop=stop)
    message = ChatMessage(role=generation_pb2.ROLE_USER, parts=[ContentPart(text=text)])
    return GenerationSpec(model=model, chat=ChatInput(messages=[message]), stop=stop)


async def ask(variables: dict[str, str], spec: GenerationSpec) -> None:
    """Streams the answer to standard output."""
    metadata = (("authorization", f"Bearer {variables['MAAS_API_KEY']}"),)
    async with grpc.aio.insecure_channel(variables["MAAS_ENDPOINT"]) as channel:
        request = StreamGenerateRequest(spec=spec)
        call = GenerationServiceStub(channel).StreamGenerate(
            request, metadata=metadata, timeout=TIMEOUT_S
        )
        async for response in call:
            for output in response.frame.delta.outputs:
                print(output.text, end="", flush=True)
            if response.frame.HasField("finished"):
                finished = response.frame.finished
                charge = f"${finished.charge.nanos / NANOS_PER_UNIT:.7f}"
                usage = finished.usage
                print(f"\n\n{usage.input_tokens} tokens in, {usage.output_tokens} out: {charge}")


def main() -> int:
    """Asks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("--chat", action="store_true", help="ask instead of continuing a text")
    parser.add_argument("--max-output-tokens", type=int, default=200)
    state_argument(parser)
    found = parser.parse_args()
    try:
        variables = read_variables(State(found.state))
        spec = spec_of(
            variables["MAAS_MODEL"], found.text, found.max_output_tokens, is_chat=found.chat
        )
        asyncio.run(ask(variables, spec))
    except FileNotFoundError:
        sys.stderr.write("ask: there is no suite yet: make run\n")
        return 1
    except BrokenPipeError:
        # The reader has seen enough; nothing more can be said to it.
        sys.stdout = None
    except grpc.aio.AioRpcError as error:
        sys.stderr.write(f"ask: {error.code().name}: {error.details()}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
