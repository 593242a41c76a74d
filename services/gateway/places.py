"""Places of running generations, where limits bound how many there may be at the same time.

Billing lends places to gateways for a lease, and all that it lends never exceed a limit. A
generation takes a place that is at hand, and gives it back at its end, whatever the end; a task
keeps a few more at hand than are used. Where none is at hand billing is asked at once, for all who
wait together.

While billing is being asked it may take away whatever we did not say was in use. So until it has
answered, and for as long as an answer stays away, there are no more places than we have claimed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog

from libs.clock import Clock
from libs.errors import MaasError, Reason, ResourceExhausted, unavailable
from services.gateway.limits import RateLimit

log = structlog.get_logger(__name__)

METRIC = "CONCURRENT_GENERATIONS"
# How often places are renewed: so long may places that another gateway needs stay unused here.
RENEW_S = 1.0
# By then another gateway has given back what it does not use.
RETRY_S = 1.5 * RENEW_S
# For so long, who finds all places taken is refused without another question.
REFUSED_S = 0.1
# A lease is not used in its last seconds: an answer may have taken its time.
LEASE_MARGIN_S = 2.0
# Of those in use, so many more are kept at hand, and one in any case.
HEADROOM_SHARE = 8
# Questions that one request has asked: at the second, whoever came in between has been seen.
QUESTIONS_MAX = 2
# Limits that one call names: of the contract.
LIMITS_MAX = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What is asked for of one limit.

    Attributes:
        limit: "limits/{limit}".
        wanted: places.
        in_use: places that cannot be taken away.
    """

    limit: str
    wanted: int
    in_use: int


@dataclass(frozen=True, slots=True)
class Held:
    """What billing answers.

    Attributes:
        counts: places of each claim, in their order.
        lease_s: counted from when it was asked for.
    """

    counts: Sequence[int]
    lease_s: float


HoldPlaces = Callable[[list[Claim]], Awaitable[Held]]
"""Asks billing. What is not named is given back."""


@dataclass(slots=True)
class _Gate:
    """The places of one limit that are here.

    Attributes:
        held: at hand, those in use among them.
        in_use: by generations; above `held` only where billing had to take some away.
        waiting: requests that billing is asked for.
        lease_until_s: monotonic.
        is_short: the last answer was less than was wanted.
        short_until_s: monotonic; if it was, it is taken to be so until then.
        is_unsure: a question has no answer: places that were not claimed may be gone.
        used_at_s: monotonic; when somebody came or went.
    """

    held: int = 0
    in_use: int = 0
    waiting: int = 0
    lease_until_s: float = 0.0
    is_short: bool = False
    short_until_s: float = 0.0
    is_unsure: bool = False
    used_at_s: float = 0.0


class Places:
    """The places of all limits. Belongs to one event loop; `run` it in the background."""

    def __init__(self, hold: HoldPlaces, clock: Clock) -> None:
        self._hold = hold
        self._clock = clock
        self._gates: dict[str, _Gate] = {}
        self._lock = asyncio.Lock()
        # Questions to billing so far, and what the last one ended with instead of an answer.
        self._turns = 0
        self._failure: MaasError | None = None
        self._is_closed = False

    async def take(self, limits: Sequence[RateLimit]) -> None:
        """Takes a place of each limit, or of none. Suspends where none is at hand.

        Args:
            limits: that bound how many generations there are.

        Raises:
            ResourceExhausted: RATE_LIMIT_REACHED.
            Unavailable: none is at hand, and billing is away.
        """
        if self._try(limits):
            return
        self._require_hope(limits)
        turn = self._turns
        gates = [self._gates.setdefault(limit.name, _Gate()) for limit in limits]
        for gate in gates:
            gate.waiting += 1
        try:
            async with self._lock:
                for _ in range(QUESTIONS_MAX):
                    if self._try(limits):
                        return
                    if self._turns > turn:
                        # A question that began after this one had come was asked for us too.
                        self._require(limits, gates)
                    await self._ask()
                if not self._try(limits):
                    self._require(limits, gates)
                    raise _full(limits[0])
        finally:
            for gate in gates:
                gate.waiting -= 1

    def give_back(self, limits: Sequence[RateLimit]) -> None:
        """Gives a place of each limit back."""
        now_s = self._clock.monotonic_s()
        for limit in limits:
            gate = self._gates[limit.name]
            gate.in_use -= 1
            gate.used_at_s = now_s

    async def run(self) -> None:
        """Keeps the places that are used, and a few more, for ever."""
        while True:
            await self._clock.sleep_s(RENEW_S)
            if self._gates:
                await self.renew()

    async def renew(self) -> None:
        """Renews what is held, and gives back what is not needed. Errors are left to the next."""
        async with self._lock:
            if self._is_closed:
                return
            await self._ask()
        before_s = self._clock.monotonic_s() - 2 * RENEW_S
        for name, gate in list(self._gates.items()):
            if not (gate.in_use or gate.waiting or gate.held) and gate.used_at_s < before_s:
                del self._gates[name]

    async def close(self) -> None:
        """Gives everything back: this gateway ends. If that fails, its lease ends by itself.

        Nothing is renewed any more, and what is being asked is answered first: else billing might
        hear of it last, and hold places for nobody.
        """
        self._is_closed = True
        try:
            async with self._lock:
                await self._hold([])
        except MaasError as error:
            log.info("places not given back", cause=error.reason.value)

    def _try(self, limits: Sequence[RateLimit]) -> bool:
        now_s = self._clock.monotonic_s()
        gates: list[_Gate] = []
        for limit in limits:
            gate = self._gates.get(limit.name)
            if gate is None or gate.in_use >= gate.held or gate.lease_until_s <= now_s:
                return False
            gates.append(gate)
        for gate in gates:
            gate.in_use += 1
            gate.used_at_s = now_s
        return True

    def _require_hope(self, limits: Sequence[RateLimit]) -> None:
        """Refuses what billing has refused a moment ago: each question is one of all limits.

        Raises:
            ResourceExhausted: RATE_LIMIT_REACHED.
        """
        now_s = self._clock.monotonic_s()
        for limit in limits:
            gate = self._gates.get(limit.name)
            # What somebody waits for is asked for anew.
            if (
                gate is not None
                and not gate.is_unsure
                and gate.is_short
                and gate.in_use >= gate.held
                and now_s < min(gate.short_until_s, gate.lease_until_s)
            ):
                raise _full(limit)

    def _require(self, limits: Sequence[RateLimit], gates: Sequence[_Gate]) -> None:
        """Sees whether the last answer leaves any hope.

        Raises:
            ResourceExhausted: RATE_LIMIT_REACHED, it was less than was wanted.
            Unavailable: there was none.
        """
        if self._failure is not None:
            raise unavailable("billing") from self._failure
        for limit, gate in zip(limits, gates, strict=True):
            if gate.is_short and gate.in_use >= gate.held:
                raise _full(limit)

    async def _ask(self) -> None:
        """Asks billing for all that is wanted. Only with the lock."""
        self._turns += 1
        claimed = [
            (gate, self._claim(name, gate)) for name, gate in list(self._gates.items())[:LIMITS_MAX]
        ]
        asked_at_s = self._clock.monotonic_s()
        try:
            answer = await self._hold([claim for _, claim in claimed])
        except MaasError as error:
            log.warning("places not renewed", cause=error.reason.value)
            self._failure = error
            return
        self._failure = None
        for (gate, claim), count in zip(claimed, answer.counts, strict=True):
            gate.held = count
            gate.is_short = count < claim.wanted
            if gate.is_short:
                gate.short_until_s = self._clock.monotonic_s() + REFUSED_S
            gate.is_unsure = False
            gate.lease_until_s = asked_at_s + answer.lease_s - LEASE_MARGIN_S

    def _claim(self, name: str, gate: _Gate) -> Claim:
        """Makes what is asked for of a limit, and leaves at hand no more than it claims."""
        if not gate.is_unsure:
            gate.held = min(gate.held, gate.in_use)
            gate.is_unsure = True
        in_use = max(gate.in_use, gate.held)
        is_idle = gate.used_at_s < self._clock.monotonic_s() - RENEW_S
        headroom = 0 if is_idle else 1 + gate.in_use // HEADROOM_SHARE
        wanted = max(in_use, gate.in_use + gate.waiting + headroom)
        return Claim(limit=name, wanted=wanted, in_use=in_use)


def _full(limit: RateLimit) -> ResourceExhausted:
    """Makes the error for a limit whose places are all taken."""
    return ResourceExhausted(
        f"{limit.name} allows {limit.rate.generations} generations at the same time",
        reason=Reason.RATE_LIMIT_REACHED,
        metadata={"limit": limit.name, "metric": METRIC},
        retry_after_s=RETRY_S,
    )
