"""The auditor's method: asks for an audit and streams what it finds."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from maas.billing.v1 import audit_service_pb2 as audit_pb
from maas.billing.v1 import audit_service_pb2_grpc
from typing_extensions import override

from libs.clock import Clock
from libs.errors import ResourceExhausted
from libs.rpc import current_call
from services.billing import convert
from services.billing.store.audit import AuditResult, AuditStore, AuditWish, Finding

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

VIOLATIONS_DEFAULT = 1000
# Of the pool's connections, for minutes.
AT_ONCE_MAX = 1
_RETRY_S = 10.0
_LONGEST_S = 3600.0


class AuditService(audit_service_pb2_grpc.AuditServiceServicer):
    """The auditor of the ledger: maas.billing.v1.AuditService."""

    def __init__(self, store: AuditStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._running = 0

    @override
    async def Reconcile(
        self, request: audit_pb.ReconcileRequest, _: Context
    ) -> AsyncGenerator[audit_pb.ReconcileResponse, None]:
        """Checks every invariant on one snapshot, and streams what is broken, then a summary.

        Raises:
            ResourceExhausted: QUEUE_FULL, this process is at it for somebody else.
            NotFound: there is no such account.
        """
        account_id = convert.account_id_of(request.account, "account") if request.account else ""
        if self._running >= AT_ONCE_MAX:
            raise ResourceExhausted("the ledger is being audited", retry_after_s=_RETRY_S)
        self._running += 1
        try:
            wish = AuditWish(
                account_id=account_id,
                start=await self._store.checkpoint_before(request.after_record),
                findings_max=request.max_violations or VIOLATIONS_DEFAULT,
                timeout_s=self._time_left_s(),
            )
            async with aclosing(self._store.audit(wish)) as found:
                async for item in found:
                    yield _to_pb(item)
        finally:
            self._running -= 1

    def _time_left_s(self) -> float:
        deadline_s = current_call().deadline_s
        if deadline_s is None:
            return _LONGEST_S
        return min(max(deadline_s - self._clock.monotonic_s(), 0.001), _LONGEST_S)


def _to_pb(item: Finding | AuditResult) -> audit_pb.ReconcileResponse:
    match item:
        case Finding():
            return audit_pb.ReconcileResponse(
                violation=audit_pb.Violation(
                    invariant=item.invariant_id,
                    resource=item.resource,
                    description=item.description,
                )
            )
        case AuditResult():
            return audit_pb.ReconcileResponse(
                summary=audit_pb.AuditSummary(
                    violation_count=item.violation_count,
                    record_count=item.record_count,
                    entry_count=item.entry_count,
                    last_record=item.end.record_count,
                )
            )
