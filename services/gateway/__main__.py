"""The gateway process: the public token API."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack

import structlog
from maas.inference.v1 import generation_service_pb2

from libs import ids, process, rpc
from libs.clock import SystemClock
from libs.config import read_secret
from libs.errors import MaasError
from libs.process import Background, StartError
from libs.rpc.identity import Identity
from libs.rpc.run import key_table, start_metrics
from services.gateway import clients
from services.gateway.config import Config
from services.gateway.journal import Journal, JournalBusy
from services.gateway.links import LinkPool
from services.gateway.operations import Generations, Limits
from services.gateway.placement import Placer
from services.gateway.running import Books
from services.gateway.service import GenerationService
from services.gateway.settlement import Settlement, Settler
from services.gateway.slices import SliceBook
from services.gateway.tables import Offerings, Prices, Workers

log = structlog.get_logger(__name__)

SERVICE = generation_service_pb2.DESCRIPTOR.services_by_name["GenerationService"]
REPLAY_WAIT_S = 0.2
# Longest wait for billing when the gateway stops; the journal keeps what is left.
SETTLE_WAIT_S = 5.0


async def replay(
    journal: Journal, settler: Settler, billing: clients.BillingClient, clock: SystemClock
) -> None:
    """Settles and gives back what an earlier process left; waits for billing if it is away.

    What billing refuses as wrong stays in the journal for the next start.
    """
    recovered = journal.recover(clock.now())
    for opening, closing in recovered.settlements:
        settler.put(Settlement(ordinal=None, opening=opening, closing=closing, owed=0))
    while True:
        try:
            await settler.flush()
            if recovered.slice_ids:
                await billing.close(recovered.slice_ids)
            break
        except MaasError as error:
            log.warning("replay waits for billing", cause=error.message)
            await clock.sleep_s(REPLAY_WAIT_S)
    if not settler.refused:
        journal.forget(recovered)
    log.info("replayed", generations=len(recovered.settlements), slices=len(recovered.slice_ids))


async def main(config: Config) -> None:
    """Builds the gateway in order, serves, and stops it in reverse."""
    clock = SystemClock()
    gateway = config.gateway
    try:
        journal = Journal(gateway.journal_dir)
    except (JournalBusy, OSError) as error:
        raise StartError(f"journal: {error}") from error
    token = read_secret(config.identity.token_file)
    async with AsyncExitStack() as stack:
        stack.callback(journal.close)
        start_metrics(config)
        keys = await stack.enter_async_context(key_table(config, config.auth))
        server = rpc.Server(
            config.server, Identity.from_config(config.identity, keys), is_public=True
        )
        catalog = await stack.enter_async_context(
            rpc.Peer(config.peers.catalog, token, clients.CATALOG_SERVICES)
        )
        billing_peer = await stack.enter_async_context(
            rpc.Peer(config.peers.billing, token, clients.BILLING_SERVICES)
        )
        scheduler_peer = await stack.enter_async_context(
            rpc.Peer(config.peers.scheduler, token, clients.SCHEDULER_SERVICES)
        )
        background = await stack.enter_async_context(Background(server.fail))

        billing = clients.BillingClient(billing_peer, journal, gateway.instance)
        scheduler = clients.SchedulerClient(scheduler_peer, background)
        offerings, prices, workers = Offerings(), Prices(), Workers()
        links = LinkPool(token, background)
        background.start(clients.follow_offerings(catalog, offerings), name="follow offerings")
        background.start(clients.follow_prices(billing_peer, prices), name="follow prices")
        background.start(
            clients.follow_workers(scheduler_peer, workers, links), name="follow workers"
        )
        book = SliceBook(
            acquire=billing.acquire,
            close=billing.close,
            new_id=lambda: f"{gateway.instance}-{ids.ulid(clock.now(), secrets.randbits(80))}",
            clock=clock,
            slice_nanos=gateway.slice_nanos,
            slices_max=gateway.slices_max,
        )
        settler = Settler(
            settle=billing.settle,
            book=book,
            journal=journal,
            clock=clock,
            interval_s=gateway.settle_interval,
            idle_s=gateway.slice_idle,
        )
        await replay(journal, settler, billing, clock)
        background.start(settler.run(), name="settle")
        generations = Generations(
            instance=gateway.instance,
            limits=Limits(
                generations_max=gateway.generations_max,
                queue_wait_s=gateway.queue_wait,
                stall_limit_s=gateway.stall_limit,
            ),
            books=Books(journal=journal, slices=book, settler=settler, clock=clock),
            offerings=offerings,
            prices=prices,
            placer=Placer(
                acquire=scheduler.acquire,
                release=scheduler.release,
                workers=workers,
                links=links,
            ),
            random_bits=secrets.randbits,
        )
        background.start(generations.watch_stalls(), name="watch stalls")
        server.add(GenerationService(generations, clock), SERVICE)
        await server.start()
        for table in (offerings, prices, workers):
            await table.wait()

        await server.serve(drain=generations.drain)
        try:
            async with asyncio.timeout(SETTLE_WAIT_S):
                await settler.finish()
        except TimeoutError:
            log.warning("settlements wait for the next start", queued=settler.queued)


if __name__ == "__main__":
    process.run(Config, main)
