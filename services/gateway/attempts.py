"""The attempts to run one generation: the first one, and others behind what was released so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from maas.engine.v1 import engine_pb2

from libs.clock import Clock
from libs.errors import (
    FieldRule,
    InvalidArgument,
    Reason,
    ResourceExhausted,
    Unavailable,
    Violation,
)
from services.gateway import convert
from services.gateway.placement import Placed, Placer, Wanted

log = structlog.get_logger(__name__)

RETRY_S = 0.1
RETRY_MAX_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """Places one generation on workers.

    Attributes:
        placer: finds a worker.
        clock: time.
        execution: what is common to all attempts.
        generation_id: for the log.
        project: "projects/{project}", for fairness.
        queue_wait_s: longest wait for a place, each time.
        deadline_s: monotonic end of the generation; None for none.
    """

    placer: Placer
    clock: Clock
    execution: engine_pb2.Execution
    generation_id: str
    project: str
    queue_wait_s: float
    deadline_s: float | None

    async def first(self) -> Placed:
        """Places it.

        Raises:
            MaasError: what the last worker or the scheduler said.
        """
        return await self._place((), frozenset())

    async def again(self, token_ids: Sequence[int], lost: str, give_up_s: float) -> Placed:
        """Places it behind its output so far, on another worker or on the same one restarted.

        Args:
            token_ids: output so far.
            lost: "workers/{worker}" that was lost; left out the first time.
            give_up_s: monotonic; workers that are all lost have until then to come back.

        Raises:
            MaasError: what was said last.
        """
        excluded = frozenset({lost})
        retry_s = RETRY_S
        while True:
            try:
                return await self._place(token_ids, excluded)
            except (Unavailable, ResourceExhausted) as error:
                if self.clock.monotonic_s() + retry_s >= give_up_s:
                    raise
                log.info(
                    "no worker to go on with yet",
                    generation_id=self.generation_id,
                    cause=error.reason.value,
                )
            # It may be back under its name, and the scheduler knows whether it is.
            excluded = frozenset()
            await self.clock.sleep_s(retry_s)
            retry_s = min(2 * retry_s, RETRY_MAX_S)

    async def _place(self, token_ids: Sequence[int], excluded: frozenset[str]) -> Placed:
        def make(execution_id: str, epoch: int) -> engine_pb2.Execution:
            attempt = engine_pb2.Execution()
            attempt.CopyFrom(self.execution)
            attempt.execution_id = execution_id
            attempt.epoch = epoch
            attempt.continue_token_ids.extend(token_ids)
            if self.deadline_s is not None:
                left_s = max(self.deadline_s - self.clock.monotonic_s(), 0.001)
                attempt.budget.CopyFrom(convert.duration_to_pb(left_s))
            return attempt

        wanted = Wanted(
            execution_id=self.generation_id,
            model_version=self.execution.model_version,
            project=self.project,
            max_wait_s=self.queue_wait_s,
            excluded=excluded,
        )
        try:
            return await self.placer.place(wanted, make)
        except InvalidArgument as error:
            default = f"spec.{self.execution.WhichOneof('input')}"
            raise _with_field(error, default) from error


def _with_field(error: InvalidArgument, default: str) -> InvalidArgument:
    """Gives a worker's refusal the path of the field: its own, or that of the input."""
    field = error.metadata.get("field", default)
    is_length = error.reason is Reason.CONTEXT_LENGTH_EXCEEDED
    rule = FieldRule.TOO_LONG if is_length else FieldRule.BAD_FORMAT
    return InvalidArgument(
        error.message,
        reason=error.reason,
        metadata=error.metadata,
        violations=error.violations or [Violation(field, rule, error.message)],
    )
