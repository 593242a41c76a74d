"""Whether llguidance can enforce a grammar, tried on single bytes instead of a vocabulary.

May be used from several threads. llguidance gives the interpreter's lock back while it works.
"""

from __future__ import annotations

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

STEPS_MAX = 64
DESCRIPTION_CHARACTERS_MAX = 200
_END = 256
# What brings most texts to their end: closing, then going on as shortly as possible.
_PREFERRED = b'"}]>0'
_NO_TEXT = "no text matches it"
_LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)


class GrammarRefused(Exception):
    """llguidance does not take it, or nothing matches it. The message is for the tenant."""


class _Bytes:
    """A vocabulary of all bytes, as llguidance asks for it."""

    eos_token_id = _END
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(_END)), b"\xff<end>")
    special_token_ids = (_END,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


_TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=_END + 1, slices=[])


def probe(grammar: str) -> None:
    """Compiles a grammar and walks to the end of a text that matches, or 64 bytes far.

    Args:
        grammar: as llguidance reads it.

    Raises:
        GrammarRefused: it is malformed or too large, or no text matches.
    """
    matcher = LLMatcher(_TOKENIZER, grammar, log_level=0, limits=_LIMITS)
    _check(matcher)
    for _ in range(STEPS_MAX):
        mask = matcher.compute_bitmask()
        if matcher.is_accepting():
            return
        _check(matcher)
        if matcher.is_stopped():
            raise GrammarRefused(_NO_TEXT)
        matcher.consume_token(_pick(mask))
    _check(matcher)


def _pick(mask: bytes) -> int:
    bits = int.from_bytes(mask, "little") & ((1 << _END) - 1)
    for byte in _PREFERRED:
        if bits >> byte & 1:
            return byte
    if bits == 0:
        raise GrammarRefused(_NO_TEXT)
    return (bits & -bits).bit_length() - 1


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        raise GrammarRefused(_describe(matcher.get_error()))


def _describe(message: str) -> str:
    """Shortens what llguidance says: the cause, without the grammar around it."""
    if message.startswith("NoExtension"):
        return _NO_TEXT
    cause = message.split("<non-verbose/>", maxsplit=1)[0].rsplit("error: ", 1)[-1].strip()
    first = (cause.splitlines() or ["cannot be compiled"])[0]
    return first[:DESCRIPTION_CHARACTERS_MAX]
