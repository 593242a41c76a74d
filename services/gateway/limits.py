"""What the gateway knows of limits: whose spending and whose rate is limited. Fed by a watch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from services.gateway.slices import Purse
from services.gateway.tables import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How fast requests may come; None for as fast as they like.

    Attributes:
        requests: in a minute.
        input_tokens: in a minute.
        output_tokens: in a minute.
        generations: at the same time.
    """

    requests: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    generations: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A limit.

    Attributes:
        name: "limits/{limit}".
        account: "accounts/{account}" that it belongs to.
        scope: "accounts/{account}", "projects/{project}" or "apiKeys/{key}" that it limits.
        rate: what it allows; None for a spend limit, whose amount is billing's alone.
        is_deleted: there is no such limit any more.
    """

    name: str
    account: str
    scope: str
    rate: Rate | None
    is_deleted: bool = False


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A rate limit that applies.

    Attributes:
        name: "limits/{limit}".
        rate: what it allows.
    """

    name: str
    rate: Rate


class AccountLimits:
    """All limits of one account."""

    def __init__(self) -> None:
        """Starts without any."""
        self._by_scope: dict[str, dict[str, Limit]] = {}
        self._spend_scopes: set[str] = set()
        self._rates: dict[str, tuple[RateLimit, ...]] = {}

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._by_scope)

    def put(self, limit: Limit) -> None:
        """Adds a limit, or replaces it."""
        self._by_scope.setdefault(limit.scope, {})[limit.name] = limit
        self._sort(limit.scope)

    def drop(self, limit: Limit) -> None:
        """Removes a limit."""
        named = self._by_scope[limit.scope]
        del named[limit.name]
        if not named:
            del self._by_scope[limit.scope]
        self._sort(limit.scope)

    def _sort(self, scope: str) -> None:
        """O(limits of one scope): they change rarely, and are looked up with every request."""
        named = self._by_scope.get(scope, {})
        rates = tuple(
            RateLimit(name, limit.rate)
            for name, limit in sorted(named.items())
            if limit.rate is not None
        )
        if rates:
            self._rates[scope] = rates
        else:
            self._rates.pop(scope, None)
        if len(rates) < len(named):
            self._spend_scopes.add(scope)
        else:
            self._spend_scopes.discard(scope)

    def purse(self, account: str, project: str, api_key: str) -> Purse:
        """Returns what a request spends from: the smallest part that a spend limit names."""
        if api_key in self._spend_scopes:
            return Purse(account, project, api_key, is_limited=True)
        if project in self._spend_scopes:
            return Purse(account, project, is_limited=True)
        return Purse(account, is_limited=account in self._spend_scopes)

    def rates(self, account: str, project: str, api_key: str) -> tuple[RateLimit, ...]:
        """Returns the rate limits of a request: of its key, then its project, then its account."""
        rates = self._rates
        if not rates:
            return ()
        return (*rates.get(api_key, ()), *rates.get(project, ()), *rates.get(account, ()))


class _Book:
    """Limits by account. Each change costs what its own scope has, however many there are.

    Attributes:
        by_account: accounts that have a limit.
    """

    def __init__(self) -> None:
        self.by_account: dict[str, AccountLimits] = {}
        self._by_name: dict[str, Limit] = {}

    def put(self, limit: Limit) -> None:
        """Adds, replaces or deletes a limit; its name may have been another one's before."""
        earlier = self._by_name.pop(limit.name, None)
        if earlier is not None:
            limits = self.by_account[earlier.account]
            limits.drop(earlier)
            if not limits:
                del self.by_account[earlier.account]
        if not limit.is_deleted:
            self._by_name[limit.name] = limit
            self.by_account.setdefault(limit.account, AccountLimits()).put(limit)


class Limits(Table):
    """The limits of all accounts."""

    def __init__(self) -> None:
        """Starts without any."""
        super().__init__("billing")
        self._book = _Book()
        # What a new stream has listed so far: what it does not list was deleted meanwhile.
        self._listing: _Book | None = None

    def begin(self) -> None:
        """Says that a new stream begins: what an earlier one has listed in part does not count."""
        self._listing = None

    def apply(self, limits: Iterable[Limit], *, is_snapshot: bool, is_complete: bool) -> None:
        """Takes a part of the watch.

        Args:
            limits: that are new or have changed.
            is_snapshot: it belongs to the first listing of a stream.
            is_complete: it is the last part of that.
        """
        if is_snapshot and self._listing is None:
            self._listing = _Book()
        target = self._book if self._listing is None else self._listing
        for limit in limits:
            target.put(limit)
        if is_complete and self._listing is not None:
            self._book, self._listing = self._listing, None
            self.complete()

    def purse_of(self, account: str, project: str, api_key: str) -> Purse:
        """Returns what a request spends from.

        Raises:
            Unavailable: the table was never complete.
        """
        limits = self.of(account)
        return Purse(account) if limits is None else limits.purse(account, project, api_key)

    def of(self, account: str) -> AccountLimits | None:
        """Returns the limits of an account; None when it has none.

        Raises:
            Unavailable: the table was never complete.
        """
        found = self._book.by_account.get(account)
        if found is None:
            self.require()
        return found
