"""The scheduler process: python -m services.scheduler --config scheduler.toml."""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack
from pathlib import Path

from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from maas.scheduler.v1 import (
    placement_service_pb2,
    worker_registry_service_pb2,
    worker_service_pb2,
)

from libs import postgres, process
from libs.clock import SystemClock
from libs.process import Background
from libs.rpc import Server
from libs.rpc.identity import Identity
from libs.rpc.run import key_table, start_metrics
from services.scheduler.config import Config
from services.scheduler.loop import Scheduler
from services.scheduler.service import PlacementService, WorkerRegistryService, WorkerService
from services.scheduler.store import SchedulerStore

MIGRATIONS = Path(__file__).parent / "migrations"


async def main(config: Config) -> None:
    """Serves until it is told to stop."""
    clock = SystemClock()
    start_metrics(config)
    async with AsyncExitStack() as stack:
        database = await postgres.connect(config.postgres, schema="scheduler")
        await stack.enter_async_context(database)
        await postgres.migrate(database, "scheduler", MIGRATIONS)
        keys = await stack.enter_async_context(key_table(config, config.auth))
        server = Server(config.server, Identity.from_config(config.identity, keys))
        background = await stack.enter_async_context(Background(on_failure=server.fail))

        settings = config.scheduler
        scheduler = Scheduler(settings.for_core(), clock, instance=secrets.token_hex(4))
        background.start(scheduler.run(), name="scheduler loop")
        placement = _service(placement_service_pb2.DESCRIPTOR, "PlacementService")
        server.add(PlacementService(scheduler, settings), placement)
        registry = _service(worker_registry_service_pb2.DESCRIPTOR, "WorkerRegistryService")
        store = SchedulerStore(database)
        server.add(WorkerRegistryService(scheduler, store, clock, settings), registry)
        workers = _service(worker_service_pb2.DESCRIPTOR, "WorkerService")
        server.add(WorkerService(scheduler, clock), workers)
        await server.start()
        await server.serve(drain=scheduler.close)


def _service(file: FileDescriptor, name: str) -> ServiceDescriptor:
    return file.services_by_name[name]


if __name__ == "__main__":
    process.run(Config, main)
