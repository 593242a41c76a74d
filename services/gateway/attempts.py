"""The attempts to run one generation: the first one, and others behind what was released so far."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
from maas.engine.v1 import engine_pb2

from libs.clock import Clock
from libs.errors import (
    DeadlineExceeded,
    FieldRule,
    InvalidArgument,
    Reason,
    ResourceExhausted,
    Unavailable,
    Violation,
)
from services.gateway import convert
from services.gateway.meter import Meter
from services.gateway.placement import Placed, Placer, Wanted
from services.gateway.rich import AnySink

log = structlog.get_logger(__name__)

# Of a public field.
_PATH = re.compile(r"spec\.[a-z0-9_.\[\]]+")
RETRY_S = 0.1
RETRY_MAX_S = 1.0
_RULES = {
    Reason.CONTEXT_LENGTH_EXCEEDED: FieldRule.TOO_LONG,
    Reason.FEATURE_UNSUPPORTED: FieldRule.UNSUPPORTED,
}


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
        time_limit_s: monotonic time at which the output ends well; None for none.
        affinity: requests with equal bytes prefer the same worker.
        new_sink: makes where the events of the first attempt arrive.
        meter: what all attempts took of their engines.
    """

    placer: Placer
    clock: Clock
    execution: engine_pb2.Execution
    generation_id: str
    project: str
    queue_wait_s: float
    deadline_s: float | None
    time_limit_s: float | None
    affinity: bytes
    new_sink: Callable[[], AnySink]
    meter: Meter = field(default_factory=Meter)

    async def first(self) -> Placed:
        """Places it.

        Raises:
            MaasError: what the last worker or the scheduler said.
        """
        return await self._place((), frozenset(), self._max_wait_s(), self.new_sink)

    async def again(
        self,
        token_ids: Sequence[int],
        lost: str,
        give_up_s: float,
        *,
        new_sink: Callable[[], AnySink],
    ) -> Placed:
        """Places it behind its output so far, on another worker or on the same one restarted.

        Args:
            token_ids: output so far.
            lost: "workers/{worker}" that was lost; left out the first time.
            give_up_s: monotonic; workers that are all lost have until then to come back.
            new_sink: makes where the events of an attempt arrive.

        Raises:
            MaasError: what was said last.
        """
        excluded = frozenset({lost})
        retry_s = RETRY_S
        while True:
            try:
                return await self._place(token_ids, excluded, self.queue_wait_s, new_sink)
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

    def _max_wait_s(self) -> float:
        """Returns the longest wait for a place; output that must have ended needs none.

        Raises:
            DeadlineExceeded: QUEUE_TIMEOUT, the time is over.
        """
        if self.time_limit_s is None:
            return self.queue_wait_s
        left_s = self.time_limit_s - self.clock.monotonic_s()
        if left_s <= 0:
            raise DeadlineExceeded(
                "no place became free within max_duration", reason=Reason.QUEUE_TIMEOUT
            )
        return min(self.queue_wait_s, left_s)

    async def _place(
        self,
        token_ids: Sequence[int],
        excluded: frozenset[str],
        max_wait_s: float,
        new_sink: Callable[[], AnySink],
    ) -> Placed:
        def make(execution_id: str, epoch: int) -> engine_pb2.Execution:
            attempt = engine_pb2.Execution()
            attempt.CopyFrom(self.execution)
            attempt.execution_id = execution_id
            attempt.epoch = epoch
            attempt.continue_token_ids.extend(token_ids)
            if self.deadline_s is not None:
                left_s = max(self.deadline_s - self.clock.monotonic_s(), 0.001)
                attempt.budget.CopyFrom(convert.duration_to_pb(left_s))
            if self.time_limit_s is not None:
                # What has used up its time meanwhile ends well all the same, and at once.
                left_s = max(self.time_limit_s - self.clock.monotonic_s(), 0.001)
                attempt.time_limit.CopyFrom(convert.duration_to_pb(left_s))
            return attempt

        def metered() -> AnySink:
            sink = new_sink()
            sink.meter = self.meter
            return sink

        wanted = Wanted(
            execution_id=self.generation_id,
            model_version=self.execution.model_version,
            project=self.project,
            max_wait_s=max_wait_s,
            excluded=excluded,
            places=max(self.execution.output.count, 1),
            affinity=self.affinity,
            priority=self.execution.priority,
            new_sink=metered,
        )
        try:
            return await self.placer.place(wanted, make)
        except InvalidArgument as error:
            default = f"spec.{self.execution.WhichOneof('input')}"
            raise _with_field(error, default) from error


def _with_field(error: InvalidArgument, default: str) -> InvalidArgument:
    """Gives a worker's refusal the path of the field: its own, or that of the input.

    Some reasons have no field among their metadata; then it stands before the description.
    """
    field = error.metadata.get("field", "")
    if not field:
        head, colon, _ = error.message.partition(": ")
        field = head if colon and _PATH.fullmatch(head) else default
    rule = _RULES.get(error.reason, FieldRule.BAD_FORMAT)
    return InvalidArgument(
        error.message,
        reason=error.reason,
        metadata=error.metadata,
        violations=error.violations or [Violation(field, rule, error.message)],
    )
