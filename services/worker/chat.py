"""Chat templates: a conversation becomes the text that the model was trained on.

Templates come with the weights, so an operator chose them; conversations come from anybody and are
only ever values. A template runs in Jinja's immutable sandbox, and is bounded besides: size of its
source, turns of its loops and calls of its macros (counted inside the compiled template), size of
what it renders, products of texts and numbers. Not bounded is a template that is made to burn
memory in variables or filters ("%999999999d"): whoever can do that chose the weights.

Never: reads a file, asks a clock other than the one it was given, logs a conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from typing_extensions import override

from libs.errors import FieldRule, InvalidArgument, invalid_field

SOURCE_CHARACTERS_MAX = 256 * 1024
RENDERED_CHARACTERS_MAX = 8 * 1024 * 1024
# 48 turns for each of 4096 messages; a tenth of a second.
TURNS_MAX = 200_000
EXPONENT_MAX = 64

_TICK = "_tick"


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        content: its text.
    """

    role: str
    content: str


class TemplateInvalid(Exception):
    """The template itself cannot be used. The message says where and holds no conversation."""


class _Refused(Exception):
    """The template called raise_exception."""


class _TooMuch(Exception):
    """A bound was reached."""


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounded products."""

    intercepted_binops = frozenset({"*", "**"})

    @override
    def call_binop(
        self,
        context: Context,
        operator: str,
        left: Any,
        right: Any,
    ) -> Any:
        if operator == "**" and not (isinstance(right, int) and right <= EXPONENT_MAX):
            raise _TooMuch
        for sized, count in ((left, right), (right, left)):
            is_product = hasattr(sized, "__len__") and isinstance(count, int)
            if is_product and len(sized) * count > RENDERED_CHARACTERS_MAX:
                raise _TooMuch
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """The compiled template of one model. May be used from several threads."""

    def __init__(
        self, source: str, special_tokens: dict[str, str], now: Callable[[], datetime]
    ) -> None:
        """Compiles a template.

        Args:
            source: Jinja2.
            special_tokens: texts that it may refer to, as "bos_token".
            now: for strftime_now.

        Raises:
            TemplateInvalid: it is too long or no Jinja2.
        """
        if len(source) > SOURCE_CHARACTERS_MAX:
            raise TemplateInvalid(
                f"the chat template is longer than {SOURCE_CHARACTERS_MAX} characters"
            )
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        self._source = source
        # What templates made for Hugging Face's renderer expect to be there.
        self._constants = {**special_tokens, "tools": None, "documents": None}
        try:
            tree = _with_ticks(environment.parse(source))
            self._template = jinja2.Template.from_code(
                environment, environment.compile(tree), environment.globals
            )
        except jinja2.TemplateError as error:
            raise TemplateInvalid(f"the chat template is no Jinja2: {error.message}") from error

    def render(self, turns: Sequence[Turn]) -> str:
        """Renders a conversation up to where the model answers.

        Raises:
            InvalidArgument: the template refuses it, fails on it, or a bound is reached.
        """
        budget = _Budget()
        parts: list[str] = []
        try:
            for part in self._template.generate(
                self._constants,
                messages=[{"role": turn.role, "content": turn.content} for turn in turns],
                add_generation_prompt=True,
                **{_TICK: budget.tick},
            ):
                budget.add(len(part))
                parts.append(part)
        except _Refused as error:
            raise self._refusal(str(error)) from None
        except _TooMuch:
            raise _bad_chat(FieldRule.TOO_LONG, "is too long for the chat template") from None
        except Exception:  # noqa: BLE001 - whatever a template does wrong; its text may quote the chat
            raise _bad_chat(
                FieldRule.BAD_FORMAT, "the model's chat template failed on this conversation"
            ) from None
        return "".join(parts)

    def _refusal(self, message: str) -> InvalidArgument:
        """Repeats what the template said only if that stands in it word for word: no chat."""
        said = f": {message}" if message and message in self._source else ""
        return _bad_chat(
            FieldRule.BAD_FORMAT, f"the model's chat template refuses this conversation{said}"
        )


class _Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self._turns = TURNS_MAX
        self._characters = RENDERED_CHARACTERS_MAX

    def tick(self) -> str:
        """Counts one turn of a loop or one call of a macro. Renders nothing."""
        self._turns -= 1
        if self._turns < 0:
            raise _TooMuch
        return ""

    def add(self, characters: int) -> None:
        """Counts what was rendered."""
        self._characters -= characters
        if self._characters < 0:
            raise _TooMuch


def _with_ticks(tree: nodes.Template) -> nodes.Template:
    """Puts a call of the counter at the head of each loop and macro."""
    blocks: list[nodes.For | nodes.Macro] = list(tree.find_all(nodes.For))
    blocks.extend(tree.find_all(nodes.Macro))
    for block in blocks:
        call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
        block.body.insert(0, nodes.ExprStmt(call))
    return tree


def _bad_chat(rule: FieldRule, description: str) -> InvalidArgument:
    return invalid_field("spec.chat", rule, description)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _to_json(
    value: Any,  # noqa: ANN401 - any value of a template
    indent: int | None = None,
) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
