"""Chat templates of seven families: what they make of conversations, and of hostile ones."""

from __future__ import annotations

import re

import pytest
from maas.engine.v1 import engine_pb2

from services.worker.prompt import PromptBuilder
from services.worker.text import TokenPieces
from tests.unit.services.worker.golden_prompts import (
    CASES,
    FAMILIES,
    FOLDER,
    Family,
    render,
    render_all,
    sections,
)

REFUSED = "(refused)"
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


class ByteTokenizer:
    """A Tokenizer, as services.worker.engine.base says: bytes, and a family's control tokens."""

    vocabulary_size = 512
    chat_template = ""

    def __init__(self, family: Family) -> None:
        self.special_tokens = {"bos_token": family.bos, "eos_token": family.eos}
        self._ids = {text: 256 + row for row, text in enumerate(family.controls)}
        self._pattern = re.compile("(" + "|".join(map(re.escape, self._ids)) + ")")

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        ids: list[int] = []
        for part in self._pattern.split(text) if parse_special else [text]:
            ids.extend([self._ids[part]] if parse_special and part in self._ids else part.encode())
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


def builder(family: Family) -> tuple[PromptBuilder, ByteTokenizer]:
    tokenizer = ByteTokenizer(family)
    pieces = TokenPieces.of(tokenizer)
    return PromptBuilder(tokenizer, pieces, family.template()), tokenizer


def accepted(family: Family) -> dict[str, engine_pb2.Execution]:
    template = family.template()
    return {
        name: case for name, case in CASES.items() if not render(template, case).startswith(REFUSED)
    }


@every_family
def test_conversations_become_what_the_golden_file_has(family: Family) -> None:
    golden = (FOLDER / f"{family.name}.txt").read_text("utf-8")

    assert sections(render_all(family.template())) == sections(golden)


@every_family
def test_a_difference_of_one_character_is_seen(family: Family) -> None:
    golden = sections((FOLDER / f"{family.name}.txt").read_text("utf-8"))
    other = family.template(family.source() + "{{ '!' }}")
    changed = sections(render_all(other))

    assert golden.keys() == changed.keys()
    # What is refused, and what ends with an unfinished message, has nothing behind it.
    same = {name for name, text in golden.items() if text == changed[name]}
    assert same == {n for n in golden if golden[n].startswith(REFUSED) or n == "continued"}


def test_every_conversation_is_accepted_by_some_family() -> None:
    assert set(CASES) == {name for family in FAMILIES for name in accepted(family)}
    assert {family.name for family in FAMILIES if "two results" in accepted(family)} >= {
        *("chatml_tools", "qwen2_5", "qwen3", "mistral_v3", "phi4_mini")
    }


@every_family
def test_honest_conversations_are_encoded_as_a_whole(family: Family) -> None:
    made, tokenizer = builder(family)
    template = family.template()

    for name, case in accepted(family).items():
        rendered = render(template, case)
        prompt = made.build(case)
        assert list(prompt.ids) == tokenizer.encode(rendered, parse_special=True), name
        assert prompt.tail == rendered[-64:]


@every_family
def test_what_is_typed_becomes_no_control_token_in_any_field(family: Family) -> None:
    made, _ = builder(family)
    # Templates cut what an assistant says at the end of its thoughts: that cannot be continued.
    typed = "".join(text for text in family.controls if text != "</think>")

    for name, case in accepted(family).items():
        honest = [token_id for token_id in made.build(case).ids if token_id >= 256]
        hostile = engine_pb2.Execution()
        hostile.CopyFrom(case)
        spoil(hostile, typed)
        ids = list(made.build(hostile).ids)
        assert [token_id for token_id in ids if token_id >= 256] == honest, name
        spelled = bytes(token_id for token_id in ids if token_id < 256).decode()
        # It is there all the same, as text.
        assert typed in spelled, name


def spoil(execution: engine_pb2.Execution, typed: str) -> None:
    """Puts a text into whatever a tenant may type."""
    for message in execution.chat.messages:
        for part in message.parts:
            if part.HasField("reasoning"):
                part.reasoning += typed
            else:
                # Behind something: templates look at how a text begins.
                part.text += typed + "x"
        for call in message.tool_calls:
            call.arguments_json = f'{{"{typed}": ["{typed}", {{"a": "{typed}"}}]}}'
    for tool in execution.tools.tools:
        tool.description += typed
        tool.parameters_json_schema = (
            f'{{"type": "object", "properties": {{"{typed}": {{"type": "string", '
            f'"enum": ["{typed}"], "description": "{typed}"}}}}}}'
        )
    if execution.chat.template_variables_json:
        execution.chat.template_variables_json = f'{{"date_string": "{typed}"}}'
