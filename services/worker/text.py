"""The text layer: from the tokens of one execution to text that may be shown. Pure.

THE RULE: a token is released only together with the text that it completes, so that released text
and released tokens always agree. Held back are the bytes of an unfinished character and the longest
end of the text with which a stop sequence begins. Hence nothing is pending at any place where
output was released, and another worker can go on behind the released tokens.

    tokens      | All | in  | E2 | 82 | AC | <S |          stop sequence "<STOP>"
    text        | All | in  |      euro    | <S |
    released    |-----------------------------|  held: "<S" until it is no stop sequence

How it ends:
    stop sequence   the text before the match is released, and with it the tokens of which at least
                    one character is visible (control tokens before the match count too); with
                    `includes_stop` the text and the tokens of the match too
    natural end     everything held is released; an unfinished character becomes U+FFFD
    abort           what is held is dropped: neither released nor counted
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.worker.engine.base import Tokenizer
from services.worker.stops import ROOT, StopMatcher

# UTF-8 never needs more to tell what an unfinished character is.
_UNFINISHED_BYTES_MAX = 3
_CHARACTER_BYTES_MAX = 4
_CONTINUING = bytes(range(0x80, 0xC0))
_SURROGATE_LEAD = 0xED
_SURROGATE_MIN = 0xA0


class Release(NamedTuple):
    """What may be shown after a step.

    Attributes:
        token_ids: released tokens.
        text: the text that they complete; whole characters.
        stop: the stop sequence that ended the output, or None.
    """

    token_ids: Sequence[int]
    text: str
    stop: str | None = None


NOTHING = Release((), "")


@dataclass(frozen=True, slots=True)
class TokenPieces:
    """What every token of a vocabulary spells, by id.

    Attributes:
        data: UTF-8 bytes; empty for control tokens.
        texts: the same as text; None when the bytes are no whole characters.
    """

    data: list[bytes]
    texts: list[str | None]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenPieces:
        """Reads a whole vocabulary; about 1 us a token, so not on the event loop."""
        data = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocabulary_size)]
        return cls(data, [_whole(piece) for piece in data])


def _whole(piece: bytes) -> str | None:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _decode(data: bytes) -> tuple[str, bytes]:
    """Decodes what is certain; returns it and the bytes of an unfinished character."""
    text, used = codecs.utf_8_decode(data, "replace", False)
    rest = data[used:]
    if len(rest) == 2 and rest[0] == _SURROGATE_LEAD and rest[1] >= _SURROGATE_MIN:  # noqa: PLR2004
        # Half of a surrogate: CPython waits for its third byte, but no character comes of it.
        return text + "\ufffd\ufffd", b""
    return text, rest


class OutputText:
    """The text of one execution. Positions are characters of the text not yet released."""

    __slots__ = (
        "_boundaries",
        "_includes_stop",
        "_is_over",
        "_matcher",
        "_pieces",
        "_starts",
        "_state",
        "_stopped_before",
        "_text",
        "_token_ids",
        "_unfinished",
        "is_clear",
    )

    def __init__(
        self,
        pieces: TokenPieces,
        matcher: StopMatcher | None = None,
        *,
        includes_stop: bool = False,
    ) -> None:
        self._pieces = pieces
        self._matcher = matcher
        self._includes_stop = includes_stop
        self._state = ROOT
        self._text = ""
        self._unfinished = b""
        self._token_ids: list[int] = []
        # The first character that shows each held token.
        self._starts: list[int] = []
        # (held tokens, characters) after each held token behind which no character is unfinished.
        self._boundaries: list[tuple[int, int]] = []
        self._is_over = False
        # The stop sequence in what was released elsewhere.
        self._stopped_before: str | None = None
        self.is_clear = True
        """Nothing is held: tokens that are whole characters need no text layer just now."""

    def prime(self, token_ids: Sequence[int]) -> bool:
        """Goes on behind tokens that were released elsewhere. Before the first push.

        Returns:
            whether the output is over: a stop sequence is complete in the text of these tokens, the
            last of which was then shown in part. Only `finish` may follow, and says which it was.
        """
        length = self._matcher.length_max if self._matcher is not None else 1
        data = self._tail(token_ids, length * _CHARACTER_BYTES_MAX)
        text, self._unfinished = _decode(data)
        found = self._find_stop(text)
        if found is not None:
            self._stopped_before = found[1]
        self.is_clear = found is None and self._state == ROOT and not self._unfinished
        return found is not None

    def push(self, token_id: int) -> Release:
        """Takes the next token and returns what may be shown now.

        Behind a match everything is dropped: the engine may be some tokens ahead.
        """
        text = self._pieces.texts[token_id]
        if (
            text is not None
            and self.is_clear
            and (self._matcher is None or self._matcher.first_characters.isdisjoint(text))
        ):
            return Release((token_id,), text)
        if self._is_over:
            return NOTHING
        added = self._take(token_id)
        stopped = self._stop(added)
        if stopped is not None:
            return stopped
        return self._release()

    def finish(self) -> Release:
        """Returns everything held, at a natural end. Nothing may be pushed behind it."""
        if self._stopped_before is not None:
            return Release((), "", self._stopped_before)
        if self._is_over:
            return NOTHING
        added = self._unfinished.decode("utf-8", "replace")
        self._unfinished = b""
        self._text += added
        stopped = self._stop(added)
        if stopped is not None:
            return stopped
        self._is_over = True
        self.is_clear = False
        # Without a token, what is left is half a character that was shown where it was released.
        return Release(self._token_ids, self._text if self._token_ids else "")

    def _take(self, token_id: int) -> str:
        """Appends a token to what is held and returns the characters that it completed."""
        piece = self._pieces.data[token_id]
        data = self._unfinished + piece
        if piece:
            start = len(self._text) + self._breaks_off(piece)
        else:
            # A control token shows when the character before it does.
            start = len(self._text) - (not self._unfinished)
        added, self._unfinished = _decode(data)
        self._text += added
        self._token_ids.append(token_id)
        self._starts.append(start)
        if not self._unfinished:
            self._boundaries.append((len(self._token_ids), len(self._text)))
        return added

    def _breaks_off(self, piece: bytes) -> int:
        """Returns 1 when a piece begins a new character in the middle of an unfinished one."""
        if not self._unfinished:
            return 0
        text, unfinished = _decode(self._unfinished + piece[:1])
        return int(bool(text) and (len(text) > 1 or bool(unfinished)))

    def _find_stop(self, added: str) -> tuple[int, str] | None:
        """Steps over new characters; returns how many of them a match leaves over, and it."""
        matcher = self._matcher
        if matcher is None or (self._state == ROOT and matcher.first_characters.isdisjoint(added)):
            return None
        state = self._state
        for position, character in enumerate(added):
            state = matcher.step(state, character)
            stop = matcher.matches[state]
            if stop is not None:
                self._state = ROOT
                return len(added) - position - 1, stop
        self._state = state
        return None

    def _stop(self, added: str) -> Release | None:
        """Ends the output when the new characters complete a stop sequence."""
        found = self._find_stop(added)
        if found is None:
            return None
        behind, stop = found
        # Below 0 when the sequence began in text that another worker has released.
        hidden = behind if self._includes_stop else behind + len(stop)
        visible = max(0, len(self._text) - hidden)
        count = 0
        for start in self._starts:
            if start >= visible:
                break
            count += 1
        self._is_over = True
        self.is_clear = False
        # Text is shown with its token only; see finish.
        return Release(self._token_ids[:count], self._text[:visible] if count else "", stop)

    def _release(self) -> Release:
        """Releases whole tokens up to what has to be held back."""
        held = self._matcher.depths[self._state] if self._matcher is not None else 0
        ready = len(self._text) - held
        for place in reversed(range(len(self._boundaries))):
            count, end = self._boundaries[place]
            if end <= ready:
                released = Release(self._token_ids[:count], self._text[:end])
                self._forget(place, count, end)
                return released
        self.is_clear = False
        return NOTHING

    def _forget(self, place: int, count: int, end: int) -> None:
        self._token_ids = self._token_ids[count:]
        self._text = self._text[end:]
        self._starts = [start - end for start in self._starts[count:]]
        self._boundaries = [
            (tokens - count, at - end) for tokens, at in self._boundaries[place + 1 :]
        ]
        self.is_clear = not self._token_ids

    def _tail(self, token_ids: Sequence[int], size: int) -> bytes:
        """Returns at least the last bytes of some tokens, from the start of a character on."""
        parts: list[bytes] = []
        length = 0
        for token_id in reversed(token_ids):
            parts.append(self._pieces.data[token_id])
            length += len(parts[-1])
            if length >= size + _UNFINISHED_BYTES_MAX:
                break
        data = b"".join(reversed(parts))
        # Bytes that go on with a character that is not here. A fourth of them would belong to none.
        head = data[:_UNFINISHED_BYTES_MAX]
        begun = len(head) - len(head.lstrip(_CONTINUING))
        return data[begun:] if len(parts) < len(token_ids) else data
