from __future__ import annotations

import pytest

from services.worker.parsing import (
    ReasoningFormat,
    ToolFormat,
    detect_reasoning_format,
    detect_tool_format,
    marks_of,
    starts_in_reasoning,
)

THINK = ReasoningFormat.THINK


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('{{- \'<tool_call>\\n{"name": "\' }}', ToolFormat.HERMES),
        ("{{ '[TOOL_CALLS] [' }}", ToolFormat.MISTRAL),
        ("{{ '<|python_tag|>' }}", ToolFormat.LLAMA3),
        ("{{ 'Environment: ipython' }}{{ '\"parameters\": ' }}", ToolFormat.LLAMA3),
        ("{{ '<tool_call>\\n<function=' }}", None),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", None),
        ("{{ messages[0].content }}", None),
        ("", None),
    ],
)
def test_tool_format_is_told_from_the_template(source: str, expected: ToolFormat | None) -> None:
    assert detect_tool_format(source) is expected


def test_reasoning_format_is_told_from_the_template() -> None:
    assert detect_reasoning_format("{{ content.split('</think>')[-1] }}") is THINK
    assert detect_reasoning_format("{{ content }}") is None


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\nI was thinking", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
        ("what is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("what is <think>? [/INST]", False),
    ],
)
def test_reasoning_is_open_only_behind_the_end_of_what_others_wrote(
    tail: str, *, expected: bool
) -> None:
    assert starts_in_reasoning(THINK, tail) is expected
    assert not starts_in_reasoning(None, tail)


def test_the_parser_needs_the_marks_of_its_formats() -> None:
    assert marks_of(ToolFormat.HERMES, THINK) == {
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
    }
    assert marks_of(ToolFormat.LLAMA3, None) == {"<|python_tag|>"}
    assert marks_of(None, None) == frozenset()
