"""Reading a segment of the usage journal, whole or not. Pure but for the reading.

Where a record is not whole, what follows decides. Nothing whole: the end was torn by a death in the
middle of a write, or lost with the power, and was never released. Something whole: the file was
damaged, and what follows still counts.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

HEADER = struct.Struct("<II")
RECORD_BYTES_MAX = 1024 * 1024
"""No record is as long: what says that it is, is none."""
_KINDS = re.compile(rb"[SOHPCAZ]")


@dataclass(slots=True)
class Segment:
    """What could be read.

    Attributes:
        bodies: of whole records, in order.
        damaged_bytes: in front of whole records; a torn end is not among them.
    """

    bodies: list[bytes] = field(default_factory=list)
    damaged_bytes: int = 0


def read_segment(path: Path) -> Segment:
    """Reads a file; says in the log what is torn or damaged."""
    data = path.read_bytes()
    found = Segment()
    position = 0
    while position < len(data):
        body = _body_at(data, position)
        if body is not None:
            found.bodies.append(body)
            position += HEADER.size + len(body)
            continue
        after = _next_whole(data, position + 1)
        if after is None:
            torn = len(data) - position
            log.warning("journal torn", segment=path.name, offset=position, bytes=torn)
            break
        log.error("journal damaged", segment=path.name, offset=position, bytes=after - position)
        found.damaged_bytes += after - position
        position = after
    return found


def _body_at(data: bytes, position: int) -> bytes | None:
    """Returns the body of the record that begins here; None when none does."""
    start = position + HEADER.size
    if start >= len(data):
        return None
    length, checksum = HEADER.unpack_from(data, position)
    # Looked at before anything is copied: in a damaged segment nearly all lengths are chance.
    if not 0 < length <= min(RECORD_BYTES_MAX, len(data) - start):
        return None
    body = data[start : start + length]
    return body if zlib.crc32(body) == checksum else None


def _next_whole(data: bytes, position: int) -> int | None:
    """Returns where the next whole record begins; None when there is none."""
    # A length, a checksum and a known kind that fit each other by chance: less than once in 2^40.
    for kind in _KINDS.finditer(data, position + HEADER.size):
        start = kind.start() - HEADER.size
        if _body_at(data, start) is not None:
            return start
    return None
