"""Slots leased in advance, so that a steady stream of requests starts without asking the scheduler.

A pool for each model version holds about as many slots as it had requests in the last second,
sixty-four at most:

    place -> take a spare -> pool half empty -> refill in the background
                none left -> AcquireSlot, which asks for spares along with the slot

A spare is taken only while its worker takes work under the same epoch and there is time left to
start on it; what is not used in time goes back before it would run out. The scheduler gives spares
where there is ample room only, and may take one back without a word: then the worker, which is the
one to know, queues the execution or refuses it, and the request is placed as if it had no spare.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from libs.clock import Clock
from libs.errors import MaasError
from services.gateway.tables import Workers

log = structlog.get_logger(__name__)

# Most spares of one version, and most that one AcquireSlot may ask for.
SPARES_MAX = 64
# Requests of a version in the last second below which nothing is leased.
BUSY_MIN = 2
RATE_WINDOW_S = 1.0
# A spare is used or given back so long before its time is over, or half of it if that is less: the
# worker's report that it has started has to reach the scheduler.
MARGIN_S = 1.0
SWEEP_S = 0.25
# Slots given back in one call, and most that wait to be: more than that run out by themselves.
RELEASE_MAX = 500
RETURNS_MAX = 10_000
CLOSE_WAIT_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spare:
    """A slot for an execution that may come.

    Attributes:
        slot_id: to give it back by.
        execution_id: for whoever uses it.
        worker: "workers/{worker}".
        endpoint: host:port.
        epoch: for the execution.
    """

    slot_id: str
    execution_id: str
    worker: str
    endpoint: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """What the scheduler gives in advance.

    Attributes:
        spares: as many of those asked for as there was ample room for.
        start_within_s: seconds from now on in which they have to start.
    """

    spares: tuple[Spare, ...]
    start_within_s: float


LeaseSlots = Callable[[str, list[str]], Awaitable[Lease]]
"""Asks the scheduler for spares alone: model version, two execution ids or more."""

ReleaseSlots = Callable[[list[str]], Awaitable[None]]
"""Gives slots back."""


@dataclass(frozen=True, slots=True)
class _Kept:
    spare: Spare
    use_by_s: float


@dataclass(slots=True)
class _Pool:
    """Spares of one model version.

    Attributes:
        kept: the oldest first.
        requests: times of the latest requests, monotonic seconds, within the window.
        ask_max: most to ask for: twice what was given last, when that was less than asked for.
        low: with so many left it is refilled.
        is_asking: an answer is awaited that may bring spares.
    """

    kept: deque[_Kept] = field(default_factory=deque)
    requests: deque[float] = field(default_factory=lambda: deque(maxlen=SPARES_MAX))
    ask_max: int = SPARES_MAX
    low: int = 0
    is_asking: bool = False

    def note(self, now_s: float) -> None:
        """Counts a request."""
        self.requests.append(now_s)
        self.forget(now_s)

    def forget(self, now_s: float) -> None:
        """Drops what is older than the window."""
        while self.requests and self.requests[0] <= now_s - RATE_WINDOW_S:
            self.requests.popleft()

    def missing(self) -> int:
        """Returns how many spares to ask for."""
        if self.is_asking or len(self.requests) < BUSY_MIN:
            return 0
        return max(0, min(len(self.requests) - len(self.kept), self.ask_max))

    def put(self, spares: tuple[Spare, ...], use_by_s: float, asked: int) -> None:
        """Takes in an answer, and learns from it how much to ask for."""
        self.kept.extend(_Kept(spare, use_by_s) for spare in spares)
        is_all = len(spares) >= asked
        self.ask_max = SPARES_MAX if is_all else min(SPARES_MAX, max(1, 2 * len(spares)))
        # After an answer without spares, too: what is left halves before the next question.
        self.low = len(self.kept) // 2


class Order:
    """Spares asked for along with a slot, or alone."""

    def __init__(self, ids: list[str], asked_s: float) -> None:
        """Keeps what it needs.

        Args:
            ids: execution ids that spares are asked for; none when none are wanted.
            asked_s: when it is asked, monotonic seconds.
        """
        self.ids = ids
        self.asked_s = asked_s
        self.lease = Lease(spares=(), start_within_s=0.0)


class Spares:
    """The spares of a gateway. `run` it in the background."""

    def __init__(
        self,
        *,
        lease: LeaseSlots,
        release: ReleaseSlots,
        workers: Workers,
        clock: Clock,
        id_prefix: str,
    ) -> None:
        """Starts empty.

        Args:
            lease: asks the scheduler for spares.
            release: gives slots back.
            workers: those that take work.
            clock: time.
            id_prefix: of execution ids; no other process has ever had it.
        """
        self._lease = lease
        self._release = release
        self._workers = workers
        self._clock = clock
        self._id_prefix = id_prefix
        self._numbers = itertools.count()
        self._pools: dict[str, _Pool] = {}
        self._returns: deque[str] = deque(maxlen=RETURNS_MAX)
        self._due: set[str] = set()
        self._wake = asyncio.Event()
        self._is_closed = False

    def count(self, model_version: str) -> int:
        """Returns how many spares of a version are kept."""
        pool = self._pools.get(model_version)
        return 0 if pool is None else len(pool.kept)

    def take(self, model_version: str, exclude: Collection[str] = ()) -> Spare | None:
        """Counts a request, and takes a spare for it if there is one. Suspends nobody.

        Args:
            model_version: "models/{model}/versions/{version}".
            exclude: workers that the request must not get.
        """
        pool = self._pools.get(model_version)
        if pool is None:
            pool = self._pools[model_version] = _Pool()
        now_s = self._clock.monotonic_s()
        pool.note(now_s)
        if not pool.kept:
            return None
        spare = self._pick(pool, model_version, exclude, now_s)
        if len(pool.kept) <= pool.low and not pool.is_asking:
            self._due.add(model_version)
            self._wake.set()
        return spare

    def _serves(self, spare: Spare, model_version: str) -> bool:
        worker = self._workers.find(spare.worker)
        return (
            worker is not None
            and worker.epoch == spare.epoch
            and model_version in worker.model_versions
        )

    def _pick(
        self, pool: _Pool, model_version: str, exclude: Collection[str], now_s: float
    ) -> Spare | None:
        passed_over: list[_Kept] = []
        found: Spare | None = None
        while pool.kept and found is None:
            kept = pool.kept.popleft()
            spare = kept.spare
            if kept.use_by_s <= now_s or not self._serves(spare, model_version):
                self._returns.append(spare.slot_id)
            elif spare.worker in exclude:
                passed_over.append(kept)
            else:
                found = spare
        pool.kept.extendleft(reversed(passed_over))
        return found

    @contextmanager
    def order(self, model_version: str, *, at_least: int = 1) -> Iterator[Order]:
        """Asks for the spares that a version is short of, in the block.

        The block puts what it got into the order's `lease`; leaving it without counts as none.

        Args:
            model_version: "models/{model}/versions/{version}".
            at_least: as many are asked for if any is wanted.
        """
        pool = self._pools.setdefault(model_version, _Pool())
        now_s = self._clock.monotonic_s()
        pool.forget(now_s)
        missing = 0 if self._is_closed else pool.missing()
        wanted = max(missing, at_least) if missing else 0
        ids = [f"{self._id_prefix}.{next(self._numbers)}" for _ in range(wanted)]
        order = Order(ids, now_s)
        if not ids:
            yield order
            return
        pool.is_asking = True
        try:
            yield order
        finally:
            pool.is_asking = False
            self._take_in(pool, order)

    def _take_in(self, pool: _Pool, order: Order) -> None:
        within_s = order.lease.start_within_s
        # Counted from the question: the answer has been on its way for an unknown time.
        use_by_s = order.asked_s + within_s - min(MARGIN_S, within_s / 2)
        if self._is_closed:
            self._returns.extend(spare.slot_id for spare in order.lease.spares)
        else:
            pool.put(order.lease.spares, use_by_s, len(order.ids))

    async def run(self) -> None:
        """Refills pools and gives back what is left over, until it is cancelled; then all."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._refill_for_ever(), name="refill spares")
                tasks.create_task(self._sweep_for_ever(), name="sweep spares")
        finally:
            await self._close()

    async def _refill_for_ever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            due, self._due = self._due, set()
            await asyncio.gather(*(self._refill(version) for version in due))

    async def _refill(self, model_version: str) -> None:
        # Two or more: a question for one alone would look like a request.
        with self.order(model_version, at_least=2) as order:
            if order.ids:
                try:
                    order.lease = await self._lease(model_version, order.ids)
                except MaasError as error:
                    log.debug("no spares", model_version=model_version, cause=error.reason.value)

    async def _sweep_for_ever(self) -> None:
        while True:
            await self._clock.sleep_s(SWEEP_S)
            self._sweep(self._clock.monotonic_s())
            await self._give_back()

    def _sweep(self, now_s: float) -> None:
        for version, pool in list(self._pools.items()):
            while pool.kept and pool.kept[0].use_by_s <= now_s:
                self._returns.append(pool.kept.popleft().spare.slot_id)
            pool.forget(now_s)
            if not pool.kept and not pool.requests and not pool.is_asking:
                del self._pools[version]

    async def _give_back(self) -> None:
        """Gives back what is not needed; where that fails, slots run out by themselves."""
        while self._returns:
            count = min(RELEASE_MAX, len(self._returns))
            slot_ids = [self._returns.popleft() for _ in range(count)]
            try:
                await self._release(slot_ids)
            except MaasError as error:
                log.warning("spares not given back", count=count, cause=error.reason.value)

    async def _close(self) -> None:
        """Gives everything back, within bounded time, and leases nothing any more."""
        self._is_closed = True
        for pool in self._pools.values():
            self._returns.extend(kept.spare.slot_id for kept in pool.kept)
            pool.kept.clear()
        try:
            async with asyncio.timeout(CLOSE_WAIT_S):
                await self._give_back()
        except TimeoutError:
            log.warning("spares not given back", count=len(self._returns), cause="timeout")
