"""From the input of an execution to token ids. Pure; may run in a thread.

What a user typed never becomes a control token. A rendered conversation is encoded as a whole, the
way the model was trained, and then checked: its control tokens must be those of the same
conversation with every content replaced by a placeholder. Where they differ, somebody typed the
text of a control token (or a template made one out of what was typed), and the conversation is put
together from the template's own pieces and the contents, each encoded by itself and the contents
without control tokens. Only such conversations may be tokenised a little differently at the seams.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs.errors import FieldRule, InvalidArgument, Reason, invalid_field
from services.worker.chat import ChatTemplate, Turn
from services.worker.engine.base import Tokenizer
from services.worker.text import TokenPieces

# Texts longer than this are tokenised away from the event loop: about a millisecond's work.
SHORT_CHARACTERS_MAX = 4096
# Likewise for the automaton of stop sequences: 2 us and more for each character.
STOP_CHARACTERS_MAX = 512
# As much as a text prompt may have (generation.proto), and as tokenizers take at once.
RENDERED_BYTES_MAX = 1024 * 1024
# Shapes of conversations, (role, has content) of each message, whose control tokens are kept.
SHAPES_MAX = 64

_ROLES = {
    generation_pb2.ROLE_SYSTEM: "system",
    generation_pb2.ROLE_USER: "user",
    generation_pb2.ROLE_ASSISTANT: "assistant",
}
# Private-use characters around a number: nothing that a template trims, splits or changes the
# case of.
_PLACEHOLDER = re.compile("\ue000\ue001([0-9]+)\ue002\ue003")


class PromptBuilder:
    """Makes prompts for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        pieces: TokenPieces,
        template: ChatTemplate | None,
        *,
        bos_id: int | None = None,
    ) -> None:
        """Keeps what it needs.

        Args:
            tokenizer: of the model.
            pieces: of the same vocabulary.
            template: of the model; None when it has none.
            bos_id: token that every prompt of this model begins with; None for none.
        """
        self._tokenizer = tokenizer
        self._vocabulary_size = tokenizer.vocabulary_size
        self._controls = frozenset(
            token_id for token_id, piece in enumerate(pieces.data) if not piece
        )
        self._template = template
        self._bos_id = bos_id
        self._bare_controls = functools.lru_cache(SHAPES_MAX)(self._find_bare_controls)

    def build(self, execution: engine_pb2.Execution) -> Sequence[int]:
        """Returns the prompt of an execution.

        Raises:
            InvalidArgument: there is no input, it is empty, a token id is not in the vocabulary,
                the model has no chat template, or its template refuses the conversation.
        """
        ids = self._ids_of(execution)
        if not ids:
            raise invalid_field("spec.input", FieldRule.REQUIRED, "must not be empty")
        return ids

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

    def _ids_of(self, execution: engine_pb2.Execution) -> list[int]:
        match execution.WhichOneof("input"):
            case "chat":
                return self._with_bos(self._chat(execution))
            case "text":
                typed = self._tokenizer.encode(execution.text, parse_special=False)
                return self._with_bos(typed)
            case "tokens":
                ids = list(execution.tokens.ids)
                self.check_ids(ids, "spec.tokens.ids")
                return ids
            case None:
                raise invalid_field("spec.input", FieldRule.REQUIRED, "must be set")

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Puts the first token of every prompt there, unless the template has done so."""
        if self._bos_id is None or not ids or ids[0] == self._bos_id:
            return ids
        return [self._bos_id, *ids]

    def _chat(self, execution: engine_pb2.Execution) -> list[int]:
        if self._template is None:
            raise InvalidArgument(
                "spec.chat: the model has no chat template",
                reason=Reason.FEATURE_UNSUPPORTED,
                metadata={"model": execution.model_version, "feature": "spec.chat"},
            )
        turns = [_turn(message) for message in execution.chat.messages]
        rendered = self._template.render(turns)
        if len(rendered.encode("utf-8")) > RENDERED_BYTES_MAX:
            raise invalid_field(
                "spec.chat",
                FieldRule.TOO_LONG,
                f"is longer than {RENDERED_BYTES_MAX} bytes with the chat template",
            )
        ids = self._tokenizer.encode(rendered, parse_special=True)
        # An empty content stays empty: templates ask for that.
        if self._controls_of(ids) == self._bare_controls(
            tuple((turn.role, bool(turn.content)) for turn in turns)
        ):
            return ids
        return self._pieced(self._scaffold(turns), turns)

    def _find_bare_controls(self, shape: tuple[tuple[str, bool], ...]) -> list[int]:
        """Returns the control tokens of any conversation of a shape in which none was typed.

        Kept for the shapes seen last, which are few: they are one half of a prompt's cost. A
        template that asks for the date may come to render another scaffold, but not other control
        tokens; where one did, the conversation would be put together from pieces.
        """
        scaffold = self._scaffold(
            [Turn(role, "x" if has_content else "") for role, has_content in shape]
        )
        return self._controls_of(self._tokenizer.encode(scaffold, parse_special=True))

    def _scaffold(self, turns: Sequence[Turn]) -> str:
        """Renders a conversation with a placeholder for each content."""
        assert self._template is not None
        return self._template.render(
            [
                Turn(turn.role, f"\ue000\ue001{row}\ue002\ue003" if turn.content else "")
                for row, turn in enumerate(turns)
            ]
        )

    def _controls_of(self, ids: Sequence[int]) -> list[int]:
        controls = self._controls
        return [token_id for token_id in ids if token_id in controls]

    def _pieced(self, scaffold: str, turns: Sequence[Turn]) -> list[int]:
        """Encodes the template's text and the contents apart from each other."""
        ids: list[int] = []
        # Every second part is the number inside a placeholder.
        for place, part in enumerate(_PLACEHOLDER.split(scaffold)):
            if place % 2:
                content = turns[int(part)].content
                ids.extend(self._tokenizer.encode(content, parse_special=False))
            else:
                ids.extend(self._tokenizer.encode(part, parse_special=True))
        return ids


def is_short(execution: engine_pb2.Execution) -> bool:
    """Tells whether a request is made so fast that it may happen on the event loop."""
    if sum(map(len, execution.stop.stop_sequences)) > STOP_CHARACTERS_MAX:
        return False
    match execution.WhichOneof("input"):
        case "chat":
            return _characters(execution.chat) <= SHORT_CHARACTERS_MAX
        case "text":
            return len(execution.text) <= SHORT_CHARACTERS_MAX
        case _:
            return True


def _characters(chat: generation_pb2.ChatInput) -> int:
    # Each message counts, so that many empty ones are not short.
    return sum(8 + sum(len(part.text) for part in item.parts) for item in chat.messages)


def _turn(message: generation_pb2.ChatMessage) -> Turn:
    role = _ROLES.get(message.role)
    if role is None:
        raise invalid_field("spec.chat", FieldRule.UNKNOWN_ENUM, "has a message of an unknown role")
    return Turn(role, "".join(part.text for part in message.parts))
