"""The billing process: python -m services.billing --config billing.toml."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from maas.billing.v1 import (
    account_service_pb2,
    audit_service_pb2,
    credit_slice_service_pb2,
    invoice_service_pb2,
    limit_service_pb2,
    price_service_pb2,
    quota_service_pb2,
    usage_service_pb2,
)

from libs import postgres, process
from libs.clock import Clock, SystemClock
from libs.postgres import Database
from libs.process import Background
from libs.receipts import ReceiptKeys
from libs.rpc import Hub, Server
from libs.rpc.feed import poll_revision
from libs.rpc.identity import Identity
from libs.rpc.run import key_table, start_metrics
from services.billing.audit_service import AuditService
from services.billing.auditor import Auditor
from services.billing.config import BillingSection, Config
from services.billing.invoice_service import InvoiceService
from services.billing.limit_service import LimitService
from services.billing.quota_service import QuotaService
from services.billing.receipts import (
    ReceiptCheck,
    ReceiptReader,
    fault_of,
    read_keys,
    read_reviewed,
    remember_keys,
)
from services.billing.service import AccountService, CreditSliceService, PriceService
from services.billing.store import (
    AccountStore,
    GrantStore,
    PriceStore,
    RefundStore,
    SettlementStore,
    SliceStore,
)
from services.billing.store.audit import AuditStore
from services.billing.store.invoices import InvoiceStore
from services.billing.store.limits import LimitStore
from services.billing.store.quotas import QuotaStore
from services.billing.store.receipts import ReceiptStore
from services.billing.store.reports import Reports
from services.billing.store.usage import UsageStore
from services.billing.store.windows import SpendWindowStore
from services.billing.sweeper import sweep_forever
from services.billing.usage_service import UsageService

MIGRATIONS = Path(__file__).parent / "migrations"
OVERDUE_SLACK_S = 60.0
PRUNE_INTERVAL_S = 60.0


async def main(config: Config) -> None:
    """Serves until it is told to stop."""
    start_metrics(config)
    async with AsyncExitStack() as stack:
        database = await postgres.connect(config.postgres, schema="billing")
        await stack.enter_async_context(database)
        await postgres.migrate(database, "billing", MIGRATIONS)
        keys = await stack.enter_async_context(key_table(config, config.auth))
        server = Server(config.server, Identity.from_config(config.identity, keys))
        background = await stack.enter_async_context(Background(on_failure=server.fail))
        compose(server, background, database, SystemClock(), config.billing)
        await server.start()
        await server.serve()


def compose(
    server: Server,
    background: Background,
    database: Database,
    clock: Clock,
    config: BillingSection,
) -> None:
    """Adds the services of billing to a server and starts its tasks."""
    hub = Hub()
    lease_s = config.lease_duration
    prices = PriceStore(database)
    reports = Reports(database)
    grants = GrantStore(database)
    spend = SpendWindowStore()
    slices = SliceStore(
        database,
        lease_s=lease_s,
        grace_s=config.grace,
        retention_s=config.slice_retention,
        spend=spend,
    )
    receipts = ReceiptStore(database)
    receipt_keys = read_keys(config.receipt_keys_file)
    settlements = SettlementStore(
        database, lease_s=lease_s, check_receipts=ReceiptCheck(receipt_keys), spend=spend
    )
    background.start(remember_keys(receipts, receipt_keys, clock), name="remember receipt keys")
    background.start(poll_revision(hub, prices.get_revision, clock), name="poll revision")
    sweeps = {
        "sweep": (slices.sweep, config.sweep_interval),
        "expire grants": (lambda: grants.sweep(clock.now()), config.sweep_interval),
        "prune slices": (slices.prune, PRUNE_INTERVAL_S),
    }
    for name, (sweep, interval_s) in sweeps.items():
        background.start(sweep_forever(sweep, clock, interval_s=interval_s), name=name)
    server.add(
        AccountService(AccountStore(database), grants, RefundStore(database), clock),
        account_service_pb2.DESCRIPTOR.services_by_name["AccountService"],
    )
    server.add(
        PriceService(prices, hub, clock),
        price_service_pb2.DESCRIPTOR.services_by_name["PriceService"],
    )
    server.add(
        UsageService(UsageStore(database, reports), ReceiptReader(receipts), clock),
        usage_service_pb2.DESCRIPTOR.services_by_name["UsageService"],
    )
    server.add(
        InvoiceService(InvoiceStore(database, reports, delay_s=config.invoice_delay), clock),
        invoice_service_pb2.DESCRIPTOR.services_by_name["InvoiceService"],
    )
    server.add(
        CreditSliceService(slices, settlements, clock, lease_s=lease_s),
        credit_slice_service_pb2.DESCRIPTOR.services_by_name["CreditSliceService"],
    )
    _compose_limits(server, background, database, clock)
    _compose_audit(server, background, database, clock, config, receipt_keys)


def _compose_limits(
    server: Server, background: Background, database: Database, clock: Clock
) -> None:
    hub = Hub()
    limits = LimitStore(database)
    background.start(poll_revision(hub, limits.get_revision, clock), name="poll limits")
    server.add(
        LimitService(limits, hub, clock),
        limit_service_pb2.DESCRIPTOR.services_by_name["LimitService"],
    )
    server.add(
        QuotaService(QuotaStore(database)),
        quota_service_pb2.DESCRIPTOR.services_by_name["QuotaService"],
    )


def _compose_audit(
    server: Server,
    background: Background,
    database: Database,
    clock: Clock,
    config: BillingSection,
    keys: ReceiptKeys,
) -> None:
    # A slice holds money until the sweeper comes, which may find the database away once.
    overdue_s = config.grace + 3 * config.sweep_interval + OVERDUE_SLACK_S
    reviewed = read_reviewed(config.receipts_reviewed_file)
    store = AuditStore(
        database, overdue_s=overdue_s, fault_of=fault_of, keys=keys, reviewed=reviewed
    )
    auditor = Auditor(
        store,
        clock,
        interval_s=config.audit_interval,
        full_interval_s=config.audit_full_interval,
    )
    background.start(auditor.run(), name="audit")
    server.add(
        AuditService(store, clock), audit_service_pb2.DESCRIPTOR.services_by_name["AuditService"]
    )


if __name__ == "__main__":
    process.run(Config, main)
