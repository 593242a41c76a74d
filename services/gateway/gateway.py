"""The parts of a gateway, put together in order; started and ended in order."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

import structlog

from libs import ids
from libs.auth import KeyTable
from libs.clock import Clock
from libs.errors import MaasError
from libs.process import Background
from libs.receipts import ReceiptSigner
from libs.rpc import Peer
from services.gateway import clients
from services.gateway.admission import Admission, Rules
from services.gateway.books import Books
from services.gateway.checks import Checks
from services.gateway.config import GatewaySection
from services.gateway.desks import Desks
from services.gateway.embed_placement import EmbedPlacer
from services.gateway.embedding import Embeddings
from services.gateway.inquiries import Inquirer
from services.gateway.journal import Journal
from services.gateway.limits import Limits
from services.gateway.links import LinkPool
from services.gateway.operations import Bounds, Generations
from services.gateway.placement import Placer
from services.gateway.places import Places
from services.gateway.quotas import Quotas
from services.gateway.quote import Quotes
from services.gateway.release import Releaser
from services.gateway.replay import Budget
from services.gateway.salt import Salts
from services.gateway.settlement import Settlement, Settler
from services.gateway.slices import Sizes, SliceBook
from services.gateway.spares import Spares
from services.gateway.tables import Adapters, Offerings, Prices, Table, Workers
from services.gateway.tokenization import Tokenization
from services.gateway.turnstile import Turnstile

log = structlog.get_logger(__name__)

REPLAY_WAIT_S = 0.2
# Longest wait for billing when the gateway stops; the journal keeps what is left.
SETTLE_WAIT_S = 5.0


class Gateway:
    """Everything behind the token API. Belongs to one event loop."""

    def __init__(
        self,
        config: GatewaySection,
        *,
        journal: Journal,
        billing: Peer,
        scheduler: Peer,
        credential: str,
        background: Background,
        keys: KeyTable,
        clock: Clock,
        cache_secret: bytes,
        signer: ReceiptSigner | None = None,
    ) -> None:
        self._clock = clock
        self._journal = journal
        self._background = background
        self._billing = clients.BillingClient(billing, journal, config.instance)
        placement = clients.SchedulerClient(scheduler, background)
        self.offerings, self.prices, self.workers = Offerings(), Prices(), Workers()
        self.limits = Limits()
        quota_client = clients.QuotaClient(billing, config.instance)
        self._places = Places(quota_client.hold, clock)
        self._quotas = quotas = Quotas(
            take=quota_client.take,
            give_back=quota_client.give_back,
            places=self._places,
            clock=clock,
        )
        background.start(self._places.run(), name="places")
        background.start(quotas.run(), name="quotas")
        # Not waited for at the start: only requests that name an adapter need it.
        self.adapters = Adapters()
        self.links = LinkPool(credential, background)
        self._book = SliceBook(
            acquire=self._billing.acquire,
            close=self._billing.close,
            new_id=lambda: f"{config.instance}-{ids.ulid(clock.now(), secrets.randbits(80))}",
            clock=clock,
            sizes=Sizes(
                nanos_max=config.slice_nanos,
                refill_s=config.slice_refill,
                count_max=config.slices_max,
            ),
            start=lambda refill: background.start(refill, name="refill slice"),
        )
        self._settler = Settler(
            settle=self._billing.settle,
            book=self._book,
            journal=journal,
            clock=clock,
            interval_s=config.settle_interval,
            idle_s=config.slice_idle,
        )
        spares = Spares(
            lease=placement.lease,
            release=placement.release_all,
            workers=self.workers,
            clock=clock,
            id_prefix=f"{config.instance}.{ids.ulid(clock.now(), secrets.randbits(80))}",
        )
        background.start(spares.run(), name="spares")
        budget = Budget(config.replay_total_bytes_max)
        books = Books(
            journal=journal,
            slices=self._book,
            settler=self._settler,
            clock=clock,
            releaser=Releaser(journal),
            background=background,
            move_wait_s=config.move_wait,
            signer=signer,
        )
        checks = Checks(
            offerings=self.offerings,
            prices=self.prices,
            adapters=self.adapters,
            workers=self.workers,
            clock=clock,
        )
        admission = Admission(
            instance=config.instance,
            rules=Rules(queue_wait_s=config.queue_wait, replay_bytes_max=config.replay_bytes_max),
            books=books,
            budget=budget,
            checks=checks,
            limits=self.limits,
            quotas=quotas,
            salts=Salts(cache_secret),
            placer=Placer(
                acquire=placement.acquire,
                release=placement.release,
                workers=self.workers,
                links=self.links,
                spares=spares,
            ),
            find_charged=self._billing.find_charged,
            is_revoked=keys.is_revoked,
            random_bits=secrets.randbits,
        )
        self.generations = Generations(
            instance=config.instance,
            bounds=Bounds(
                generations_max=config.generations_max,
                stall_limit_s=config.stall_limit,
                replay_window_s=config.replay_window,
            ),
            books=books,
            budget=budget,
            admission=admission,
        )
        keys.on_revoked(self.generations.revoke)
        desks = Desks(credential, clock)
        background.start(desks.run(), name="desks")
        inquirer = Inquirer(desks=desks, workers=self.workers, clock=clock)
        questions = Turnstile("questions", config.questions_max)
        self.quotes = Quotes(
            checks=checks,
            offerings=self.offerings,
            workers=self.workers,
            inquirer=inquirer,
            turnstile=questions,
        )
        self.tokenization = Tokenization(
            offerings=self.offerings, inquirer=inquirer, quotes=self.quotes, turnstile=questions
        )
        self.embeddings = Embeddings(
            instance=config.instance,
            books=books,
            offerings=self.offerings,
            prices=self.prices,
            workers=self.workers,
            limits=self.limits,
            quotas=quotas,
            placer=EmbedPlacer(
                acquire=placement.acquire,
                release=placement.release,
                workers=self.workers,
                links=self.links,
                desks=desks,
                queue_wait_s=config.queue_wait,
            ),
            turnstile=Turnstile("calls to embed", config.embeds_max),
            is_revoked=keys.is_revoked,
            random_bits=secrets.randbits,
        )
        keys.on_revoked(self.embeddings.revoke)

    async def start(self) -> None:
        """Settles what an earlier process left, waits for the tables, starts settling."""
        await self._replay()
        self._background.start(self._settler.run(), name="settle")
        self._background.start(self.generations.watch(), name="watch generations")
        tables: Sequence[Table] = (self.offerings, self.prices, self.limits, self.workers)
        for table in tables:
            await table.wait()

    async def drain(self) -> None:
        """Refuses new work and waits for what runs; cancelled, it stops the generations."""
        await asyncio.gather(self.generations.drain(), self.embeddings.drain())

    async def finish(self) -> None:
        """Settles what has ended and gives all slices back, within bounded time."""
        self.generations.stop()
        try:
            async with asyncio.timeout(SETTLE_WAIT_S):
                await self._settler.finish()
                await self._quotas.flush()
                await self._places.close()
        except TimeoutError:
            log.warning("settlements wait for the next start", queued=self._settler.queued)

    async def _replay(self) -> None:
        """Waits for billing if it is away. What it refuses as wrong stays in the journal."""
        recovered = self._journal.recover(self._clock.now())
        for opening, closing in recovered.settlements:
            self._settler.put(Settlement(ordinal=None, opening=opening, closing=closing, owed=0))
        while True:
            try:
                await self._settler.flush()
                if recovered.slice_ids:
                    await self._billing.close(recovered.slice_ids)
                break
            except MaasError as error:
                log.warning("replay waits for billing", cause=error.message)
                await self._clock.sleep_s(REPLAY_WAIT_S)
        if not self._settler.refused:
            self._journal.forget(recovered)
        log.info(
            "replayed", generations=len(recovered.settlements), slices=len(recovered.slice_ids)
        )
