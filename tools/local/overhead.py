"""How many tokens a chat template can add: bounds that the catalog keeps with a model version.

No token is shorter than a byte, so bytes bound tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from libs.errors import InvalidArgument
from services.worker.chat import ChatTemplate, TemplateInvalid, Turn

OVERHEAD_MAX = 65536
MARGIN = 8
"""Begin-of-sequence and whatever else a tokenizer puts before a text."""
_FIXED_TIME = datetime(2000, 1, 1, tzinfo=UTC)
_SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_USER, _ASSISTANT, _SYSTEM = Turn("user", "x"), Turn("assistant", "x"), Turn("system", "x")


def bounds(source: str) -> tuple[int, int]:
    """Most tokens that a template adds to a prompt, and to each message.

    A template that cannot be used counts as none: its worker refuses conversations anyway.
    """
    if not source:
        return MARGIN, 0
    try:
        template = ChatTemplate(source, _SPECIAL_TOKENS, lambda: _FIXED_TIME)
    except TemplateInvalid:
        return MARGIN, 0
    alone = _added(template, [_USER])
    # What two turns add together bounds what one of them adds.
    pair = _added(template, [_USER, _ASSISTANT, _USER]) - alone
    instructed = _added(template, [_SYSTEM, _USER]) - alone
    message = max(pair, instructed, 0) + 1
    return min(alone + MARGIN, OVERHEAD_MAX), min(message, OVERHEAD_MAX)


def _added(template: ChatTemplate, turns: Sequence[Turn]) -> int:
    """Bytes of a rendering beyond the contents; 0 when the template refuses the conversation."""
    try:
        text = template.render(turns)
    except InvalidArgument:
        return 0
    return len(text.encode("utf-8")) - sum(len(turn.content) for turn in turns)
