"""A network that fails: relays in a process of their own, without gRPC, told what goes wrong.

    python -m tools.chaos.network "clients>gateway=127.0.0.1:20000" ...

says on its output, in one line of JSON, where each link is entered, reads a trouble a line from its
input, and ends with it. Asked for its lags, it answers with those of its own in another line. Links
pass bytes both ways and know nothing of what they mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Self

from typing_extensions import override

from tools.chaos.lag import Lags
from tools.conformance.relay import CHUNK_BYTES, Relay

LAGS_ASKED = b"lags"
SLICED_BYTES = 64
"""So much of each piece goes byte by byte: the heads of HTTP/2 frames and the start of messages."""
_NARROW_PIECES_PER_S = 20


class Trouble(enum.Enum):
    """What happens to a link."""

    DELAY = "delay"
    """Everything comes later, by the amount in milliseconds on the average, for a time."""
    HOLE = "hole"
    """Nothing comes for a time, and nobody is told; then all of it does."""
    RESET = "reset"
    """Every connection is reset."""
    HALF_CLOSE = "half-close"
    """Each connection is ended in one direction: towards us, or from us if the amount is odd."""
    CUT = "cut"
    """Every connection is reset once so many bytes more have passed."""
    SLICES = "slices"
    """Pieces begin byte by byte, for a time."""
    NARROW = "narrow"
    """So many bytes a second pass at most, for a time."""


LASTING = frozenset({Trouble.DELAY, Trouble.HOLE, Trouble.SLICES, Trouble.NARROW})
"""What goes on for a time; the others happen at once."""


@dataclasses.dataclass(frozen=True, slots=True)
class Jam:
    """One trouble of one link.

    Attributes:
        link: its name.
        trouble: what.
        seconds: how long; 0 for what happens at once.
        amount: milliseconds, bytes, or bytes a second, as the trouble says; 0 for others.
    """

    link: str
    trouble: Trouble
    seconds: float
    amount: int

    def to_line(self) -> str:
        """One line for the process of the network."""
        return json.dumps([self.link, self.trouble.value, self.seconds, self.amount]) + "\n"

    @classmethod
    def of_line(cls, line: str | bytes) -> Self:
        """Reads a line."""
        link, trouble, seconds, amount = json.loads(line)
        return cls(link, Trouble(trouble), seconds, amount)


@dataclasses.dataclass(slots=True)
class _Way:
    """One direction of a connection.

    Attributes:
        writer: where it leads to.
        is_away: it leads from who has connected to the address.
        is_over: it was closed before the other direction.
    """

    writer: asyncio.StreamWriter
    is_away: bool
    is_over: bool = False


class Link(Relay):
    """All connections to one address."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self._chance = random.Random(target)  # noqa: S311 - no secret
        self._jams: dict[Trouble, tuple[float, int]] = {}
        """Until when on the loop's clock, and how much."""
        self._cut_after_bytes: int | None = None
        self._ways: list[_Way] = []
        self._cuts: set[asyncio.Task[int]] = set()

    def jam(self, jam: Jam) -> None:
        """Has a trouble begin."""
        if jam.trouble is Trouble.RESET:
            self._cut_soon()
        elif jam.trouble is Trouble.CUT:
            self._cut_after_bytes = jam.amount
        elif jam.trouble is Trouble.HALF_CLOSE:
            self._half_close(is_away=jam.amount % 2 == 1)
        else:
            # One at a time: a delay for each single byte would be none that a network has.
            until_s = asyncio.get_running_loop().time() + jam.seconds
            self._jams = {jam.trouble: (until_s, jam.amount)}

    def _half_close(self, *, is_away: bool) -> None:
        for way in self._ways:
            if way.is_away == is_away and not way.is_over and not way.writer.is_closing():
                way.is_over = True
                way.writer.write_eof()

    def _cut_soon(self) -> None:
        # A connection cannot wait for its own end.
        task = asyncio.create_task(self.cut())
        self._cuts.add(task)
        task.add_done_callback(self._cuts.discard)

    @override
    async def copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        # Who has gone again at once has no name.
        peer = target.get_extra_info("peername") or ()
        way = _Way(target, is_away=tuple(peer[:2]) == self.target)
        self._ways.append(way)
        try:
            while data := await source.read(CHUNK_BYTES):
                self._count(len(data))
                for piece in self.pieces(data):
                    await self._hold_up(len(piece))
                    if way.is_over:
                        return
                    target.write(piece)
                    await target.drain()
        finally:
            self._ways.remove(way)
        target.close()

    def _count(self, size: int) -> None:
        if self._cut_after_bytes is not None:
            self._cut_after_bytes -= size
            if self._cut_after_bytes <= 0:
                self._cut_after_bytes = None
                self._cut_soon()

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """In what parts data is passed on, as the troubles of the moment want it."""
        start = 0
        while start < len(data):
            end = start + self._piece_bytes(start)
            yield data[start:end]
            start = end

    def _piece_bytes(self, start: int) -> int:
        if self._amount(Trouble.SLICES) is not None and start < SLICED_BYTES:
            return 1
        narrow = self._amount(Trouble.NARROW)
        return CHUNK_BYTES if narrow is None else max(1, narrow // _NARROW_PIECES_PER_S)

    async def _hold_up(self, size: int) -> None:
        delay_ms = self._amount(Trouble.DELAY)
        if delay_ms is not None:
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * delay_ms / 1000)
        narrow = self._amount(Trouble.NARROW)
        if narrow is not None:
            await asyncio.sleep(size / narrow)
        while self._amount(Trouble.HOLE) is not None:
            until_s, _ = self._jams[Trouble.HOLE]
            await asyncio.sleep(until_s - asyncio.get_running_loop().time())
        if size == 1:
            # Else the system makes one packet of them.
            await asyncio.sleep(0)

    def _amount(self, trouble: Trouble) -> int | None:
        """How much of it there is just now; None when there is none."""
        until_s, amount = self._jams.get(trouble, (0.0, 0))
        return amount if asyncio.get_running_loop().time() < until_s else None


async def serve(targets: dict[str, str]) -> None:
    """Relays until the input ends.

    Args:
        targets: host:port by the name of the link.
    """
    loop = asyncio.get_running_loop()
    lags = Lags()
    watch = asyncio.create_task(lags.watch())
    jams = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(jams), sys.stdin)
    async with AsyncExitStack() as stack:
        links = {name: Link(target) for name, target in targets.items()}
        for link in links.values():
            await stack.enter_async_context(link)
        print(json.dumps({name: link.endpoint for name, link in links.items()}), flush=True)
        while line := await jams.readline():
            if line.strip() == LAGS_ASKED:
                print(json.dumps(lags.found), flush=True)
                continue
            jam = Jam.of_line(line)
            links[jam.link].jam(jam)
    watch.cancel()


def main(arguments: Sequence[str]) -> int:
    """Relays until the input ends; returns the exit code."""
    targets = dict(argument.split("=", 1) for argument in arguments)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(targets))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
