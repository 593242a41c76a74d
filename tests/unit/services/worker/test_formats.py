"""services/worker/formats.py and model.py: what is read off a model, and what is configured."""

from __future__ import annotations

from pathlib import Path

import pytest
from typing_extensions import override

from libs.clock import SystemClock
from services.worker.engine.base import EngineInfo, EngineStartError
from services.worker.engine.sim_tokenizer import SimTokenizer
from services.worker.formats import find_formats
from services.worker.model import Model, TextSettings, make_model, read_template
from services.worker.parsing import ReasoningFormat, ToolFormat
from services.worker.text import TokenPieces

TOKENIZER = SimTokenizer()
PIECES = TokenPieces.of(TOKENIZER)
INFO = EngineInfo(
    engine="none",
    version="1",
    context_length=512,
    max_running=4,
    vocabulary_size=TOKENIZER.vocabulary_size,
    digest="",
    is_deterministic=True,
)
HERMES = "{% if tools %}<tool_call>{% endif %}"
THINKS = "{{ '<think></think>' }}"


class Marked(SimTokenizer):
    """Has the marks of calls as control tokens, as many models have."""

    @override
    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        marks = {"<tool_call>": 256, "</tool_call>": 257}
        if parse_special and text in marks:
            return [marks[text]]
        return super().encode(text, parse_special=parse_special)


def make(settings: TextSettings, tokenizer: SimTokenizer = TOKENIZER) -> Model:
    now = SystemClock().now
    return make_model(tokenizer, INFO, settings, bos_id=None, has_adapters=False, now=now)


def test_formats_are_read_off_the_template() -> None:
    formats = find_formats(HERMES + THINKS, TOKENIZER, PIECES)

    assert (formats.tools, formats.reasoning) == (ToolFormat.HERMES, ReasoningFormat.THINK)
    assert find_formats("{{ messages }}", TOKENIZER, PIECES).tools is None
    assert not formats.marks, "they are text in this vocabulary"


def test_a_configuration_says_otherwise() -> None:
    formats = find_formats(
        HERMES + THINKS, TOKENIZER, PIECES, tool_parser="mistral", reasoning_parser="none"
    )

    assert (formats.tools, formats.reasoning) == (ToolFormat.MISTRAL, None)


def test_marks_that_are_control_tokens_are_known_by_their_ids() -> None:
    formats = find_formats(HERMES, Marked(), PIECES)

    assert formats.marks == {256: "<tool_call>", 257: "</tool_call>"}


def test_without_a_template_nothing_is_split() -> None:
    formats = find_formats("", TOKENIZER, PIECES, tool_parser="hermes", reasoning_parser="think")

    assert (formats.tools, formats.reasoning) == (None, None)


def test_a_configured_template_replaces_the_models_own(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}!")

    model = make(TextSettings(chat_template=read_template(file)))

    assert model.capabilities.chat
    assert not model.capabilities.tool_calls
    assert make(TextSettings()).capabilities.tool_calls


def test_a_template_that_cannot_be_read_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match=r"worker\.chat_template"):
        read_template(tmp_path / "missing.jinja")
    assert read_template(None) is None


def test_a_model_with_a_broken_template_is_refused_at_start() -> None:
    with pytest.raises(EngineStartError, match="chat template"):
        make(TextSettings(chat_template="{% for %}"))
