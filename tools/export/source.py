"""Where exports read: usage records or ledger entries page by page, prices and accounts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Generic, TypeVar

import grpc
from maas.billing.v1 import account_service_pb2 as account_pb
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import price_service_pb2 as price_pb
from maas.billing.v1 import usage_service_pb2 as usage_pb
from maas.billing.v1.account_service_pb2_grpc import AccountServiceStub
from maas.billing.v1.price_service_pb2_grpc import PriceServiceStub
from maas.billing.v1.usage_service_pb2_grpc import UsageServiceStub

from libs.clock import Clock
from tools.export.options import Options

if TYPE_CHECKING:
    from grpc.aio import UnaryUnaryMultiCallable

PAGE_SIZE = 1000
CALL_S = 60.0
TRIES_MAX = 6
_PAUSE_S = 0.5
_SYSTEM_ACCOUNTS = "accounts/system-"
_EVER = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))

Request = TypeVar("Request")
Response = TypeVar("Response")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """A page of what is exported.

    Attributes:
        items: oldest first.
        next_token: where the next page begins; empty after the last.
    """

    items: Sequence[Item]
    next_token: str


class Source:
    """Billing, as a client sees it. What is read once of prices and accounts is kept.

    Raises, from all its methods, AioRpcError: a call was refused, or failed six times.

    Args:
        channel: to billing.
        options: what to read.
        clock: for pauses.
    """

    def __init__(self, channel: grpc.aio.Channel, options: Options, clock: Clock) -> None:
        self._accounts = AccountServiceStub(channel)
        self._prices = PriceServiceStub(channel)
        self._usage = UsageServiceStub(channel)
        self._options = options
        self._clock = clock
        self._metadata = (("authorization", f"Bearer {options.key}"),)
        self._known_prices: dict[str, ledger_pb2.Price] = {}
        self._known_customers: dict[str, str] = {}

    async def records(self) -> AsyncIterator[Page[ledger_pb2.UsageRecord]]:
        """Yields the pages of usage records that were asked for."""
        options = self._options
        wanted = usage_pb.UsageFilter()
        if options.start_time is not None:
            wanted.start_time.FromDatetime(options.start_time)
        if options.end_time is not None:
            wanted.end_time.FromDatetime(options.end_time)
        token = options.after
        while True:
            request = usage_pb.ListUsageRecordsRequest(
                parent=options.parent, page_size=PAGE_SIZE, page_token=token, filter=wanted
            )
            page = await self._call(self._usage.ListUsageRecords, request)
            yield Page(page.usage_records, page.next_page_token)
            token = page.next_page_token
            if not token:
                return

    async def movements(self) -> AsyncIterator[Page[ledger_pb2.LedgerEntry]]:
        """Yields the pages of ledger entries that were asked for: of customers, and no usage.

        All entries are read for them: the ledger is listed whole.
        """
        token = self._options.after
        while True:
            request = account_pb.ListLedgerEntriesRequest(
                parent=self._options.parent, page_size=PAGE_SIZE, page_token=token
            )
            page = await self._call(self._accounts.ListLedgerEntries, request)
            found = [entry for entry in page.entries if self._is_wanted(entry)]
            token = page.next_page_token
            yield Page(found, token)
            if not token:
                return

    def _is_wanted(self, entry: ledger_pb2.LedgerEntry) -> bool:
        time = entry.create_time.ToDatetime(tzinfo=UTC)
        return (
            entry.kind != ledger_pb2.ENTRY_KIND_USAGE
            and not entry.account.startswith(_SYSTEM_ACCOUNTS)
            and (self._options.start_time or _EVER[0]) <= time
            and time < (self._options.end_time or _EVER[1])
        )

    async def price(self, name: str) -> ledger_pb2.Price:
        """Reads a price."""
        found = self._known_prices.get(name)
        if found is None:
            request = price_pb.GetPriceRequest(name=name)
            response = await self._call(self._prices.GetPrice, request)
            found = self._known_prices[name] = response.price
        return found

    async def customer(self, account: str) -> str:
        """Reads the name for people of an account; may be empty."""
        found = self._known_customers.get(account)
        if found is None:
            request = account_pb.GetAccountRequest(name=account)
            response = await self._call(self._accounts.GetAccount, request)
            found = self._known_customers[account] = response.account.display_name
        return found

    async def _call(
        self, method: UnaryUnaryMultiCallable[Request, Response], request: Request
    ) -> Response:
        """Calls, again when billing is away for a moment: reading may be repeated."""
        pause_s = _PAUSE_S
        for _ in range(TRIES_MAX - 1):
            try:
                return await method(request, timeout=CALL_S, metadata=self._metadata)
            except grpc.aio.AioRpcError as failure:
                if failure.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
            await self._clock.sleep_s(pause_s)
            pause_s *= 2
        return await method(request, timeout=CALL_S, metadata=self._metadata)


@asynccontextmanager
async def connected(options: Options, clock: Clock) -> AsyncIterator[Source]:
    """Opens the connection."""
    # Pages are at most 3 MiB and a record; the default of 4 MiB is enough.
    if options.certificates is None:
        channel = grpc.aio.insecure_channel(options.endpoint)
    else:
        trust = grpc.ssl_channel_credentials(options.certificates)
        channel = grpc.aio.secure_channel(options.endpoint, trust)
    async with channel:
        yield Source(channel, options, clock)
