"""Usage's methods: parse, one call of a store, build. Who reaches what: see service.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maas.billing.v1 import usage_service_pb2 as usage_pb
from maas.billing.v1 import usage_service_pb2_grpc
from typing_extensions import override

from libs import paging
from libs.clock import Clock
from libs.rpc import current_call
from services.billing import convert, usage_convert
from services.billing.receipts import ReceiptReader
from services.billing.service import is_administrator, reachable_account
from services.billing.store.usage import UsageStore
from services.billing.usage import key_of_values

if TYPE_CHECKING:
    from grpc.aio import ServicerContext

    Context = ServicerContext[Any, Any]

# Of the time that a call has left: the rest is for saying that it was too short.
_READING_SHARE = 0.8
_READING_MAX_S = 120.0


class UsageService(usage_service_pb2_grpc.UsageServiceServicer):
    """What was used: maas.billing.v1.UsageService."""

    def __init__(self, store: UsageStore, receipts: ReceiptReader, clock: Clock) -> None:
        self._store = store
        self._receipts = receipts
        self._clock = clock

    @override
    async def ListUsageRecords(
        self, request: usage_pb.ListUsageRecordsRequest, _: Context
    ) -> usage_pb.ListUsageRecordsResponse:
        """Lists usage records, oldest first."""
        page = paging.page_of(request.page_size, request.page_token)
        records = await self._store.list_records(
            reachable_account(request.parent, "parent"),
            page,
            generation_id=convert.text_of(request.generation_id, "generation_id"),
            wanted=usage_convert.filter_from_pb(request.filter),
            timeout_s=reading_time_s(self._clock),
        )
        numbers = {record.settlement.generation_id: record.number for record in records}
        items, token = paging.cut(
            [convert.record_to_pb(record) for record in records],
            page,
            lambda item: str(numbers[item.generation_id]),
        )
        return usage_pb.ListUsageRecordsResponse(usage_records=items, next_page_token=token)

    @override
    async def SummarizeUsage(
        self, request: usage_pb.SummarizeUsageRequest, _: Context
    ) -> usage_pb.SummarizeUsageResponse:
        """Sums usage records by any of their dimensions."""
        page = paging.page_of(request.page_size, request.page_token)
        summaries = await self._store.summarize(
            reachable_account(request.parent, "parent"),
            page,
            wanted=usage_convert.filter_from_pb(request.filter),
            grouping=usage_convert.grouping_from_pb(request.group_by, request.label_key),
            timeout_s=reading_time_s(self._clock),
        )
        shows_cost = is_administrator()
        items, token = paging.cut(
            [usage_convert.summary_to_pb(item, shows_cost=shows_cost) for item in summaries],
            page,
            lambda item: key_of_values(item.values),
        )
        return usage_pb.SummarizeUsageResponse(summaries=items, next_page_token=token)

    @override
    async def GetReceipt(
        self, request: usage_pb.GetReceiptRequest, _: Context
    ) -> usage_pb.GetReceiptResponse:
        """Reads the signed receipt of a settled generation."""
        return await self._receipts.get(request, current_call().require_principal())

    @override
    async def ListReceiptKeys(
        self, request: usage_pb.ListReceiptKeysRequest, _: Context
    ) -> usage_pb.ListReceiptKeysResponse:
        """Lists the public keys of receipts."""
        return await self._receipts.list_keys(request)


def reading_time_s(clock: Clock) -> float:
    """Returns for how long the current call may read, seconds."""
    deadline_s = current_call().deadline_s
    if deadline_s is None:
        return _READING_MAX_S
    left_s = deadline_s - clock.monotonic_s()
    return min(max(_READING_SHARE * left_s, 0.001), _READING_MAX_S)
