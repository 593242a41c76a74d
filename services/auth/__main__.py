"""The auth process: python -m services.auth --config auth.toml."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

from maas.auth.v1 import api_key_service_pb2, key_table_service_pb2, tenancy_service_pb2

from libs import postgres, process
from libs.auth import KeyTable
from libs.clock import SystemClock
from libs.config import read_secret
from libs.process import Background, StartError
from libs.rpc import Hub, Server
from libs.rpc.feed import poll_revision
from libs.rpc.identity import Identity
from libs.rpc.run import start_metrics
from services.auth.config import Config
from services.auth.operations import KeyOperations
from services.auth.service import ApiKeyService, KeyTableService, TenancyService
from services.auth.store import AuthStore

MIGRATIONS = Path(__file__).parent / "migrations"


async def main(config: Config) -> None:
    """Serves until it is told to stop."""
    clock = SystemClock()
    start_metrics(config)
    async with AsyncExitStack() as stack:
        database = await postgres.connect(config.postgres, schema="auth")
        await stack.enter_async_context(database)
        await postgres.migrate(database, "auth", MIGRATIONS)
        # Callers of this server are checked against its own table; the others watch it.
        keys = KeyTable()
        server = Server(config.server, Identity.from_config(config.identity, keys))
        background = await stack.enter_async_context(Background(on_failure=server.fail))

        hub = Hub()
        store = AuthStore(database)
        operations = KeyOperations(store, keys, hub, clock)
        if config.auth.bootstrap_admin_key_file is not None:
            await put_first_key(operations, config.auth.bootstrap_admin_key_file)
        await operations.fill_table()
        background.start(poll_revision(hub, store.get_revision, clock), name="poll revision")
        background.start(operations.keep_table(), name="keep table")
        tenancy = tenancy_service_pb2.DESCRIPTOR.services_by_name["TenancyService"]
        server.add(TenancyService(store, clock), tenancy)
        api_keys = api_key_service_pb2.DESCRIPTOR.services_by_name["ApiKeyService"]
        server.add(ApiKeyService(store, operations), api_keys)
        key_table = key_table_service_pb2.DESCRIPTOR.services_by_name["KeyTableService"]
        server.add(KeyTableService(store, hub), key_table)
        await server.start()
        await server.serve()


async def put_first_key(operations: KeyOperations, path: Path) -> None:
    """Puts the administrator's key of the configuration into an empty table.

    Raises:
        ConfigError: the file cannot be read.
        StartError: it holds no key.
    """
    try:
        await operations.put_first(read_secret(path))
    except ValueError as error:
        raise StartError(f"{path}: {error}") from error


if __name__ == "__main__":
    process.run(Config, main)
