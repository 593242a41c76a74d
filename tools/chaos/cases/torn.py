"""Cases of a journal that is not as it was written, found by the gateway's next process."""

from __future__ import annotations

import asyncio
import random
import struct
import zlib
from collections.abc import Callable, Iterator

from tools.chaos.audit import End
from tools.chaos.cases.ground import WELL_S, Answer, Ground
from tools.conformance.operator import within
from tools.conformance.verdict import expect, expect_equal
from tools.local.absence import halted, process_away

STREAMS = 6
SHORT_TOKENS = 60
LONG_TOKENS = 300
_HEADER = struct.Struct("<II")
_PROGRESS = struct.Struct("<cII")

Damage = Callable[[bytes], bytes]
"""Makes of a segment what the next process finds."""


async def killed_with_a_journal(ground: Ground, damage: Damage) -> list[Answer]:
    """Kills the gateway while its journal has ends that are not settled, and alters the journal.

    Billing stands still from before the first end until after the kill: what has ended is in the
    journal alone. Returns what clients got: the first half had ended, the rest was cut.
    """
    async with asyncio.TaskGroup() as tasks:
        lengths = [SHORT_TOKENS] * STREAMS + [LONG_TOKENS] * STREAMS
        reading = [tasks.create_task(ground.stream(tokens)) for tokens in lengths]
        await asyncio.sleep(0)
        await ground.begun(len(reading))
        with halted(ground.state, "billing"):
            await asyncio.gather(*reading[:STREAMS])
            with process_away(ground.state, "gateway"):
                file = max(ground.state.journal.glob("*.journal"))
                file.write_bytes(damage(file.read_bytes()))
    answers = [task.result() for task in reading]
    ends = [answer.attempt.end for answer in answers]
    expect_equal(ends, [End.CLEAN] * STREAMS + [End.CUT] * STREAMS, "ends for the clients")
    return answers


async def _is_said(ground: Ground, event: str, times: int) -> None:
    async def is_said() -> bool:
        return ground.log_of("gateway").count(f'"event": "{event}"') > times

    expect(await within(WELL_S, is_said), f"the gateway did not log {event!r}")


def _chance(seed: int) -> random.Random:
    return random.Random(f"torn {seed}")  # noqa: S311 - no secret


async def torn_end(ground: Ground, seed: int) -> None:
    """A record that was being written when the process died: ignored, and said."""
    before = ground.log_of("gateway").count('"event": "journal torn"')

    def tear(data: bytes) -> bytes:
        body = _PROGRESS.pack(b"P", 1, 10**6)
        record = _HEADER.pack(len(body), zlib.crc32(body)) + body
        return data + record[: _chance(seed).randrange(1, len(record))]

    answers = await killed_with_a_journal(ground, tear)
    await _is_said(ground, "journal torn", before)
    ground.findings.shown.append(f"{len(answers)} streams settled behind a torn record")


async def flipped_bit(ground: Ground, seed: int) -> None:
    """A bit that flipped in the middle: noticed, kept, and what lies behind it counts."""
    before = ground.log_of("gateway").count('"event": "journal damaged"')
    kept = len(list(ground.state.journal.glob("*.damaged")))

    def flip(data: bytes) -> bytes:
        chance = _chance(seed)
        damaged = bytearray(data)
        damaged[chance.randrange(*chance.choice(_superseded(data)))] ^= 1 << chance.randrange(8)
        return bytes(damaged)

    answers = await killed_with_a_journal(ground, flip)
    await _is_said(ground, "journal damaged", before)

    async def is_kept() -> bool:
        return len(list(ground.state.journal.glob("*.damaged"))) == kept + 1

    expect(await within(WELL_S, is_kept), "the damaged segment was not kept")
    ground.findings.shown.append(f"{len(answers)} streams settled around a damaged record")


async def lost_end(ground: Ground) -> None:
    """Power fails: what the disk had not written is gone, and nobody pays for what is not there.

    That is what the operator loses: ends become those of a lost gateway, generations have no
    record, slices are freed when lease and grace are over. Nothing is charged twice or too much.
    """
    answers = await killed_with_a_journal(ground, _until_half_of_the_openings)
    await ground.served()
    await ground.at_rest()
    expect_equal(await ground.forgive(answers), STREAMS, "generations that have no record")
    ground.findings.shown.append(
        f"of {len(answers)} streams whose journal was lost from the middle of their openings on"
        f" {STREAMS} have no record, and none has more than its client got"
    )


def _until_half_of_the_openings(data: bytes) -> bytes:
    ends = [end for _, end, body in _records(data) if body[:1] == b"O"]
    return data[: ends[-STREAMS - 1]]


def _superseded(data: bytes) -> list[tuple[int, int]]:
    """Where counts begin and end that a later count replaces: without them all is as it was."""
    found: list[tuple[int, int]] = []
    latest: dict[int, tuple[int, int]] = {}
    for start, end, body in _records(data):
        if body[:1] == b"P":
            _, ordinal, _ = _PROGRESS.unpack(body)
            if ordinal in latest:
                found.append(latest[ordinal])
            latest[ordinal] = (start, end)
    return found


def _records(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yields where each record begins and ends, and its body, of a segment that is whole."""
    start = 0
    while start < len(data):
        length, _ = _HEADER.unpack_from(data, start)
        end = start + _HEADER.size + length
        yield start, end, data[start + _HEADER.size : end]
        start = end
