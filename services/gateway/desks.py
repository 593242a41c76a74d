"""Unary calls to workers, each at its own connection: what is asked beside the streams of links.

A connection is opened with the first call to a worker that the scheduler has named, and closed when
it has not been used for a while. What goes wrong comes back as what this gateway's callers may see:
a refusal keeps the path of its field, a worker's failure is told apart from theirs, and an address
is never told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import structlog
from maas.engine.v1 import engine_service_pb2_grpc

from libs.clock import Clock
from libs.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    FieldRule,
    Internal,
    InvalidArgument,
    MaasError,
    NotFound,
    Reason,
    ResourceExhausted,
    Unavailable,
    Violation,
)
from libs.rpc import Peer

if TYPE_CHECKING:
    from grpc.aio import UnaryUnaryMultiCallable
    from maas.engine.v1.engine_service_pb2_grpc import EngineServiceAsyncStub

log = structlog.get_logger(__name__)

Request = TypeVar("Request")
Response = TypeVar("Response")

SWEEP_S = 5.0
IDLE_S = 60.0
RETRY_S = 1.0

# Another worker may well answer what this one did not.
ELSEWHERE = frozenset(
    {
        Reason.WORKER_LOST,
        Reason.WORKER_DRAINING,
        Reason.QUEUE_FULL,
        Reason.RESOURCE_NOT_FOUND,
        Reason.SERVICE_UNAVAILABLE,
    }
)
_RULES = {
    Reason.CONTEXT_LENGTH_EXCEEDED: FieldRule.TOO_LONG,
    Reason.FEATURE_UNSUPPORTED: FieldRule.UNSUPPORTED,
}
# What a worker says of the request, of its room or of the time. All else is a failure of ours.
_PASSED_ON = (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)


@dataclass(slots=True)
class _Desk:
    """The connection to one worker.

    Attributes:
        peer: the connection.
        stub: of its EngineService.
        calls: in flight.
        used_at_s: monotonic; when the last call began or ended.
    """

    peer: Peer
    stub: EngineServiceAsyncStub
    used_at_s: float
    calls: int = 0


class Desks:
    """The connections for unary calls. `run` it in the background."""

    def __init__(self, credential: str, clock: Clock) -> None:
        self._credential = credential
        self._clock = clock
        self._desks: dict[tuple[str, str], _Desk] = {}

    @property
    def open(self) -> int:
        """Connections there are."""
        return len(self._desks)

    async def call(
        self,
        target: tuple[str, str],
        method: Callable[[EngineServiceAsyncStub], UnaryUnaryMultiCallable[Request, Response]],
        request: Request,
        *,
        timeout_s: float,
        field: str,
    ) -> Response:
        """Calls a method of a worker once.

        Args:
            target: "workers/{worker}" and host:port, from the scheduler.
            method: picks it from the stub.
            request: its request.
            timeout_s: deadline, seconds.
            field: path in the caller's request of what a refusal is about that names no field.

        Raises:
            MaasError: what the worker said, as this gateway's caller may see it.
        """
        desk = self._desk(target)
        desk.calls += 1
        try:
            return await desk.peer.call(method(desk.stub), request, timeout_s=timeout_s)
        except MaasError as error:
            raise _for_caller(error, target[0], field) from error
        finally:
            desk.calls -= 1
            desk.used_at_s = self._clock.monotonic_s()

    async def run(self) -> None:
        """Closes connections that are not used, until it is cancelled; then all."""
        try:
            while True:
                await self._clock.sleep_s(SWEEP_S)
                await self._close_idle(self._clock.monotonic_s() - IDLE_S)
        finally:
            while self._desks:
                await self._desks.popitem()[1].peer.close()

    async def _close_idle(self, before_s: float) -> None:
        # Not while a call is in flight: it would end as if its caller had cancelled it.
        idle = [
            target
            for target, desk in self._desks.items()
            if not desk.calls and desk.used_at_s <= before_s
        ]
        for desk in [self._desks.pop(target) for target in idle]:
            await desk.peer.close()

    def _desk(self, target: tuple[str, str]) -> _Desk:
        desk = self._desks.get(target)
        if desk is None:
            # Of no service: nothing is repeated below us, where another worker may be the better
            # choice; and every call brings its deadline.
            peer = Peer(target[1], self._credential, [])
            stub = engine_service_pb2_grpc.EngineServiceStub(peer.channel)
            desk = self._desks[target] = _Desk(peer, stub, self._clock.monotonic_s())
        return desk


def engine_failed(worker: str) -> Internal:
    """Makes the error for a worker that breaks its promises."""
    return Internal("the engine failed", reason=Reason.ENGINE_FAILURE, metadata={"worker": worker})


def _for_caller(error: MaasError, worker: str, field: str) -> MaasError:
    """Turns what came of a call to a worker into what this gateway's caller may see."""
    if isinstance(error, InvalidArgument):
        return _with_path(error, field)
    is_away = isinstance(error, Unavailable) and error.reason is Reason.SERVICE_UNAVAILABLE
    if is_away or error.reason is Reason.FENCED or isinstance(error, Cancelled):
        # Mostly the library's words about a connection, which name an address; or the worker is not
        # the registration that was meant; or it ends. Our own cancellation does not come back.
        return Unavailable(
            "the worker was lost",
            reason=Reason.WORKER_LOST,
            metadata={"worker": worker},
            retry_after_s=RETRY_S,
        )
    if isinstance(error, ResourceExhausted):
        return ResourceExhausted(
            "the worker has no room", reason=error.reason, retry_after_s=RETRY_S
        )
    if isinstance(error, DeadlineExceeded):
        return DeadlineExceeded("the worker did not answer in time")
    if isinstance(error, _PASSED_ON):
        return error
    log.error("worker call failed", worker=worker, cause=error.reason.value)
    return engine_failed(worker)


def _with_path(error: InvalidArgument, field: str) -> InvalidArgument:
    """Names fields as the caller's request does."""
    rule = _RULES.get(error.reason, FieldRule.BAD_FORMAT)
    violations = [
        Violation(_public(item.field), item.rule, item.description) for item in error.violations
    ] or [Violation(_public(error.metadata.get("field", field)), rule, error.message)]
    metadata = error.metadata
    if "field" in metadata:
        metadata = {**metadata, "field": violations[0].field}
    return InvalidArgument(
        error.message,
        reason=error.reason,
        metadata=metadata,
        violations=violations,
        retry_after_s=error.retry_after_s,
    )


def _public(field: str) -> str:
    head, dot, rest = field.partition(".")
    return f"spec{dot}{rest}" if head == "execution" else field
