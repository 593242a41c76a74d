"""What one ExecuteMany stream has to say: columns, until the transport takes them.

    pump  --append-->  columns  --wake-->  due?  --one message-->  transport

A message needs three things: something that is due, a credit, and that the transport has taken the
message before. Until then steps pile up here, and the next message merges them: a lane has one row
in it. What can pile up is bounded by what the stream's executions may still say and by `LANES_MAX`.

A row is never split on its way, and what piled up while the gateway or this process stood still is
to reach clients in portions: messages behind a halt have rows of `ROW_TOKENS_MAX` tokens at most,
until nothing is left and nothing can still be on its way from the engine. Without a halt messages
follow one another, and a row is as long as it is.

Acceptances, ends and the first token of an execution are due at once, and everything pending leaves
with them. Other tokens are due at once too, unless every open execution of the stream has an output
interval: then they are due when the oldest of them is half of the shortest interval old. The other
half is left to the gateway, which collects for the same interval. `HELD_MAX` bounds what waits so.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from itertools import chain
from typing import Any

from maas.engine.v1 import engine_pb2, engine_service_pb2

from libs.clock import CancelTimer, Clock
from libs.errors import Cancelled, MaasError, ResourceExhausted
from libs.rpc.writer import CallWriter
from services.worker.rows import ROW_TOKENS_MAX, RichRows

# Lanes that the gateway has not been told the end of. More than any worker runs: a gateway that
# starts without reading is cut off.
LANES_MAX = 16_384
# Tokens in one message: far below the largest message that a gateway takes.
ROWS_MAX = 65_536
# Tokens that may wait for their interval: more make no message cheaper.
HELD_MAX = 8_192
CREDIT_MAX = 1 << 30
# Between two messages: something may have stood still, or nobody had anything to say. For as long
# behind it more may come: a timer may write before what the engine has made meanwhile is read.
HALT_S = 0.1


class Outbox:
    """Pending events of one stream. Belongs to one event loop.

    Attributes:
        lanes: of each pending token.
        token_ids: pending tokens.
        texts: text that each of them completes. The pump appends to these three itself, because a
            call for each token would cost more than all the rest.
        rich: rows that are more than text.
    """

    def __init__(self, clock: Clock) -> None:
        self.lanes: list[int] = []
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.rich = RichRows()
        self._clock = clock
        self._accepted: list[engine_pb2.Accepted] = []
        self._prefilled: list[engine_pb2.Prefilled] = []
        self._ended: list[engine_pb2.Ended] = []
        self._open_lanes: set[int] = set()
        self._credit = 0
        self._intervals = _Intervals()
        # Something is pending, and may not wait for more.
        self._is_due = False
        self._cancel_timer: CancelTimer | None = None
        self._is_waking = False
        # Tokens of a row of the next message; when the last one was written, and the first one
        # behind the last halt.
        self._row_tokens_max = ROWS_MAX
        self._written_s = clock.monotonic_s()
        self._halted_s = -math.inf
        self._writer: CallWriter | None = None
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing: MaasError | None = None

    def attach(self, write: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
        """Has messages written from here on.

        Args:
            write: of the call's context. The call's headers have been sent.
        """
        self._writer = CallWriter(write, self._on_written)
        self.wake_soon()

    def detach(self) -> None:
        """Writes nothing more; the call is over."""
        self._writer = None
        self._stop_timer()

    async def wait_over(self) -> None:
        """Waits until nothing more can be written.

        Raises:
            MaasError: what the stream was closed with.
            Cancelled: the gateway has gone away.
        """
        await self._over

    def open_lane(self, lane: int) -> bool:
        """Takes a lane into use; False when the gateway uses it already.

        Raises:
            ResourceExhausted: the gateway starts without reading.
        """
        if lane in self._open_lanes:
            return False
        if len(self._open_lanes) >= LANES_MAX:
            raise ResourceExhausted(f"more than {LANES_MAX} lanes are in use on this stream")
        self._open_lanes.add(lane)
        return True

    def accept(self, lane: int, input_tokens: int, interval_s: float = 0.0) -> None:
        """Says that an execution is in the engine.

        Args:
            lane: of the execution.
            input_tokens: of its prompt.
            interval_s: in which its reader collects output; 0 for a reader that wants it at once.
        """
        self._accepted.append(engine_pb2.Accepted(lane=lane, input_tokens=input_tokens))
        self.follow(lane, interval_s)
        self._is_due = True

    def follow(self, lane: int, interval_s: float) -> None:
        """Counts one more output of an accepted execution as open.

        Args:
            lane: of the output.
            interval_s: see `accept`.
        """
        self._intervals.add(lane, interval_s)

    def prefilled(self, lane: int, cached_tokens: int) -> None:
        """Says how much of a prompt the prefix cache had; travels with the first token."""
        self._prefilled.append(engine_pb2.Prefilled(lane=lane, cached_tokens=cached_tokens))

    def end(self, ended: engine_pb2.Ended) -> None:
        """Says that an execution is over. Its lane is free once the message is taken."""
        self._ended.append(ended)
        self._intervals.remove(ended.lane)
        self._is_due = True

    def urge(self) -> None:
        """Says that the tokens just appended may not wait."""
        self._is_due = True

    def grant(self, messages: int) -> None:
        """Allows more messages."""
        self._credit = min(self._credit + messages, CREDIT_MAX)
        self._send()

    def wake(self) -> None:
        """Sends what is due, if it can be sent; after appending, once for a whole step."""
        if not self._is_due and (self.lanes or self.rich):
            self._hold()
        self._send()

    def wake_soon(self) -> None:
        """Wakes in the next turn of the event loop: what comes until then shares the message."""
        if not self._is_waking:
            self._is_waking = True
            asyncio.get_running_loop().call_soon(self._wake_up)

    def close(self, error: MaasError) -> None:
        """Ends the stream with an error as soon as every lane's end has been written."""
        self._closing = error
        self.wake_soon()

    def _wake_up(self) -> None:
        self._is_waking = False
        self.wake()

    def _hold(self) -> None:
        """Decides how long the pending tokens wait."""
        interval_s = self._intervals.shortest_s
        if not interval_s or len(self.lanes) + self.rich.tokens >= HELD_MAX:
            self._is_due = True
        elif self._cancel_timer is None:
            self._cancel_timer = self._clock.call_after(interval_s / 2, self._ring)

    def _ring(self) -> None:
        self._cancel_timer = None
        self._is_due = True
        self._send()

    def _stop_timer(self) -> None:
        if self._cancel_timer is not None:
            self._cancel_timer()
            self._cancel_timer = None

    def _send(self) -> None:
        writer = self._writer
        if writer is None or writer.is_busy:
            return
        if self._is_due and self._credit:
            self._credit -= 1
            self._stop_timer()
            self._look_back()
            writer.write(self._take())
        elif self._closing is not None and not self._open_lanes:
            self._finish(self._closing)

    def _look_back(self) -> None:
        """Sees whether something stood still before the message that is about to be written."""
        now_s = self._clock.monotonic_s()
        if now_s - self._written_s > HALT_S:
            self._row_tokens_max = ROW_TOKENS_MAX
            self._halted_s = now_s
        self._written_s = now_s

    def _on_written(self, error: BaseException | None) -> None:
        if error is None:
            self._send()
        else:
            self._finish(Cancelled("the gateway went away"))

    def _finish(self, error: MaasError) -> None:
        self.detach()
        if not self._over.done():
            self._over.set_exception(error)
            # A handler that was cancelled does not ask any more; that is no defect.
            self._over.exception()

    def _take(self) -> engine_service_pb2.ExecuteManyResponse:
        response = engine_service_pb2.ExecuteManyResponse()
        events = response.events
        if self._accepted:
            events.accepted.extend(self._accepted)
            self._accepted.clear()
        if self._prefilled:
            events.prefilled.extend(self._prefilled)
            self._prefilled.clear()
        if self.rich and self.rich.holds(self.lanes):
            self.rich.follow(self.lanes, self.token_ids, self.texts)
        self._take_rows(events)
        if self.rich:
            self.rich.take(events)
        # Rows that did not fit stay due.
        self._is_due = bool(self.lanes or self.rich)
        if self._ended and not self._is_due:
            events.ended.extend(self._ended)
            self._open_lanes.difference_update([ended.lane for ended in self._ended])
            self._ended.clear()
        return response

    def _take_rows(self, events: engine_pb2.StepEvents) -> None:
        lanes, token_ids, texts = self.lanes, self.token_ids, self.texts
        # Of lanes that are equally fast no more is looked at than a message takes.
        most = min(ROWS_MAX, self._row_tokens_max * max(1, len(self._open_lanes)))
        if len(lanes) > most:
            lanes, token_ids, texts = lanes[:most], token_ids[:most], texts[:most]
        taken = len(lanes)
        left: list[tuple[int, int, str]] = []
        if len(set(lanes)) == taken:
            events.lanes.extend(lanes)
            events.token_ids.extend(token_ids)
            events.texts.extend(texts)
        else:
            left = _merge(events, lanes, token_ids, texts, self._row_tokens_max)
        self.lanes[:taken] = [lane for lane, _, _ in left]
        self.token_ids[:taken] = [token_id for _, token_id, _ in left]
        self.texts[:taken] = [text for _, _, text in left]
        if not self.lanes and self._written_s - self._halted_s > HALT_S:
            self._row_tokens_max = ROWS_MAX


class _Intervals:
    """The output intervals of a stream's open executions. One that has none counts as 0 s."""

    __slots__ = ("_by_lane", "_counts", "_shortest_s")

    def __init__(self) -> None:
        self._by_lane: dict[int, float] = {}
        self._counts: dict[float, int] = {}
        # None when it has to be looked up.
        self._shortest_s: float | None = 0.0

    @property
    def shortest_s(self) -> float:
        """The shortest interval in seconds; 0 when one execution has none, or none is open."""
        if self._shortest_s is None:
            self._shortest_s = min(self._counts, default=0.0)
        return self._shortest_s

    def add(self, lane: int, interval_s: float) -> None:
        """An execution is open."""
        self._by_lane[lane] = interval_s
        self._counts[interval_s] = self._counts.get(interval_s, 0) + 1
        self._shortest_s = None

    def remove(self, lane: int) -> None:
        """An execution is over, if it was ever open."""
        interval_s = self._by_lane.pop(lane, None)
        if interval_s is None:
            return
        self._counts[interval_s] -= 1
        if not self._counts[interval_s]:
            del self._counts[interval_s]
        self._shortest_s = None


def _merge(
    events: engine_pb2.StepEvents,
    lanes: list[int],
    token_ids: list[int],
    texts: list[str],
    row_tokens_max: int,
) -> list[tuple[int, int, str]]:
    """Makes one row of the tokens of each lane; returns those that do not fit into it, in order."""
    rows: dict[int, tuple[list[int], list[str]]] = {}
    left: list[tuple[int, int, str]] = []
    for lane, token_id, text in zip(lanes, token_ids, texts, strict=True):
        row = rows.get(lane)
        if row is None:
            rows[lane] = ([token_id], [text])
        elif len(row[0]) < row_tokens_max:
            row[0].append(token_id)
            row[1].append(text)
        else:
            left.append((lane, token_id, text))
    events.lanes.extend(rows)
    events.token_counts.extend([len(ids) for ids, _ in rows.values()])
    events.token_ids.extend(chain.from_iterable(ids for ids, _ in rows.values()))
    events.texts.extend(["".join(parts) for _, parts in rows.values()])
    return left
