"""tools/local/overhead.py: the bound is never below what a template adds."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.chat import ChatTemplate, Turn
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
