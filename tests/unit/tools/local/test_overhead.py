"""tools/local/overhead.py: the bound is never below what a template adds."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from services.gateway.convert import prompt_size
from services.worker import templates
from services.worker.chat import ChatTemplate, Turn
from services.worker.conversation import conversation_of
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


WORDS = st.text("abcdefgh ", max_size=12)
GOLDEN = Path(__file__).parents[2] / "services" / "worker" / "golden"
SOURCES = {
    "chatml_tools": templates.load("chatml_tools"),
    **{name: (GOLDEN / f"{name}.jinja").read_text("utf-8") for name in ("qwen3", "phi4_mini")},
}
TEMPLATES = {
    name: ChatTemplate(source, {}, lambda: datetime(2026, 1, 1, tzinfo=UTC))
    for name, source in SOURCES.items()
}
BOUNDS = {name: bounds(source) for name, source in SOURCES.items()}


@st.composite
def specs(draw: st.DrawFn) -> generation_pb2.GenerationSpec:
    """Requests with tools, calls, results and reasoning, in an order that templates accept."""
    spec = generation_pb2.GenerationSpec()
    if draw(st.booleans()):
        spec.chat.messages.add(role=generation_pb2.ROLE_SYSTEM).parts.add(text=draw(WORDS))
    for _ in range(draw(st.integers(1, 4))):
        spec.chat.messages.add(role=generation_pb2.ROLE_USER).parts.add(text=draw(WORDS))
        answer = spec.chat.messages.add(role=generation_pb2.ROLE_ASSISTANT)
        answer.parts.add(reasoning=draw(WORDS))
        answer.parts.add(text=draw(WORDS))
        for number in range(draw(st.integers(0, 3))):
            call_id = f"call{number:05}"
            answer.tool_calls.add(id=call_id, name="weather", arguments_json='{"city": "Oslo"}')
            result = generation_pb2.ChatMessage(role=generation_pb2.ROLE_TOOL, tool_call_id=call_id)
            result.parts.add(text=draw(WORDS))
            spec.chat.messages.append(result)
    spec.chat.messages.add(role=generation_pb2.ROLE_USER).parts.add(text=draw(WORDS))
    for number in range(draw(st.integers(0, 3))):
        spec.tools.tools.add(name=f"f{number}", description=draw(WORDS))
    return spec


@pytest.mark.parametrize("name", SOURCES)
@given(spec=specs(), enabled=st.none() | st.booleans())
def test_no_conversation_with_tools_exceeds_the_bound(
    name: str,
    spec: generation_pb2.GenerationSpec,
    enabled: bool | None,  # noqa: FBT001 - a case of the test
) -> None:
    prompt, message = BOUNDS[name]
    template = TEMPLATES[name]
    size = prompt_size(spec)
    execution = engine_pb2.Execution(chat=spec.chat)
    if spec.tools.tools:
        execution.tools.CopyFrom(spec.tools)
    if enabled is not None and template.habits.switches:
        execution.reasoning.enabled = enabled

    rendered = template.render_conversation(conversation_of(execution, template.habits))

    pieces = size.message_count + size.tool_count
    assert len(rendered.encode()) <= size.content_units + prompt + message * pieces
