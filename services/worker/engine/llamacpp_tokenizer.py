"""llama.cpp's own tokeniser over the vocabulary of a GGUF file, in the worker's process.

Only the vocabulary is loaded: some milliseconds and megabytes, no weights, no threads.

Beginning of sequence. encode() adds nothing. Some models were trained with their bos token before
every prompt: adds_bos says so, and whoever makes prompts puts bos_id in front of those that do not
begin with it already (many chat templates write it themselves).

Never: computes with the model.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import re
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from services.worker.engine.base import EngineStartError
from services.worker.engine.llamacpp_api import (
    ATTRIBUTE_CONTROL,
    ATTRIBUTE_STRIPS_LEFT,
    ATTRIBUTE_UNKNOWN,
    ATTRIBUTE_USER_DEFINED,
    NO_TOKEN,
    Handle,
    Llama,
    open_library,
    read_piece,
)

TEXT_BYTES_MAX: Final = 1 << 20
"""Longest text that encode takes, in UTF-8; bounds what a hostile text may cost (see _cut)."""

_SHORT_TEXT_BYTES: Final = 1 << 12
_PIECE_BYTES: Final = 1 << 11
# Twice what was measured: 256 to 512 bytes of stack for a byte of text.
_STACK_BYTES: Final = 1 << 20
_STACK_BYTES_PER_BYTE: Final = 1 << 10
_SPECIAL: Final = ATTRIBUTE_CONTROL | ATTRIBUTE_USER_DEFINED | ATTRIBUTE_UNKNOWN
# Some kinds of vocabulary put a space before the text; that may become a token.
_EXTRA_TOKENS: Final = 2
_deep_stack_lock: Final = threading.Lock()


class LlamaCppTokenizer:
    """A Tokenizer, as services.worker.engine.base says. Any thread may use it.

    Loading takes milliseconds for small vocabularies, up to about a second for large ones: call
    it off the event loop.

    Args:
        model_path: GGUF file.

    Attributes:
        adds_bos: the model was trained with its bos token before every sequence.
        bos_id: that token; None when the vocabulary has none.
        vocabulary_size: see base.Tokenizer.
        chat_template: see base.Tokenizer.
        special_tokens: see base.Tokenizer.

    Raises:
        EngineStartError: the file cannot be read as a model, or the library cannot be loaded.
    """

    def __init__(self, model_path: Path) -> None:
        self._llama = open_library()
        model = _load_vocabulary(self._llama, model_path)
        self._vocabulary = self._llama.model_get_vocab(model)
        # At the latest at exit, and before the library's own end.
        weakref.finalize(self, self._llama.model_free, model)
        self._size = self._llama.vocab_n_tokens(self._vocabulary)
        self._pieces = [
            read_piece(self._llama, self._vocabulary, token_id) for token_id in range(self._size)
        ]
        self._borders = _find_borders(self._llama, self._vocabulary, self._size)
        self._chat_template = (self._llama.model_chat_template(model, None) or b"").decode(
            "utf-8", "replace"
        )
        bos_id = self._llama.vocab_bos(self._vocabulary)
        self.bos_id: int | None = None if bos_id == NO_TOKEN else bos_id
        self.adds_bos = self.bos_id is not None and self._llama.vocab_get_add_bos(self._vocabulary)
        self._special_tokens = {
            "bos_token": self._text_of(bos_id),
            "eos_token": self._text_of(self._llama.vocab_eos(self._vocabulary)),
        }

    @property
    def vocabulary_size(self) -> int:
        """See base.Tokenizer."""
        return self._size

    @property
    def chat_template(self) -> str:
        """See base.Tokenizer."""
        return self._chat_template

    @property
    def special_tokens(self) -> dict[str, str]:
        """See base.Tokenizer."""
        return dict(self._special_tokens)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Turns text into ids; see base.Tokenizer. Releases the GIL while it works.

        Raises:
            ValueError: the text has more than TEXT_BYTES_MAX bytes.
        """
        # A lone surrogate is no character and has no UTF-8.
        data = text.encode("utf-8", "replace")
        if len(data) > TEXT_BYTES_MAX:
            raise ValueError(f"a text of more than {TEXT_BYTES_MAX} bytes is not tokenised")
        if len(data) <= _SHORT_TEXT_BYTES:
            return self._tokenize(data, parse_special=parse_special)
        ids: list[int] = []
        for piece in self._cut(data) if parse_special else [data]:
            ids += self._tokenize_long(piece, parse_special=parse_special)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; see base.Tokenizer. A table look-up."""
        if token_id < 0:
            raise IndexError("a token id is not negative")
        return self._pieces[token_id]

    def _tokenize(self, data: bytes, *, parse_special: bool) -> list[int]:
        # No tokeniser makes more tokens than bytes.
        count_max = len(data) + _EXTRA_TOKENS
        ids = (ctypes.c_int32 * count_max)()
        count = self._llama.tokenize(
            self._vocabulary, data, len(data), ids, count_max, False, parse_special
        )
        if count < 0:
            raise ValueError("the text cannot be tokenised")
        return ids[:count]

    def _tokenize_long(self, data: bytes, *, parse_special: bool) -> list[int]:
        """Tokenises on a thread whose stack is deep enough for the text.

        For some kinds of vocabulary (tekken, gpt-4o, deepseek...) llama.cpp splits words with
        std::regex, which recurses for each character of a word: 30 thousand times the letter a
        overflow 8 MiB of stack and end the process. One text at a time, to bound the memory.
        """
        if len(data) <= _SHORT_TEXT_BYTES:
            return self._tokenize(data, parse_special=parse_special)
        with _deep_stack_lock, concurrent.futures.ThreadPoolExecutor(1) as pool:
            previous = threading.stack_size(_STACK_BYTES + _STACK_BYTES_PER_BYTE * len(data))
            try:
                tokenizing = pool.submit(self._tokenize, data, parse_special=parse_special)
            finally:
                threading.stack_size(previous)
            return tokenizing.result()

    def _cut(self, data: bytes) -> Iterator[bytes]:
        """Cuts a long text right before control tokens, where its tokens have a border anyway.

        For each control token in a text llama.cpp looks for all others in all the rest of it,
        which takes time with the square of the length: 10 s for 50 thousand in 600 kB.
        """
        start = 0
        if self._borders is not None:
            for match in self._borders.finditer(data):
                if match.start() - start >= _PIECE_BYTES:
                    yield data[start : match.start()]
                    start = match.start()
        yield data[start:]

    def _text_of(self, token_id: int) -> str:
        if token_id == NO_TOKEN:
            return ""
        return read_piece(self._llama, self._vocabulary, token_id, is_control_shown=True).decode(
            "utf-8", "replace"
        )


def _load_vocabulary(llama: Llama, path: Path) -> Handle:
    if not path.is_file():
        raise EngineStartError(f"there is no model file {path}")
    parameters = llama.model_default_params()
    parameters.vocab_only = True
    parameters.n_gpu_layers = 0
    model = llama.model_load_from_file(str(path).encode(), parameters)
    if model is None:
        raise EngineStartError(
            f"llama.cpp cannot load the vocabulary of {path}: "
            f"{llama.take_errors() or 'no reason given'}"
        )
    return model


def _find_borders(llama: Llama, vocabulary: Handle, size: int) -> re.Pattern[bytes] | None:
    """A pattern of the control tokens that no other special token can overlap in a text."""
    specials: dict[bytes, int] = {}
    for token_id in range(size):
        attributes = llama.vocab_get_attr(vocabulary, token_id)
        if attributes & _SPECIAL:
            specials[llama.vocab_get_text(vocabulary, token_id) or b""] = attributes
    specials.pop(b"", None)
    first_bytes = {token[0] for token in specials}
    inner_bytes = {byte for token in specials for byte in token[1:]}
    borders = [
        re.escape(token)
        for token, attributes in specials.items()
        if attributes & ATTRIBUTE_CONTROL
        and not attributes & ATTRIBUTE_STRIPS_LEFT
        and token[0] not in inner_bytes
        and first_bytes.isdisjoint(token[1:])
    ]
    return re.compile(b"|".join(borders)) if borders else None
