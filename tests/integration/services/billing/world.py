"""Billing in this process, behind real gRPC and on a real PostgreSQL."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime

import asyncpg
from google.protobuf.timestamp_pb2 import Timestamp
from maas.billing.v1 import account_service_pb2 as account_pb
from maas.billing.v1 import (
    account_service_pb2_grpc,
    audit_service_pb2,
    audit_service_pb2_grpc,
    credit_slice_service_pb2_grpc,
    invoice_service_pb2,
    ledger_pb2,
    limit_service_pb2_grpc,
    price_service_pb2_grpc,
    quota_service_pb2_grpc,
    usage_service_pb2_grpc,
)
from maas.billing.v1 import credit_slice_service_pb2 as slice_pb
from maas.billing.v1 import limit_service_pb2 as limit_pb
from maas.billing.v1 import price_service_pb2 as price_pb
from maas.billing.v1 import quota_service_pb2 as quota_pb
from maas.billing.v1 import usage_service_pb2 as usage_pb
from maas.common.v1 import money_pb2
from maas.common.v1 import usage_pb2 as token_usage_pb2

from libs import postgres
from libs.auth import KeyRecord, KeyTable, Role, new_key, sha256_of
from libs.config import PostgresSection, ServerSection
from libs.postgres import Database
from libs.process import Background
from libs.rpc import Peer, Server
from libs.rpc.identity import Identity
from libs.testing import FakeClock
from services.billing.__main__ import compose
from services.billing.config import BillingSection
from services.billing.store import GrantStore, SliceStore
from services.billing.store.windows import SpendWindowStore
from tests.integration.services.billing.audit import Connection

SERVICES = [
    account_pb.DESCRIPTOR.services_by_name["AccountService"],
    price_pb.DESCRIPTOR.services_by_name["PriceService"],
    usage_pb.DESCRIPTOR.services_by_name["UsageService"],
    slice_pb.DESCRIPTOR.services_by_name["CreditSliceService"],
    limit_pb.DESCRIPTOR.services_by_name["LimitService"],
    quota_pb.DESCRIPTOR.services_by_name["QuotaService"],
    audit_service_pb2.DESCRIPTOR.services_by_name["AuditService"],
    invoice_service_pb2.DESCRIPTOR.services_by_name["InvoiceService"],
]
GATEWAY_TOKEN = "ms_gateway"
INTERNAL = [
    "maas.billing.v1.PriceService/WatchPrices",
    "maas.billing.v1.CreditSliceService/AcquireSlice",
    "maas.billing.v1.CreditSliceService/Settle",
    "maas.billing.v1.CreditSliceService/FindSettlement",
    "maas.billing.v1.CreditSliceService/CloseSlices",
    "maas.billing.v1.LimitService/WatchLimits",
    "maas.billing.v1.QuotaService/TakeQuota",
    "maas.billing.v1.QuotaService/GiveBackQuota",
    "maas.billing.v1.QuotaService/HoldPlaces",
]
LEASE_S = 60.0
GRACE_S = 600.0
# A price of one nano for one token, so that amounts are counts.
NANO_PER_TOKEN = 1_000_000


def usd(nanos: int) -> money_pb2.Money:
    return money_pb2.Money(currency_code="USD", nanos=nanos)


def time_pb(second: int = 0) -> Timestamp:
    message = Timestamp()
    message.FromDatetime(datetime(2026, 1, 1, 0, 0, second, tzinfo=UTC))
    return message


def settlement(
    generation_id: str,
    *,
    slice_id: str,
    account: str = "accounts/acme",
    tokens: int = 1,
    price: str = "prices/nano",
    end_cause: ledger_pb2.EndCause.ValueType = ledger_pb2.END_CAUSE_COMPLETED,
    project: str = "projects/demo",
    request_id: str = "",
    request_sha256: bytes = b"",
    labels: Mapping[str, str] | None = None,
    end_user: str = "",
) -> slice_pb.Settlement:
    """A settlement of `tokens` nanos at the price of the tests."""
    return slice_pb.Settlement(
        generation_id=generation_id,
        slice_id=slice_id,
        account=account,
        project=project,
        api_key="apiKeys/key",
        offering="offerings/tiny",
        model_version="models/tiny/versions/1",
        price=price,
        usage=token_usage_pb2.TokenUsage(input_tokens=0, output_tokens=tokens),
        end_cause=end_cause,
        start_time=time_pb(1),
        end_time=time_pb(2),
        request_id=request_id,
        request_sha256=request_sha256,
        labels=labels,
        end_user=end_user,
    )


class Client:
    """The stubs of one caller."""

    def __init__(self, endpoint: str, credential: str) -> None:
        self.peer = Peer(endpoint, credential, SERVICES)
        self.accounts = account_service_pb2_grpc.AccountServiceStub(self.peer.channel)
        self.prices = price_service_pb2_grpc.PriceServiceStub(self.peer.channel)
        self.usage = usage_service_pb2_grpc.UsageServiceStub(self.peer.channel)
        self.audits = audit_service_pb2_grpc.AuditServiceStub(self.peer.channel)
        self.slices = credit_slice_service_pb2_grpc.CreditSliceServiceStub(self.peer.channel)
        self.limits = limit_service_pb2_grpc.LimitServiceStub(self.peer.channel)
        self.quotas = quota_service_pb2_grpc.QuotaServiceStub(self.peer.channel)


@dataclasses.dataclass(slots=True, kw_only=True)
class Billing:
    """One billing service and its callers.

    Attributes:
        dsn: of its database.
        endpoint: host:port.
        clock: of records; leases run on the database's.
        database: its pool.
        connection: a connection of the test, on the schema.
        admin: an operator.
        tenant: organization acme.
        stranger: organization other.
        gateway: the service that spends.
        keys: the callers' keys.
    """

    dsn: str
    endpoint: str
    clock: FakeClock
    database: Database
    connection: Connection
    admin: Client
    tenant: Client
    stranger: Client
    gateway: Client
    keys: KeyTable
    _numbers: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))

    async def open_account(self, credit: int = 0, account_id: str = "acme") -> str:
        """Makes an account with credit, and the price; returns the account's name."""
        await self.admin.peer.call(
            self.admin.accounts.CreateAccount,
            account_pb.CreateAccountRequest(account_id=account_id, display_name=account_id),
        )
        if credit:
            await self.post(credit, account=f"accounts/{account_id}")
        await self.create_price("nano")
        return f"accounts/{account_id}"

    async def post(
        self,
        nanos: int,
        *,
        account: str = "accounts/acme",
        kind: ledger_pb2.EntryKind.ValueType = ledger_pb2.ENTRY_KIND_GRANT,
        request_id: str | None = None,
        description: str = "",
    ) -> ledger_pb2.LedgerEntry:
        """Posts an entry."""
        response = await self.admin.peer.call(
            self.admin.accounts.PostEntry,
            account_pb.PostEntryRequest(
                account=account,
                amount=usd(nanos),
                kind=kind,
                request_id=request_id or f"request-{next(self._numbers)}",
                description=description,
            ),
        )
        return response.entry

    async def create_price(
        self, price_id: str, nanos: int = NANO_PER_TOKEN, offering: str = "offerings/tiny"
    ) -> ledger_pb2.Price:
        """Creates a price, the same for input and output."""
        response = await self.admin.peer.call(
            self.admin.prices.CreatePrice,
            price_pb.CreatePriceRequest(
                price_id=price_id,
                price=ledger_pb2.Price(
                    offering=offering,
                    input_price_per_million=usd(nanos),
                    output_price_per_million=usd(nanos),
                ),
            ),
        )
        return response.price

    async def acquire(
        self,
        slice_id: str,
        wanted: int,
        *,
        required: int = 0,
        account: str = "accounts/acme",
        holder: str = "gateway-1",
    ) -> int:
        """Acquires a slice; returns what was granted."""
        response = await self.gateway.peer.call(
            self.gateway.slices.AcquireSlice,
            slice_pb.AcquireSliceRequest(
                slice_id=slice_id,
                account=account,
                holder=holder,
                required_nanos=required,
                wanted_nanos=wanted,
            ),
        )
        return response.granted_nanos

    async def settle(
        self, *settlements: slice_pb.Settlement, renew: tuple[str, ...] = ()
    ) -> slice_pb.SettleResponse:
        """Settles a batch."""
        return await self.gateway.peer.call(
            self.gateway.slices.Settle,
            slice_pb.SettleRequest(settlements=settlements, renew_slice_ids=renew),
        )

    async def find(
        self, request_id: str, *, project: str = "projects/demo"
    ) -> slice_pb.FindSettlementResponse:
        """Finds what was charged for a request."""
        return await self.gateway.peer.call(
            self.gateway.slices.FindSettlement,
            slice_pb.FindSettlementRequest(project=project, request_id=request_id),
        )

    async def close(self, *slice_ids: str) -> None:
        """Closes slices."""
        await self.gateway.peer.call(
            self.gateway.slices.CloseSlices,
            slice_pb.CloseSlicesRequest(slice_ids=slice_ids, holder="gateway-1"),
        )

    async def balance(self, account: str = "accounts/acme") -> tuple[int, int, int]:
        """Reads posted, held and available."""
        response = await self.admin.peer.call(
            self.admin.accounts.GetBalance, account_pb.GetBalanceRequest(account=account)
        )
        found = response.balance
        return found.posted.nanos, found.held.nanos, found.available.nanos

    async def records(self, account: str = "accounts/acme") -> list[ledger_pb2.UsageRecord]:
        """Lists the first usage records."""
        response = await self.admin.peer.call(
            self.admin.usage.ListUsageRecords, usage_pb.ListUsageRecordsRequest(parent=account)
        )
        return list(response.usage_records)

    async def pass_lease_time(self, seconds: float) -> None:
        """Moves the clock that leases run on."""
        await self.connection.execute(
            "UPDATE lease_clock SET shift = shift + make_interval(secs => $1)", seconds
        )

    def advance(self, seconds: float) -> None:
        """Moves the clock of records; the callers' keys stay fresh."""
        self.clock.advance(seconds)
        self.keys.touch(self.clock.monotonic_s())

    async def sweep(self) -> None:
        """Runs the sweeper once."""
        spend = SpendWindowStore()
        await SliceStore(self.database, lease_s=LEASE_S, grace_s=GRACE_S, spend=spend).sweep()
        await GrantStore(self.database).sweep(self.clock.now())


def identity(clock: FakeClock) -> tuple[Identity, dict[str, str], KeyTable]:
    """Who may call, the callers' keys by name, and the table of them."""
    table = KeyTable()
    secrets: dict[str, str] = {}
    callers = {"admin": "", "tenant": "acme", "stranger": "other"}
    for number, (name, organization) in enumerate(callers.items()):
        key = new_key(number, number)
        secrets[name] = key.secret
        record = KeyRecord(
            key_id=key.key_id,
            secret_sha256=sha256_of(key.secret),
            role=Role.TENANT if organization else Role.ADMINISTRATOR,
            is_active=True,
            project="demo",
            organization=organization,
            revision=number + 1,
        )
        table.apply([record])
    table.touch(clock.monotonic_s())
    allow = {method: frozenset({"gateway"}) for method in INTERNAL}
    return Identity(table, {sha256_of(GATEWAY_TOKEN): "gateway"}, allow), secrets, table


@asynccontextmanager
async def running(
    dsn: str, *, connections_max: int = 8, settings: Mapping[str, str] | None = None
) -> AsyncIterator[Billing]:
    """Billing on a database that has its tables, with more keys of its configuration."""
    clock = FakeClock()
    who, secrets, keys = identity(clock)
    async with AsyncExitStack() as stack:
        config = PostgresSection(dsn=dsn, connections_max=connections_max)
        database = await postgres.connect(config, schema="billing")
        await stack.enter_async_context(database)
        listen = ServerSection(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0")
        server = Server(listen, who, clock=clock)
        background = await stack.enter_async_context(Background(on_failure=server.fail))
        section = BillingSection.model_validate(
            {"lease_duration": "60s", "grace": "10m", **(settings or {})}
        )
        compose(server, background, database, clock, section)
        endpoint = f"127.0.0.1:{await server.start()}"
        stack.push_async_callback(server.stop, 0.0)
        clients = [
            Client(endpoint, secret)
            for secret in (secrets["admin"], secrets["tenant"], secrets["stranger"], GATEWAY_TOKEN)
        ]
        for client in clients:
            await stack.enter_async_context(client.peer)
        connection = await asyncpg.connect(dsn, server_settings={"search_path": "billing"})
        stack.push_async_callback(connection.close)
        yield Billing(
            dsn=dsn,
            endpoint=endpoint,
            clock=clock,
            database=database,
            connection=connection,
            admin=clients[0],
            tenant=clients[1],
            stranger=clients[2],
            gateway=clients[3],
            keys=keys,
        )
