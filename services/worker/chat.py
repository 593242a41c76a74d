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
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from typing_extensions import override

from libs.chat_rules import ENABLED_VARIABLES, JsonObject
from libs.errors import FieldRule, InvalidArgument, invalid_field
from services.worker import veil

SOURCE_CHARACTERS_MAX = 256 * 1024
RENDERED_CHARACTERS_MAX = 8 * 1024 * 1024
# 48 turns for each of 4096 messages; a tenth of a second.
TURNS_MAX = 200_000
EXPONENT_MAX = 64

_TICK = "_tick"
# Whether what is rendered are placeholders; see veil.py.
_IS_VEILED = "_is_veiled"
# Stands behind an unfinished message while it is rendered. Of letters that no template knows.
_UNFINISHED = "\u16b0\u16b1\u16b2\u16b0"
_TELLS_NO_CONTENT = re.compile(r"content['\"]?\]?\s+is\s+(?:not\s+)?none", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        content: its text.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation as templates made for Hugging Face's renderer take it.

    Attributes:
        messages: each with role and content; name, reasoning_content, tool_calls and tool_call_id
            where they apply.
        tools: functions that the model may call; None for none.
        variables: more of them, by name.
        is_continued: the last message is unfinished: the text ends with its content.
    """

    messages: list[JsonObject]
    tools: list[JsonObject] | None = None
    variables: JsonObject = field(default_factory=dict)
    is_continued: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a template knows, read from its source.

    Attributes:
        knows_tools: it shows tools to the model.
        knows_calls: it shows calls of tools, and their results.
        knows_reasoning: it shows reasoning, or can switch it.
        knows_developer: it tells a developer's instructions from the system's.
        tells_no_content: it tells a message without content, which is None then, from an empty one.
        takes_argument_texts: it wants the arguments of calls as JSON text, not as objects.
        switches: variables that switch reasoning.
    """

    knows_tools: bool
    knows_calls: bool
    knows_reasoning: bool
    knows_developer: bool
    tells_no_content: bool
    takes_argument_texts: bool
    switches: frozenset[str]


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
            tree = environment.parse(source)
            names = meta.find_undeclared_variables(tree)
            self._template = jinja2.Template.from_code(
                environment, environment.compile(_with_ticks(tree)), environment.globals
            )
        except jinja2.TemplateError as error:
            raise TemplateInvalid(f"the chat template is no Jinja2: {error.message}") from error
        self.habits = self._find_habits(names)

    @property
    def knows_tools(self) -> bool:
        """Tools can be shown to the model."""
        return self.habits.knows_tools

    @property
    def knows_reasoning(self) -> bool:
        """The model's reasoning can be shown to it, or be switched."""
        return self.habits.knows_reasoning

    def render(self, turns: Sequence[Turn]) -> str:
        """Renders a plain conversation up to where the model answers.

        Raises:
            InvalidArgument: the template refuses it, fails on it, or a bound is reached.
        """
        return self._render(
            {
                "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
                "add_generation_prompt": True,
            }
        )

    def render_conversation(self, conversation: Conversation, *, is_veiled: bool = False) -> str:
        """Renders any conversation up to where the model answers, or goes on.

        Args:
            conversation: with names of variables that are not the server's own.
            is_veiled: its contents are placeholders, which JSON must tell from texts.

        Raises:
            InvalidArgument: the template refuses it, fails on it, cannot leave the last message
                unfinished, or a bound is reached.
        """
        messages = conversation.messages
        last = str(messages[-1]["content"]) if conversation.is_continued else ""
        if conversation.is_continued:
            messages = [*messages[:-1], {**messages[-1], "content": last + _UNFINISHED}]
        rendered = self._render(
            {
                **conversation.variables,
                "messages": messages,
                "tools": conversation.tools,
                "add_generation_prompt": not conversation.is_continued,
                _IS_VEILED: is_veiled,
            }
        )
        return _cut_behind(last, rendered) if conversation.is_continued else rendered

    def _find_habits(self, names: set[str]) -> Habits:
        switches = ENABLED_VARIABLES & names
        source = self._source
        return Habits(
            knows_tools="tools" in names,
            knows_calls="tool_calls" in source,
            knows_reasoning=bool(switches)
            or "reasoning_effort" in names
            or "reasoning_content" in source
            or "think>" in source,
            knows_developer="developer" in source,
            tells_no_content=_TELLS_NO_CONTENT.search(source) is not None,
            takes_argument_texts="arguments" in source and self._takes_argument_texts(),
            switches=switches,
        )

    def _takes_argument_texts(self) -> bool:
        """Tries it: a template that joins texts fails on an object."""
        for arguments in ({"a": "b"}, '{"a": "b"}'):
            call = {"name": "f", "arguments": arguments}
            messages = [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "content": None if _TELLS_NO_CONTENT.search(self._source) else "",
                    "tool_calls": [{"id": "call00000", "type": "function", "function": call}],
                },
            ]
            try:
                self._render({"messages": messages, "add_generation_prompt": False})
            except InvalidArgument:
                continue
            return isinstance(arguments, str)
        return False

    def _render(self, variables: Mapping[str, object]) -> str:
        budget = _Budget()
        parts: list[str] = []
        try:
            for part in self._template.generate(
                self._constants, **variables, **{_TICK: budget.tick}
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


def _cut_behind(content: str, rendered: str) -> str:
    """Returns what was rendered up to the end of the last message's content.

    Raises:
        InvalidArgument: the template has changed or left out that content.
    """
    text, found, _ = rendered.rpartition(_UNFINISHED)
    # Templates may cut white space off before a content.
    if not found or not text.endswith(content.lstrip()):
        raise invalid_field(
            "spec.chat.continue_last_message",
            FieldRule.UNSUPPORTED,
            "the model's chat template cannot leave this message unfinished",
        )
    return text


def _bad_chat(rule: FieldRule, description: str) -> InvalidArgument:
    return invalid_field("spec.chat", rule, description)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


@jinja2.pass_context
def _to_json(
    context: Context,
    value: Any,  # noqa: ANN401 - any value of a template
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    *,
    ensure_ascii: bool = False,
    sort_keys: bool = False,
) -> str:
    is_veiled = bool(context.get(_IS_VEILED))
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii and not is_veiled,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    return veil.inside_json(text) if is_veiled else text
