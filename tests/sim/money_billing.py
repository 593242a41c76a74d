"""Billing as a page of plain Python: the contract's methods over the reference ledger.

The ledger is the one that the state machine in test_ledger_model.py compares with the real SQL;
quota and places are decided by billing's own pure rules. What must hold at every moment is claimed
after each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from maas.billing.v1 import credit_slice_service_pb2 as credit_pb2
from maas.billing.v1 import ledger_pb2, quota_service_pb2
from maas.common.v1 import usage_pb2

from libs.errors import FailedPrecondition, Reason, already_exists
from libs.testing.clock import START
from services.billing.quotas import (
    PLACES_LEASE_S,
    QUOTA_LEASE_S,
    Bucket,
    Claim,
    Metric,
    QuotaAmount,
    Refusal,
    Wish,
    grants_of,
    places_of,
)
from services.gateway.domain import EndCause
from tests.integration.services.billing.reference import Reference, Refused, cost

Key = tuple[str, int]

_REASONS = {
    "INSUFFICIENT_CREDIT": Reason.INSUFFICIENT_CREDIT,
    "SLICE_NOT_OPEN": Reason.SLICE_NOT_OPEN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was settled.

    Attributes:
        usage: counts.
        amount: nanos charged.
        lacking: nanos of it that its slice did not have.
        slice_state: of its slice just before; empty for one that is not known.
        at_s: when.
    """

    settlement: credit_pb2.Settlement
    usage: usage_pb2.TokenUsage
    cause: EndCause
    amount: int
    lacking: int
    slice_state: str
    at_s: float


@dataclass
class _Places:
    claim: Claim
    expires_at: float


@dataclass
class SimBilling:
    """Billing and its database.

    Attributes:
        ledger: money.
        rates: requests a minute, by limit.
        places: generations at the same time, by limit.
        records: by generation.
        contradicted: generations that were settled again with other counts.
        reclaimed_at: when slices were reclaimed.
        funded: nanos that customers were given.
    """

    claim: Callable[[bool, str], None]
    ledger: Reference
    rates: Mapping[str, int] = field(default_factory=dict)
    places: Mapping[str, int] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    contradicted: list[str] = field(default_factory=list)
    reclaimed_at: dict[str, float] = field(default_factory=dict)
    last_lease: dict[str, float] = field(default_factory=dict)
    funded: int = 0
    _buckets: dict[Key, Bucket] = field(default_factory=dict)
    _held: dict[str, dict[str, _Places]] = field(default_factory=dict)

    def open(self, account: str, credit: int) -> None:
        """Opens an account with some credit."""
        self.ledger.open(account)
        self.ledger.give(account, credit)
        self.funded += credit

    def handle(self, method: str, payload: bytes, now_s: float) -> Message:
        """Does what is asked, in one transaction.

        Raises:
            MaasError: it is refused.
        """
        self.ledger.now = now_s
        try:
            return self._handle(method, payload)
        except Refused as refused:
            reason = _REASONS.get(str(refused))
            if reason is None:
                raise already_exists("creditSlices/-") from refused
            raise FailedPrecondition(str(refused), reason=reason) from refused
        finally:
            self.check()

    def _handle(self, method: str, payload: bytes) -> Message:
        methods: dict[str, Callable[[bytes], Message]] = {
            "AcquireSlice": self._acquire,
            "Settle": self._settle,
            "CloseSlices": self._close,
            "FindSettlement": self._find,
            "TakeQuota": self._take,
            "GiveBackQuota": self._give_back,
            "HoldPlaces": self._hold,
        }
        return methods[method](payload)

    def sweep(self, now_s: float) -> None:
        """Marks what has run out, and frees what is left after the grace."""
        self.ledger.now = now_s
        self.ledger.sweep()
        for slice_id, item in self.ledger.slices.items():
            if item.state == "reclaimed":
                self.reclaimed_at.setdefault(slice_id, now_s)
        self.check()

    @property
    def has_slices(self) -> bool:
        """Whether any slice is not at its end."""
        return any(item.state in {"open", "expired"} for item in self.ledger.slices.values())

    def check(self) -> None:
        """Claims what holds at every moment: conservation, floors, slices."""
        ledger = self.ledger
        total = sum(ledger.money.posted.values()) + ledger.revenue + ledger.bad_debt
        self.claim(total == self.funded, f"entries sum to {total - self.funded}")
        charged = sum(record.amount for record in self.records.values())
        self.claim(ledger.revenue == charged, f"revenue {ledger.revenue}, records {charged}")
        for account, posted in ledger.money.posted.items():
            self.claim(posted >= ledger.held(account), f"{account} is below its floor")
        for slice_id, item in ledger.slices.items():
            self.claim(item.consumed <= item.granted, f"{slice_id} is consumed beyond its grant")

    def _acquire(self, payload: bytes) -> Message:
        request = credit_pb2.AcquireSliceRequest.FromString(payload)
        granted = self.ledger.acquire(
            request.slice_id,
            request.account.removeprefix("accounts/"),
            request.required_nanos,
            request.wanted_nanos,
        )
        self._note_leases([request.slice_id])
        return credit_pb2.AcquireSliceResponse(
            granted_nanos=granted, lease_duration=_duration(self.ledger.lease_s)
        )

    def _note_leases(self, slice_ids: list[str]) -> None:
        for slice_id in slice_ids:
            if self.ledger.is_leased(slice_id):
                self.last_lease[slice_id] = self.ledger.slices[slice_id].expires_at

    def _close(self, payload: bytes) -> Message:
        self.ledger.close(list(credit_pb2.CloseSlicesRequest.FromString(payload).slice_ids))
        return credit_pb2.CloseSlicesResponse()

    def _settle(self, payload: bytes) -> Message:
        request = credit_pb2.SettleRequest.FromString(payload)
        new = 0
        for item in request.settlements:
            new += self._settle_one(item)
        named = sorted({*request.renew_slice_ids, *(i.slice_id for i in request.settlements)})
        lost = self.ledger.renew(set(named))
        self._note_leases(named)
        return credit_pb2.SettleResponse(
            settled_count=new, lost_slice_ids=lost, lease_duration=_duration(self.ledger.lease_s)
        )

    def _settle_one(self, item: credit_pb2.Settlement) -> bool:
        usage, cause = item.usage, EndCause(item.end_cause)
        first = self.records.get(item.generation_id)
        if first is not None and (first.usage, first.cause) != (usage, cause):
            self.contradicted.append(item.generation_id)
        counts = (
            usage.input_tokens - usage.cached_input_tokens,
            usage.cached_input_tokens,
            usage.output_tokens - usage.reasoning_tokens,
            usage.reasoning_tokens,
        )
        self.claim(min(counts) >= 0, f"{item.generation_id} has a part above its whole")
        amount = cost(counts, background=item.background) if cause.is_charged else 0
        of_slice = self.ledger.slices.get(item.slice_id)
        rest = 0 if of_slice is None else of_slice.rest
        state = "" if of_slice is None else of_slice.state
        account = item.account.removeprefix("accounts/")
        if not self.ledger.settle(item.generation_id, item.slice_id, account, amount):
            return False
        self.claim(first is None, f"{item.generation_id} was settled twice")
        self.records[item.generation_id] = Record(
            settlement=item,
            usage=usage,
            cause=cause,
            amount=amount,
            lacking=max(0, amount - rest),
            slice_state=state,
            at_s=self.ledger.now,
        )
        return True

    def _find(self, payload: bytes) -> Message:
        request = credit_pb2.FindSettlementRequest.FromString(payload)
        for record in self.records.values():
            item = record.settlement
            found = (item.project, item.request_id) == (request.project, request.request_id)
            if found and record.cause.is_charged:
                return credit_pb2.FindSettlementResponse(
                    usage_record=ledger_pb2.UsageRecord(
                        generation_id=item.generation_id, usage=item.usage
                    ),
                    request_sha256=item.request_sha256,
                )
        return credit_pb2.FindSettlementResponse()

    # Rate limits.

    @property
    def _now(self) -> datetime:
        return START + timedelta(seconds=self.ledger.now)

    def _bucket(self, key: Key) -> Bucket:
        found = self._buckets.get(key) or Bucket(0, START)
        return found.drained(self._now, per_minute=self.rates[key[0]])

    def _take(self, payload: bytes) -> Message:
        request = quota_service_pb2.TakeQuotaRequest.FromString(payload)
        amounts = [_amount(item) for item in request.amounts]
        wishes = [
            Wish(
                bucket=self._bucket(amount.key),
                per_minute=self.rates[amount.limit_id],
                required=amount.required,
                wanted=amount.wanted,
            )
            for amount in amounts
        ]
        grants = grants_of(wishes)
        if isinstance(grants, Refusal):
            return quota_service_pb2.TakeQuotaResponse(
                retry_after=_duration(grants.wait.total_seconds()), refused_index=grants.index
            )
        for amount, wish, count in zip(amounts, wishes, grants, strict=True):
            self._buckets[amount.key] = wish.bucket.taken(request.holder, count)
        return quota_service_pb2.TakeQuotaResponse(
            granted=grants, lease_duration=_duration(QUOTA_LEASE_S)
        )

    def _give_back(self, payload: bytes) -> Message:
        request = quota_service_pb2.GiveBackQuotaRequest.FromString(payload)
        for amount in map(_amount, request.amounts):
            bucket = self._bucket(amount.key)
            self._buckets[amount.key] = bucket.given_back(request.holder, amount.required)
        return quota_service_pb2.GiveBackQuotaResponse()

    def _hold(self, payload: bytes) -> Message:
        request = quota_service_pb2.HoldPlacesRequest.FromString(payload)
        now_s, holder = self.ledger.now, request.holder
        counts: list[int] = []
        for item in request.places:
            live = {
                name: held
                for name, held in self._held.get(item.limit, {}).items()
                if held.expires_at > now_s
            }
            before = live.pop(holder, None)
            wish = Claim(
                holder=holder,
                held=0 if before is None else before.claim.held,
                in_use=item.in_use,
                wanted=item.count,
            )
            others = [held.claim for held in live.values()]
            count = places_of(wish, others, total=self.places[item.limit])
            live[holder] = _Places(replace(wish, held=count), now_s + PLACES_LEASE_S)
            self._held[item.limit] = live
            lent = sum(held.claim.held for held in live.values())
            self.claim(lent <= self.places[item.limit], f"{lent} places of {item.limit} are lent")
            counts.append(count)
        for limit in self._held.keys() - {item.limit for item in request.places}:
            self._held[limit].pop(holder, None)
        return quota_service_pb2.HoldPlacesResponse(
            places=[
                quota_service_pb2.Places(limit=item.limit, count=count)
                for item, count in zip(request.places, counts, strict=True)
            ],
            lease_duration=_duration(PLACES_LEASE_S),
        )


def _amount(item: quota_service_pb2.QuotaAmount) -> QuotaAmount:
    return QuotaAmount(
        limit_id=item.limit,
        metric=Metric(item.metric),
        required=item.required,
        wanted=item.wanted,
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromTimedelta(timedelta(seconds=seconds))
    return duration
