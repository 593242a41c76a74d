"""What one ExecuteMany stream has to say: columns, until the writer takes them.

    pump  --append-->  columns  --take-->  one message  --> transport

While the reader keeps up, a message is one step of the engine and its columns are sent as they
are. When the transport is busy or the gateway has granted no more messages, steps pile up here, and
the next message merges them: a lane has one row in it. What can pile up is bounded by what the
stream's executions may still say, and by `LANES_MAX`.
"""

from __future__ import annotations

import asyncio
from itertools import chain

from maas.engine.v1 import engine_pb2, engine_service_pb2

from libs.errors import MaasError, ResourceExhausted

# Lanes that the gateway has not been told the end of. More than any worker runs: a gateway that
# starts without reading is cut off.
LANES_MAX = 16_384
# Tokens in one message: far below the largest message that a gateway takes.
ROWS_MAX = 65_536
CREDIT_MAX = 1 << 30


class Outbox:
    """Pending events of one stream. Belongs to one event loop; one task calls `next`.

    Attributes:
        lanes: of each pending token.
        token_ids: pending tokens.
        texts: text that each of them completes. The pump appends to these three itself, because a
            call for each token would cost more than all the rest.
    """

    def __init__(self) -> None:
        self.lanes: list[int] = []
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self._accepted: list[engine_pb2.Accepted] = []
        self._ended: list[engine_pb2.Ended] = []
        self._open_lanes: set[int] = set()
        self._credit = 0
        self._changed = asyncio.Event()
        self._closing: MaasError | None = None

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

    def accept(self, lane: int, input_tokens: int) -> None:
        """Says that an execution is in the engine."""
        self._accepted.append(engine_pb2.Accepted(lane=lane, input_tokens=input_tokens))

    def end(self, ended: engine_pb2.Ended) -> None:
        """Says that an execution is over. Its lane is free once the message is taken."""
        self._ended.append(ended)

    def grant(self, messages: int) -> None:
        """Allows more messages."""
        self._credit = min(self._credit + messages, CREDIT_MAX)
        self._changed.set()

    def wake(self) -> None:
        """Lets the writer look; after appending, once for a whole step."""
        if self._credit and (self.lanes or self._ended or self._accepted):
            self._changed.set()

    def close(self, error: MaasError) -> None:
        """Ends the stream with an error as soon as every lane's end has been taken."""
        self._closing = error
        self._changed.set()

    async def next(self) -> engine_service_pb2.ExecuteManyResponse:
        """Waits until there is something to send and a message is allowed.

        Raises:
            MaasError: what the stream was closed with.
        """
        while not (self._credit and (self.lanes or self._ended or self._accepted)):
            if self._closing is not None and not self._open_lanes:
                raise self._closing
            self._changed.clear()
            await self._changed.wait()
        self._credit -= 1
        return self._take()

    def _take(self) -> engine_service_pb2.ExecuteManyResponse:
        response = engine_service_pb2.ExecuteManyResponse()
        events = response.events
        events.accepted.extend(self._accepted)
        self._accepted.clear()
        self._take_rows(events)
        if not self.lanes:
            events.ended.extend(self._ended)
            self._open_lanes.difference_update([ended.lane for ended in self._ended])
            self._ended.clear()
        return response

    def _take_rows(self, events: engine_pb2.StepEvents) -> None:
        lanes, token_ids, texts = self.lanes, self.token_ids, self.texts
        if len(lanes) > ROWS_MAX:
            lanes, token_ids, texts = lanes[:ROWS_MAX], token_ids[:ROWS_MAX], texts[:ROWS_MAX]
        if len(set(lanes)) == len(lanes):
            events.lanes.extend(lanes)
            events.token_ids.extend(token_ids)
            events.texts.extend(texts)
        else:
            _merge(events, lanes, token_ids, texts)
        taken = len(lanes)
        del self.lanes[:taken]
        del self.token_ids[:taken]
        del self.texts[:taken]


def _merge(
    events: engine_pb2.StepEvents, lanes: list[int], token_ids: list[int], texts: list[str]
) -> None:
    """Makes one row of all tokens of a lane."""
    rows: dict[int, tuple[list[int], list[str]]] = {}
    for lane, token_id, text in zip(lanes, token_ids, texts, strict=True):
        row = rows.get(lane)
        if row is None:
            rows[lane] = ([token_id], [text])
        else:
            row[0].append(token_id)
            row[1].append(text)
    events.lanes.extend(rows)
    events.token_counts.extend([len(ids) for ids, _ in rows.values()])
    events.token_ids.extend(chain.from_iterable(ids for ids, _ in rows.values()))
    events.texts.extend(["".join(parts) for _, parts in rows.values()])
