"""The gateway process: python -m services.gateway --config gateway.toml."""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack
from pathlib import Path

from maas.inference.v1 import (
    embedding_service_pb2,
    generation_service_pb2,
    tokenization_service_pb2,
)

from libs import process
from libs.clock import SystemClock
from libs.config import ConfigError, read_secret
from libs.process import Background, StartError
from libs.receipts import BadReceipt, ReceiptSigner, key_from_text
from libs.rpc import Peer, Server
from libs.rpc.identity import Identity
from libs.rpc.run import key_table, start_metrics
from services.gateway import clients
from services.gateway.config import Config
from services.gateway.gateway import Gateway
from services.gateway.journal import Journal, JournalBusy
from services.gateway.service import EmbeddingService, GenerationService, TokenizationService

GENERATIONS = generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"]
TOKENIZATION = tokenization_service_pb2.DESCRIPTOR.services_by_name["TokenizationService"]
EMBEDDINGS = embedding_service_pb2.DESCRIPTOR.services_by_name["EmbeddingService"]


async def main(config: Config) -> None:
    """Builds the gateway in order, serves until it is told to stop, ends in reverse."""
    clock = SystemClock()
    journal = _open_journal(config)
    token = read_secret(config.identity.token_file)
    peers = config.peers
    async with AsyncExitStack() as stack:
        stack.callback(journal.close)
        start_metrics(config)
        keys = await stack.enter_async_context(key_table(config, config.auth))
        server = Server(config.server, Identity.from_config(config.identity, keys), is_public=True)
        enter = stack.enter_async_context
        catalog = await enter(Peer(peers.catalog, token, clients.CATALOG_SERVICES))
        billing = await enter(Peer(peers.billing, token, clients.BILLING_SERVICES))
        scheduler = await enter(Peer(peers.scheduler, token, clients.SCHEDULER_SERVICES))
        background = await enter(Background(server.fail))
        gateway = Gateway(
            config.gateway,
            journal=journal,
            billing=billing,
            scheduler=scheduler,
            credential=token,
            background=background,
            keys=keys,
            clock=clock,
            cache_secret=cache_secret(config.gateway.cache_secret_file),
            signer=receipt_signer(config.gateway.receipt_key_file),
        )
        start = background.start
        start(clients.follow_offerings(catalog, gateway.offerings), name="follow offerings")
        start(clients.follow_adapters(catalog, gateway.adapters), name="follow adapters")
        start(clients.follow_prices(billing, gateway.prices), name="follow prices")
        start(clients.follow_limits(billing, gateway.limits), name="follow limits")
        start(
            clients.follow_workers(scheduler, gateway.workers, gateway.links),
            name="follow workers",
        )
        await gateway.start()
        server.add(GenerationService(gateway.generations, gateway.quotes), GENERATIONS)
        server.add(TokenizationService(gateway.tokenization), TOKENIZATION)
        server.add(EmbeddingService(gateway.embeddings), EMBEDDINGS)
        await server.start()
        await server.serve(drain=gateway.drain, abandon=gateway.generations.stop)
        await gateway.finish()


def cache_secret(file: Path | None) -> bytes:
    """Reads the secret that keeps the prefix caches of tenants apart, or makes one.

    Raises:
        StartError: the file cannot be read or is empty.
    """
    if file is None:
        return secrets.token_bytes(32)
    try:
        return read_secret(file).encode()
    except ConfigError as error:
        raise StartError(
            f"gateway.cache_secret_file: {error}: write a random text to it, the same for all "
            "gateways that share workers, or leave the key out"
        ) from error


def receipt_signer(file: Path | None) -> ReceiptSigner | None:
    """Reads the key that receipts are signed with; None without a file.

    Raises:
        StartError: the file cannot be read or is no key.
    """
    if file is None:
        return None
    try:
        return ReceiptSigner(key_from_text(read_secret(file)))
    except (ConfigError, BadReceipt) as error:
        raise StartError(
            f"gateway.receipt_key_file: {file}: {error}: write base64 of 32 random bytes to it, or "
            "leave the key out"
        ) from error


def _open_journal(config: Config) -> Journal:
    try:
        return Journal(config.gateway.journal_dir)
    except (JournalBusy, OSError) as error:
        raise StartError(f"journal: {error}") from error


if __name__ == "__main__":
    process.run(Config, main)
