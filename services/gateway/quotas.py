"""Rate limits at admission: requests and tokens per minute, and running generations.

A request takes from every limit that applies or from none: its places first, then what it needs of
each metric, for the worst case. What is at hand was taken from billing in advance, a second's worth
at most, and is filled up in the background; what is missing is taken with one call. What a request
does not use goes back later, many at a time, and if that fails it flows back by itself.

    taken    requests 1, input tokens the bound of the prompt, output tokens the most there can be
    accepted the prompt's exact size is known: the rest of the input goes back
    ended    the output's size is known: the rest goes back, and the place
"""

from __future__ import annotations

import asyncio
import enum
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from libs.clock import Clock
from libs.errors import (
    DeadlineExceeded,
    FieldRule,
    InvalidArgument,
    MaasError,
    Reason,
    ResourceExhausted,
    Violation,
    unavailable,
)
from services.gateway.demand import Demand
from services.gateway.limits import Rate, RateLimit
from services.gateway.places import Places

log = structlog.get_logger(__name__)

# Quota is taken in advance for so long.
AHEAD_S = 1.0
# A share that is not used by then goes back before its lease ends.
LEASE_MARGIN_S = 0.25
# From the first thing to give back until it leaves, together with what comes meanwhile.
GIVE_BACK_S = 0.02
# Shares that nobody has used for a while are looked for this often.
SWEEP_S = 0.5
# Amounts in one call: of the contract.
AMOUNTS_MAX = 64
# For so long, who needs as much as somebody who was just refused is refused without a question.
REFUSED_S = 0.1
# What is given back by the very refusal is on its way.
RETRY_MARGIN_S = 0.05


class Metric(enum.Enum):
    """What is limited per minute; the values are those of maas.billing.v1.QuotaMetric."""

    REQUESTS = 1
    INPUT_TOKENS = 2
    OUTPUT_TOKENS = 3


Key = tuple[str, Metric]
"""A metric of a limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """An amount of one metric of a limit.

    Attributes:
        key: of which.
        required: how much is needed.
        wanted: how much is of use.
    """

    key: Key
    required: int
    wanted: int


@dataclass(frozen=True, slots=True)
class Taken:
    """What billing answers to TakeQuota.

    Attributes:
        granted: of each amount, in their order; empty when it is refused.
        lease_s: counted from when it was asked for.
        retry_after_s: when it is refused: what is required is there by then.
        refused: index of the amount that has to be waited for longest.
    """

    granted: Sequence[int] = ()
    lease_s: float = 0.0
    retry_after_s: float = 0.0
    refused: int = 0


TakeQuota = Callable[[list[Amount]], Awaitable[Taken]]
"""Asks billing. Raises InvalidArgument LARGER_THAN_LIMIT."""

GiveBackQuota = Callable[[Mapping[Key, int]], Awaitable[None]]
"""Gives quota back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What one request may use.

    Attributes:
        input_tokens: at most.
        output_tokens: at most, of all outputs.
        is_exact: the input is so large, and not only at most.
        input_field: path of the input in the request.
        output_field: path of what bounds the output.
    """

    input_tokens: int
    output_tokens: int = 0
    is_exact: bool = False
    input_field: str = "spec.input"
    output_field: str = "spec.stop.max_output_tokens"


@dataclass(slots=True)
class _Share:
    """What is at hand of one metric of a limit. Times are monotonic seconds.

    Attributes:
        demand: what requests take of it.
        free: taken from billing, and by no request.
        lease_until_s: free may be used until then.
        refused: so much was not there the last time.
        refused_until_s: and it is not asked for again until then.
        retry_at_s: when it is there, if nobody else takes it.
        full: what there should be; below half of it more is brought. 0 near the limit.
    """

    demand: Demand = field(default_factory=lambda: Demand(AHEAD_S))
    free: int = 0
    lease_until_s: float = 0.0
    refused: int = 0
    refused_until_s: float = 0.0
    retry_at_s: float = 0.0
    full: int = 0


class Ticket:
    """What one request has taken of the limits that apply to it.

    What it has not used goes back whole, however late: a share of it only would take most of their
    limit from tenants with long requests and short answers. Nobody gains by that. Billing takes
    back no more than has not flowed back by itself, and never above a full bucket: admissions less
    what went back stay below burst + rate x time, and no more than one burst can begin at once.
    """

    __slots__ = ("_input_field", "_is_over", "_limits", "_places", "_quotas", "_taken")

    def __init__(
        self,
        quotas: Quotas,
        limits: Sequence[RateLimit],
        places: Sequence[RateLimit],
        taken: dict[Key, int],
        input_field: str,
    ) -> None:
        self._quotas = quotas
        self._limits = limits
        self._places = places
        self._taken = taken
        self._input_field = input_field
        self._is_over = False

    def accepted(self, input_tokens: int) -> None:
        """Says how many tokens the prompt has: what was taken above that goes back.

        Raises:
            InvalidArgument: LARGER_THAN_LIMIT, it has more than a limit ever allows.
        """
        for limit in self._limits:
            _require_fit(limit, Metric.INPUT_TOKENS, input_tokens, self._input_field)
        self._keep(Metric.INPUT_TOKENS, input_tokens)

    def end(self, output_tokens: int) -> None:
        """Gives back what was not used. May be repeated.

        Args:
            output_tokens: released.
        """
        if self._is_over:
            return
        self._is_over = True
        self._keep(Metric.OUTPUT_TOKENS, output_tokens)
        self._quotas.leave(self._places)

    def cancel(self) -> None:
        """Gives everything back: the request was refused. Nothing happens after its end."""
        if self._is_over:
            return
        self._is_over = True
        self._quotas.give_back(self._taken)
        self._quotas.leave(self._places)

    def _keep(self, metric: Metric, used: int) -> None:
        surplus = {
            key: count - used
            for key, count in self._taken.items()
            if key[1] is metric and count > used
        }
        for key in surplus:
            self._taken[key] = used
        self._quotas.give_back(surplus)


class Quotas:
    """Shares of rate limits. Belongs to one event loop; `run` it in the background."""

    def __init__(
        self, *, take: TakeQuota, give_back: GiveBackQuota, places: Places, clock: Clock
    ) -> None:
        """Keeps what it needs.

        Args:
            take: asks billing.
            give_back: tells billing.
            places: of running generations.
            clock: time.
        """
        self._take_quota = take
        self._give_back_quota = give_back
        self._places = places
        self._clock = clock
        self._shares: defaultdict[Key, _Share] = defaultdict(_Share)
        # To be given back, and less than half full. Bounded by the limits that there are.
        self._surplus: dict[Key, int] = {}
        self._low: set[Key] = set()
        self._has_work = asyncio.Event()
        self._sweep_at_s = 0.0

    async def take(self, limits: Sequence[RateLimit], need: Need) -> Ticket:
        """Takes what a request may need of all limits that apply to it, or nothing of any.

        Args:
            limits: that apply: of the key, the project and the account. At least one.
            need: of the request.

        Raises:
            InvalidArgument: LARGER_THAN_LIMIT.
            ResourceExhausted: RATE_LIMIT_REACHED.
            Unavailable: it is not at hand, and billing is away.
        """
        needed = _needed(limits, need)
        places = [limit for limit in limits if limit.rate.generations is not None]
        if places:
            await self._places.take(places)
        try:
            await self._take(needed, need)
        except BaseException:
            self._places.give_back(places)
            raise
        return Ticket(self, limits, places, needed, need.input_field)

    def give_back(self, amounts: Mapping[Key, int]) -> None:
        """Gives back what was taken and not used, soon and in the background."""
        for key, count in amounts.items():
            if count > 0:
                self._surplus[key] = self._surplus.get(key, 0) + count
        if self._surplus:
            self._has_work.set()

    def leave(self, limits: Sequence[RateLimit]) -> None:
        """Gives places back."""
        self._places.give_back(limits)

    async def run(self) -> None:
        """Gives back what is not used and brings what runs low, for ever."""
        while True:
            try:
                async with asyncio.timeout(SWEEP_S):
                    await self._has_work.wait()
                await self._clock.sleep_s(GIVE_BACK_S)
            except TimeoutError:
                pass
            if self._clock.monotonic_s() >= self._sweep_at_s:
                self.sweep()
            await self.flush()
            await self.bring()

    def sweep(self) -> None:
        """Takes shares that were not used out of reach before their leases end."""
        now_s = self._clock.monotonic_s()
        self._sweep_at_s = now_s + SWEEP_S
        for key, share in list(self._shares.items()):
            if share.lease_until_s > now_s + SWEEP_S:
                continue
            self.give_back({key: share.free})
            share.free = 0
            if now_s >= max(share.lease_until_s, share.refused_until_s) and (
                share.demand.recent(now_s) == 0 and share.demand.is_idle
            ):
                del self._shares[key]

    async def flush(self) -> None:
        """Gives back what there is. What does not get through flows back by itself."""
        surplus, self._surplus = self._surplus, {}
        self._has_work.clear()
        items = list(surplus.items())
        for start in range(0, len(items), AMOUNTS_MAX):
            part = dict(items[start : start + AMOUNTS_MAX])
            try:
                await self._give_back_quota(part)
            except MaasError as error:
                log.info("quota not given back", cause=error.reason.value)
                continue
            for share in filter(None, map(self._shares.get, part)):
                # There may be room again.
                share.refused_until_s = 0.0

    async def bring(self) -> None:
        """Fills and renews shares that run low or out, and what is used with them, in one call."""
        now_s = self._clock.monotonic_s()
        amounts = []
        while self._low:
            share = self._shares[key := self._low.pop()]
            share.full = min(share.full, share.demand.recent(now_s))
            # Once its lease is over it may have flowed back to billing: no new lease is for that.
            if share.full and share.lease_until_s > now_s:
                self.give_back({key: share.free - share.full})
                share.free = min(share.free, share.full)
                amounts.append(Amount(key=key, required=0, wanted=share.full - share.free))
        for start in range(0, len(amounts), AMOUNTS_MAX):
            part = amounts[start : start + AMOUNTS_MAX]
            try:
                self._put(part, await self._take_quota(part), now_s)
            except MaasError as error:
                log.info("no quota in advance", cause=error.reason.value)

    async def _take(self, needed: dict[Key, int], need: Need) -> None:
        """Takes from what is at hand, and what is missing from billing: all or nothing."""
        now_s = self._clock.monotonic_s()
        at_hand: dict[Key, int] = {}
        missing: dict[Key, int] = {}
        for key, count in needed.items():
            share = self._shares[key]
            if share.lease_until_s <= now_s:
                self.give_back({key: share.free})
                share.free = 0
            at_hand[key] = min(share.free, count)
            if count > share.free:
                missing[key] = count - share.free
        if missing:
            self._require_hope(missing, now_s)
        for key, count in at_hand.items():
            self._shares[key].free -= count
        if missing:
            try:
                await self._ask(missing, need)
            except BaseException:
                # To billing, and not to the share: only with it, what it says of later is true.
                self.give_back(at_hand)
                raise
        now_s = self._clock.monotonic_s()
        for key, count in needed.items():
            share = self._shares[key]
            share.demand.note(count, now_s)
            if 2 * share.free < share.full or share.lease_until_s < now_s + 2 * SWEEP_S:
                self._low.update(needed)
                self._has_work.set()

    def _require_hope(self, missing: Mapping[Key, int], now_s: float) -> None:
        """Refuses what billing has refused a moment ago.

        Raises:
            ResourceExhausted: RATE_LIMIT_REACHED.
        """
        for key, count in missing.items():
            share = self._shares[key]
            if count >= share.refused and now_s < share.refused_until_s:
                raise _reached(key, share.retry_at_s - now_s)

    async def _ask(self, missing: Mapping[Key, int], need: Need) -> None:
        asked_at_s = self._clock.monotonic_s()
        recent = {key: self._shares[key].demand.recent(asked_at_s) for key in missing}
        amounts = [
            Amount(key=key, required=count, wanted=count + recent[key])
            for key, count in missing.items()
        ]
        try:
            taken = await self._take_quota(amounts)
        except InvalidArgument as error:
            raise _with_field(error, need) from error
        except DeadlineExceeded as error:
            raise unavailable("billing") from error
        if not taken.granted:
            self._refuse(amounts[taken.refused], taken.retry_after_s)
        self._put(amounts, taken, asked_at_s)

    def _put(self, amounts: Sequence[Amount], taken: Taken, asked_at_s: float) -> None:
        """Adds what billing gave beyond what is required."""
        if not taken.granted:
            # The limit was lowered below what is taken of it.
            self._shares[amounts[taken.refused].key].full = 0
            return
        lease_until_s = asked_at_s + taken.lease_s - LEASE_MARGIN_S
        for amount, granted in zip(amounts, taken.granted, strict=True):
            share = self._shares[amount.key]
            share.free += granted - amount.required
            share.lease_until_s = max(share.lease_until_s, lease_until_s)
            if granted < amount.wanted:
                share.full = 0
            elif amount.required:
                share.full = min(share.free, amount.wanted - amount.required)

    def _refuse(self, amount: Amount, retry_after_s: float) -> None:
        """Remembers and tells a refusal.

        Raises:
            ResourceExhausted: always.
        """
        share = self._shares[amount.key]
        now_s = self._clock.monotonic_s()
        share.refused = amount.required
        share.retry_at_s = now_s + retry_after_s + RETRY_MARGIN_S
        share.refused_until_s = min(share.retry_at_s, now_s + REFUSED_S)
        raise _reached(amount.key, share.retry_at_s - now_s)


def _needed(limits: Iterable[RateLimit], need: Need) -> dict[Key, int]:
    """Returns what is needed of each metric that is limited.

    Of input that is only bounded no more than a limit has: it may well be less.

    Raises:
        InvalidArgument: LARGER_THAN_LIMIT.
    """
    needed: dict[Key, int] = {}
    for limit in limits:
        rate = limit.rate
        if rate.requests is not None:
            needed[limit.name, Metric.REQUESTS] = 1
        if rate.input_tokens is not None and need.input_tokens:
            if need.is_exact:
                _require_fit(limit, Metric.INPUT_TOKENS, need.input_tokens, need.input_field)
            needed[limit.name, Metric.INPUT_TOKENS] = min(need.input_tokens, rate.input_tokens)
        if rate.output_tokens is not None and need.output_tokens:
            _require_fit(limit, Metric.OUTPUT_TOKENS, need.output_tokens, need.output_field)
            needed[limit.name, Metric.OUTPUT_TOKENS] = need.output_tokens
    return needed


def _require_fit(limit: RateLimit, metric: Metric, required: int, path: str) -> None:
    most = _most(limit.rate, metric)
    if most is None or required <= most:
        return
    raise InvalidArgument(
        f"{path}: {limit.name} allows {most} {metric.name.lower()} a minute, "
        f"and this may take {required}",
        reason=Reason.LARGER_THAN_LIMIT,
        metadata={
            "limit": limit.name,
            "metric": metric.name,
            "required": str(required),
            "most": str(most),
        },
        violations=[Violation(path, FieldRule.OUT_OF_RANGE, f"must be at most {most}")],
    )


def _most(rate: Rate, metric: Metric) -> int | None:
    match metric:
        case Metric.REQUESTS:
            return rate.requests
        case Metric.INPUT_TOKENS:
            return rate.input_tokens
        case Metric.OUTPUT_TOKENS:
            return rate.output_tokens


def _reached(key: Key, retry_after_s: float) -> ResourceExhausted:
    name, metric = key
    return ResourceExhausted(
        f"{name} has no room for this now",
        reason=Reason.RATE_LIMIT_REACHED,
        metadata={"limit": name, "metric": metric.name},
        retry_after_s=retry_after_s,
    )


def _with_field(error: InvalidArgument, need: Need) -> InvalidArgument:
    """Gives billing's refusal the path of the request's field: its limit was lowered just now."""
    is_output = error.metadata.get("metric") == Metric.OUTPUT_TOKENS.name
    path = need.output_field if is_output else need.input_field
    most = error.metadata.get("most", "")
    return InvalidArgument(
        error.message,
        reason=error.reason,
        metadata=error.metadata,
        violations=[Violation(path, FieldRule.OUT_OF_RANGE, f"must be at most {most}")],
    )
