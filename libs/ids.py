"""Ids and resource names: made, parsed and formatted in one place.

Pure: time and chance are brought by the caller.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime

from libs.errors import FieldRule, InvalidArgument, invalid_field

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [first + second for first in _CROCKFORD for second in _CROCKFORD]
_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_ULID = re.compile(rf"[0-7][{_CROCKFORD}]{{25}}")
_TIME_BITS = 48
_RANDOM_BITS = 80


def ulid(now: datetime, random_bits: int) -> str:
    """Makes a ULID: 26 characters that sort by time. Source: github.com/ulid/spec.

    Args:
        now: aware; its milliseconds are used.
        random_bits: 80 bits of chance.
    """
    milliseconds = int(now.timestamp() * 1000)
    value = (milliseconds % (1 << _TIME_BITS)) << _RANDOM_BITS
    value |= random_bits % (1 << _RANDOM_BITS)
    return "".join([_PAIRS[(value >> shift) & 1023] for shift in range(120, -1, -10)])


def time_of_ulid(text: str) -> datetime | None:
    """Returns when a ULID was made, to the millisecond; None when the text is none."""
    if _ULID.fullmatch(text) is None:
        return None
    value = 0
    for character in text:
        value = value * 32 + _CROCKFORD.index(character)
    try:
        return datetime.fromtimestamp((value >> _RANDOM_BITS) / 1000, UTC)
    except ValueError:
        # Its 48 bits reach beyond the year 9999: nobody has made it yet.
        return None


def parse_name(name: str, pattern: str, *, field: str) -> tuple[str, ...]:
    """Splits a resource name into its ids.

    Args:
        name: as "models/llama/versions/1".
        pattern: collections with a star for each id, as "models/*/versions/*".
        field: path of the field that held the name, for the error.

    Raises:
        InvalidArgument: the name does not have that form.
    """
    expression = "/".join(f"({_ID})" if part == "*" else part for part in pattern.split("/"))
    match = re.fullmatch(expression, name)
    if match is None:
        raise bad_name(pattern, field=field)
    return match.groups()


def bad_name(pattern: str, *, field: str) -> InvalidArgument:
    """Makes the error for a name that does not have the form of `pattern`."""
    return invalid_field(field, FieldRule.BAD_FORMAT, f"must have the form {pattern}")


def last_part(name: str) -> str:
    """Returns what stands behind the last slash."""
    return name.rpartition("/")[2]
