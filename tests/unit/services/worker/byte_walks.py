"""Random outputs under a constraint: llguidance as the engines use it, over the bytes."""

from __future__ import annotations

import functools
import random

from services.worker.engine.matcher import Matcher, MatcherError, MatcherFactory

END = 256
BYTES_MAX = 8192


@functools.cache
def _factory() -> MatcherFactory:
    pieces = [*(bytes([value]) for value in range(END)), b""]
    return MatcherFactory(pieces, end_ids=[END], control_ids=[])


def accepts(grammar: str, text: str) -> bool:
    """Whether a whole text matches."""
    matcher = _factory().make(grammar)
    return _passes(matcher, text) and bool(matcher.mask()[END])


def begins(grammar: str, text: str) -> bool:
    """Whether a text is the beginning of one that matches."""
    return _passes(_factory().make(grammar), text)


def _passes(matcher: Matcher, text: str) -> bool:
    try:
        for byte in text.encode():
            if not matcher.mask()[byte]:
                return False
            matcher.accept(byte)
    except MatcherError:
        return False
    return True


def random_output(grammar: str, seed: int, *, bytes_max: int = BYTES_MAX) -> str:
    """Draws one byte after the other among those that are allowed, until nothing but the end is."""
    chance = random.Random(seed)  # noqa: S311 - the same walk in every run
    matcher = _factory().make(grammar)
    output = bytearray()
    while len(output) < bytes_max:
        allowed = [int(token) for token in matcher.mask().nonzero()[0]]
        token = chance.choice(allowed)
        if token == END:
            return output.decode()
        matcher.accept(token)
        output.append(token)
    raise AssertionError(f"no end within {bytes_max} bytes: {bytes(output[:100])!r}")
