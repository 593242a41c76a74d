"""The billing process: python -m services.billing --config billing.toml."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from maas.billing.v1 import (
    account_service_pb2,
    credit_slice_service_pb2,
    price_service_pb2,
    usage_service_pb2,
)

from libs import postgres, process
from libs.clock import Clock, SystemClock
from libs.postgres import Database
from libs.process import Background
from libs.rpc import Hub, Server
from libs.rpc.feed import poll_revision
from libs.rpc.identity import Identity
from libs.rpc.run import key_table, start_metrics
from services.billing.config import BillingSection, Config
from services.billing.service import AccountService, CreditSliceService, PriceService, UsageService
from services.billing.store import AccountStore, PriceStore, SettlementStore, SliceStore
from services.billing.sweeper import sweep_forever

MIGRATIONS = Path(__file__).parent / "migrations"


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
    slices = SliceStore(database, lease_s=lease_s, grace_s=config.grace)
    settlements = SettlementStore(database, lease_s=lease_s)
    background.start(poll_revision(hub, prices.get_revision, clock), name="poll revision")
    background.start(
        sweep_forever(slices.sweep, clock, interval_s=config.sweep_interval), name="sweep"
    )
    server.add(
        AccountService(AccountStore(database), clock),
        account_service_pb2.DESCRIPTOR.services_by_name["AccountService"],
    )
    server.add(
        PriceService(prices, hub, clock),
        price_service_pb2.DESCRIPTOR.services_by_name["PriceService"],
    )
    server.add(
        UsageService(settlements),
        usage_service_pb2.DESCRIPTOR.services_by_name["UsageService"],
    )
    server.add(
        CreditSliceService(slices, settlements, clock, lease_s=lease_s),
        credit_slice_service_pb2.DESCRIPTOR.services_by_name["CreditSliceService"],
    )


if __name__ == "__main__":
    process.run(Config, main)
