"""What has piled up leaves in portions, and what is fast by itself does not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.testing import FakeClock
from services.gateway.pacing import FAST_TOKENS_S, LOOK_EVERY, PORTION, SPAN_S, UNBOUNDED, Pace

# The promise for a client that reads: docs/money.md.
OVER_MAX = 64
# Of a test's time.
TICK_S = SPAN_S / 10


class Stream:
    """A generation's pace, and what it released.

    Attributes:
        released: tokens.
        waiting: tokens that could be released.
        log: time and size of each release.
    """

    def __init__(self, *, running_s: float) -> None:
        self.clock = FakeClock()
        self.released = 0
        self.waiting = 0
        self.log: list[tuple[float, int]] = []
        self.pace = Pace(self.clock, self.clock.monotonic_s(), self.release)
        self.clock.advance(running_s)

    def come(self, tokens: int) -> None:
        """A worker's tokens come."""
        self.waiting += tokens
        self.release()

    def release(self) -> None:
        """Releases what may be released, as an idle reader has it done."""
        if self.waiting and not self.pace.is_pausing:
            most = self.pace.portion(tokens=self.released, waiting=self.waiting)
            count = min(most, self.waiting)
            if count:
                self.log.append((self.clock.monotonic_s(), count))
            self.released += count
            self.waiting -= count

    def run(self, seconds: float, tokens_s: float = 0.0) -> None:
        """Lets time pass in which a worker makes tokens."""
        made = 0.0
        for tick in range(1, round(seconds / TICK_S) + 1):
            self.clock.advance(TICK_S)
            fresh = int(tick * TICK_S * tokens_s - made)
            made += fresh
            if fresh:
                self.come(fresh)

    def most_within(self, seconds: float) -> int:
        """The most tokens that left in so much time."""
        most = within = first = 0
        for at_s, count in self.log:
            within += count
            while self.log[first][0] <= at_s - seconds:
                within -= self.log[first][1]
                first += 1
            most = max(most, within)
        return most


def test_a_portion_leaves_at_once_whatever_the_pace() -> None:
    stream = Stream(running_s=100)

    stream.come(PORTION)

    assert [count for _, count in stream.log] == [PORTION]
    assert (stream.pace.is_behind, stream.pace.is_pausing) == (False, False)


def test_a_pile_leaves_a_portion_in_each_span() -> None:
    stream = Stream(running_s=5)
    began_s = stream.clock.monotonic_s()

    stream.come(3 * PORTION - 1)
    assert stream.pace.is_behind
    stream.run(3 * SPAN_S)

    assert [count for _, count in stream.log] == [PORTION, PORTION, PORTION - 1]
    assert [at_s - began_s for at_s, _ in stream.log] == pytest.approx([0, SPAN_S, 2 * SPAN_S])
    assert (stream.pace.is_behind, stream.pace.is_pausing) == (False, False)


@given(
    pieces=st.lists(
        st.tuples(st.integers(1, PORTION), st.sampled_from([0, 1, 3, 9, 11])),
        min_size=1,
        max_size=60,
    )
)
def test_however_it_comes_no_more_than_two_portions_are_on_their_way(
    pieces: list[tuple[int, int]],
) -> None:
    """Pieces of up to a portion, each released by itself as far as the pace lets it."""
    stream = Stream(running_s=100)

    for tokens, ticks in pieces:
        stream.come(tokens)
        stream.run(ticks * TICK_S)
    stream.run(SPAN_S * (1 + sum(tokens for tokens, _ in pieces)))

    assert stream.waiting == 0
    assert stream.most_within(0.99 * SPAN_S) <= 2 * PORTION <= OVER_MAX


def test_a_stream_that_counts_as_slow_never_grows_faster_than_it_catches_up() -> None:
    assert PORTION / SPAN_S > FAST_TOKENS_S


@pytest.mark.parametrize("tokens_s", [20, 100, 500])
@pytest.mark.parametrize("halt_s", [0.5, 5])
def test_a_stream_catches_up_after_a_halt(tokens_s: int, halt_s: float) -> None:
    stream = Stream(running_s=0)
    stream.run(1, tokens_s)
    assert stream.waiting == 0
    stream.log.clear()

    stream.clock.advance(halt_s)
    stream.come(round(tokens_s * halt_s))
    stream.run(6 * halt_s, tokens_s)

    assert stream.waiting == 0
    assert stream.most_within(SPAN_S) <= OVER_MAX


def test_a_stream_that_is_fast_from_its_beginning_takes_whatever_there_is() -> None:
    stream = Stream(running_s=0.1)

    for _ in range(20):
        stream.come(200)
        stream.clock.advance(0.1)

    assert [count for _, count in stream.log] == [200] * 20


def test_a_fast_stream_that_began_late_is_held_up_for_two_looks_only() -> None:
    """As where a thousand streams begin at once: its mean stays low for long."""
    stream = Stream(running_s=60)

    stream.run(2 * LOOK_EVERY * SPAN_S + SPAN_S, 4 * FAST_TOKENS_S)

    assert stream.waiting == 0
    assert stream.pace.portion(tokens=stream.released, waiting=10_000) == UNBOUNDED


def test_a_pile_alone_makes_no_stream_fast() -> None:
    stream = Stream(running_s=100)

    stream.come(40 * PORTION)
    stream.run(3 * LOOK_EVERY * SPAN_S, 100)

    assert stream.most_within(0.99 * SPAN_S) <= 2 * PORTION
