"""How fast a stream catches up with what has piled up for it.

A gateway or a worker that stood still for a while finds seconds of output at once. A client that
has left meanwhile, or leaves just then, must not pay for all of it: its cancellation lies in a
socket that nobody has looked at yet, and what is released until then is charged. So a stream gets
no more than a portion in each span of time, in which a cancellation is seen. Two portions may be on
their way together, at the end of one span and the beginning of the next: 64 tokens.

Whether there is a pile is told from the stream alone: one that has made fewer tokens since its call
arrived than FAST_TOKENS_S allows has no more than a portion in a span unless something stood still.
Halts only lower that mean. What is faster, as simulated engines are, takes whatever is there:
packing is what makes it cheap, and its clients get a bound in time and not in tokens. One that was
held up for long before it began has a low mean, too: it counts as fast once it goes on to be fed
faster than that while it catches up.

A client that itself stands still is no matter of this: until the windows of HTTP/2 and the buffers
of its sockets are full it looks like one that reads. If it dies then it pays for what these hold,
at most for what is made until the stall limit; if it comes back it reads all of that.
"""

from __future__ import annotations

from collections.abc import Callable

from libs.clock import Clock

# Output tokens in one span.
PORTION = 32
# Longer than a cancellation needs to come from its client, on a busy machine, and short enough that
# a stream catches up faster than it can grow while it counts as slow.
SPAN_S = 0.05
# Mean of a generation since its call has arrived, all outputs together.
FAST_TOKENS_S = 600.0
# Portions between two looks at what has come meanwhile. What has piled up comes before the first.
LOOK_EVERY = 5

UNBOUNDED = 1 << 62


class Pace:
    """Of one generation: what its next frame may bring, and the pauses. Belongs to one event loop.

    Attributes:
        is_behind: there is more than may be released: it waits for no interval of a reader.
        is_pausing: nothing may be released until `on_go`.
    """

    __slots__ = (
        "_arrived_s",
        "_clock",
        "_is_fast",
        "_left",
        "_looked_s",
        "_made",
        "_on_go",
        "_portions",
        "_span_end_s",
        "is_behind",
        "is_pausing",
    )

    def __init__(self, clock: Clock, arrived_s: float, on_go: Callable[[], None]) -> None:
        """Starts without a pile.

        Args:
            clock: time.
            arrived_s: of the call, by that clock.
            on_go: called at the end of each pause.
        """
        self._clock = clock
        self._arrived_s = arrived_s
        self._on_go = on_go
        self._is_fast = False
        # Of the portion of the present span.
        self._left = 0
        self._span_end_s = arrived_s
        # Since it is behind; and at the last look the time, and what was made until then.
        self._portions = 0
        self._looked_s = 0.0
        self._made = 0
        self.is_behind = False
        self.is_pausing = False

    def portion(self, *, tokens: int, waiting: int) -> int:
        """Returns how many output tokens the frame may bring that is made now. On the token path.

        Args:
            tokens: released so far.
            waiting: that could be released.

        Returns:
            0 to wait for `on_go`.
        """
        now_s = self._clock.monotonic_s()
        if now_s >= self._span_end_s:
            self._span_end_s = now_s + SPAN_S
            self._left = PORTION
        if waiting <= self._left:
            self._left -= waiting
            self.is_behind = False
            return UNBOUNDED
        self.is_behind = self._is_pile(tokens + waiting, now_s)
        if not self.is_behind:
            return UNBOUNDED
        self.is_pausing = True
        self._clock.call_after(self._span_end_s - now_s, self._go)
        if self._left < PORTION:
            # A part of a portion is none: what comes in one piece may be as large as a whole one.
            return 0
        self._left = 0
        return PORTION

    def _is_pile(self, made: int, now_s: float) -> bool:
        """Tells whether what waits has piled up."""
        if self._is_fast or made > FAST_TOKENS_S * (now_s - self._arrived_s):
            return False
        if not self.is_behind:
            self._portions = 0
        self._portions += 1
        if self._portions % LOOK_EVERY == 0:
            came = made - self._made
            is_first = self._portions == LOOK_EVERY
            self._is_fast = not is_first and came > FAST_TOKENS_S * (now_s - self._looked_s)
            self._looked_s, self._made = now_s, made
        return not self._is_fast

    def _go(self) -> None:
        self.is_pausing = False
        self._on_go()
