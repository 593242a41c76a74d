"""tools/local/overhead.py: the bound is never below what a template adds."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs.errors import InvalidArgument
from services.gateway.prompt_size import prompt_size
from services.worker.chat import ChatTemplate, Turn
from services.worker.conversation import conversation_of
from tests.unit.services.worker.golden_prompts import FAMILIES
from tools.local.overhead import MARGIN, OVERHEAD_MAX, bounds

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}You are a helpful assistant.{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
)
TURNS = st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), st.text(max_size=20))


@pytest.mark.parametrize("source", [CHATML, WITH_DEFAULT])
@given(turns=st.lists(TURNS, min_size=1, max_size=8))
def test_no_conversation_exceeds_the_bound(source: str, turns: list[Turn]) -> None:
    prompt, message = bounds(source)
    template = ChatTemplate(source, {"bos_token": "<s>"}, lambda: datetime(2026, 1, 1, tzinfo=UTC))

    added = len(template.render(turns).encode()) - sum(len(t.content.encode()) for t in turns)

    assert added <= prompt + message * len(turns)


@pytest.mark.parametrize("source", ["", "{% for %}"])
def test_no_usable_template_adds_next_to_nothing(source: str) -> None:
    assert bounds(source) == (MARGIN, 0)


def test_bound_has_a_bound() -> None:
    assert bounds("x" * 100_000)[0] == OVERHEAD_MAX


# Letters, what JSON escapes, and what has several bytes.
WORDS = st.text("abc \"\\\n\t\x01\x7f'{[:,é\u200b雪\U000e0001", max_size=12)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
TINY_NUMBERS = st.sampled_from(["1e15", "-1e15", "1E1", "0.00001", "1e999", "123456789012345678.5"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)
ENOUGH = 1_000_000
# No template writes all variables with every message; this one does, as JSON and as Python.
REPEATING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if city is not defined %}{% elif loop.index0 % 2 %}"
    "{{ city | tojson(indent=4, ensure_ascii=true) }}{% else %}{{ city }}{% endif %}{% endfor %}"
)
NAMING = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.name %} is somebody who goes by the name of {{ m.name }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
SOURCES = {
    **{family.name: family.source() for family in FAMILIES},
    "repeating": REPEATING,
    "naming": NAMING,
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    name: ChatTemplate(source, SPECIAL, lambda: datetime(2026, 1, 1, tzinfo=UTC))
    for name, source in SOURCES.items()
}
BOUNDS = {name: bounds(source) for name, source in SOURCES.items()}


@st.composite
def json_texts(draw: st.DrawFn, names: st.SearchStrategy[str] = WORDS) -> str:
    """JSON objects as their writers may have written them: compact or not, escaped or not."""
    value = draw(st.dictionaries(names, VALUES, max_size=4))
    separators = draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")]))
    text = json.dumps(value, separators=separators, ensure_ascii=draw(st.booleans()))
    number = draw(st.none() | TINY_NUMBERS)
    if number is not None and text.endswith("null}"):
        text = f"{text[:-5]}{number}}}"
    return text


@st.composite
def specs(draw: st.DrawFn) -> generation_pb2.GenerationSpec:
    """Requests with tools, calls, results and reasoning, in an order that templates accept."""
    spec = generation_pb2.GenerationSpec()
    if draw(st.booleans()):
        spec.chat.messages.add(role=generation_pb2.ROLE_SYSTEM).parts.add(text=draw(WORDS))
    calls = 0
    for _ in range(draw(st.integers(1, 3))):
        spec.chat.messages.add(role=generation_pb2.ROLE_USER).parts.add(text=draw(WORDS))
        answer = spec.chat.messages.add(role=generation_pb2.ROLE_ASSISTANT)
        # What one call is to some templates is a refusal to others, as is a text beside it.
        number = draw(st.integers(0, 2))
        if not number or draw(st.booleans()):
            answer.parts.add(reasoning=draw(WORDS))
            answer.parts.add(text=draw(WORDS))
        for _ in range(number):
            call_id = f"call{calls:05}"
            calls += 1
            arguments = draw(json_texts())
            answer.tool_calls.add(id=call_id, name="weather", arguments_json=arguments)
            result = generation_pb2.ChatMessage(role=generation_pb2.ROLE_TOOL, tool_call_id=call_id)
            result.parts.add(text=draw(WORDS))
            spec.chat.messages.append(result)
    spec.chat.messages.add(role=generation_pb2.ROLE_USER).parts.add(text=draw(WORDS))
    if draw(st.booleans()):
        for message in spec.chat.messages:
            message.name = draw(st.just("") | WORDS)
    for place in range(draw(st.integers(0, 2))):
        tool = spec.tools.tools.add(name=f"f{place}", description=draw(WORDS))
        tool.parameters_json_schema = draw(st.just("") | json_texts())
    if draw(st.booleans()):
        spec.chat.template_variables_json = draw(json_texts(st.just("city")))
    return spec


def rendered_bytes(
    name: str, spec: generation_pb2.GenerationSpec, *, enabled: bool | None = None
) -> int | None:
    """Bytes of what a template makes of a request; None when it refuses it."""
    template = TEMPLATES[name]
    execution = engine_pb2.Execution(chat=spec.chat)
    if spec.tools.tools:
        execution.tools.CopyFrom(spec.tools)
    if enabled is not None and template.habits.switches:
        execution.reasoning.enabled = enabled
    try:
        text = template.render_conversation(conversation_of(execution, template.habits))
    except InvalidArgument:
        return None
    return len(text.encode())


def bound_of(name: str, spec: generation_pb2.GenerationSpec) -> int:
    """Units that are held for a request."""
    prompt, message = BOUNDS[name]
    size = prompt_size(spec, ENOUGH)
    return size.content_units + prompt + message * (size.message_count + size.tool_count)


@pytest.mark.parametrize("name", SOURCES)
@given(spec=specs(), enabled=st.none() | st.booleans())
def test_no_conversation_with_tools_exceeds_the_bound(
    name: str,
    spec: generation_pb2.GenerationSpec,
    enabled: bool | None,  # noqa: FBT001 - a case of the test
) -> None:
    size = rendered_bytes(name, spec, enabled=enabled)

    assert size is None or size <= bound_of(name, spec)


@pytest.mark.parametrize("name", SOURCES)
def test_every_template_renders_some_of_these_conversations(name: str) -> None:
    # Or the test above would say nothing of it.
    spec = generation_pb2.GenerationSpec()
    spec.chat.messages.add(role=generation_pb2.ROLE_USER).parts.add(text="x")
    calls = spec.chat.messages.add(role=generation_pb2.ROLE_ASSISTANT).tool_calls
    calls.add(id="call00000", name="weather", arguments_json='{"a":[[[[1e15,1e15]]]]}')
    result = spec.chat.messages.add(role=generation_pb2.ROLE_TOOL, tool_call_id="call00000")
    result.parts.add(text="x" + '\x01"' * 200)
    if TEMPLATES[name].habits.knows_calls:
        size = rendered_bytes(name, spec)

        assert size is not None
        assert size <= bound_of(name, spec)


def test_what_is_written_around_names_is_within_the_bound() -> None:
    spec = generation_pb2.GenerationSpec()
    for _ in range(8):
        message = spec.chat.messages.add(role=generation_pb2.ROLE_USER, name="bob")
        message.parts.add(text="x")

    size = rendered_bytes("naming", spec)

    assert size is not None
    assert size <= bound_of("naming", spec)


def test_indented_schemas_and_escaped_results_are_within_the_bound() -> None:
    spec = generation_pb2.GenerationSpec()
    spec.chat.messages.add(role=generation_pb2.ROLE_SYSTEM).parts.add(text="s")
    spec.chat.messages.add(role=generation_pb2.ROLE_USER).parts.add(text="x")
    schema = '{"a":' * 40 + "{}" + "}" * 40
    spec.tools.tools.add(name="f", description='\x01"' * 100, parameters_json_schema=schema)

    size = rendered_bytes("llama3", spec)

    # Far beyond its own bytes.
    assert size is not None
    assert size > 10 * len(schema)
    assert size <= bound_of("llama3", spec)


def test_what_exceeds_the_context_anyway_is_not_looked_into() -> None:
    spec = generation_pb2.GenerationSpec()
    spec.chat.messages.add(role=generation_pb2.ROLE_USER).parts.add(text="x")
    schema = '{"a":' * 10 + "{}" + "}" * 10
    spec.tools.tools.add(name="f", parameters_json_schema=schema)

    assert prompt_size(spec, 1).content_units == 1 + len(schema)
    assert prompt_size(spec, ENOUGH).content_units > 1 + len(schema)
