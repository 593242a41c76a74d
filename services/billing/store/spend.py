"""What slices and settlements tell the spend limits, in their own transactions.

The stores of slices and settlements call these methods with the balances of all accounts that are
concerned locked, and only for accounts that have spend limits (`Balance.has_spend_limits`), so that
others pay nothing for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from libs.postgres import Connection
from services.billing.domain import UsageRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class SpendWish:
    """Money that a new slice shall have.

    Attributes:
        slice_id: its row is there already, with `nanos` granted.
        account_id: whose money.
        project_id: who alone may spend it; empty for the whole account.
        api_key_id: the key that alone may spend it; empty for all.
        required: nanos, the least that are of use.
        nanos: what the account has for it, at least `required`.
    """

    slice_id: str
    account_id: str
    project_id: str
    api_key_id: str
    required: int
    nanos: int


class SpendWindows(Protocol):
    """Windows of spend limits, as slices and settlements see them."""

    async def hold(self, connection: Connection, wish: SpendWish) -> int:
        """Sets money aside in every window that applies; returns how many nanos.

        Raises:
            MaasError: SPEND_LIMIT_REACHED, not even `required` has room. The slice's row goes
                with the transaction.
        """
        ...

    async def settle(
        self,
        connection: Connection,
        records: Sequence[UsageRecord],
        consumed: Mapping[str, int],
    ) -> None:
        """Counts charges.

        Args:
            connection: of the transaction; the head is locked too.
            records: new ones, of accounts that have spend limits.
            consumed: nanos that were taken from each slice of such accounts.
        """
        ...

    async def release(self, connection: Connection, freed: Mapping[str, int]) -> None:
        """Frees what ended slices had left.

        Args:
            connection: of the transaction.
            freed: nanos by slice, of accounts that have spend limits; zero is possible.
        """
        ...


class NoSpendWindows:
    """No limits at all: for parts that are used alone."""

    async def hold(self, connection: Connection, wish: SpendWish) -> int:
        """Returns all that the account has for it."""
        del connection
        return wish.nanos

    async def settle(
        self,
        connection: Connection,
        records: Sequence[UsageRecord],
        consumed: Mapping[str, int],
    ) -> None:
        """Does nothing."""

    async def release(self, connection: Connection, freed: Mapping[str, int]) -> None:
        """Does nothing."""
