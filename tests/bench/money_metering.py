"""What counting and journaling add to a released token: `--only metering`.

In this process, with a gateway's own generations, releaser and journal. Each step brings a token
for each of so many generations, as a worker's message does, and all are released; the floor is the
same without a count: nothing is added up, and nothing is written. The calls that read are left out,
as writing a frame costs ten times what is measured. Time is the CPU of this thread: other work on
the machine counts on neither side.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from maas.engine.v1 import engine_pb2
from typing_extensions import override

from libs.clock import SystemClock
from libs.process import Background
from libs.units import Rates
from services.gateway import frames
from services.gateway.attempts import Attempts
from services.gateway.books import Books
from services.gateway.domain import Opening, Price
from services.gateway.generation import Sink, new_sink
from services.gateway.journal import Journal
from services.gateway.links import Link, LinkPool
from services.gateway.placement import Placed, Placer
from services.gateway.plain import PlainGeneration
from services.gateway.reader import Reader
from services.gateway.release import TURN_MAX, Batch, Releaser
from services.gateway.settlement import Settler
from services.gateway.slices import Hold, Purse, Sizes, Slice, SliceBook
from services.gateway.tables import Workers
from services.gateway.terms import Terms, Times
from tests.bench.measure import quantile
from tests.bench.money_rig import run
from tests.bench.report import against, table

if TYPE_CHECKING:
    from services.gateway.frames import Frame

AIM_NS = 2000.0
SIZES = (1, 32, 256)
TOKENS = 60_000
"""Of each kind in each round, at most."""
STEPS_MAX = 6_000
"""Longer outputs have frames of another form, which costs more on both sides."""
ROUNDS = 5
TOKEN_ID = 300
TEXT = " fox"
PRICE = Price(
    name="prices/price",
    offering="offerings/tiny",
    rates=Rates(input_price=150_000_000, output_price=600_000_000),
    effective_time=SystemClock().now(),
)


class Uncounted(PlainGeneration):
    """The floor: releases as others do, and counts nothing."""

    @override
    def _release(self, batch: Batch, *_: int) -> Frame | None:
        chunk = self._text_sink.take()
        self.sequence += 1
        return frames.delta(
            sequence=self.sequence,
            text=chunk.text,
            token_ids=(),
            end=chunk.end,
            output_tokens=self.output_tokens,
        )


class Taker(Reader):
    """Takes each frame at once, and does nothing with it."""

    __slots__ = ()

    @override
    def write(self, frame: Frame, now_s: float) -> None:
        """Takes a frame."""
        self.cursor = frame.sequence
        if self._on_ready is not None:
            self._on_ready(self)


class Crowd:
    """Generations that get a token in each step.

    Attributes:
        generations: all of them.
    """

    def __init__(
        self, kind: type[PlainGeneration], count: int, journal: Journal, background: Background
    ) -> None:
        """Opens them.

        Args:
            kind: counted or not.
            count: how many.
            journal: that the counted ones write to.
            background: has nothing to do.
        """
        self._releaser = Releaser(journal)
        books = _books(journal, self._releaser, background)
        self._sinks: list[Sink] = []
        self.generations: list[PlainGeneration] = []
        for number in range(count):
            sink = new_sink()
            self._sinks.append(sink)
            generation = _generation(kind, number, sink, books, background)
            generation.attach(Taker("key", write=_written))
            self.generations.append(generation)

    async def run(self, steps: int) -> float:
        """Releases a token of each in each step; returns CPU seconds."""
        await self._released()
        started_s = time.thread_time()
        for _ in range(steps):
            for sink in self._sinks:
                sink.push_one(TEXT, TOKEN_ID)
            await self._released()
        return time.thread_time() - started_s

    async def _released(self) -> None:
        while self._releaser._is_due:  # noqa: ASYNC110 - as many turns of the loop as it takes
            await asyncio.sleep(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """CPU nanoseconds of a token.

    Attributes:
        bare_ns: released, and not counted.
        counted_ns: released and counted.
        journal_ns: of that, the record in the journal alone.
    """

    bare_ns: float
    counted_ns: float
    journal_ns: float

    @property
    def added_ns(self) -> float:
        """What the count costs."""
        return self.counted_ns - self.bare_ns


def metering(repeats: int, *, is_quick: bool) -> None:
    """Cost of the count of a token, by how many generations have one in each step."""
    tokens = 2_000 if is_quick else TOKENS
    rounds = 1 if is_quick else ROUNDS * repeats
    with tempfile.TemporaryDirectory(prefix="maas-bench-") as folder:
        found = run(_measure(Path(folder), tokens, rounds))
    rows = [
        [
            f"{count}",
            f"{cost.bare_ns:,.0f}",
            f"{cost.counted_ns:,.0f}",
            f"{cost.added_ns:,.0f}",
            f"{cost.journal_ns:,.0f}",
            against(round(cost.added_ns), AIM_NS),
        ]
        for count, cost in found.items()
    ]
    table(
        f"Metering, CPU ns of a released token, medians of {rounds} rounds",
        ["generations a step", "not counted", "counted", "added", "journal alone", "aim of added"],
        rows,
    )
    print(f"  one write of the journal for {TURN_MAX} generations at most; no fsync: a plain write")


async def _measure(folder: Path, tokens: int, rounds: int) -> dict[int, Cost]:
    return {
        count: await cost_of(
            folder / f"journal-{count}", count, min(STEPS_MAX, tokens // count), rounds
        )
        for count in SIZES
    }


async def cost_of(folder: Path, count: int, steps: int, rounds: int) -> Cost:
    """Measures one size, floor and suite in turn.

    Args:
        folder: for the journal.
        count: generations.
        steps: of each kind in each round, whose generations are new.
        rounds: figures are medians of them, without the first.
    """
    journal = Journal(folder)
    bare_s, counted_s, journal_s = [], [], []
    try:
        async with Background() as background:
            for number in range(1 + rounds):
                bare = Crowd(Uncounted, count, journal, background)
                counted = Crowd(PlainGeneration, count, journal, background)
                times = (await bare.run(steps), await counted.run(steps))
                _check(bare, counted, steps)
                if number:
                    bare_s.append(times[0])
                    counted_s.append(times[1])
                    journal_s.append(_written_alone(journal, count, steps))
    finally:
        journal.close()
    bare_ns, counted_ns, journal_ns = (
        quantile(seconds, 0.5) / (steps * count) * 1e9 for seconds in (bare_s, counted_s, journal_s)
    )
    return Cost(bare_ns=bare_ns, counted_ns=counted_ns, journal_ns=journal_ns)


def _written_alone(journal: Journal, count: int, steps: int) -> float:
    """Writes what as many released tokens need, and nothing else; returns CPU seconds."""
    turns = [
        [(ordinal, steps) for ordinal in range(start, min(start + TURN_MAX, count))]
        for start in range(0, count, TURN_MAX)
    ]
    started_s = time.thread_time()
    for _ in range(steps):
        for counts in turns:
            journal.progress(counts)
    return time.thread_time() - started_s


def _check(bare: Crowd, counted: Crowd, tokens: int) -> None:
    """Sees that the one kind has counted every token, and both have released every one."""
    assert {generation.output_tokens for generation in counted.generations} == {tokens}
    assert {generation.output_tokens for generation in bare.generations} == {0}
    # The first frame says that it has started.
    sequences = {
        generation.sequence for crowd in (bare, counted) for generation in crowd.generations
    }
    assert sequences == {1 + tokens}


async def _written(_: bytes) -> None:
    """Nobody reads: a taker leaves its transport alone."""


async def _never(*_: object) -> NoReturn:
    """Nothing ends and nothing is placed here, so nobody is asked."""
    raise AssertionError


def _books(journal: Journal, releaser: Releaser, background: Background) -> Books:
    """Makes the books of generations that do not end."""
    clock = SystemClock()
    book = SliceBook(
        acquire=_never,
        close=_never,
        new_id=str,
        clock=clock,
        sizes=Sizes(nanos_max=1, refill_s=1.0, count_max=1),
        start=lambda refill: background.start(refill, name="refill slice"),
    )
    settler = Settler(
        settle=_never, book=book, journal=journal, clock=clock, interval_s=1.0, idle_s=1.0
    )
    return Books(
        journal=journal,
        slices=book,
        settler=settler,
        clock=clock,
        releaser=releaser,
        background=background,
        move_wait_s=1.0,
    )


def _generation(
    kind: type[PlainGeneration], number: int, sink: Sink, books: Books, background: Background
) -> PlainGeneration:
    """Opens a generation that a worker has accepted."""
    clock = books.clock
    purse = Purse("accounts/a")
    money = Slice("slice", purse, free=0, lease_s=1.0, lease_until_s=0.0, used_at_s=0.0)
    link = Link("workers/w", "127.0.0.1:1", "none")
    attempts = Attempts(
        placer=Placer(
            acquire=_never,
            release=_nothing,
            workers=Workers(),
            links=LinkPool("none", background),
        ),
        clock=clock,
        execution=engine_pb2.Execution(),
        generation_id=f"gen_bench_{number}",
        project="projects/p",
        queue_wait_s=1.0,
        deadline_s=None,
        time_limit_s=None,
        affinity=b"",
        new_sink=new_sink,
    )
    return kind(
        books=books,
        opening=Opening(
            generation_id=f"gen_bench_{number}",
            slice_id="slice",
            account="accounts/a",
            project="projects/p",
            api_key="apiKeys/k",
            offering=PRICE.offering,
            model_version="models/tiny/versions/1",
            price=PRICE.name,
            input_tokens=1,
            start_time=clock.now(),
        ),
        terms=Terms(
            price=PRICE,
            max_output_tokens=sys.maxsize,
            seed=1,
            with_ids=False,
            lives_on=False,
            is_kept=False,
            is_unary=False,
            is_exact=True,
        ),
        hold=Hold(money, 0),
        attempts=attempts,
        placed=Placed(link=link, lanes=[0], sink=sink, input_tokens=1),
        # None of them is behind, whatever it has counted: a call that is yet to come has no pile.
        times=Times(arrived_s=clock.monotonic_s() + 3600, accepted_s=clock.monotonic_s()),
        log=None,
        on_end=_nothing,
    )


def _nothing(_: object) -> None:
    """Nothing ends here."""
