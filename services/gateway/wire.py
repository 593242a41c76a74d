"""The wire format of protobuf, where messages are written by hand because there are so many."""

from __future__ import annotations

# Numbers below are of at most two bytes as varints, and ready-made.
SHORT = 1 << 14


def _long_varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)


VARINTS = [_long_varint(value) for value in range(SHORT)]


def varint(value: int) -> bytes:
    """Writes a number."""
    return VARINTS[value] if value < SHORT else _long_varint(value)


def field(head: bytes, data: bytes) -> bytes:
    """Writes a field of a length: text, bytes, a message or packed numbers.

    Args:
        head: number of the field with its wire type.
        data: what it holds.
    """
    return head + varint(len(data)) + data
