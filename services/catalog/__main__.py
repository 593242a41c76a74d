"""The catalog process: python -m services.catalog --config catalog.toml."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from maas.catalog.v1 import adapter_service_pb2, model_service_pb2, offering_service_pb2

from libs import postgres, process
from libs.clock import SystemClock
from libs.process import Background
from libs.rpc import Hub, Server
from libs.rpc.feed import poll_revision
from libs.rpc.identity import Identity
from libs.rpc.run import key_table, start_metrics
from services.catalog.config import Config
from services.catalog.service import AdapterService, ModelService, OfferingService
from services.catalog.store import AdapterStore, CatalogStore

MIGRATIONS = Path(__file__).parent / "migrations"


async def main(config: Config) -> None:
    """Serves until it is told to stop."""
    clock = SystemClock()
    start_metrics(config)
    async with AsyncExitStack() as stack:
        database = await postgres.connect(config.postgres, schema="catalog")
        await stack.enter_async_context(database)
        await postgres.migrate(database, "catalog", MIGRATIONS)
        keys = await stack.enter_async_context(key_table(config, config.auth))
        server = Server(config.server, Identity.from_config(config.identity, keys))
        background = await stack.enter_async_context(Background(on_failure=server.fail))

        hub = Hub()
        store = CatalogStore(database)
        background.start(poll_revision(hub, store.get_revision, clock), name="poll revision")
        models = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"]
        server.add(ModelService(store, clock), models)
        offerings = offering_service_pb2.DESCRIPTOR.services_by_name["OfferingService"]
        server.add(OfferingService(store, hub, clock), offerings)
        adapters = adapter_service_pb2.DESCRIPTOR.services_by_name["AdapterService"]
        server.add(AdapterService(AdapterStore(database), hub, clock), adapters)
        await server.start()
        await server.serve()


if __name__ == "__main__":
    process.run(Config, main)
