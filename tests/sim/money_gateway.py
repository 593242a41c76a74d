"""A gateway of the simulation: the real one on a real journal; its process dies and returns."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from libs.auth import KeyRecord, KeyTable, Principal, Role
from libs.process import Background
from libs.receipts import ReceiptKeys, ReceiptSigner
from libs.testing.clock import START
from libs.units import Rates
from services.gateway.config import GatewaySection
from services.gateway.domain import Offering, Price
from services.gateway.gateway import Gateway
from services.gateway.journal import Journal
from services.gateway.limits import Limit, Rate
from services.gateway.service import GenerationService
from services.gateway.tables import Worker
from tests.integration.services.billing.reference import (
    CACHED_INPUT_PRICE,
    DISCOUNT_PERCENT,
    INPUT_PRICE,
    OUTPUT_PRICE,
    REASONING_PRICE,
    REQUEST_PRICE,
)
from tests.sim.money_loop import Loop, Process, SimClock, State
from tests.sim.money_network import Line, SimPeer, SimWorker

VERSION = "models/m/versions/1"
RATES = Rates(
    input_price=INPUT_PRICE,
    output_price=OUTPUT_PRICE,
    cached_input_price=CACHED_INPUT_PRICE,
    reasoning_price=REASONING_PRICE,
    request_price=REQUEST_PRICE,
    background_discount_percent=DISCOUNT_PERCENT,
)
OFFERING = Offering(
    name="offerings/m",
    model_version=VERSION,
    context_length=1000,
    default_max_output_tokens=512,
    default_temperature=1.0,
    default_top_p=1.0,
    default_top_k=0,
    prompt_overhead_tokens=0,
    message_overhead_tokens=0,
)
PRICE = Price(
    name="prices/p",
    offering="offerings/m",
    rates=RATES,
    # Long ago also for a clock that is an hour behind.
    effective_time=START - timedelta(days=1),
)
SIGNER = ReceiptSigner(bytes(32))
RECEIPT_KEYS = ReceiptKeys([SIGNER.public_key])
# Two organizations: one has credit alone, the other rate limits, too.
FREE = Principal(key_id="k1", role=Role.TENANT, project="p1", organization="free")
LIMITED = Principal(key_id="k2", role=Role.TENANT, project="p2", organization="limited")
LIMIT = "limits/l"
REQUESTS_A_MINUTE = 12
PLACES = 4
# Of the end of a journal, what a machine without power may have lost.
UNWRITTEN_BYTES_MAX = 1500


class SimGateway:
    """One gateway, over all the lives of its process.

    Attributes:
        name: of the instance.
        line: to billing.
        clock: of its machine.
        process: that runs now, or is dead.
        service: its API while it serves; None while it does not.
        lives: processes that there were, with this one.
    """

    def __init__(
        self,
        name: str,
        *,
        loop: Loop,
        rng: random.Random,
        folder: Path,
        workers: list[SimWorker],
        new_peer: Callable[[Line], SimPeer],
        scheduler: Callable[[], SimPeer],
        slice_nanos: int,
        signs: bool,
        on_death: Callable[[SimGateway], None],
        defect: Callable[[str], None],
    ) -> None:
        self.name = name
        self.line = Line()
        self.clock = SimClock(loop)
        self.service: GenerationService | None = None
        self.gateway: Gateway | None = None
        self.lives: list[Process] = []
        self._loop = loop
        self._rng = rng
        self._folder = folder
        self._workers = workers
        self._new_peer = new_peer
        self._scheduler = scheduler
        self._config = GatewaySection.model_validate(
            {
                "instance": name,
                "journal_dir": folder,
                "slice_nanos": slice_nanos,
                "slice_idle": "1s",
                "queue_wait": "3s",
                "stall_limit": "4s",
                "replay_window": "6s",
                "move_wait": "3s",
            }
        )
        self._signs = signs
        self._on_death = on_death
        self._defect = defect
        self._journal: Journal | None = None
        self._background: Background | None = None
        self._full: tuple[int, int] | None = None
        self._main_task: asyncio.Task[None] | None = None
        self._spent_journals: list[Journal] = []

    @property
    def process(self) -> Process:
        """The one that runs, or ran last."""
        return self.lives[-1]

    @property
    def is_dead(self) -> bool:
        """Whether no process runs."""
        return not self.lives or self.process.state is State.DEAD

    @property
    def is_quiet(self) -> bool:
        """Whether it serves, and nothing runs or waits for its settlement."""
        gateway = self.gateway
        return (
            self.service is not None
            and gateway is not None
            and not gateway.generations._running
            and not gateway._settler.queued
        )

    def describe(self) -> str:
        """Says what it is busy with."""
        gateway = self.gateway
        if self.service is None or gateway is None:
            return "does not serve"
        return f"runs {len(gateway.generations._running)}, settles {gateway._settler.queued}"

    def running(self, account: str) -> int:
        """Counts the generations of an account."""
        if self.service is None or self.gateway is None:
            return 0
        running = self.gateway.generations._running.values()
        return sum(generation.opening.account == account for generation in running)

    def start(self) -> None:
        """Starts a process: it replays its journal and serves."""
        process = Process(self._loop, self._died)
        self.lives.append(process)
        self._main_task = process.start(self._main())

    async def _main(self) -> None:
        self._journal = journal = Journal(self._folder)
        self._background = background = Background(self._failed)
        keys = KeyTable()
        keys.apply(
            KeyRecord(
                key_id=principal.key_id,
                secret_sha256=bytes(32),
                role=principal.role,
                is_active=True,
                project=principal.project,
                organization=principal.organization,
                revision=1,
            )
            for principal in (FREE, LIMITED)
        )
        self.gateway = gateway = Gateway(
            self._config,
            journal=journal,
            billing=self._new_peer(self.line),
            scheduler=self._scheduler(),
            credential="sim",
            background=background,
            keys=keys,
            clock=self.clock,
            cache_secret=bytes(32),
            signer=SIGNER if self._signs else None,
        )
        self._fill_tables(gateway)
        await gateway.start()
        self.service = GenerationService(gateway.generations, gateway.quotes)

    def _fill_tables(self, gateway: Gateway) -> None:
        gateway.offerings.apply([OFFERING])
        gateway.prices.apply([PRICE])
        limit = Limit(
            name=LIMIT,
            account="accounts/limited",
            scope="accounts/limited",
            rate=Rate(requests=REQUESTS_A_MINUTE, generations=PLACES),
        )
        gateway.limits.apply([limit], is_snapshot=True, is_complete=True)
        for worker in self._workers:
            gateway.workers.put(
                Worker(
                    name=worker.name,
                    endpoint=worker.name,
                    epoch=1,
                    model_versions=frozenset({VERSION}),
                )
            )
            gateway.links.get(worker.name, worker.name)
        for table in (gateway.offerings, gateway.prices, gateway.workers):
            table.complete()

    def _failed(self, error: BaseException) -> None:
        self._defect(f"a background task of {self.name} failed: {error!r}")

    def stop(self, hang_up: Callable[[], object]) -> asyncio.Task[None] | None:
        """Stops it as SIGTERM without patience does: what runs ends free of charge.

        Args:
            hang_up: ends the calls that it serves.
        """
        if self.is_dead or self.service is None or self.process.state is State.HALTED:
            return None
        self.service = None
        return self.process.start(self._stop(hang_up))

    async def _stop(self, hang_up: Callable[[], object]) -> None:
        assert self.gateway is not None
        assert self._background is not None
        self.gateway.generations.stop()
        hang_up()
        await self.gateway.finish()
        await self._background.__aexit__(None, None, None)
        journal = self._journal
        if journal is not None and self._full is None:
            self._journal = None
            journal.close()
        self.process.kill()

    def _died(self) -> None:
        """The kernel closes its files; what it wrote stays."""
        self.service = None
        journal, self._journal = self._journal, None
        if journal is not None:
            self._heal_disk(journal)
            # What is left of the process must not reach its files any more.
            with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - for its descriptor
                os.dup2(nothing.fileno(), journal._descriptor)
            os.close(journal._lock)
            journal._folder = self._folder / "gone"
            self._spent_journals.append(journal)
        self._on_death(self)

    def lose_power(self) -> None:
        """Kills the process, and loses the end of what it wrote."""
        self.process.kill()
        segments = sorted(self._folder.glob("*.journal"))
        if segments:
            size = segments[-1].stat().st_size
            lost = self._rng.randint(0, min(size, UNWRITTEN_BYTES_MAX))
            os.truncate(segments[-1], size - lost)

    def fill_disk(self) -> None:
        """Has the kernel refuse every byte of the journal with ENOSPC."""
        journal = self._journal
        if journal is None or self._full is not None:
            return
        kept = os.dup(journal._descriptor)
        with open("/dev/full", "wb") as full:  # noqa: PTH123 - for its descriptor
            os.dup2(full.fileno(), journal._descriptor)
        self._full = (kept, journal._descriptor)

    def heal_disk(self) -> None:
        """Lets the journal be written again."""
        if self._journal is not None:
            self._heal_disk(self._journal)

    def _heal_disk(self, journal: Journal) -> None:
        if self._full is None:
            return
        kept, descriptor = self._full
        self._full = None
        # Unless it has gone on in another file meanwhile.
        if journal._descriptor == descriptor:
            os.dup2(kept, descriptor)
        os.close(kept)

    def unsettled(self) -> list[str]:
        """Lists generations that the next process would find in the journal."""
        journal = Journal(self._folder)
        recovered = journal.recover(self.clock.now())
        journal.close()
        return [opening.generation_id for opening, _ in recovered.settlements]

    async def bury(self) -> None:
        """Clears away what is left of dead processes."""
        for process in self.lives:
            if process.state is State.DEAD:
                await process.bury()
        for journal in self._spent_journals:
            os.close(journal._descriptor)
        self._spent_journals.clear()
