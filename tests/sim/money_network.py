"""The network between gateways and their neighbours, in memory: messages are serialized, delayed,
lost, answered to nobody, and said again long after; lines are cut.

Calls go through gRPC's stubs and the suite's `Peer`, whose channel is replaced: what is left of
gRPC are deadlines and the retries that the contract allows.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from google.protobuf.message import Message
from maas.engine.v1 import engine_pb2, engine_service_pb2
from maas.inference.v1 import generation_pb2
from maas.scheduler.v1 import placement_service_pb2
from typing_extensions import override

from libs.errors import DeadlineExceeded, MaasError, Reason, Unavailable, unavailable
from libs.rpc import Peer
from libs.rpc.policy import MethodPolicy, policies_of
from services.gateway.clients import BILLING_SERVICES, SCHEDULER_SERVICES
from services.gateway.domain import TEXT_OVERHEAD_TOKENS
from tests.sim.money_loop import Loop, Process

if TYPE_CHECKING:
    import random

    import grpc

Request = TypeVar("Request")
Response = TypeVar("Response")

POLICIES: dict[str, MethodPolicy] = {
    name: policy
    for service in (*BILLING_SERVICES, *SCHEDULER_SERVICES)
    for name, policy in policies_of(service).items()
}
# Of the service config of the suite's clients.
ATTEMPTS_MAX = 4
BACKOFF_S = 0.1
# A message that was given up may still arrive so much later.
STALE_MAX_S = 4.0
LATE_SHARE = 0.5

OUTSIDE = contextvars.Context()
"""Where nothing belongs to a process."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method of a stub."""

    name: str
    read: Callable[[bytes], Any]


class SimChannel:
    """Makes methods of stubs."""

    def unary_unary(
        self, path: str, *_: object, response_deserializer: Callable[[bytes], Any], **__: object
    ) -> Method:
        return Method(path.rpartition("/")[2], response_deserializer)

    unary_stream = stream_stream = stream_unary = unary_unary


def _channel() -> grpc.aio.Channel:
    return cast("grpc.aio.Channel", SimChannel())


class Service(Protocol):
    """What answers calls."""

    def __call__(self, method: str, payload: bytes) -> Message: ...


@dataclass(slots=True)
class Line:
    """The way from one gateway to billing.

    Attributes:
        is_cut: nothing comes through, and nobody is told.
        loss: share of messages that are lost, each way.
        slow: share that takes seconds.
        parked: what is heard of once the line is healed.
        life: grows whenever billing dies: what it was answering is not heard any more.
    """

    is_cut: bool = False
    loss: float = 0.0
    slow: float = 0.0
    life: int = 0
    parked: list[Callable[[], None]] = field(default_factory=list)

    def heal(self) -> None:
        """Lets everything through."""
        self.is_cut, self.loss, self.slow = False, 0.0, 0.0
        parked, self.parked = self.parked, []
        for come in parked:
            come()


class SimPeer(Peer):
    """A service at the other end of a line."""

    def __init__(
        self, loop: Loop, rng: random.Random, line: Line, service: Service, count: Counting
    ) -> None:
        self.endpoint = "sim"
        self.channel = _channel()
        self._loop = loop
        self._rng = rng
        self._line = line
        self._service = service
        self._count = count

    @override
    async def call(self, method: Any, request: Any, *, timeout_s: float | None = None) -> Any:
        process = Process.current()
        if process is None or process.is_buried:
            raise unavailable("network")
        policy = POLICIES[method.name]
        deadline_s = timeout_s if timeout_s is not None else policy.default_deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                return await self._try(method, request.SerializeToString(), policy)
        except TimeoutError:
            self._count("deadline")
            raise DeadlineExceeded(method.name) from None

    async def _try(self, method: Method, payload: bytes, policy: MethodPolicy) -> Any:
        attempts = ATTEMPTS_MAX if policy.is_retry_safe else 1
        for attempt in range(1, attempts + 1):
            try:
                answer = await self._send(method, payload)
            except Unavailable:
                if attempt == attempts:
                    raise
                self._count("retry")
                backoff_s = BACKOFF_S * 2 ** (attempt - 1)
                await asyncio.sleep(backoff_s * self._rng.uniform(0.8, 1.2))
            else:
                return method.read(answer)
        raise AssertionError

    async def _send(self, method: Method, payload: bytes) -> bytes:
        line = self._line
        answer: asyncio.Future[bytes] = self._loop.create_future()
        if line.is_cut:
            self._count("cut off")
            line.parked.append(partial(self._after_cut, method.name, payload, answer))
        elif self._rng.random() < line.loss:
            self._count("request lost")
            self._fail(answer)
            if self._rng.random() < LATE_SHARE:
                # It was not lost at all, and comes when nobody waits for its answer any more.
                self._count("request late")
                late_s = self._rng.uniform(0.0, STALE_MAX_S)
                self._later(late_s, self._arrive, method.name, payload, None)
        else:
            self._later(self._delay_s(), self._arrive, method.name, payload, answer)
        return await answer

    def _after_cut(self, method: str, payload: bytes, answer: asyncio.Future[bytes]) -> None:
        """The line is back: what was on its way comes through, or the connection breaks."""
        if self._rng.random() < 0.5:
            self._later(self._delay_s(), self._arrive, method, payload, answer)
        else:
            self._break(answer)

    def _arrive(self, method: str, payload: bytes, answer: asyncio.Future[bytes] | None) -> None:
        if self._line.is_cut:
            if answer is not None:
                self._line.parked.append(partial(self._after_cut, method, payload, answer))
            return
        result: bytes | MaasError
        try:
            result = self._service(method, payload).SerializeToString()
        except MaasError as error:
            result = error
        if answer is None:
            return
        if self._rng.random() < self._line.loss:
            self._count("answer lost")
            self._fail(answer)
        else:
            self._later(self._delay_s(), self._reply, answer, result, self._line.life)

    def _reply(self, answer: asyncio.Future[bytes], result: bytes | MaasError, life: int) -> None:
        if answer.done():
            return
        if self._line.is_cut:
            self._line.parked.append(partial(self._break, answer))
            return
        if life != self._line.life:
            self._count("answer of a dead billing")
            result = unavailable("billing")
        if isinstance(result, bytes):
            answer.set_result(result)
        else:
            answer.set_exception(result)

    def _fail(self, answer: asyncio.Future[bytes]) -> None:
        """The connection breaks, or nothing is heard until it does or the deadline is over."""
        if self._rng.random() < 0.95:
            self._break(answer)
        else:
            self._count("silence")
            self._line.parked.append(partial(self._break, answer))

    def _break(self, answer: asyncio.Future[bytes]) -> None:
        error = unavailable("network")
        self._later(self._delay_s(), self._reply, answer, error, self._line.life)

    def _delay_s(self) -> float:
        if self._rng.random() < self._line.slow:
            return self._rng.uniform(0.5, 3.0)
        return self._rng.expovariate(200.0)

    def _later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> None:
        self._loop.call_later(delay_s, callback, *args, context=OUTSIDE)


class Counting(Protocol):
    """Notes that something has happened."""

    def __call__(self, what: str) -> None: ...


class SimScheduler:
    """Names a worker at once: any that is up, the others behind it."""

    def __init__(self, rng: random.Random, workers: list[SimWorker]) -> None:
        self._rng = rng
        self._workers = workers

    def __call__(self, method: str, payload: bytes) -> Message:
        if method == "ReleaseSlots":
            return placement_service_pb2.ReleaseSlotsResponse()
        request = placement_service_pb2.AcquireSlotRequest.FromString(payload)
        able = [item for item in self._workers if item.name not in request.exclude_workers]
        up = [item for item in able if item.is_up]
        if not up or not request.max_wait.ToTimedelta():
            raise Unavailable("no worker", reason=Reason.NO_READY_WORKER)
        self._rng.shuffle(up)
        targets = [
            placement_service_pb2.SlotTarget(worker=item.name, endpoint=item.name, epoch=1)
            for item in up
        ]
        return placement_service_pb2.AcquireSlotResponse(
            slot_id="slot", target=targets[0], fallbacks=targets[1:]
        )


class SimWorker:
    """A worker that makes as many tokens as the prompt says: 1, 2, 3 and so on.

    Attributes:
        name: "workers/{worker}".
        is_up: whether its process runs.
    """

    def __init__(self, name: str, loop: Loop, rng: random.Random) -> None:
        self.name = name
        self.is_up = True
        self.streams: list[SimStream] = []
        self.loop = loop
        self.rng = rng

    def kill(self) -> None:
        """Everything that runs on it is lost."""
        self.is_up = False
        for stream in self.streams[:]:
            stream.cut()

    def start(self) -> None:
        """Starts it again."""
        self.is_up = True


class SimStream:
    """One ExecuteMany stream."""

    def __init__(self, worker: SimWorker) -> None:
        self._worker = worker
        self._process = Process.current()
        self._responses: asyncio.Queue[engine_service_pb2.ExecuteManyResponse | None] = (
            asyncio.Queue()
        )
        self._running: dict[int, engine_pb2.Execution] = {}

    async def wait_for_connection(self) -> None:
        """Raises what a call to a worker that is not there raises."""
        await asyncio.sleep(0)
        if not self._worker.is_up:
            raise unavailable("worker")
        self._worker.streams.append(self)

    async def write(self, request: engine_service_pb2.ExecuteManyRequest) -> None:
        """Sends to the worker."""
        self._later(self._worker.rng.expovariate(500.0), self._hear, request)

    async def read(self) -> engine_service_pb2.ExecuteManyResponse:
        """Waits for the next message."""
        response = await self._responses.get()
        if response is None:
            raise unavailable("worker")
        return response

    def cut(self) -> None:
        """The connection is gone."""
        self._running.clear()
        if self in self._worker.streams:
            self._worker.streams.remove(self)
            self._responses.put_nowait(None)

    def is_of(self, process: Process) -> bool:
        """Tells whether a process has opened it."""
        return self._process is process

    def _hear(self, request: engine_service_pb2.ExecuteManyRequest) -> None:
        if self not in self._worker.streams:
            return
        for execution in request.start:
            self._running[execution.lane] = execution
            self._later(self._worker.rng.expovariate(100.0), self._accept, execution)
        for lane in request.abort_lanes:
            if self._running.pop(lane, None) is not None:
                ended = engine_pb2.Ended(lane=lane)
                ended.failure.reason = "ABORTED"
                self._say(engine_pb2.StepEvents(ended=[ended]))

    def _accept(self, execution: engine_pb2.Execution) -> None:
        if self._running.get(execution.lane) is not execution:
            return
        accepted = engine_pb2.Accepted(
            lane=execution.lane, input_tokens=prompt_of(execution).input_tokens
        )
        cached = prompt_of(execution).cached_tokens
        prefilled = [engine_pb2.Prefilled(lane=execution.lane, cached_tokens=cached)]
        self._say(engine_pb2.StepEvents(accepted=[accepted], prefilled=prefilled if cached else []))
        self._next(execution, len(execution.continue_token_ids))

    def _next(self, execution: engine_pb2.Execution, made: int) -> None:
        delay_s = self._worker.rng.expovariate(1.0 / prompt_of(execution).token_s)
        self._later(delay_s, self._make, execution, made)

    def _make(self, execution: engine_pb2.Execution, made: int) -> None:
        if self._running.get(execution.lane) is not execution:
            return
        lane, most = execution.lane, execution.stop.max_output_tokens
        last = min(prompt_of(execution).output_tokens, most)
        events = engine_pb2.StepEvents()
        if made < last:
            made += 1
            events.lanes.append(lane)
            events.token_ids.append(made)
            events.texts.append("x")
        if made >= last:
            del self._running[lane]
            ended = engine_pb2.Ended(lane=lane)
            ended.end.reason = generation_pb2.FINISH_REASON_END
            events.ended.append(ended)
        self._say(events)
        if made < last:
            self._next(execution, made)

    def _say(self, events: engine_pb2.StepEvents) -> None:
        self._responses.put_nowait(engine_service_pb2.ExecuteManyResponse(events=events))

    def _later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> None:
        self._worker.loop.call_later(delay_s, callback, *args, context=OUTSIDE)


class WorkerPeer(Peer):
    """The connection to a worker."""

    def __init__(self, worker: SimWorker) -> None:
        self.endpoint = worker.name
        self.channel = _channel()
        self._worker = worker

    @override
    async def close(self) -> None:
        """There is nothing to close."""

    @override
    @asynccontextmanager
    async def both_ways(self, method: Any) -> AsyncIterator[Any]:
        process = Process.current()
        if process is None or process.is_buried:
            raise unavailable("network")
        stream = SimStream(self._worker)
        try:
            yield stream
        finally:
            stream.cut()


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a prompt tells the worker to do.

    Attributes:
        output_tokens: to make.
        spared_tokens: that it is shorter than its bound.
        cached_tokens: of it, that the prefix cache is said to have.
        token_s: mean seconds between two tokens.
    """

    output_tokens: int
    spared_tokens: int
    cached_tokens: int
    token_s: float

    @property
    def text(self) -> str:
        """As a prompt."""
        return f"{self.output_tokens} {self.spared_tokens} {self.cached_tokens} {self.token_s}"

    @property
    def input_tokens(self) -> int:
        """As many as the bound of a text allows, less what is spared."""
        return len(self.text) + TEXT_OVERHEAD_TOKENS - self.spared_tokens


def prompt_of(execution: engine_pb2.Execution) -> Prompt:
    """Reads a prompt."""
    output_tokens, spared_tokens, cached_tokens, token_s = execution.text.split()
    return Prompt(int(output_tokens), int(spared_tokens), int(cached_tokens), float(token_s))
