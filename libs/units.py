"""Money and tokens: their types and the one rounding rule.

Pure. One nano is 1e-9 of the currency's major unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

Nanos = NewType("Nanos", int)
Tokens = NewType("Tokens", int)

CURRENCY = "USD"
NANOS_MAX = 2**63 - 1
_MILLION = 1_000_000
# Prices are nanos per million tokens, and a discount leaves percents of a line.
_PERCENT = 100
_MILLION_PERCENT = _MILLION * _PERCENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a price says: how the counts of one generation become its charge.

    A charge is a sum of lines: input, output and the request. A discount is taken from each line
    before it is rounded up to whole nanos. Where a part of a line has a price of its own (cached
    input, reasoning), the parts are two lines, which may round up to a nano more than one; then the
    one at the dearer price counts. So a charge is never more than `most`, which is what was held.

    Attributes:
        input_price: nanos per million input tokens.
        output_price: nanos per million output tokens.
        cached_input_price: nanos per million input tokens that the prefix cache had, at most
            input_price; None for input_price.
        reasoning_price: nanos per million output tokens that are reasoning; None for output_price.
        request_price: nanos for each request that is charged.
        background_discount_percent: what background requests pay less, 0 to 100.
    """

    input_price: int
    output_price: int
    cached_input_price: int | None = None
    reasoning_price: int | None = None
    request_price: int = 0
    background_discount_percent: int = 0

    def __post_init__(self) -> None:
        """Refuses rates that no price has.

        Raises:
            ValueError: a negative price, or a discount that is no percentage.
        """
        prices = (self.input_price, self.output_price, self.cached_input_price or 0)
        if min(*prices, self.reasoning_price or 0, self.request_price) < 0:
            raise ValueError("prices are not negative")
        if not 0 <= self.background_discount_percent <= _PERCENT:
            raise ValueError("a discount is 0 to 100 percent")

    def charge(
        self,
        *,
        input_tokens: int,
        output_tokens: int,
        cached_input_tokens: int = 0,
        reasoning_tokens: int = 0,
        is_background: bool = False,
    ) -> Nanos:
        """Prices a generation.

        Args:
            input_tokens: of the prompt, cached ones among them.
            output_tokens: of all outputs, reasoning among them.
            cached_input_tokens: the part of input_tokens that the prefix cache had.
            reasoning_tokens: the part of output_tokens that is reasoning.
            is_background: the discount applies.

        Raises:
            ValueError: a negative count, or a part that is more than its whole.
        """
        if not 0 <= cached_input_tokens <= input_tokens:
            raise ValueError("cached tokens are a part of the input")
        if not 0 <= reasoning_tokens <= output_tokens:
            raise ValueError("reasoning tokens are a part of the output")
        paid = self._paid(is_background=is_background)
        return Nanos(
            _split_line(
                input_tokens, self.input_price, cached_input_tokens, self.cached_input_price, paid
            )
            + _split_line(
                output_tokens, self.output_price, reasoning_tokens, self.reasoning_price, paid
            )
            - (-self.request_price * paid // _PERCENT)
        )

    def most(self, *, input_tokens: int, output_tokens: int, is_background: bool = False) -> Nanos:
        """Returns the most that such a generation may be charged: what is held for it.

        That is without a cache hit, and with the dearer of output and reasoning.

        Args:
            input_tokens: of the prompt, at most.
            output_tokens: of all outputs, at most.
            is_background: the discount applies.

        Raises:
            ValueError: a negative count.
        """
        if input_tokens < 0 or output_tokens < 0:
            raise ValueError("counts are not negative")
        paid = self._paid(is_background=is_background)
        return Nanos(
            _line(input_tokens * max(self.input_price, self.cached_input_price or 0), paid)
            + _line(output_tokens * self._dearest_output, paid)
            - (-self.request_price * paid // _PERCENT)
        )

    def affordable(
        self, *, nanos: int, input_tokens: int, is_background: bool = False
    ) -> int | None:
        """Returns the most output tokens that `most` prices at `nanos` or less.

        A line is rounded up to whole nanos, and whole nanos are what is left for it, so rounding
        does not matter: tokens * price <= left. Negative when the input alone costs more. None
        when output is free, so that any number fits.
        """
        left = nanos - self.most(
            input_tokens=input_tokens, output_tokens=0, is_background=is_background
        )
        if left < 0:
            return -1
        price = self._dearest_output * self._paid(is_background=is_background)
        return left * _MILLION_PERCENT // price if price else None

    @property
    def _dearest_output(self) -> int:
        return max(self.output_price, self.reasoning_price or 0)

    def _paid(self, *, is_background: bool) -> int:
        """Percents of each line that are paid."""
        return _PERCENT - self.background_discount_percent if is_background else _PERCENT


def _line(nano_tokens: int, paid: int) -> int:
    """Rounds a line up: tokens times price, of which `paid` percent are paid."""
    return -(-nano_tokens * paid // _MILLION_PERCENT)


def _split_line(tokens: int, price: int, part: int, part_price: int | None, paid: int) -> int:
    """Prices a line of which a part may have a price of its own."""
    if not part or part_price is None:
        return _line(tokens * price, paid)
    split = _line((tokens - part) * price, paid) + _line(part * part_price, paid)
    return min(split, _line(tokens * max(price, part_price), paid))
