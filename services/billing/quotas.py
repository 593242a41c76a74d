"""Quota of rate limits: a bucket for each metric of a limit, and places of running generations.

Pure: no gRPC, no SQL, no clock.

A bucket is GCRA, kept as a level instead of a time: taking fills it, time drains it at the limit's
rate, and what does not fit under a minute's worth has to wait. Levels are in UNITs, 60 millionths
of a request or token: a rate of n a minute drains n UNITs in a microsecond, so nothing is rounded.

Each holder's share of the level is kept too. It drains with the level, and only what is left of it
can be given back: what has flowed back by itself, or was taken by others, cannot be given back by
a message that came twice.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from libs.errors import FieldRule, InvalidArgument, Reason, Violation
from services.billing.limits import RateLimit, limit_name

UNIT = 60_000_000
MICROSECOND = timedelta(microseconds=1)

# What a gateway takes in advance may be spent this long, seconds. Shares that are spent late come
# on top of what has drained meanwhile: at most a second of the rate from each gateway.
QUOTA_LEASE_S = 2.0
# How long places are held, seconds: a gateway that is gone blocks its places for so long.
PLACES_LEASE_S = 15.0


class Metric(enum.Enum):
    """What is limited per minute; the values are those of maas.billing.v1.QuotaMetric."""

    REQUESTS = 1
    INPUT_TOKENS = 2
    OUTPUT_TOKENS = 3

    def rate_of(self, limit: RateLimit | None) -> int | None:
        """Returns how many a limit allows in a minute; None when it does not limit them."""
        if limit is None:
            return None
        match self:
            case Metric.REQUESTS:
                return limit.requests
            case Metric.INPUT_TOKENS:
                return limit.input_tokens
            case Metric.OUTPUT_TOKENS:
                return limit.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaAmount:
    """How much somebody asks for or gives back.

    Attributes:
        limit_id: of which limit.
        metric: of what.
        required: how much is needed, or given back.
        wanted: how much is of use.
    """

    limit_id: str
    metric: Metric
    required: int
    wanted: int = 0

    @property
    def key(self) -> tuple[str, int]:
        """Which bucket; buckets are locked in this order."""
        return self.limit_id, self.metric.value


@dataclass(frozen=True, slots=True)
class Bucket:
    """One metric of one limit.

    Attributes:
        level: what was taken and has not drained, UNITs.
        drain_time: until when it has drained.
        shares: of each holder, UNITs; together never more than the level.
    """

    level: int
    drain_time: datetime
    shares: Mapping[str, int] = field(default_factory=dict)

    def drained(self, now: datetime, *, per_minute: int) -> Bucket:
        """Returns the bucket as it is now.

        Args:
            now: a time before the last one, of somebody who has waited for a lock, is that one.
            per_minute: the limit's rate. A lower one than before leaves a full bucket, no more.
        """
        now = max(now, self.drain_time)
        elapsed = (now - self.drain_time) // MICROSECOND
        level = min(max(self.level - elapsed * per_minute, 0), per_minute * UNIT)
        shares = {
            holder: share * level // self.level
            for holder, share in self.shares.items()
            if share * level >= self.level > 0
        }
        return Bucket(level, now, shares)

    def taken(self, holder: str, count: int) -> Bucket:
        """Returns the bucket after `holder` took so many."""
        shares = dict(self.shares)
        shares[holder] = shares.get(holder, 0) + count * UNIT
        return Bucket(self.level + count * UNIT, self.drain_time, shares)

    def given_back(self, holder: str, count: int) -> Bucket:
        """Returns the bucket after `holder` gave so many back, as far as they are its own."""
        shares = dict(self.shares)
        back = min(count * UNIT, shares.pop(holder, 0))
        if self.shares.get(holder, 0) > back:
            shares[holder] = self.shares[holder] - back
        return Bucket(self.level - back, self.drain_time, shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is asked for of one bucket.

    Attributes:
        bucket: as it is now.
        per_minute: the limit's rate.
        required: how much is needed, at most the rate.
        wanted: how much is of use.
    """

    bucket: Bucket
    per_minute: int
    required: int
    wanted: int

    @property
    def wait(self) -> timedelta:
        """Until what is required is there, if nobody else takes it. Zero when it is there."""
        missing = self.bucket.level + self.required * UNIT - self.per_minute * UNIT
        return max(-(-missing // self.per_minute), 0) * MICROSECOND

    @property
    def grant(self) -> int:
        """How much to give once the required is there: a second of the rate more, at most."""
        room = (self.per_minute * UNIT - self.bucket.level) // UNIT
        return min(max(self.wanted, self.required), room, self.required + self.per_minute // 60)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Not all that is required is there.

    Attributes:
        index: of the wish that has to wait longest.
        wait: how long.
    """

    index: int
    wait: timedelta


def larger_than_limit(amount: QuotaAmount, field: str, *, most: int) -> InvalidArgument:
    """Makes the error for an amount that never fits.

    Args:
        amount: what was asked for.
        field: path of it.
        most: what the limit allows at once.
    """
    return InvalidArgument(
        f"{field}: {limit_name(amount.limit_id)} allows {most} at once",
        reason=Reason.LARGER_THAN_LIMIT,
        metadata={
            "limit": limit_name(amount.limit_id),
            "metric": amount.metric.name,
            "required": str(amount.required),
            "most": str(most),
        },
        violations=[Violation(field, FieldRule.OUT_OF_RANGE, f"must be at most {most}")],
    )


def grants_of(wishes: Sequence[Wish]) -> list[int] | Refusal:
    """Decides how much each wish gets: what it requires at least, or none gets anything."""
    waits = [wish.wait for wish in wishes]
    longest = max(waits, default=timedelta())
    if longest:
        return Refusal(waits.index(longest), longest)
    return [wish.grant for wish in wishes]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceWish:
    """How many places of a limit a gateway wants.

    Attributes:
        limit_id: of which limit.
        wanted: places.
        in_use: places with a generation in them.
    """

    limit_id: str
    wanted: int
    in_use: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What one gateway has and wants of the places of a limit.

    Attributes:
        holder: the gateway's instance.
        held: places that it has now.
        in_use: places with a generation in them.
        wanted: places that it wants.
    """

    holder: str
    held: int
    in_use: int
    wanted: int


def places_of(claim: Claim, others: Sequence[Claim], *, total: int) -> int:
    """Decides how many places a gateway gets.

    All together never have more than `total`, unless that was lowered below what is in use. Where
    more are wanted than there are, each keeps what it uses, and the rest is shared evenly as far
    as it is wanted: whoever has more than that gives it back with its next renewal.

    Args:
        claim: of the gateway.
        others: of those whose leases run.
        total: places that the limit allows.
    """
    free = total - sum(other.held for other in others)
    # What is used was held before, so it fits; only after a lowered limit or a lost lease it may
    # not, and then it is kept as far as it is held.
    kept = min(claim.in_use, claim.held)
    fair = _fair_share(claim, others, total=total)
    return max(kept, min(max(claim.wanted, claim.in_use), max(fair, kept), free), 0)


def _fair_share(claim: Claim, others: Sequence[Claim], *, total: int) -> int:
    """Returns what the gateway gets when everybody gets what is fair at once."""
    claims = [claim, *others]
    left = max(total - sum(item.in_use for item in claims), 0)
    # More than in use, smallest wish first: what one does not want, the later ones share.
    wishes = sorted((max(item.wanted - item.in_use, 0), item.holder) for item in claims)
    for index, (wish, holder) in enumerate(wishes):
        share = min(wish, -(-left // (len(wishes) - index)))
        left -= share
        if holder == claim.holder:
            return claim.in_use + share
    raise AssertionError("the claim is among the claims")
