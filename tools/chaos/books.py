"""What billing says: balance, all records, all entries, and its own auditor's findings."""

from __future__ import annotations

import grpc
from maas.billing.v1 import account_service_pb2 as accounts
from maas.billing.v1 import audit_service_pb2 as audits
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import usage_service_pb2 as usage
from maas.billing.v1.account_service_pb2_grpc import AccountServiceStub
from maas.billing.v1.audit_service_pb2_grpc import AuditServiceStub
from maas.billing.v1.usage_service_pb2_grpc import UsageServiceStub

from libs.rpc import Peer
from tools.chaos.audit import Record
from tools.conformance.client import Tenant

AUDITS = audits.DESCRIPTOR.services_by_name["AuditService"]
_PAGE_SIZE = 1000
_OURS = {
    ledger_pb2.END_CAUSE_WORKER_LOST,
    ledger_pb2.END_CAUSE_ENGINE_FAILURE,
    ledger_pb2.END_CAUSE_GATEWAY_LOST,
}


class Books:
    """Billing, as a tenant and as an administrator."""

    def __init__(self, channel: grpc.aio.Channel, tenant: Tenant, administrator: Tenant) -> None:
        self._tenant = tenant
        self._administrator = administrator
        self._accounts = AccountServiceStub(channel)
        self._usage = UsageServiceStub(channel)

    async def held(self) -> int:
        """Nanos that are set aside."""
        response = await self._tenant.call(self._accounts.GetBalance, accounts.GetBalanceRequest())
        return response.balance.held.nanos

    async def records(self) -> list[Record]:
        """Every usage record of the tenant."""
        found: list[Record] = []
        page_token = ""
        while True:
            request = usage.ListUsageRecordsRequest(page_size=_PAGE_SIZE, page_token=page_token)
            response = await self._tenant.call(self._usage.ListUsageRecords, request)
            found += [_record(item) for item in response.usage_records]
            page_token = response.next_page_token
            if not page_token:
                return found

    async def ledger_sum(self) -> int:
        """Nanos over all entries of all accounts."""
        total, page_token = 0, ""
        while True:
            request = accounts.ListLedgerEntriesRequest(
                parent="accounts/-", page_size=_PAGE_SIZE, page_token=page_token
            )
            response = await self._administrator.call(self._accounts.ListLedgerEntries, request)
            total += sum(entry.amount.nanos for entry in response.entries)
            page_token = response.next_page_token
            if not page_token:
                return total


async def reconcile(endpoint: str, key: str) -> list[str]:
    """Has billing check every invariant; returns what is broken."""
    async with (
        Peer(endpoint, key, [AUDITS]) as peer,
        peer.stream(AuditServiceStub(peer.channel).Reconcile, audits.ReconcileRequest()) as answers,
    ):
        messages = [answer async for answer in answers]
    broken = [
        f"{item.violation.invariant} {item.violation.resource}: {item.violation.description}"
        for item in messages
        if item.HasField("violation")
    ]
    if not messages or not messages[-1].HasField("summary"):
        broken.append("Reconcile ended without a summary")
    return broken


def _record(item: ledger_pb2.UsageRecord) -> Record:
    return Record(
        generation_id=item.generation_id,
        request_id=item.request_id,
        input_tokens=item.usage.input_tokens,
        output_tokens=item.usage.output_tokens,
        charge_nanos=item.charge.nanos,
        is_ours=item.end_cause in _OURS,
    )
