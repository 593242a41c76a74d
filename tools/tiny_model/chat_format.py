"""The special tokens and the chat template (ChatML), in one place for corpus, tokenizer and file.

Pure data and one function. The template writes no begin-of-text token; training shows the model
texts with and without one.
"""

from __future__ import annotations

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
PADDING = "<|pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

SPECIAL_TOKENS: tuple[str, ...] = (BEGIN_OF_TEXT, END_OF_TEXT, PADDING, TURN_START, TURN_END)
"""In the order of their ids, from zero."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def turn_head(role: str) -> str:
    """Return what stands before the content of a turn."""
    return f"{TURN_START}{role}\n"


def turn(role: str, content: str) -> str:
    """Return one finished turn, with the line break that follows it."""
    return f"{turn_head(role)}{content}{TURN_END}\n"


def as_chat_prompt(content: str) -> str:
    """Return the prompt of a chat with one user message, ready for the answer."""
    return turn("user", content) + turn_head("assistant")
