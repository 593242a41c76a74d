"""Links to workers: one multiplexed ExecuteMany stream for each, whatever runs on it.

One task writes and one reads. Executions are told apart by lanes, small integers that this side
chooses. When a stream breaks, everything on it fails with WORKER_LOST and the link connects again;
when a worker is gone from the scheduler's table, its link goes too.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog
from maas.engine.v1 import engine_pb2, engine_service_pb2, engine_service_pb2_grpc

from libs.errors import (
    BY_CODE,
    Code,
    FieldRule,
    Internal,
    MaasError,
    Reason,
    Unavailable,
    Violation,
)
from libs.process import Background
from libs.rpc import Peer
from services.gateway.generation import Inlet

if TYPE_CHECKING:
    from grpc.aio import StreamStreamCall

    Stream = StreamStreamCall[
        engine_service_pb2.ExecuteManyRequest, engine_service_pb2.ExecuteManyResponse
    ]

log = structlog.get_logger(__name__)

SERVICES = [engine_service_pb2.DESCRIPTOR.services_by_name["EngineService"]]
# Messages that a worker may send ahead of us; half of them are granted anew at a time.
WINDOW = 64
RECONNECT_S = 0.1
RECONNECT_MAX_S = 1.0
# Executions that start with one message, and their bytes: it may hold one that is larger, but far
# less than what a worker reads at once, as that would end everything on the stream.
START_MAX = 256
START_BYTES_MAX = 8 * 1024 * 1024

_RULES = {rule.value: rule for rule in FieldRule}
_REASONS = {reason.value: reason for reason in Reason}


class Link:
    """The stream to one worker."""

    def __init__(self, worker: str, endpoint: str, credential: str) -> None:
        self.worker = worker
        self.endpoint = endpoint
        self._credential = credential
        self._sinks: dict[int, Inlet] = {}
        self._free: list[int] = []
        self._lanes = 0
        self._starts: list[engine_pb2.Execution] = []
        # In order; of lanes that the worker has been sent and has not ended.
        self._aborts: dict[int, None] = {}
        self._grant = 0
        self._wake = asyncio.Event()
        self._up = asyncio.Event()
        self._is_retired = False

    @property
    def running(self) -> int:
        """Outputs that executions on this link make."""
        return len(self._sinks)

    @property
    def is_up(self) -> bool:
        """Whether the stream stands."""
        return self._up.is_set()

    async def ready(self, timeout_s: float) -> None:
        """Waits until the stream stands.

        Raises:
            Unavailable: WORKER_LOST, it does not stand in that time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            raise self.lost() from None

    def start(self, execution: engine_pb2.Execution, sink: Inlet) -> int:
        """Sends an execution of one output; returns its lane. Its events go to the sink.

        Raises:
            Unavailable: WORKER_LOST, the stream does not stand.
        """
        return self.start_many(execution, [sink])[0]

    def start_many(self, execution: engine_pb2.Execution, sinks: Sequence[Inlet]) -> list[int]:
        """Sends an execution with an output for each sink; returns their lanes.

        Raises:
            Unavailable: WORKER_LOST, the stream does not stand.
        """
        if not self.is_up:
            raise self.lost()
        lanes = []
        for sink in sinks:
            lane = heapq.heappop(self._free) if self._free else self._new_lane()
            self._sinks[lane] = sink
            lanes.append(lane)
        execution.lane = lanes[0]
        if len(lanes) > 1:
            execution.more_lanes[:] = lanes[1:]
        self._starts.append(execution)
        self._wake.set()
        return lanes

    def abort(self, lane: int, sink: Inlet) -> None:
        """Stops an output, if it still has that lane. Its remaining events go nowhere.

        An execution that has not been sent is taken back with all of its outputs: a worker reads
        aborts before starts, so one in the same message would be lost.
        """
        if self._sinks.get(lane) is sink and not self._withdraw(lane):
            self._aborts[lane] = None
            self._wake.set()

    def _withdraw(self, lane: int) -> bool:
        for place, execution in enumerate(self._starts):
            lanes = (execution.lane, *execution.more_lanes)
            if lane in lanes:
                del self._starts[place]
                for each in lanes:
                    del self._sinks[each]
                    heapq.heappush(self._free, each)
                return True
        return False

    def retire(self) -> None:
        """Lets the link end with its present stream: the scheduler has lost the worker."""
        self._is_retired = True

    async def run(self) -> None:
        """Keeps the stream up until the link is retired."""
        backoff_s = RECONNECT_S
        async with Peer(self.endpoint, self._credential, SERVICES) as peer:
            stub = engine_service_pb2_grpc.EngineServiceStub(peer.channel)
            while not self._is_retired:
                try:
                    async with peer.both_ways(stub.ExecuteMany) as stream:
                        await self._serve(stream)
                        backoff_s = RECONNECT_S
                except MaasError as error:
                    log.warning("worker link lost", worker=self.worker, cause=error.message)
                except Exception:
                    log.exception("worker link failed", worker=self.worker)
                finally:
                    self._break()
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, RECONNECT_MAX_S)

    async def _serve(self, stream: Stream) -> None:
        await stream.write(engine_service_pb2.ExecuteManyRequest(grant=WINDOW))
        # A worker that is not there fails here.
        await stream.wait_for_connection()
        self._up.set()
        tasks = {
            asyncio.create_task(self._read(stream), name=f"read from {self.worker}"),
            asyncio.create_task(self._write(stream), name=f"write to {self.worker}"),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            # A stream that was cancelled under us ends its task as cancelled: it is just over.
            if not task.cancelled():
                task.result()

    async def _write(self, stream: Stream) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._starts or self._aborts or self._grant:
                aborts = list(itertools.islice(self._aborts, START_MAX))
                starts = self._next_starts()
                request = engine_service_pb2.ExecuteManyRequest(
                    start=starts,
                    abort_lanes=aborts,
                    grant=self._grant,
                )
                del self._starts[: len(starts)]
                for lane in aborts:
                    del self._aborts[lane]
                self._grant = 0
                try:
                    await stream.write(request)
                except asyncio.InvalidStateError:
                    # The call is over; the reader knows why.
                    return

    def _next_starts(self) -> list[engine_pb2.Execution]:
        """Returns what fits into one message; one execution in any case."""
        size = 0
        for count, execution in enumerate(self._starts[:START_MAX]):
            size += execution.ByteSize()
            if size > START_BYTES_MAX and count:
                return self._starts[:count]
        return self._starts[:START_MAX]

    async def _read(self, stream: Stream) -> None:
        received = 0
        while True:
            response = await stream.read()
            if not isinstance(response, engine_service_pb2.ExecuteManyResponse):
                return
            self._dispatch(response.events)
            received += 1
            if received >= WINDOW // 2:
                self._grant += received
                received = 0
                self._wake.set()

    def _dispatch(self, events: engine_pb2.StepEvents) -> None:
        sinks = self._sinks
        for accepted in events.accepted:
            sinks[accepted.lane].accept(accepted.input_tokens)
        if events.prefilled or events.prompt_scores:
            self._dispatch_prompts(events)
        token_ids = events.token_ids
        if events.segments or events.scores:
            self._dispatch_rich(events)
        elif events.token_counts:
            start = 0
            rows = zip(events.lanes, events.token_counts, events.texts, strict=True)
            for lane, count, text in rows:
                sinks[lane].push(text, token_ids[start : start + count])
                start += count
        else:
            for lane, token_id, text in zip(events.lanes, token_ids, events.texts, strict=True):
                sinks[lane].push_one(text, token_id)
        for ended in events.ended:
            self._end(ended)

    def _dispatch_prompts(self, events: engine_pb2.StepEvents) -> None:
        for prefilled in events.prefilled:
            self._sinks[prefilled.lane].prefill(prefilled.cached_tokens)
        for prompt in events.prompt_scores:
            self._sinks[prompt.lane].push_prompt_scores(prompt.scores)

    def _dispatch_rich(self, events: engine_pb2.StepEvents) -> None:
        """Rows some of which show more than text; the others go the plain way."""
        segments = {row.row: row for row in events.segments}
        scores = {row.row: row.scores for row in events.scores}
        counts = events.token_counts or [1] * len(events.lanes)
        start = 0
        rows = zip(events.lanes, counts, events.texts, strict=True)
        for number, (lane, count, text) in enumerate(rows):
            token_ids = events.token_ids[start : start + count]
            start += count
            shown, scored = segments.get(number), scores.get(number)
            if shown is None and scored is None:
                self._sinks[lane].push(text, token_ids)
            else:
                self._sinks[lane].push_rich(text, token_ids, shown, scored)

    def _end(self, ended: engine_pb2.Ended) -> None:
        sink = self._sinks.pop(ended.lane)
        # Whoever has the lane next must not be stopped in its place.
        self._aborts.pop(ended.lane, None)
        heapq.heappush(self._free, ended.lane)
        if ended.HasField("engine_time"):
            sink.took(ended.engine_time.ToNanoseconds())
        if ended.HasField("failure"):
            sink.fail(self._error_of(ended.failure))
        else:
            sink.finish(ended.end)

    def _error_of(self, failure: engine_pb2.Failure) -> MaasError:
        kind = BY_CODE.get(Code(failure.code), Internal) if failure.code else Internal
        return kind(
            failure.message,
            reason=_REASONS.get(failure.reason),
            metadata=dict(failure.metadata),
            violations=[
                Violation(item.field, _RULES[item.rule], item.description)
                for item in failure.violations
                # What a newer worker calls otherwise: the reason says enough.
                if item.rule in _RULES
            ],
            retry_after_s=1.0 if kind is Unavailable else None,
        )

    def _break(self) -> None:
        """Fails everything on the stream; lanes start anew with the next one."""
        self._up.clear()
        sinks = list(self._sinks.values())
        self._sinks.clear()
        self._starts.clear()
        self._aborts.clear()
        self._grant = 0
        self._free.clear()
        self._lanes = 0
        for sink in sinks:
            sink.fail(self.lost())

    def _new_lane(self) -> int:
        self._lanes += 1
        return self._lanes

    def lost(self) -> Unavailable:
        """Makes the error for a worker that does not answer."""
        return worker_lost(self.worker)


class LinkPool:
    """The links of this gateway: to workers that the scheduler named, and to no others."""

    def __init__(self, credential: str, background: Background) -> None:
        self._credential = credential
        self._background = background
        self._links: dict[tuple[str, str], Link] = {}

    def get(self, worker: str, endpoint: str) -> Link:
        """Returns the link to a worker, opening it when it is new."""
        link = self._links.get((worker, endpoint))
        if link is None:
            link = Link(worker, endpoint, self._credential)
            self._links[worker, endpoint] = link
            self._background.start(link.run(), name=f"link to {worker}")
        return link

    def retain(self, workers: set[tuple[str, str]]) -> None:
        """Retires the links to all but these workers and endpoints."""
        for key in [key for key in self._links if key not in workers]:
            self._links.pop(key).retire()


def worker_lost(worker: str) -> Unavailable:
    """Makes the error for a worker that is not there, or is not who was meant any more."""
    return Unavailable(
        "the worker was lost",
        reason=Reason.WORKER_LOST,
        metadata={"worker": worker},
        retry_after_s=1.0,
    )
