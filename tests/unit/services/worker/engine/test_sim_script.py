"""What the simulator says because of the form of its prompt: thoughts, calls, plain answers."""

from __future__ import annotations

import json
from dataclasses import replace

import jinja2
import jsonschema
import pytest
from llguidance import LLMatcher

from libs.testing import FakeClock
from services.worker.engine.base import (
    Constraint,
    ConstraintKind,
    EndReason,
    EngineRequest,
    Sampling,
)
from services.worker.engine.sim import FLAT_OUT, SimEngine
from services.worker.engine.sim_tokenizer import CHAT_TEMPLATE, SimTokenizer

TOKENIZER = SimTokenizer()
ENVIRONMENT = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701 - no HTML
ENVIRONMENT.filters["tojson"] = json.dumps
TEMPLATE = ENVIRONMENT.from_string(CHAT_TEMPLATE)

WEATHER: dict[str, object] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}},
]
Message = dict[str, object]
USER: Message = {"role": "user", "content": "What should I wear?"}
RESULT: list[Message] = [
    USER,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "get_time", "arguments": {}}}],
    },
    {"role": "tool", "content": "12:30"},
]


def prompt(messages: list[Message], **options: object) -> tuple[int, ...]:
    text = TEMPLATE.render(messages=messages, add_generation_prompt=True, **options)
    return tuple(TOKENIZER.encode(text, parse_special=True))


def ask(prompt_ids: tuple[int, ...], *, tokens: int = 200, seed: int = 1) -> EngineRequest:
    return EngineRequest(
        prompt_ids=prompt_ids,
        max_output_tokens=tokens,
        sampling=Sampling(temperature=1, top_p=1, top_k=0, seed=seed),
    )


async def say(request: EngineRequest) -> tuple[list[int], EndReason]:
    engine = SimEngine(
        FakeClock(), TOKENIZER, capacity=1, context_length=2000, kv_tokens=2000, costs=FLAT_OUT
    )
    engine.submit(1, request)
    said: list[int] = []
    while True:
        batch = await engine.next_step()
        said += batch.token_ids
        if batch.ended:
            await engine.stop()
            return said, batch.ended[0].reason


def text_of(token_ids: list[int]) -> str:
    return b"".join(TOKENIZER.token_bytes(token_id) for token_id in token_ids).decode()


def calls_in(text: str) -> list[tuple[str, dict[str, object]]]:
    found = []
    for part in text.split("<tool_call>\n")[1:]:
        call = json.loads(part.split("\n</tool_call>")[0])
        found.append((call["name"], call["arguments"]))
    return found


async def test_an_open_block_of_reasoning_is_closed_before_the_answer() -> None:
    said, _ = await say(ask(prompt([USER], enable_thinking=True), tokens=60))

    thought, _, answer = text_of(said).partition("\n</think>\n\n")
    assert thought.endswith(".")
    assert len(thought.split()) > 4
    assert answer[0].isupper()
    assert len(said) == 60


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
async def test_nobody_else_thinks(options: dict[str, object]) -> None:
    said, _ = await say(ask(prompt([USER], **options), tokens=60))

    assert "think>" not in text_of(said)


async def test_a_user_gets_a_call_whose_arguments_match_the_schema() -> None:
    for seed in range(5):
        said, reason = await say(ask(prompt([USER], tools=TOOLS[:1]), seed=seed))

        ((name, arguments),) = calls_in(text_of(said))
        assert name == "get_weather"
        jsonschema.validate(arguments, WEATHER)
        assert reason is EndReason.END_OF_SEQUENCE
        assert text_of(said).endswith("\n</tool_call>")


async def test_functions_that_the_user_names_are_called_in_parallel() -> None:
    user: Message = {"role": "user", "content": "Call get_time and then get weather for me."}

    said, _ = await say(ask(prompt([user], tools=TOOLS)))

    assert [name for name, _ in calls_in(text_of(said))] == ["get_weather", "get_time"]


async def test_thoughts_come_before_calls() -> None:
    said, reason = await say(ask(prompt([USER], tools=TOOLS, enable_thinking=True)))

    thought, _, rest = text_of(said).partition("\n</think>\n\n")
    assert "<tool_call>" not in thought
    assert len(calls_in(rest)) == 1
    assert reason is EndReason.END_OF_SEQUENCE


async def test_the_result_of_a_tool_gets_plain_words() -> None:
    said, reason = await say(ask(prompt(RESULT, tools=TOOLS), tokens=40))

    assert "<" not in text_of(said)
    assert (len(said), reason) == (40, EndReason.MAX_TOKENS)


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}])
async def test_the_result_of_a_tool_gets_a_few_words_where_calls_are_constrained(
    options: dict[str, object],
) -> None:
    free = Constraint(
        kind=ConstraintKind.TOOLS,
        source="",
        grammar=LLMatcher.grammar_from_lark("start: /(?s:.*)/"),
    )
    request = replace(ask(prompt(RESULT, tools=TOOLS, **options)), constraint=free)

    said, reason = await say(request)

    answer = text_of(said).rpartition("\n</think>\n\n")[2]
    assert "<" not in answer
    assert len(answer.split()) == 8
    assert reason is EndReason.END_OF_SEQUENCE


async def test_a_question_behind_a_result_gets_a_call_again() -> None:
    messages: list[Message] = [*RESULT, {"role": "assistant", "content": "Wear wool."}, USER]

    said, _ = await say(ask(prompt(messages, tools=TOOLS)))

    assert len(calls_in(text_of(said))) == 1


async def test_words_of_a_user_are_no_list_of_functions() -> None:
    listed = TEMPLATE.render(messages=[USER], tools=TOOLS).replace("<|im_", "<|")

    said, _ = await say(ask(prompt([{"role": "user", "content": listed}]), tokens=40))

    assert "<tool_call>" not in text_of(said)


@pytest.mark.parametrize(
    "listed", ["", "<tools>\n</tools>", '<tools>\n[1]\n{}\nnull\n{"function": 7}\n</tools>']
)
@pytest.mark.parametrize("end", ["", "<|im_end|>\n<|im_start|>user\nHello<|im_end|>"])
async def test_lists_of_functions_that_are_none_are_left_alone(listed: str, end: str) -> None:
    text = (
        "<|im_start|>system\nYou may call one or more of these functions:\n"
        f"{listed}{end}\n<|im_start|>assistant\n"
    )
    prompt_ids = tuple(TOKENIZER.encode(text, parse_special=True))

    said, reason = await say(ask(prompt_ids, tokens=20))

    assert (len(said), reason) == (20, EndReason.MAX_TOKENS)


async def test_functions_with_a_schema_that_is_none_are_called_without_arguments() -> None:
    odd = {"type": "function", "function": {"name": "odd", "parameters": {"type": "nothing"}}}

    said, _ = await say(ask(prompt([USER], tools=[odd])))

    assert calls_in(text_of(said)) == [("odd", {})]


async def test_from_every_place_of_a_script_it_goes_on_as_it_would_have() -> None:
    request = ask(prompt([USER], tools=TOOLS, enable_thinking=True))
    whole, _ = await say(request)

    for cut in range(0, len(whole) + 1, 3):
        rest, reason = await say(replace(request, continue_ids=tuple(whole[:cut])))
        assert whole[:cut] + rest == whole
        assert reason is EndReason.END_OF_SEQUENCE
