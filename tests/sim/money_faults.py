"""What goes wrong in the simulation of money: drawn from the seed, each fault with its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from libs.failpoints import Point
from tests.sim.money_loop import Process

if TYPE_CHECKING:
    from tests.sim.money_clients import Ask
    from tests.sim.money_gateway import SimGateway
    from tests.sim.money_world import World

# From less than a lease up to longer than one with its grace.
LONG_MIN_S = 4.0
LONG_S = 13.0
STEPS_MAX = 300
# A gateway that has started dies again so soon: in its replay.
AGAIN_STEPS_MAX = 25
POINTS = (
    Point.SLICE_NOTED,
    Point.SLICE_ANSWERED,
    Point.JOURNAL_OPENED,
    Point.RELEASE_COUNTED,
    Point.JOURNAL_CLOSED,
    Point.SETTLE_ANSWERED,
    Point.SLICES_CLOSING,
    Point.SLICES_CLOSED,
    Point.REPLAY_READ,
    Point.REPLAY_SETTLED,
)
PASSAGES_MAX = 6
SKEW_MAX_S = 3600.0
# After a gateway or billing could not be heard, places may be lent twice for so long.
PLACES_UNSURE_S = 20.0


class Faults:
    """The plan, and what became of it.

    Attributes:
        end_s: when the last fault is over.
        deaths: of gateways: instance and time; ends on request among them.
        power_losses: likewise.
        full_disks: likewise.
        worker_deaths: times.
        longest_s: the longest time in which a gateway or billing could do nothing, or hear nothing.
        unsure_until_s: until then places may be lent twice.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.end_s = 0.0
        self.is_over = False
        self.deaths: list[tuple[str, float]] = []
        self.power_losses: list[tuple[str, float]] = []
        self.full_disks: list[tuple[str, float]] = []
        self.worker_deaths: list[float] = []
        self.longest_s = 0.0
        self.unsure_until_s = 0.0
        self._fatal: dict[Process, tuple[Point, int]] = {}
        theme, rng = world.theme, world.rng
        acts: dict[str, Callable[[SimGateway, float], None]] = {
            "kill": self._kill,
            "kill at a point": self._kill_at_point,
            "power loss": self._lose_power,
            "halt": self._halt,
            "cut": self._cut,
            "loss": self._lossy,
            "billing away": self._billing_away,
            "billing restart": self._billing_restarts,
            "full disk": self._fill_disk,
            "worker": self._kill_worker,
            "clock": self._skew,
            "stop": self._stop,
        }
        for _ in range(rng.choice(theme.faults)):
            name = rng.choice(theme.kinds)
            is_long = rng.random() < theme.long_share
            lasts_s = rng.uniform(LONG_MIN_S, LONG_S) if is_long else rng.uniform(0.05, 2.0)
            at_s = rng.uniform(0.1, theme.span_s)
            self.end_s = max(self.end_s, at_s + lasts_s)
            world.after(at_s, self._begin, name, acts[name], lasts_s)
        if theme.is_lossy:
            for gateway in world.gateways:
                self._lossy(gateway, max(self.end_s, theme.span_s))

    def _begin(self, name: str, act: Callable[[SimGateway, float], None], lasts_s: float) -> None:
        gateway = self._world.rng.choice(self._world.gateways)
        if gateway.service is None or self.is_over:
            return
        self._world.count(name)
        act(gateway, lasts_s)

    def heal(self) -> None:
        """Ends all faults."""
        self.is_over = True
        self._fatal.clear()
        self._back()
        for worker in self._world.workers:
            worker.start()
        for gateway in self._world.gateways:
            gateway.line.heal()
            gateway.heal_disk()
            gateway.process.dies_at = 0
            gateway.process.go_on()
            if gateway.is_dead:
                gateway.start()

    @staticmethod
    def hit(events: list[tuple[str, float]], ask: Ask) -> bool:
        """Tells whether a fault of its gateway may have met a call."""
        return any(name == ask.gateway and at_s >= ask.at_s for name, at_s in events)

    def is_fatal(self, process: Process, point: Point) -> bool:
        """Tells whether a process dies at a point that it has come to."""
        fatal = self._fatal.get(process)
        if fatal is None or fatal[0] is not point:
            return False
        self._fatal[process] = (point, fatal[1] - 1)
        return fatal[1] == 1

    def died(self, gateway: SimGateway) -> None:
        """Has a gateway started again: soon, or after a lease and its grace."""
        world, rng = self._world, self._world.rng
        self.deaths.append((gateway.name, world.loop.time()))
        if world.is_ending:
            return
        if self.is_over:
            world.after(0.0, self._start, gateway)
            return
        is_long = world.chance(world.theme.long_share)
        delay_s = rng.uniform(LONG_MIN_S, LONG_S) if is_long else rng.uniform(0.02, 1.0)
        self.end_s = max(self.end_s, world.loop.time() + delay_s)
        self.longest_s = max(self.longest_s, delay_s)
        world.after(delay_s, self._start, gateway)

    def _start(self, gateway: SimGateway) -> None:
        if not gateway.is_dead:
            return
        gateway.start()
        if not self.is_over and self._world.chance(self._world.theme.again_share):
            self._world.count("died again")
            gateway.process.dies_at = self._world.rng.randint(1, AGAIN_STEPS_MAX)

    def _kill(self, gateway: SimGateway, _: float) -> None:
        steps = self._world.rng.randint(1, STEPS_MAX)
        gateway.process.dies_at = gateway.process.steps + steps

    def _kill_at_point(self, gateway: SimGateway, _: float) -> None:
        rng = self._world.rng
        self._fatal[gateway.process] = (rng.choice(POINTS[:8]), rng.randint(1, PASSAGES_MAX))

    def _lose_power(self, gateway: SimGateway, _: float) -> None:
        self.power_losses.append((gateway.name, self._world.loop.time()))
        gateway.lose_power()

    def _halt(self, gateway: SimGateway, lasts_s: float) -> None:
        process = gateway.process
        process.halt()
        self._note_halt(gateway)
        self._unheard(lasts_s)
        self._world.after(lasts_s, self._go_on, gateway, process)

    def _go_on(self, gateway: SimGateway, process: Process) -> None:
        self._note_halt(gateway)
        process.go_on()

    def _note_halt(self, gateway: SimGateway) -> None:
        for ask in self._world.asks:
            if ask.gateway == gateway.name and not ask.is_over:
                ask.met_halt = True

    def _cut(self, gateway: SimGateway, lasts_s: float) -> None:
        self._unheard(lasts_s)
        gateway.line.is_cut = True
        self._world.after(lasts_s, gateway.line.heal)

    def _lossy(self, gateway: SimGateway, lasts_s: float) -> None:
        self._unsure(lasts_s)
        gateway.line.loss = self._world.rng.choice((0.1, 0.3, 0.4))
        gateway.line.slow = self._world.rng.choice((0.0, 0.1))
        if gateway.line.slow:
            # Tries that are lost or slow, one behind the other, may outlast a lease and its grace.
            self.longest_s = max(self.longest_s, lasts_s)
        self._world.after(lasts_s, gateway.line.heal)

    def _billing_away(self, _: SimGateway, lasts_s: float) -> None:
        self._unheard(lasts_s)
        self._world.is_billing_up = False
        self._break_lines()
        self._world.after(lasts_s, self._back)

    def _billing_restarts(self, gateway: SimGateway, _: float) -> None:
        self._billing_away(gateway, 0.2)

    def _back(self) -> None:
        self._world.is_billing_up = True

    def _break_lines(self) -> None:
        """What billing was answering is done, and nobody hears of it."""
        for gateway in self._world.gateways:
            gateway.line.life += 1

    def _fill_disk(self, gateway: SimGateway, lasts_s: float) -> None:
        self.full_disks.append((gateway.name, self._world.loop.time() + lasts_s))
        gateway.fill_disk()
        self._world.after(lasts_s, gateway.heal_disk)

    def _kill_worker(self, _: SimGateway, lasts_s: float) -> None:
        worker = self._world.rng.choice(self._world.workers)
        self.worker_deaths.append(self._world.loop.time() + lasts_s)
        worker.kill()
        self._world.after(lasts_s, worker.start)

    def _skew(self, gateway: SimGateway, _: float) -> None:
        gateway.clock.skew_s = self._world.rng.uniform(-SKEW_MAX_S, SKEW_MAX_S)

    def _stop(self, gateway: SimGateway, _: float) -> None:
        calls = [call for call in self._world.calls if call.is_of(gateway.process)]

        def hang_up() -> None:
            for call in calls:
                call.hang_up()

        gateway.stop(hang_up)

    def _unheard(self, lasts_s: float) -> None:
        self.longest_s = max(self.longest_s, lasts_s)
        self._unsure(lasts_s)

    def _unsure(self, lasts_s: float) -> None:
        until_s = self._world.loop.time() + lasts_s + PLACES_UNSURE_S
        self.unsure_until_s = max(self.unsure_until_s, until_s)
