"""A campaign: strikes under load, the drain, the audit."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from libs.errors import MaasError
from libs.failpoints import Point
from tools.chaos import plan
from tools.chaos.audit import Attempt, Audit, Halt, audit
from tools.chaos.books import Books, reconcile
from tools.chaos.lag import Lags
from tools.chaos.load import Load, channel
from tools.chaos.options import Options
from tools.chaos.place import Place
from tools.chaos.strikes import POLL_S, Striker
from tools.conformance.client import Refusal, Tenant
from tools.conformance.operator import within

WELL_S = 60.0
"""Longest time until all is well after the last strike."""
CLIENTS_S = 60.0
"""Longest time until the last client has its end: longer than any of its calls."""
DRAIN_S = 60.0
"""Longest time until nothing is held, and all that was started is settled."""
POINTS_S = 120.0
"""Longest time of rest after the strikes until every fail-point has had its turn."""
KILL_S = 6.0
"""Longest time for each kill that was asked for, over that of the strikes."""
_ROUNDS_A_LINE = 10
_FAULTS_SHOWN = 30


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a campaign found.

    Attributes:
        options: of the campaign.
        striker: what was struck.
        attempts: what clients asked for.
        points: fail-points that have killed their process.
        missed: fail-points that nobody came to.
        well_s: seconds until all was well after the last strike.
        drain_s: seconds until all was settled after the last client's end.
        lag_s: seconds in which clients or the network stood still by themselves.
        audit: what clients received beside what was recorded.
        faults: what must not be, of all kinds.
    """

    options: Options
    striker: Striker
    attempts: list[Attempt]
    points: set[str]
    missed: set[str]
    well_s: float
    drain_s: float
    lag_s: float
    audit: Audit
    faults: list[str]

    @property
    def kills(self) -> int:
        """SIGKILLs, those at fail-points included."""
        return self.striker.kills.total() + len(self.points)


class _Campaign:
    def __init__(self, place: Place, options: Options, say: Callable[[str], None]) -> None:
        self._place = place
        self._options = options
        self._say = say
        self._striker = Striker(place)
        self._gateways = plan.gateways(options.gateways)
        self._rules: set[str] = set()

    async def run(self) -> Outcome:
        variables = self._place.variables
        tenant_key, admin_key = variables["MAAS_API_KEY"], variables["MAAS_ADMIN_KEY"]
        model = variables["MAAS_MODEL"]
        async with AsyncExitStack() as stack:
            tenants = {}
            for name in self._gateways:
                front = await stack.enter_async_context(channel(self._place.entry(name)))
                tenants[name] = Tenant(front, tenant_key, model)
            back = await stack.enter_async_context(channel(variables["MAAS_BILLING"]))
            load = Load(tenants, self._options.seed)
            books = Books(back, Tenant(back, tenant_key, model), Tenant(back, admin_key, model))
            faults: list[str] = []
            clients = asyncio.create_task(load.run(self._options.clients), name="clients")
            lags = Lags()
            watch = asyncio.create_task(lags.watch(), name="lags")
            try:
                await self._strike_all()
                well_s = await self._until_well(faults)
                load.stop()
                # Their calls have deadlines; a defect of theirs is raised here.
                await asyncio.wait([clients], timeout=CLIENTS_S)
                if not clients.done():
                    faults.append(f"clients had no end {CLIENTS_S:g} s after their last request")
                elif not clients.cancelled():
                    clients.result()
            finally:
                clients.cancel()
                watch.cancel()
            drain_s = await self._drain(books, load, faults)
            records = await books.records()
            if total := await books.ledger_sum():
                faults.append(f"the ledger sums to {total} nanos, not to zero")
            faults += await reconcile(variables["MAAS_BILLING"], admin_key)
        # Who reads is this process, through that of the network: without them nobody does.
        own = [Halt(*lag, is_away=True) for lag in [*lags.found, *self._place.lags()]]
        found = audit(load.attempts, records, [*self._striker.halts, *own])
        missed = self._rules - self._place.acted()
        if self._kills() < self._options.kills:
            faults.append(f"{self._kills()} kills, not {self._options.kills}, in the time for them")
        faults += [*self._striker.faults, *load.mismatches, *found.faults]
        faults += [f"fail-point {rule} did not act" for rule in sorted(missed)]
        return Outcome(
            options=self._options,
            striker=self._striker,
            attempts=load.attempts,
            points=self._place.acted(),
            missed=missed,
            well_s=well_s,
            drain_s=drain_s,
            lag_s=sum(halt.end_s - halt.start_s for halt in own),
            audit=found,
            faults=faults[:_FAULTS_SHOWN],
        )

    async def _strike_all(self) -> None:
        loop = asyncio.get_running_loop()
        options = self._options
        until_s = loop.time() + options.seconds
        ground = plan.Ground(
            targets=plan.targets(options.gateways),
            links=self._place.links,
            strikes_max=options.strikes_max,
            pause_s=options.pause_s,
        )
        rounds = plan.rounds(options.seed, ground)
        async with asyncio.TaskGroup() as tasks:
            if options.has_points:
                for name in self._gateways:
                    self._arm(name, plan.GATEWAY_POINTS, tasks)
                self._arm("billing", plan.BILLING_POINTS, tasks)
            for number, round_ in enumerate(rounds):
                late_s = loop.time() - until_s
                is_enough = late_s >= 0 and self._kills() >= options.kills
                if is_enough or late_s >= KILL_S * options.kills:
                    break
                await self._striker.strike(round_, tasks)
                await within(WELL_S, self._can_work)
                await asyncio.sleep(round_.pause_s)
                if number % _ROUNDS_A_LINE == _ROUNDS_A_LINE - 1:
                    self._tell()
            await within(POINTS_S, self._are_points_done)

    async def _are_points_done(self) -> bool:
        return self._rules <= self._place.acted()

    def _arm(self, name: str, points: tuple[Point, ...], tasks: asyncio.TaskGroup) -> None:
        rules = plan.rules(self._options.seed, name, points)
        self._rules |= {f"{name}: {rule}" for rule in rules}
        self._place.arm(name, rules)
        self._striker.kill(name, tasks)

    def _tell(self) -> None:
        acted = len(self._place.acted())
        self._say(f"  {self._kills()} kills, {acted} of them at fail-points")

    def _kills(self) -> int:
        return self._striker.kills.total() + len(self._place.acted())

    async def _can_work(self) -> bool:
        """Whether there is work that the next strike can meet: half of each kind do their own.

        Who stands still may go on doing so: that others die meanwhile is part of it.
        """
        kinds: dict[str, list[str]] = defaultdict(list)
        for name in self._place.names():
            kinds[name.partition("-")[0]].append(name)
        for names in kinds.values():
            if 2 * await self._well_count(names) < len(names):
                return False
        return True

    async def _well_count(self, names: Sequence[str]) -> int:
        halted = self._striker.halted
        return sum([name in halted or await self._place.is_well(name) for name in names])

    async def _is_well(self) -> bool:
        for name in self._place.names():
            if not await self._place.is_well(name):
                return False
        return True

    async def _until_well(self, faults: list[str]) -> float:
        """Waits until every process does its work; returns the seconds that it took."""
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        if not await within(WELL_S, self._is_well):
            faults.append(f"not every process was back {WELL_S:g} s after the last strike")
        return loop.time() - start_s

    async def _drain(self, books: Books, load: Load, faults: list[str]) -> float:
        """Waits until nothing is held and every generation has its record."""
        started = {item.generation_id for item in load.attempts} - {""}
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        state = "billing does not answer"
        while loop.time() - start_s < DRAIN_S:
            try:
                held = await books.held()
                settled = {record.generation_id for record in await books.records()}
            except (Refusal, MaasError) as error:
                state = str(error)
            else:
                if not held and started <= settled:
                    return loop.time() - start_s
                state = f"{held} nanos are held, {len(started - settled)} generations not settled"
            await asyncio.sleep(4 * POLL_S)
        faults.append(f"after {DRAIN_S:g} s of rest {state}")
        return loop.time() - start_s


async def run(place: Place, options: Options, say: Callable[[str], None]) -> Outcome:
    """Runs a campaign.

    Args:
        place: the suite; it is whole again afterwards, unless there are faults.
        options: what to do.
        say: shows a line of progress.
    """
    return await _Campaign(place, options, say).run()
