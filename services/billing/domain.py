"""Accounts, entries, prices, credit slices, usage records, and the rules of each.

Pure: no gRPC, no SQL, no clock. Amounts are nanos of USD.

    posted     sum of the account's ledger entries
    held       granted - consumed over its slices that are open or expired
    available  posted - held + credit limit - what has expired, never negative
    remaining  of its grants: they sum to posted, or to zero while that is negative
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import NamedTuple

from libs.errors import FailedPrecondition, FieldRule, Reason, invalid_field
from libs.units import CURRENCY, NANOS_MAX, Nanos, Rates

SYSTEM_PREFIX = "system-"
REVENUE = "system-revenue"
FUNDING = "system-funding"
BAD_DEBT = "system-bad-debt"
NO_LABELS: Mapping[str, str] = MappingProxyType({})

# Bounds that keep every charge within 64 bits: a line of input, one of output, and the request.
PRICE_MAX = 10**15
TOKENS_MAX = 2**32
# Of one generation: 11 days, far beyond what any takes.
ENGINE_TIME_MAX_US = 10**12
# A thousand dollars: so that the cost of a whole month of engines stays within 64 bits, too.
ENGINE_SECOND_COST_MAX = 10**12

assert 2 * (TOKENS_MAX * PRICE_MAX // 10**6 + 1) + PRICE_MAX < NANOS_MAX


class EntryKind(enum.Enum):
    """Why money moved."""

    GRANT = "grant"
    ADJUSTMENT = "adjustment"
    USAGE = "usage"
    TOP_UP = "top_up"
    REFUND = "refund"
    EXPIRY = "expiry"


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
        return CHARGE_RULES[self].is_charged


@dataclass(frozen=True, slots=True)
class ChargeRule:
    """What an end means for the bill.

    Attributes:
        is_charged: the counts that were released are charged; else the record's amount is zero.
        why: the reason, for people.
    """

    is_charged: bool
    why: str


# The written policy: every way to end has its rule. Whatever the rule, the usage record counts all
# tokens that were released, and whoever is charged pays for those and for the prompt.
CHARGE_RULES: Mapping[EndCause, ChargeRule] = {
    EndCause.COMPLETED: ChargeRule(
        is_charged=True,
        why="The client got the whole output, however short.",
    ),
    EndCause.CLIENT_CANCELLED: ChargeRule(
        is_charged=True,
        why="The client ended it, by a call or by going away, and has what was released.",
    ),
    EndCause.DEADLINE: ChargeRule(
        is_charged=True,
        why="The client said how long it waits, and has what was released until then.",
    ),
    EndCause.STALLED: ChargeRule(
        is_charged=True,
        why="The client stopped reading; what was released is kept for it to resume.",
    ),
    EndCause.REVOKED: ChargeRule(
        is_charged=True,
        why="The client's key was revoked or its generation cancelled by who owns it.",
    ),
    EndCause.WORKER_LOST: ChargeRule(
        is_charged=False,
        why="Our worker was lost, and no other could go on: a broken output is a gift.",
    ),
    EndCause.ENGINE_FAILURE: ChargeRule(
        is_charged=False,
        why="Our engine failed: a broken output is a gift, and before the first token there is"
        " nothing to charge.",
    ),
    EndCause.GATEWAY_LOST: ChargeRule(
        is_charged=False,
        why="Our gateway was lost or stopped, and with it the stream.",
    ),
}


class GrantKind(enum.Enum):
    """Whether somebody paid for a grant."""

    GIFT = "gift"
    TOP_UP = "top_up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whoever pays, or one of the ledger's own accounts."""

    account_id: str
    display_name: str
    create_time: datetime
    credit_limit: int = 0

    @property
    def name(self) -> str:
        """Resource name."""
        return account_name(self.account_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Money of an account at one moment.

    Attributes:
        account_id: whose.
        posted: sum of its entries.
        held: what its slices have left.
        credit_limit: how far new slices may take it below zero.
        expired: part of posted that has expired and is not taken back yet.
        is_due: a grant may have expired since anybody looked.
        has_spend_limits: what is set aside and charged has to be told to them.
    """

    account_id: str
    posted: int
    held: int
    credit_limit: int = 0
    expired: int = 0
    is_due: bool = False
    has_spend_limits: bool = False

    @property
    def available(self) -> int:
        """What can still be set aside; zero where a limit was lowered below what is used."""
        if self.account_id.startswith(SYSTEM_PREFIX):
            return 0
        return max(0, self.posted - self.held + self.credit_limit - self.expired)


class Entry(NamedTuple):
    """One side of a movement of money.

    A tuple, made in a third of the time that a frozen dataclass takes: two for each settlement.

    Attributes:
        number: consecutive over the whole ledger, in order of commit.
        account_id: whose.
        transaction_number: number of the first entry of the movement.
        amount: positive in favour of the account; not zero.
        kind: why.
        source: generation id or request_id.
        description: text of the operator.
        create_time: when it was posted.
        grant_id: of the grant that it gave or took back; None when it did neither.
    """

    number: int
    account_id: str
    transaction_number: int
    amount: int
    kind: EntryKind
    source: str
    description: str
    create_time: datetime
    grant_id: str | None = None


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
        reasoning_price: nanos per million output tokens that are reasoning; None for output_price.
        request_price: nanos for each request that is charged.
        background_discount_percent: what requests in the background pay less.
        engine_second_cost: nanos that a second of an engine costs the operator; None when it is
            not known. Never charged.
        revision: order of creation.
    """

    price_id: str
    offering_id: str
    input_price: int
    output_price: int
    effective_time: datetime
    create_time: datetime
    cached_input_price: int | None = None
    reasoning_price: int | None = None
    request_price: int = 0
    background_discount_percent: int = 0
    engine_second_cost: int | None = None
    revision: int = 0

    @property
    def rates(self) -> Rates:
        """How counts become a charge."""
        return Rates(
            input_price=self.input_price,
            output_price=self.output_price,
            cached_input_price=self.cached_input_price,
            reasoning_price=self.reasoning_price,
            request_price=self.request_price,
            background_discount_percent=self.background_discount_percent,
        )

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
        lease: what is left of it where a spend limit may end it early; None where none does.
    """

    slice_id: str
    account_id: str | None
    holder: str
    granted: int
    consumed: int
    state: SliceState
    is_leased: bool
    lease: timedelta | None = None

    @property
    def remaining(self) -> int:
        """What settlements can still take from it."""
        return self.granted - self.consumed if self.state.holds_money else 0


class Receipt(NamedTuple):
    """A signed receipt, as a client got it or as it is kept.

    A tuple for the same reason as Entry.

    Attributes:
        content: serialized maas.common.v1.Receipt, exactly the bytes that are signed.
        key_id: of the key that signed it.
        signature: 64 bytes.
        fault: why it was not kept; empty when it was. Whatever else is empty then.
    """

    content: bytes = b""
    key_id: str = ""
    signature: bytes = b""
    fault: str = ""


class Settlement(NamedTuple):
    """One generation that has ended, as the gateway tells it. Ids are the parts of names.

    A tuple for the same reason as Entry.

    Attributes:
        input_tokens: of the prompt, those from the prefix cache among them.
        output_tokens: released to the client, reasoning among them.
        cached_input_tokens: part of input_tokens that the prefix cache had.
        reasoning_tokens: part of output_tokens that is reasoning.
        request_id: the client's idempotency key; empty when it gave none.
        request_sha256: of what was asked for, 32 bytes; empty when it is not known.
        labels: the client's own.
        end_user: the client's own id of whom the request was for; empty when it said none.
        engine_time_us: share of an engine's time that it took, microseconds.
        is_background: it has the discount of requests in the background.
        receipt: what the client got with its last frame; None when there was none.
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
    labels: Mapping[str, str] = NO_LABELS
    end_user: str = ""
    engine_time_us: int = 0
    is_background: bool = False
    receipt: Receipt | None = None

    @property
    def counts(self) -> tuple[object, ...]:
        """What a repeat may not contradict: who pays, at which price, for what."""
        return (
            self.account_id,
            self.price_id,
            self.input_tokens,
            self.output_tokens,
            self.cached_input_tokens,
            self.reasoning_tokens,
            self.end_cause.value,
            self.is_background,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRecord:
    """One settled generation. Never changes; what was refunded since stands beside it.

    Attributes:
        settlement: as the gateway told it.
        number: consecutive over all records, in order of commit.
        amount: what the counts cost; zero when the end is not charged.
        shortfall: part of the amount that the account could not pay.
        settle_time: when it was settled.
        refunded: sum of what was given back of the charge.
    """

    settlement: Settlement
    number: int
    amount: Nanos
    shortfall: Nanos
    settle_time: datetime
    refunded: int = 0

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
        FailedPrecondition: INSUFFICIENT_CREDIT, it would fall below what is held and the limit.
    """
    check_room(balance, posting.amount, "amount.nanos")
    if posting.amount < 0 and balance.available + posting.amount < 0:
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


def check_room(balance: Balance, amount: int, field: str) -> None:
    """Refuses what would take the balance, with its credit limit, out of 64 bits.

    Args:
        balance: before.
        amount: nanos that come to posted, or to the credit limit.
        field: path of the amount.

    Raises:
        InvalidArgument: it would.
    """
    if balance.posted + balance.credit_limit + amount > NANOS_MAX:
        raise invalid_field(field, FieldRule.OUT_OF_RANGE, "the balance would overflow")
