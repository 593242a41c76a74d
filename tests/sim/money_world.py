"""A small world around the money of gateways, driven by one seed.

Several gateways with their journals, two workers, a billing, and clients that ask, read, leave,
repeat and let go on; what goes wrong is in money_faults.py, what must hold in money_checks.py and,
at every moment, in money_billing.py. Everything but billing, the scheduler and the engines is the
code that users run, up to the stubs of gRPC.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

from google.protobuf.message import Message
from structlog.testing import capture_logs

from libs import failpoints
from libs.errors import unavailable
from libs.failpoints import Point
from services.gateway import journal, links, spares
from tests.integration.services.billing.reference import Reference
from tests.sim.money_billing import SimBilling
from tests.sim.money_checks import check_drained, check_logs
from tests.sim.money_clients import Ask, SimCall
from tests.sim.money_faults import Faults
from tests.sim.money_gateway import (
    FREE,
    LIMIT,
    LIMITED,
    PLACES,
    REQUESTS_A_MINUTE,
    SimGateway,
)
from tests.sim.money_loop import Loop, Process, Stuck
from tests.sim.money_network import (
    OUTSIDE,
    Line,
    Prompt,
    SimPeer,
    SimScheduler,
    SimWorker,
    WorkerPeer,
)
from tests.sim.money_themes import Theme, theme_of

LEASE_S = 5.0
GRACE_S = 5.0
SWEEP_S = 0.5
WATCH_S = 0.3
# From the last fault until nothing is held any more.
DRAIN_S = 10.0
DRAIN_LOOK_S = 0.25


class World:
    """Everything, and the time."""

    def __init__(self, seed: int, folder: Path, theme: Theme | None = None) -> None:
        self.seed = seed
        self.rng = random.Random(seed)  # noqa: S311 - no secret
        self.loop = Loop()
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.asks: list[Ask] = []
        self.calls: list[SimCall] = []
        rng = self.rng
        self.theme = theme = theme_of(seed) if theme is None else theme
        self.billing = SimBilling(
            claim=self.claim,
            ledger=Reference(lease_s=LEASE_S, grace_s=GRACE_S),
            rates={LIMIT: REQUESTS_A_MINUTE},
            places={LIMIT: PLACES},
        )
        credit = rng.choice(theme.credits)
        for principal in (FREE, LIMITED):
            self.billing.open(principal.organization, credit)
        self.workers = [SimWorker(f"workers/{name}", self.loop, rng) for name in "ab"]
        slice_nanos = rng.choice(theme.slices)
        self.longest = rng.choice((20, 20, 120))
        self.limited_share = rng.choice(theme.limited_shares)
        signs = rng.random() < 0.3
        self.segment_bytes = rng.choice((500, 4000, journal.SEGMENT_BYTES_MAX))
        self.is_billing_up = True
        self.is_ending = False
        self.grace_s = GRACE_S
        scheduler = SimScheduler(rng, self.workers)
        self.gateways = [
            SimGateway(
                f"g{number}",
                loop=self.loop,
                rng=rng,
                folder=folder / f"g{number}",
                workers=self.workers,
                new_peer=lambda line: SimPeer(self.loop, rng, line, self._to_billing, self.count),
                scheduler=lambda: SimPeer(self.loop, rng, Line(), scheduler, self.count),
                slice_nanos=slice_nanos,
                signs=signs,
                on_death=self._gateway_died,
                defect=self.problems.append,
            )
            for number in range(rng.choice((1, 2, 2, 3)))
        ]
        self.faults = Faults(self)

    def run(self) -> None:
        """Lets faults happen, then none, and checks that everything has drained."""
        # What garbage collection ends would end at another time the next time.
        gc.disable()
        try:
            problems = self._run_all()
        finally:
            gc.enable()
        assert not problems, f"SEED={self.seed}: " + "\n".join(problems[:10])

    def _run_all(self) -> list[str]:
        with self._surroundings():
            with capture_logs() as logs:
                try:
                    self.loop.run_until_complete(self._run())
                except (Exception, Stuck) as error:  # noqa: BLE001 - a defect of any kind
                    self.problems.append(repr(error))
            check_logs(self, logs)
            problems = self.problems + self.loop.defects
            with capture_logs():
                self.loop.run_until_complete(self._bury())
            self.loop.close()
        return problems

    @contextmanager
    def _surroundings(self) -> Iterator[None]:
        """What the code under test finds in its modules: chance, workers, fail-points."""
        workers = {worker.name: worker for worker in self.workers}
        with ExitStack() as stack:
            for patch in (
                mock.patch("secrets.randbits", self.rng.getrandbits),
                mock.patch.object(failpoints, "hit", self._hit),
                # There are none, so looking for them is but time.
                mock.patch.object(spares, "SWEEP_S", 60.0),
                mock.patch.object(journal, "SEGMENT_BYTES_MAX", self.segment_bytes),
                mock.patch.object(
                    links, "Peer", lambda endpoint, *_: WorkerPeer(workers[endpoint])
                ),
            ):
                stack.enter_context(patch)
            yield

    async def _run(self) -> None:
        self._begin()
        while self.loop.time() < max(self.theme.span_s, self.faults.end_s):
            # One fault may lead to another.
            await self._pass(max(self.theme.span_s, self.faults.end_s) - self.loop.time())
        self.faults.heal()
        await self._drain()
        check_drained(self)
        await self._stop()

    @staticmethod
    async def _pass(seconds: float) -> None:
        """Lets virtual time pass."""
        await asyncio.sleep(seconds)

    def _begin(self) -> None:
        for gateway in self.gateways:
            gateway.start()
        span_s = self.theme.span_s
        until_s = max(span_s, self.faults.end_s)
        for _ in range(self.rng.randint(*self.theme.requests) + int(until_s - span_s)):
            self.after(self.rng.uniform(0.05, until_s), self.arrive)
        self.after(SWEEP_S, self._sweep)
        self.after(WATCH_S, self._watch)

    async def _drain(self) -> None:
        """Waits until nothing is held; what never ends is found by the checks."""
        end_s = self.loop.time() + DRAIN_S
        if self.faults.power_losses:
            # Slices that the journal has forgotten go by themselves.
            end_s += LEASE_S + GRACE_S
        while self.loop.time() < end_s and not self.is_drained:
            await self._pass(DRAIN_LOOK_S)

    @property
    def is_drained(self) -> bool:
        """Whether nothing runs, waits or is held."""
        return (
            all(ask.is_over for ask in self.asks)
            and all(gateway.is_quiet for gateway in self.gateways)
            and not self.billing.has_slices
        )

    async def _stop(self) -> None:
        """Ends all gateways: cleanly, then their journals have nothing to settle."""
        self.is_ending = True
        stopping = [task for gateway in self.gateways if (task := gateway.stop(list)) is not None]
        if stopping:
            await asyncio.wait(stopping, timeout=30.0)
        for gateway in self.gateways:
            self.claim(gateway.is_dead, f"{gateway.name} does not stop")
            gateway.process.kill()
            left = gateway.unsettled()
            self.claim(not left, f"{gateway.name} has left {left} in its journal")

    async def _bury(self) -> None:
        for gateway in self.gateways:
            gateway.process.kill()
            await gateway.bury()

    # What happens.

    def after(self, delay_s: float, action: object, *args: object) -> None:
        """Does something later."""
        assert callable(action)
        self.loop.call_later(delay_s, action, *args, context=OUTSIDE)

    def count(self, what: str) -> None:
        """Notes that something has happened, to see that the world is no idle one."""
        self.counts[what] += 1

    def claim(self, holds: bool, text: str) -> None:  # noqa: FBT001 - reads as an assertion
        """Notes what does not hold."""
        if not holds:
            self.problems.append(f"at {self.loop.time():.3f}s: {text}")

    def chance(self, share: float) -> bool:
        """Throws a coin."""
        return self.rng.random() < share

    def arrive(self) -> None:
        """A client asks for something."""
        rng = self.rng
        output_tokens = rng.choice((1, 3, 8, 20, 20, self.longest))
        prompt = Prompt(
            output_tokens=output_tokens,
            spared_tokens=rng.choice((0, 0, 1, 5)),
            cached_tokens=rng.choice((0, 0, 1, 5)),
            token_s=rng.choice((0.001, 0.02, 0.1)) if output_tokens < 50 else 0.003,
        )
        ask = Ask(
            gateway=rng.choice(self.gateways).name,
            principal=LIMITED if self.chance(self.limited_share) else FREE,
            at_s=self.loop.time(),
            prompt=prompt,
            max_output_tokens=rng.choice((output_tokens, output_tokens, 10)),
            is_unary=self.chance(0.15),
            request_id=f"r{len(self.asks)}" if self.chance(0.2) else "",
            reads_s=rng.choice((0.0, 0.0, 0.0, 0.05, 0.5)),
            lives_on=self.chance(0.1),
        )
        self.ask(ask)

    def ask(self, ask: Ask, *, stays: bool = False) -> None:
        """Calls a gateway; one that is not there refuses.

        Args:
            ask: what to ask for.
            stays: the client waits for the end.
        """
        gateway = next(item for item in self.gateways if item.name == ask.gateway)
        self.count("asked")
        if gateway.service is None:
            self.count("nobody there")
            return
        call = SimCall(ask, self.loop, self.rng, gateway.process)
        self.asks.append(ask)
        self.calls.append(call)
        call.start(gateway.service)
        if not stays and self.chance(0.25):
            self.after(self.rng.expovariate(2.0), call.leave)
        if ask.request_id and self.chance(0.7):
            self.after(self.rng.uniform(0.01, 3.0), self._repeat, ask)

    def _repeat(self, first: Ask) -> None:
        self.count("repeated by the client")
        self.ask(
            Ask(
                gateway=first.gateway,
                principal=first.principal,
                at_s=self.loop.time(),
                prompt=first.prompt,
                max_output_tokens=first.max_output_tokens,
                request_id=first.request_id,
                is_repeat=True,
            )
        )

    def _gateway_died(self, gateway: SimGateway) -> None:
        """Its connections break."""
        for worker in self.workers:
            for stream in worker.streams[:]:
                if stream.is_of(gateway.process):
                    stream.cut()
        for call in self.calls:
            if call.is_of(gateway.process):
                call.break_off()
        self.faults.died(gateway)

    def _hit(self, point: Point) -> None:
        process = Process.current()
        if process is None or process.is_buried:
            return
        if self.faults.is_fatal(process, point):
            self.count(f"died at {point.value}")
            process.die()

    def _watch(self) -> None:
        """Counts running generations of who has few places, unless some may be lent twice."""
        if self.loop.time() >= self.faults.unsure_until_s:
            account = f"accounts/{LIMITED.organization}"
            running = sum(gateway.running(account) for gateway in self.gateways)
            self.claim(running <= PLACES, f"{running} generations run in {PLACES} places")
        self.after(WATCH_S, self._watch)

    # Billing.

    def _to_billing(self, method: str, payload: bytes) -> Message:
        if not self.is_billing_up:
            raise unavailable("billing")
        self.count(method)
        return self.billing.handle(method, payload, self.loop.time())

    def _sweep(self) -> None:
        if self.is_billing_up:
            self.billing.sweep(self.loop.time())
        self.after(SWEEP_S, self._sweep)
