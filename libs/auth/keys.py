"""API keys: their form, how they are made and how they are recognised.

    mk_<id>_<secret><crc>
    id      12 characters of a-z0-9: public, names the key
    secret  43 characters of base62: 256 bits
    crc     6 characters of base62: CRC-32 of everything before it

The checksum lets scanners and this code tell a mistyped or invented key without a look-up. It is no
protection. Only the SHA-256 of the whole key is stored: with 256 bits of chance in it, a slow hash
would protect nothing and cost a request 100 ms.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BASE36 = "0123456789abcdefghijklmnopqrstuvwxyz"
_ID_LENGTH = 12
_SECRET_LENGTH = 43
_CRC_LENGTH = 6
_FORM = re.compile(
    rf"mk_([a-z0-9]{{{_ID_LENGTH}}})_([A-Za-z0-9]{{{_SECRET_LENGTH}}})([A-Za-z0-9]{{{_CRC_LENGTH}}})"
)
KEY_ID = slice(3, 3 + _ID_LENGTH)
"""Where the id stands in a key."""
ID_BITS = 62
SECRET_BITS = 256


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made.

    Attributes:
        key_id: public part.
        secret: the whole key; show it once, store it never.
    """

    key_id: str
    secret: str


def _encode(value: int, alphabet: str, length: int) -> str:
    digits = []
    for _ in range(length):
        value, digit = divmod(value, len(alphabet))
        digits.append(alphabet[digit])
    return "".join(reversed(digits))


def _checksum(text: str) -> str:
    return _encode(zlib.crc32(text.encode("ascii")), _BASE62, _CRC_LENGTH)


def new_key(id_bits: int, secret_bits: int) -> NewKey:
    """Makes a key from chance that the caller brings: 62 and 256 bits."""
    key_id = _encode(id_bits, _BASE36, _ID_LENGTH)
    body = f"mk_{key_id}_{_encode(secret_bits, _BASE62, _SECRET_LENGTH)}"
    return NewKey(key_id, body + _checksum(body))


def parse_key(text: str) -> str | None:
    """Returns the id of a well-formed key, else None. Says nothing about whether it is known."""
    match = _FORM.fullmatch(text)
    if match is None or _checksum(text[:-_CRC_LENGTH]) != match[3]:
        return None
    return match[1]


def key_id_of(text: str) -> str:
    """Returns the id of a key.

    Raises:
        ValueError: the text is no key.
    """
    key_id = parse_key(text)
    if key_id is None:
        raise ValueError("not an API key: its form or its checksum is wrong")
    return key_id


def sha256_of(text: str) -> bytes:
    """Returns what is stored of a credential: 32 bytes."""
    return hashlib.sha256(text.encode("utf-8")).digest()
