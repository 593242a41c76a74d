r"""How families of models write calls and reasoning, told from their chat templates.

    HERMES   <tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>, again for each call
    LLAMA3   {"name": "f", "parameters": {...}}, several with ";" between them; as the whole
             output, or behind <|python_tag|>
    MISTRAL  [TOOL_CALLS] [{"name": "f", "arguments": {...}}, ...]
    THINK    <think>...</think>, then the answer

A mark is often a token of its own in the model's vocabulary, and then maybe one without text:
`marks_of` says for which tokens the text layer has to make an exception.
"""

from __future__ import annotations

import enum
import re

_TURN_ENDS = re.compile(r"<[|｜]|\[/?INST\]|</s>|<(?:start|end)_of_turn>")  # noqa: RUF001 - DeepSeek's


class ToolFormat(enum.Enum):
    """How a model writes calls."""

    HERMES = "hermes"
    LLAMA3 = "llama3"
    MISTRAL = "mistral"


class ReasoningFormat(enum.Enum):
    """How a model writes reasoning."""

    THINK = "think"


THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
CALL_OPEN: dict[ToolFormat, str] = {
    ToolFormat.HERMES: "<tool_call>",
    ToolFormat.LLAMA3: "<|python_tag|>",
    ToolFormat.MISTRAL: "[TOOL_CALLS]",
}
HERMES_CLOSE = "</tool_call>"


def detect_tool_format(template_source: str) -> ToolFormat | None:
    """Tells from a chat template how its model writes calls; None when in no way known here.

    Families that use a known mark around something else than JSON objects are not known: the
    arguments as XML (Qwen3-Coder, GLM), or between marks of their own (Mistral since 2025).
    """
    if "<tool_call>" in template_source:
        is_xml = "<function=" in template_source or "<arg_key>" in template_source
        return None if is_xml else ToolFormat.HERMES
    if "[TOOL_CALLS]" in template_source:
        return None if "[ARGS]" in template_source else ToolFormat.MISTRAL
    is_llama = "ipython" in template_source and '"parameters"' in template_source
    if "<|python_tag|>" in template_source or is_llama:
        return ToolFormat.LLAMA3
    return None


def detect_reasoning_format(template_source: str) -> ReasoningFormat | None:
    """Tells from a chat template how its model writes reasoning; None when it has none."""
    return ReasoningFormat.THINK if THINK_CLOSE in template_source else None


def starts_in_reasoning(reasoning_format: ReasoningFormat | None, prompt_tail: str) -> bool:
    """Tells whether the output goes on with a block of reasoning that the prompt has opened.

    Args:
        reasoning_format: of the model.
        prompt_tail: the end of the rendered prompt. What a user wrote about the mark does not
            count, because the end of the user's turn stands behind it.
    """
    if reasoning_format is None:
        return False
    opened = prompt_tail.rfind(THINK_OPEN)
    if opened < 0:
        return False
    behind = prompt_tail[opened + len(THINK_OPEN) :]
    return THINK_CLOSE not in behind and _TURN_ENDS.search(behind) is None


def marks_of(tools: ToolFormat | None, reasoning: ReasoningFormat | None) -> frozenset[str]:
    """Returns the marks that the parser has to see, even as control tokens of the vocabulary."""
    marks: set[str] = set()
    if reasoning is not None:
        marks |= {THINK_OPEN, THINK_CLOSE}
    if tools is not None:
        marks.add(CALL_OPEN[tools])
    if tools is ToolFormat.HERMES:
        marks.add(HERMES_CLOSE)
    return frozenset(marks)
