"""The simulator's tokenizer: a fixed vocabulary made in code. Reads no file, asks no clock.

    ids 0..255            one byte each: any text has a spelling
    then                  control tokens <|im_start|>, <|im_end|>, <|end_of_text|>
    then                  pairs of lower-case letters, suffixes, runs of spaces and line ends
    then                  words, four ways: "word", " word", "Word", " Word"

Encoding cuts text into pieces (a word with at most one space before it, a run of spaces, a run of
anything else) and takes the token that is a whole piece; an unknown word is spelled in pairs of
letters, everything else in bytes. Linear in the text; for 1 MiB, on one core of a small machine:
20 ms of one letter, 110 ms of English, 300 ms at worst (pieces of one character).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from services.worker import templates
from services.worker.engine.sim_words import SUFFIXES, WORDS

BYTE_COUNT = 256
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|end_of_text|>")
# Longer runs of letters are no words; bytes spell them fastest.
WORD_LENGTH_MAX = 64

_PIECES = re.compile(r" ?[A-Za-z]+| +|[^ A-Za-z]+")
_CONTROLS = re.compile("(" + "|".join(re.escape(text) for text in CONTROL_TOKENS) + ")")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WHITE = ("  ", "    ", "        ", "\n\n", ", ", ". ", ": ")

CHAT_TEMPLATE = templates.load("chatml_tools")


def _texts() -> Iterator[str]:
    """Yields the texts of all tokens behind the control tokens, in the order of their ids."""
    yield from (first + second for first in _LETTERS for second in _LETTERS)
    yield from _WHITE
    yield from SUFFIXES
    for word in WORDS:
        yield word
        yield f" {word}"
        yield word.capitalize()
        yield f" {word.capitalize()}"


def _vocabulary() -> tuple[list[bytes], dict[str, int]]:
    pieces = [bytes([byte]) for byte in range(BYTE_COUNT)]
    pieces.extend(b"" for _ in CONTROL_TOKENS)
    ids: dict[str, int] = {}
    for text in _texts():
        if len(text) > 1 and text not in ids:
            ids[text] = len(pieces)
            pieces.append(text.encode("ascii"))
    return pieces, ids


class SimTokenizer:
    """Implements services.worker.engine.base.Tokenizer."""

    def __init__(self) -> None:
        self._bytes, self._ids = _vocabulary()
        self._controls = {text: BYTE_COUNT + row for row, text in enumerate(CONTROL_TOKENS)}

    @property
    def vocabulary_size(self) -> int:
        """Token ids are 0 <= id < vocabulary_size."""
        return len(self._bytes)

    @property
    def chat_template(self) -> str:
        """ChatML with tools and thinking."""
        return CHAT_TEMPLATE

    @property
    def special_tokens(self) -> dict[str, str]:
        """There is no token for the beginning of a text."""
        return {"bos_token": "", "eos_token": "<|im_end|>"}

    @property
    def control_ids(self) -> tuple[int, ...]:
        """Ids of the control tokens."""
        return tuple(self._controls.values())

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids of the control tokens that end an output."""
        return self._controls["<|im_end|>"], self._controls["<|end_of_text|>"]

    def id_of(self, text: str) -> int | None:
        """Returns the token that spells exactly this text, or None."""
        encoded = text.encode()
        return encoded[0] if len(encoded) == 1 else self._ids.get(text)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Turns text into ids. Adds nothing at either end."""
        if not parse_special:
            return self._encode_plain(text)
        ids: list[int] = []
        for part in _CONTROLS.split(text):
            control = self._controls.get(part)
            if control is None:
                ids.extend(self._encode_plain(part))
            else:
                ids.append(control)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes of one token, possibly part of a character; empty for control tokens."""
        return self._bytes[token_id]

    def _encode_plain(self, text: str) -> list[int]:
        known = self._ids.get
        ids: list[int] = []
        for piece in _PIECES.findall(text):
            token_id = known(piece)
            if token_id is not None:
                ids.append(token_id)
            elif piece[-1] in _ENDS_OF_WORDS and len(piece) <= WORD_LENGTH_MAX:
                self._spell(piece, ids)
            else:
                # A lone surrogate cannot come out of protobuf; it becomes "?".
                ids.extend(piece.encode("utf-8", "replace"))
        return ids

    def _spell(self, piece: str, ids: list[int]) -> None:
        """Spells an unknown word in pairs of letters."""
        start = 0
        if piece[0] == " ":
            ids.append(ord(" "))
            start = 1
        for at in range(start, len(piece), 2):
            pair = piece[at : at + 2]
            token_id = self._ids.get(pair)
            if token_id is None:
                ids.extend(pair.encode("ascii"))
            else:
                ids.append(token_id)


_ENDS_OF_WORDS = frozenset(_LETTERS + _LETTERS.upper())
