"""Questions that any worker of a model version can answer, and that cost nobody anything.

A question goes to one worker, the next one each time; to another when that one cannot be reached
or takes nothing. It takes no place on a worker and none of a slice, so what there may be of them at
a time is bounded here (turnstile.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from libs.clock import Clock
from libs.errors import DeadlineExceeded, MaasError, NotFound
from services.gateway.desks import ELSEWHERE, Desks
from services.gateway.tables import Workers, no_ready_worker

if TYPE_CHECKING:
    from grpc.aio import UnaryUnaryMultiCallable
    from maas.engine.v1.engine_service_pb2_grpc import EngineServiceAsyncStub

Request = TypeVar("Request")
Response = TypeVar("Response")

# Workers that are asked the same question.
WORKERS_MAX = 3
# The default deadline of these methods in the contract: no worker is given more.
ANSWER_WAIT_S = 10.0


class Inquirer:
    """Asks workers."""

    def __init__(self, *, desks: Desks, workers: Workers, clock: Clock) -> None:
        """Keeps what it needs.

        Args:
            desks: connections to workers.
            workers: those that take work.
            clock: time.
        """
        self._desks = desks
        self._workers = workers
        self._clock = clock
        self._turns = itertools.count()

    async def ask(
        self,
        model_version: str,
        method: Callable[[EngineServiceAsyncStub], UnaryUnaryMultiCallable[Request, Response]],
        request: Request,
        *,
        field: str,
        deadline_s: float | None,
    ) -> Response:
        """Asks a worker, and others when it does not answer.

        Args:
            model_version: "models/{model}/versions/{version}".
            method: picks it from the stub.
            request: its request.
            field: path in the caller's request of what a refusal is about that names no field.
            deadline_s: monotonic end of the caller's call; None for none.

        Raises:
            Unavailable: NO_READY_WORKER, or none of those asked could answer.
            MaasError: what a worker said.
        """
        targets = self._targets(model_version)
        give_up_s = self._clock.monotonic_s() + ANSWER_WAIT_S
        if deadline_s is not None:
            give_up_s = min(give_up_s, deadline_s)
        last: MaasError = no_ready_worker(model_version)
        for others, target in zip(reversed(range(len(targets))), targets, strict=True):
            left_s = max(give_up_s - self._clock.monotonic_s(), 0.001)
            try:
                return await self._desks.call(
                    target,
                    method,
                    request,
                    # A worker that hangs leaves time for another.
                    timeout_s=left_s / 2 if others else left_s,
                    field=field,
                )
            except MaasError as error:
                if error.reason not in ELSEWHERE and not isinstance(error, DeadlineExceeded):
                    raise
                # It has said what it no longer serves; to our caller the model is there.
                last = no_ready_worker(model_version) if isinstance(error, NotFound) else error
        raise last

    def _targets(self, model_version: str) -> list[tuple[str, str]]:
        workers = self._workers.serving(model_version, set())
        if not workers:
            self._workers.require()
            return []
        first = next(self._turns) % len(workers)
        turned = [*workers[first:], *workers[:first]][:WORKERS_MAX]
        return [(worker.name, worker.endpoint) for worker in turned]
