"""Amounts as exact decimals. Pure."""

from __future__ import annotations

from decimal import Context, Decimal

# Wide enough for every product of a count and a price, so that nothing is ever rounded.
EXACT = Context(prec=60)
_NANO = Decimal("1e-9")


def decimal_of_nanos(nanos: int) -> Decimal:
    """Returns an amount in the major unit."""
    return EXACT.multiply(Decimal(nanos), _NANO)


def text_of(value: Decimal) -> str:
    """Writes a number without exponent and without zeros at its end: "0", "0.25", "-3"."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
