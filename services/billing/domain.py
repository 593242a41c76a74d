"""Accounts, entries, prices, credit slices, usage records, and the rules of each.

Pure: no gRPC, no SQL, no clock. Amounts are nanos of USD.

    posted     sum of the account's ledger entries
    held       granted - consumed over its slices that are open or expired
    available  posted - held - floor, never negative
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from libs.errors import FailedPrecondition, FieldRule, Reason, invalid_field
from libs.units import CURRENCY, NANOS_MAX, Nanos

SYSTEM_PREFIX = "system-"
REVENUE = "system-revenue"
FUNDING = "system-funding"
BAD_DEBT = "system-bad-debt"

# Bounds that keep every charge within 64 bits: 2 * TOKENS_MAX * PRICE_MAX / 10^6 < 2^63. Cached
# tokens are a part of the input and cost no more than the rest of it.
PRICE_MAX = 10**15
TOKENS_MAX = 2**32

assert 2 * TOKENS_MAX * PRICE_MAX // 10**6 < NANOS_MAX


class EntryKind(enum.Enum):
    """Why money moved."""

    GRANT = "grant"
    ADJUSTMENT = "adjustment"
    USAGE = "usage"


class SliceState(enum.Enum):
    """Life of a credit slice: open, expired, reclaimed; or closed at any time before."""

    OPEN = "open"
    EXPIRED = "expired"
    CLOSED = "closed"
    RECLAIMED = "reclaimed"

    @property
    def holds_money(self) -> bool:
        """Whether what is left of the slice is still part of the account's held."""
        return self in {SliceState.OPEN, SliceState.EXPIRED}


class EndCause(enum.Enum):
    """How a generation ended; the values are those of maas.billing.v1.EndCause."""

    COMPLETED = 1
    CLIENT_CANCELLED = 2
    DEADLINE = 3
    STALLED = 4
    REVOKED = 5
    WORKER_LOST = 11
    ENGINE_FAILURE = 12
    GATEWAY_LOST = 13

    @property
    def is_charged(self) -> bool:
        """Whether the client pays for what was released: not where the fault was ours."""
        return self in _CHARGED


_CHARGED = frozenset(
    {
        EndCause.COMPLETED,
        EndCause.CLIENT_CANCELLED,
        EndCause.DEADLINE,
        EndCause.STALLED,
        EndCause.REVOKED,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whoever pays, or one of the ledger's own accounts."""

    account_id: str
    display_name: str
    create_time: datetime

    @property
    def name(self) -> str:
        """Resource name."""
        return account_name(self.account_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Money of an account at one moment."""

    account_id: str
    posted: int
    held: int
    floor: int

    @property
    def available(self) -> int:
        """What can still be set aside."""
        return self.posted - self.held - self.floor


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One side of a movement of money.

    Attributes:
        number: consecutive over the whole ledger, in order of commit.
        account_id: whose.
        transaction_number: number of the first entry of the movement.
        amount: positive in favour of the account; not zero.
        kind: why.
        source: generation id or request_id.
        description: text of the operator.
        create_time: when it was posted.
    """

    number: int
    account_id: str
    transaction_number: int
    amount: int
    kind: EntryKind
    source: str
    description: str
    create_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Posting:
    """An operator's wish to move money between an account and system-funding.

    Attributes:
        account_id: a customer's.
        amount: positive to give.
        kind: GRANT or ADJUSTMENT.
        request_id: unique for the account.
        description: for people.
    """

    account_id: str
    amount: int
    kind: EntryKind
    request_id: str
    description: str

    def is_repeat_of(self, entry: Entry) -> bool:
        """Tells whether the entry with this request_id came from the same wish."""
        mine = (self.amount, self.kind, self.description)
        return mine == (entry.amount, entry.kind, entry.description)


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Prices of an offering from a moment on. Never changes.

    Attributes:
        price_id: last part of its name.
        offering_id: what it is for.
        input_price: nanos per million input tokens.
        output_price: nanos per million output tokens.
        cached_input_price: nanos per million input tokens that the prefix cache had, at most
            input_price; None for the same.
        effective_time: from when on it is in force.
        create_time: when it was created.
        revision: order of creation.
    """

    price_id: str
    offering_id: str
    input_price: int
    output_price: int
    effective_time: datetime
    create_time: datetime
    cached_input_price: int | None = None
    revision: int = 0

    def is_repeat_of(self, stored: Price) -> bool:
        """Tells whether creating this again asks for what is stored, whenever that was made."""
        mine = dataclasses.replace(self, create_time=stored.create_time, revision=stored.revision)
        if self.effective_time == self.create_time and stored.effective_time == stored.create_time:
            # Both times nothing was said.
            mine = dataclasses.replace(mine, effective_time=stored.effective_time)
        return mine == stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Money set aside for one gateway.

    Attributes:
        slice_id: made by the gateway.
        account_id: whose money; None in the mark of a slice that was closed before it was acquired.
        holder: the gateway's instance.
        granted: set aside at first.
        consumed: settled from it.
        state: see SliceState.
        is_leased: open, and the lease has not run out.
    """

    slice_id: str
    account_id: str | None
    holder: str
    granted: int
    consumed: int
    state: SliceState
    is_leased: bool

    @property
    def remaining(self) -> int:
        """What settlements can still take from it."""
        return self.granted - self.consumed if self.state.holds_money else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """One generation that has ended, as the gateway tells it. Ids are the parts of names.

    Attributes:
        input_tokens: of the prompt, those from the prefix cache among them.
        output_tokens: released to the client, reasoning among them.
        cached_input_tokens: part of input_tokens that the prefix cache had.
        reasoning_tokens: part of output_tokens that is reasoning.
        request_id: the client's idempotency key; empty when it gave none.
        request_sha256: of what was asked for, 32 bytes; empty when it is not known.
        labels: the client's own.
        end_user: the client's own id of whom the request was for; empty when it said none.
    """

    generation_id: str
    slice_id: str
    account_id: str
    project_id: str
    api_key_id: str
    offering_id: str
    model_id: str
    version_id: str
    price_id: str
    input_tokens: int
    output_tokens: int
    end_cause: EndCause
    start_time: datetime
    end_time: datetime
    request_id: str = ""
    request_sha256: bytes = b""
    cached_input_tokens: int = 0
    reasoning_tokens: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    end_user: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRecord:
    """One settled generation. Never changes.

    Attributes:
        settlement: as the gateway told it.
        number: consecutive over all records, in order of commit.
        amount: what the counts cost; zero when the end is not charged.
        shortfall: part of the amount that the account could not pay.
        settle_time: when it was settled.
    """

    settlement: Settlement
    number: int
    amount: Nanos
    shortfall: Nanos
    settle_time: datetime

    @property
    def charge(self) -> int:
        """What was taken from the account."""
        return self.amount - self.shortfall


def account_name(account_id: str) -> str:
    """Returns the resource name of an account."""
    return f"accounts/{account_id}"


def insufficient_credit(account_id: str, *, required: int, available: int) -> FailedPrecondition:
    """Makes the error for an account that has too little. Amounts in nanos."""
    return FailedPrecondition(
        f"{account_name(account_id)} has not enough credit",
        reason=Reason.INSUFFICIENT_CREDIT,
        metadata={
            "account": account_name(account_id),
            "requiredNanos": str(required),
            "availableNanos": str(available),
            "currency": CURRENCY,
        },
    )


def check_posting(posting: Posting, balance: Balance) -> None:
    """Decides whether a posting fits the account.

    Raises:
        InvalidArgument: the balance would leave 64 bits.
        FailedPrecondition: INSUFFICIENT_CREDIT, it would fall below what is held and the floor.
    """
    if balance.posted + posting.amount > NANOS_MAX:
        raise invalid_field("amount.nanos", FieldRule.OUT_OF_RANGE, "the balance would overflow")
    if balance.available + posting.amount < 0:
        raise insufficient_credit(
            posting.account_id, required=-posting.amount, available=balance.available
        )


def grant_of(balance: Balance, *, required: int, wanted: int) -> int:
    """Decides how much a new slice gets: what is wanted, as far as it is there.

    Raises:
        FailedPrecondition: INSUFFICIENT_CREDIT, not even `required` is available.
    """
    if balance.available < required:
        raise insufficient_credit(
            balance.account_id, required=required, available=balance.available
        )
    return min(max(wanted, required), balance.available)
