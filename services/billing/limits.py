"""Limits, and what fits into the windows of spend limits.

Pure: no gRPC, no SQL, no clock. Amounts are nanos of USD.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from libs.errors import Reason, ResourceExhausted
from libs.units import CURRENCY

# A request asks for at most 64 amounts of quota: three scopes, three metrics.
LIMITS_PER_SCOPE_MAX = 7
QUOTA_AMOUNTS_MAX = 64
# So that levels of buckets, in 60 millionths, stay within 64 bits.
PER_MINUTE_MAX = 10**11

assert 3 * 3 * LIMITS_PER_SCOPE_MAX <= QUOTA_AMOUNTS_MAX


class ScopeKind(enum.Enum):
    """Whom a limit limits."""

    ACCOUNT = "account"
    PROJECT = "project"
    API_KEY = "api_key"


class Span(enum.Enum):
    """Over which time a spend limit counts, in UTC."""

    DAY = "day"
    MONTH = "month"


@dataclass(frozen=True, slots=True)
class Scope:
    """Whom a limit limits.

    Attributes:
        kind: an account, a project or a key.
        scope_id: its id.
    """

    kind: ScopeKind
    scope_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendLimit:
    """Most money in a window.

    Attributes:
        amount: nanos.
        span: how long a window is.
        alert_percents: ascending, 1 to 100, each once.
    """

    amount: int
    span: Span
    alert_percents: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """How fast requests may come; None is not limited.

    Attributes:
        requests: in a minute.
        input_tokens: in a minute.
        output_tokens: in a minute.
        concurrent_generations: at the same time.
    """

    requests: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    concurrent_generations: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit.

    Attributes:
        limit_id: last part of its name.
        account_id: whom it belongs to.
        scope: whom it limits.
        kind: what it allows.
        create_time: when it was created.
        counted_after: a spend limit counts the account's usage records behind this number.
        is_deleted: it limits nobody any more.
        revision: order of changes.
    """

    limit_id: str
    account_id: str
    scope: Scope
    kind: SpendLimit | RateLimit
    create_time: datetime
    counted_after: int = 0
    is_deleted: bool = False
    revision: int = 0

    @property
    def name(self) -> str:
        """Resource name."""
        return limit_name(self.limit_id)

    def is_repeat_of(self, stored: Limit) -> bool:
        """Tells whether creating this again asks for what is stored."""
        mine = dataclasses.replace(
            self,
            create_time=stored.create_time,
            counted_after=stored.counted_after,
            revision=stored.revision,
        )
        return mine == stored


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitUsage:
    """What is used of a limit at one moment.

    Attributes:
        spent: nanos charged in the window that runs.
        held: nanos set aside in it.
        window_end: when that ends; None for a rate limit.
        places: of running generations, of a rate limit.
    """

    spent: int = 0
    held: int = 0
    window_end: datetime | None = None
    places: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendAlert:
    """A percentage of a spend limit was crossed.

    Attributes:
        number: in order of commit.
        limit_id: of which limit.
        percent: which of its percentages.
        window_start: first moment of the window.
        spent: nanos charged in the window by then.
        create_time: when that was.
    """

    number: int
    limit_id: str
    percent: int
    window_start: datetime
    spent: int
    create_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The window of a spend limit that runs now.

    Attributes:
        limit_id: of which limit.
        amount: nanos that may be spent in it.
        start: its first moment.
        end: the first moment of the next one.
        spent: nanos charged in it.
        held: nanos that slices have left of it.
    """

    limit_id: str
    amount: int
    start: datetime
    end: datetime
    spent: int
    held: int

    @property
    def room(self) -> int:
        """Nanos that can still be set aside; never negative."""
        return max(self.amount - self.spent - self.held, 0)


@dataclass(frozen=True, slots=True)
class Room:
    """What a new slice may take of all windows that it has to fit into.

    Attributes:
        nanos: at most.
        windows: which.
    """

    nanos: int
    windows: tuple[Window, ...]

    @property
    def end(self) -> datetime:
        """When the first of the windows ends. There is at least one."""
        return min(window.end for window in self.windows)


def limit_name(limit_id: str) -> str:
    """Returns the resource name of a limit."""
    return f"limits/{limit_id}"


def room_of(windows: Iterable[Window], *, required: int, wanted: int, now: datetime) -> Room:
    """Decides how much a new slice may take: what is wanted, as far as every window has it.

    Args:
        windows: of all limits that apply.
        required: least nanos that are of use.
        wanted: nanos.
        now: on the clock of the windows.

    Raises:
        ResourceExhausted: SPEND_LIMIT_REACHED, a window has less than what is required.
    """
    found = tuple(windows)
    full = [window for window in found if window.room < required]
    if full:
        raise _reached(full, required=required, now=now)
    most = max(wanted, required)
    return Room(min([most, *(window.room for window in found)]), found)


def _reached(full: list[Window], *, required: int, now: datetime) -> ResourceExhausted:
    # Of several the one that has to be waited for longest: only then all have room.
    never = [window for window in full if window.amount < required]
    window = never[0] if never else max(full, key=lambda item: item.end)
    return ResourceExhausted(
        f"{limit_name(window.limit_id)} has no room for this"
        + (" at any time" if never else " until its window ends"),
        reason=Reason.SPEND_LIMIT_REACHED,
        metadata={
            "limit": limit_name(window.limit_id),
            "requiredNanos": str(required),
            "availableNanos": str(window.room),
            "currency": CURRENCY,
        },
        retry_after_s=None if never else (window.end - now).total_seconds(),
    )
