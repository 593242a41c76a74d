"""Billing's side of rate limits, as its contract says: buckets that drain, and places."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from libs.errors import InvalidArgument, Reason, unavailable
from services.gateway.limits import RateLimit
from services.gateway.places import Claim, Held
from services.gateway.quotas import Amount, Key, Metric, Taken

SHARE_LEASE_S = 2.0
PLACES_LEASE_S = 15.0


def per_minute(limit: RateLimit, metric: Metric) -> int | None:
    """What a limit allows of a metric."""
    rate = limit.rate
    return {
        Metric.REQUESTS: rate.requests,
        Metric.INPUT_TOKENS: rate.input_tokens,
        Metric.OUTPUT_TOKENS: rate.output_tokens,
    }[metric]


@dataclass
class QuotaBilling:
    """Quota of one gateway, and places that others have.

    Attributes:
        limits: by name.
        levels: taken and not drained.
        asked: each question for quota.
        returned: each amount that came back.
        claims: each question for places.
        elsewhere: places of each limit that other gateways have.
        is_away: nothing is answered.
        now_s: monotonic seconds.
    """

    limits: dict[str, RateLimit] = field(default_factory=dict)
    levels: dict[Key, float] = field(default_factory=dict)
    drained_s: dict[Key, float] = field(default_factory=dict)
    asked: list[list[Amount]] = field(default_factory=list)
    returned: list[dict[Key, int]] = field(default_factory=list)
    claims: list[list[Claim]] = field(default_factory=list)
    elsewhere: dict[str, int] = field(default_factory=dict)
    is_away: bool = False
    now_s: Callable[[], float] = time.monotonic  # noqa: TID251 - the time of another machine

    def add(self, *limits: RateLimit) -> None:
        """Adds limits."""
        self.limits.update((limit.name, limit) for limit in limits)

    def level(self, key: Key) -> float:
        """What is taken of a metric of a limit, and has not drained."""
        now_s = self.now_s()
        rate = per_minute(self.limits[key[0]], key[1]) or 0
        elapsed_s = now_s - self.drained_s.get(key, now_s)
        self.levels[key] = max(self.levels.get(key, 0.0) - elapsed_s * rate / 60, 0.0)
        self.drained_s[key] = now_s
        return self.levels[key]

    async def take(self, amounts: list[Amount]) -> Taken:
        """Takes all, or nothing."""
        self.asked.append(amounts)
        if self.is_away:
            raise unavailable("billing")
        waits: list[float] = []
        for item in amounts:
            rate = per_minute(self.limits[item.key[0]], item.key[1])
            assert rate is not None
            if item.required > rate:
                raise InvalidArgument(
                    "amounts[0].required: too much",
                    reason=Reason.LARGER_THAN_LIMIT,
                    metadata={"metric": item.key[1].name, "most": str(rate)},
                )
            waits.append((self.level(item.key) + item.required - rate) * 60 / rate)
        longest = max(waits)
        if longest > 0:
            return Taken(retry_after_s=longest, refused=waits.index(longest))
        granted = []
        for item in amounts:
            rate = per_minute(self.limits[item.key[0]], item.key[1]) or 0
            room = int(rate - self.levels[item.key])
            granted.append(min(max(item.wanted, item.required), room, item.required + rate // 60))
            self.levels[item.key] += granted[-1]
        return Taken(granted=granted, lease_s=SHARE_LEASE_S)

    async def give_back(self, amounts: Mapping[Key, int]) -> None:
        """Takes back."""
        if self.is_away:
            raise unavailable("billing")
        self.returned.append(dict(amounts))
        for key, count in amounts.items():
            self.levels[key] = max(self.level(key) - count, 0.0)

    async def hold(self, claims: list[Claim]) -> Held:
        """Lends as many places as there are."""
        self.claims.append(claims)
        if self.is_away:
            raise unavailable("billing")
        counts = []
        for claim in claims:
            total = self.limits[claim.limit].rate.generations
            assert total is not None
            free = total - self.elsewhere.get(claim.limit, 0)
            counts.append(max(min(claim.wanted, free), 0))
        return Held(counts, PLACES_LEASE_S)
