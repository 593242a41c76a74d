"""From the input of an execution to token ids. Pure; may run in a thread.

What a tenant typed never becomes a control token, be it a message, a name, a tool's description or
schema, arguments, a result or a template's variable. A rendered conversation is encoded as a whole,
the way the model was trained, and then checked: its control tokens must be those of the same
conversation with every content replaced by a placeholder (veil.py). Where they differ, somebody
typed the text of a control token (or a template made one out of what was typed), and the
conversation is put together from the template's own pieces and the contents, each encoded by itself
and the contents without control tokens. Only such conversations may be tokenised a little
differently at the seams.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, tools_pb2

from libs.chat_rules import check_spec, pieces_of
from libs.errors import FieldRule, InvalidArgument, Reason, invalid_field
from services.worker.chat import ChatTemplate, Conversation, Turn
from services.worker.conversation import conversation_of, plain_turns, shows_tools, veiled
from services.worker.engine.base import Tokenizer
from services.worker.text import TokenPieces
from services.worker.veil import Torn, Veil

# Texts longer than this are tokenised away from the event loop: about a millisecond's work.
SHORT_CHARACTERS_MAX = 4096
# Messages, parts and calls: likewise, and for checking them.
SHORT_PIECES_MAX = 512
# Likewise for the automaton of stop sequences: 2 us and more for each character.
STOP_CHARACTERS_MAX = 512
_PIECE_CHARACTERS = SHORT_CHARACTERS_MAX // SHORT_PIECES_MAX
# What a message, a part or a call costs, and a byte of a constraint, as characters of a text.
_PIECE_WORK = 32
_CONSTRAINT_WORK = 16
# As much as a text prompt may have (generation.proto), and as tokenizers take at once.
RENDERED_BYTES_MAX = 1024 * 1024
# Shapes of conversations, (role, has content) of each message, whose control tokens are kept; and
# as many veiled ones that are not longer than this.
SHAPES_MAX = 64
SCAFFOLD_CHARACTERS_MAX = 32 * 1024
# Of what was rendered last, for those who ask how the prompt ends.
TAIL_CHARACTERS = 64
# Control tokens spell more than others: no prompt has more bytes for each of its tokens than the
# longest piece of its vocabulary, or this. No character has more than four.
CONTROL_BYTES_MAX = 32
CHARACTER_BYTES_MAX = 4


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine goes on with.

    Attributes:
        ids: token ids; at least one.
        tail: the last 64 characters of a rendered conversation; empty for text and token ids.
    """

    ids: Sequence[int]
    tail: str = ""


class PromptBuilder:
    """Makes prompts for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        pieces: TokenPieces,
        template: ChatTemplate | None,
        *,
        bos_id: int | None = None,
        context_length: int | None = None,
    ) -> None:
        """Keeps what it needs.

        Args:
            tokenizer: of the model.
            pieces: of the same vocabulary.
            template: of the model; None when it has none.
            bos_id: token that every prompt of this model begins with; None for none.
            context_length: prompt and output together, tokens; None leaves prompts unbounded.
        """
        self._tokenizer = tokenizer
        self._vocabulary_size = tokenizer.vocabulary_size
        self._controls = frozenset(
            token_id for token_id, piece in enumerate(pieces.data) if not piece
        )
        self._template = template
        self._bos_id = bos_id
        self._most = None if context_length is None else context_length - 1
        # No token spells more.
        self._piece_bytes = max(CHARACTER_BYTES_MAX, max(map(len, pieces.data), default=0))
        self._bare_controls = functools.lru_cache(SHAPES_MAX)(self._find_bare_controls)
        self._short_controls = functools.lru_cache(SHAPES_MAX)(self._find_controls)

    def check_size(self, execution: engine_pb2.Execution) -> None:
        """Refuses what cannot fit, however it is tokenised. Costs far less than tokenising.

        Of a conversation what users, tools and instructions say counts, without the white space
        around it: templates leave out nothing else of theirs.

        Raises:
            InvalidArgument: the prompt has more tokens than the context, with
                CONTEXT_LENGTH_EXCEEDED.
        """
        if self._most is None:
            return
        match execution.WhichOneof("input"):
            case "text":
                self._require_room(_bytes_of(execution.text), self._piece_bytes)
            case "chat" if (
                len(execution.chat.messages) > self._most
                or execution.chat.ByteSize() > self._most * self._piece_bytes
            ):
                self._require_room(self._asked_tokens(execution.chat), 1)
            case "tokens":
                self._require_room(len(execution.tokens.ids), 1)
            case _:
                return

    def build(self, execution: engine_pb2.Execution) -> Prompt:
        """Returns the prompt of an execution.

        Raises:
            InvalidArgument: there is no input, it is empty, a token id is not in the vocabulary,
                the model has no chat template, the conversation breaks a rule (libs.chat_rules), or
                the template refuses it or cannot show what is asked for.
        """
        prompt = self._prompt_of(execution)
        if not prompt.ids:
            raise invalid_field("spec.input", FieldRule.REQUIRED, "must not be empty")
        return prompt

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        """Checks that ids are in the vocabulary.

        Raises:
            InvalidArgument: names the first that is not.
        """
        if not ids or max(ids) < self._vocabulary_size:
            return
        place = next(row for row, token_id in enumerate(ids) if token_id >= self._vocabulary_size)
        raise invalid_field(
            f"{field}[{place}]",
            FieldRule.OUT_OF_RANGE,
            f"must be below {self._vocabulary_size}, the size of the vocabulary",
        )

    def _require_room(self, size: int, token_size: int) -> None:
        """Refuses what has more tokens than the context when each has at most so many bytes."""
        tokens = -(-size // token_size)
        if self._most is not None and tokens > self._most:
            raise InvalidArgument(
                f"the prompt has at least {tokens} tokens; at most {self._most} leave room for "
                "output",
                reason=Reason.CONTEXT_LENGTH_EXCEEDED,
                metadata={"tokens": str(tokens), "limit": str(self._most)},
            )

    def _asked_tokens(self, chat: generation_pb2.ChatInput) -> int:
        """Returns how many tokens users, tools and instructions have at least: one a message."""
        piece = self._piece_bytes
        return sum(
            max(1, -(-sum(_bytes_of(part.text.strip()) for part in message.parts) // piece))
            for message in chat.messages
            if message.role != generation_pb2.ROLE_ASSISTANT
        )

    def _prompt_of(self, execution: engine_pb2.Execution) -> Prompt:
        match execution.WhichOneof("input"):
            case "chat":
                return self._chat(execution)
            case "text":
                typed = self._tokenizer.encode(execution.text, parse_special=False)
                return Prompt(self._with_bos(typed))
            case "tokens":
                ids = list(execution.tokens.ids)
                self.check_ids(ids, "spec.tokens.ids")
                return Prompt(ids)
            case None:
                raise invalid_field("spec.input", FieldRule.REQUIRED, "must be set")

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Puts the first token of every prompt there, unless the template has done so."""
        if self._bos_id is None or not ids or ids[0] == self._bos_id:
            return ids
        return [self._bos_id, *ids]

    def _chat(self, execution: engine_pb2.Execution) -> Prompt:
        template = self._template
        if template is None:
            raise InvalidArgument(
                "spec.chat: the model has no chat template",
                reason=Reason.FEATURE_UNSUPPORTED,
                metadata={"model": execution.model_version, "feature": "spec.chat"},
            )
        turns = plain_turns(execution)
        if turns is None:
            check_spec(execution)
            conversation = conversation_of(execution, template.habits)
            rendered = template.render_conversation(conversation)
        else:
            conversation = None
            rendered = template.render(turns)
        self._require_renderable(rendered)
        ids = self._tokenizer.encode(rendered, parse_special=True)
        self._require_room(len(ids), 1)
        controls = self._controls_of(ids)
        if conversation is not None:
            ids = self._guarded(template, conversation, ids, controls)
        # An empty content stays empty: templates ask for that.
        elif turns is not None and controls != self._bare_controls(
            tuple((turn.role, bool(turn.content)) for turn in turns)
        ):
            ids = self._pieced(template, _conversation_of_turns(turns))
        return Prompt(self._with_bos(ids), rendered[-TAIL_CHARACTERS:])

    def _require_renderable(self, rendered: str) -> None:
        size = _bytes_of(rendered)
        _require_encodable(size)
        self._require_room(size, max(self._piece_bytes, CONTROL_BYTES_MAX))

    def _guarded(
        self,
        template: ChatTemplate,
        conversation: Conversation,
        ids: list[int],
        controls: list[int],
    ) -> list[int]:
        """Returns the ids of a rendered conversation if none of its control tokens was typed.

        Else those of the same conversation put together from pieces.
        """
        scaffold = template.render_conversation(veiled(conversation, Veil()), is_veiled=True)
        is_short_one = len(scaffold) <= SCAFFOLD_CHARACTERS_MAX
        find = self._short_controls if is_short_one else self._find_controls
        return ids if controls == find(scaffold) else self._pieced(template, conversation)

    def _find_bare_controls(self, shape: tuple[tuple[str, bool], ...]) -> list[int]:
        """Returns the control tokens of any plain conversation of a shape in which none was typed.

        Kept for the shapes seen last, which are few: they are one half of a prompt's cost. A
        template that asks for the date may come to render another scaffold, but not other control
        tokens; where one did, the conversation would be put together from pieces.
        """
        assert self._template is not None
        turns = [Turn(role, "x" if has_content else "") for role, has_content in shape]
        hidden = veiled(_conversation_of_turns(turns), Veil())
        return self._find_controls(self._template.render_conversation(hidden, is_veiled=True))

    def _find_controls(self, scaffold: str) -> list[int]:
        # Placeholders may be longer than what they stand for.
        _require_encodable(_bytes_of(scaffold))
        return self._controls_of(self._tokenizer.encode(scaffold, parse_special=True))

    def _controls_of(self, ids: Sequence[int]) -> list[int]:
        controls = self._controls
        return [token_id for token_id in ids if token_id in controls]

    def _pieced(self, template: ChatTemplate, conversation: Conversation) -> list[int]:
        """Encodes the template's text and the contents apart from each other.

        Raises:
            InvalidArgument: the template cuts contents into parts, so that they cannot be told from
                its own text.
        """
        veil = Veil()
        scaffold = template.render_conversation(veiled(conversation, veil), is_veiled=True)
        ids: list[int] = []
        try:
            for piece in veil.pieces(scaffold):
                ids += self._tokenizer.encode(piece.text, parse_special=not piece.is_typed)
        except Torn:
            raise invalid_field(
                "spec.chat",
                FieldRule.BAD_FORMAT,
                "has the text of a control token where the model's chat template cannot keep it "
                "apart from its own",
            ) from None
        return ids


def _require_encodable(size: int) -> None:
    if size > RENDERED_BYTES_MAX:
        raise invalid_field(
            "spec.chat",
            FieldRule.TOO_LONG,
            f"is longer than {RENDERED_BYTES_MAX} bytes with the chat template",
        )


def is_short(execution: engine_pb2.Execution) -> bool:
    """Tells whether a request is made so fast that it may happen on the event loop."""
    if sum(map(len, execution.stop.stop_sequences)) > STOP_CHARACTERS_MAX:
        return False
    if execution.HasField("constraint") or _constrains_calls(execution):
        return False
    match execution.WhichOneof("input"):
        case "chat":
            return _characters(execution) <= SHORT_CHARACTERS_MAX
        case "text":
            return len(execution.text) <= SHORT_CHARACTERS_MAX
        case _:
            return True


def work_of(execution: engine_pb2.Execution) -> int:
    """Estimates what a request costs to make, as characters of a text to tokenise.

    A message costs its template's statements, and a constraint what compiling it takes.
    """
    total = execution.ByteSize() + _PIECE_WORK * pieces_of(execution.chat)
    if execution.HasField("constraint"):
        total += _CONSTRAINT_WORK * execution.constraint.ByteSize()
    if _constrains_calls(execution):
        total += _CONSTRAINT_WORK * execution.tools.ByteSize()
    return total


def _constrains_calls(execution: engine_pb2.Execution) -> bool:
    """Tells whether a grammar has to be made of the tools, which takes milliseconds."""
    return shows_tools(execution) and (
        execution.tools.mode == tools_pb2.TOOL_MODE_REQUIRED
        or any(tool.strict for tool in execution.tools.tools)
    )


def _characters(execution: engine_pb2.Execution) -> int:
    """Counts the characters of a conversation, until there are too many of them."""
    chat = execution.chat
    total = len(chat.template_variables_json)
    for message in chat.messages:
        total += _message_characters(message)
        if total > SHORT_CHARACTERS_MAX:
            return total
    if execution.HasField("tools"):
        total += sum(
            64 + len(tool.description) + len(tool.parameters_json_schema)
            for tool in execution.tools.tools
        )
    return total


def _message_characters(message: generation_pb2.ChatMessage) -> int:
    # Each message and part counts, so that many empty ones are not short.
    parts = message.parts
    total = _PIECE_CHARACTERS * (1 + len(parts))
    total += sum([len(part.text) or len(part.reasoning) for part in parts])
    if message.tool_calls:
        total += sum(64 + len(call.arguments_json) for call in message.tool_calls)
    return total


def _bytes_of(text: str) -> int:
    # JSON may spell half of a character, which has no UTF-8; tokenizers take it for "?".
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _conversation_of_turns(turns: Sequence[Turn]) -> Conversation:
    return Conversation(messages=[{"role": turn.role, "content": turn.content} for turn in turns])
