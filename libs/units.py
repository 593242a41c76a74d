"""Money and tokens: their types and the one rounding rule.

Pure. One nano is 1e-9 of the currency's major unit.
"""

from __future__ import annotations

from typing import NewType

Nanos = NewType("Nanos", int)
Tokens = NewType("Tokens", int)

CURRENCY = "USD"
NANOS_MAX = 2**63 - 1
_MILLION = 1_000_000


def charge(tokens: int, nanos_per_million: int) -> Nanos:
    """Prices one line: tokens * nanos_per_million / 10^6, rounded up.

    Rounding happens once per line, here, so that gateway and ledger agree to the nano.

    Raises:
        ValueError: a negative count or price, which no caller may have let in.
    """
    if tokens < 0 or nanos_per_million < 0:
        raise ValueError("counts and prices are not negative")
    return Nanos(-(-tokens * nanos_per_million // _MILLION))


def charge_usage(
    *,
    input_tokens: int,
    output_tokens: int,
    input_price: int,
    output_price: int,
    cached_input_tokens: int = 0,
    cached_input_price: int | None = None,
) -> Nanos:
    """Prices a generation: the sum of its lines. Prices are nanos per million tokens.

    Two lines of input may round up to a nano more than one does; then the one counts, so that a
    cache hit never costs more than a miss, and never more than what was held for it.

    Args:
        input_tokens: of the prompt, cached ones among them.
        output_tokens: of all outputs.
        input_price: of input tokens that were not cached.
        output_price: of output tokens.
        cached_input_tokens: the part of input_tokens that the prefix cache had.
        cached_input_price: of these; None for input_price, and for one line of input.

    Raises:
        ValueError: a negative count or price, or more cached tokens than there are.
    """
    if cached_input_tokens > input_tokens:
        raise ValueError("cached tokens are a part of the input")
    nanos: int = charge(input_tokens, input_price)
    if cached_input_tokens and cached_input_price is not None:
        fresh = charge(input_tokens - cached_input_tokens, input_price)
        nanos = min(nanos, fresh + charge(cached_input_tokens, cached_input_price))
    return Nanos(nanos + charge(output_tokens, output_price))


def affordable_output_tokens(
    *, nanos: int, input_tokens: int, input_price: int, output_price: int
) -> int | None:
    """Returns the most output tokens that `charge_usage` prices at `nanos` or less.

    A line is rounded up to whole nanos, and whole nanos are what is left for it, so rounding does
    not matter: tokens * price / 10^6 <= left. Negative when the input alone costs more. None when
    output is free, so that any number fits.
    """
    left = nanos - charge(input_tokens, input_price)
    if left < 0:
        return -1
    return left * _MILLION // output_price if output_price else None
