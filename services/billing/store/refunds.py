"""Refunds: charges that are given back."""

from __future__ import annotations

from datetime import datetime

from libs.errors import FailedPrecondition, FieldRule, Reason, invalid_field, not_found
from libs.postgres import Connection, Database
from services.billing.division import movement
from services.billing.domain import REVENUE, Entry, EntryKind, check_room
from services.billing.grants import Refund, grant_by_entry, grant_of_entry, request_id_reused
from services.billing.store.grants import expire_due, give
from services.billing.store.ledger import find_requested, lock_balances, lock_head


class RefundStore:
    """Refunds. Every method may be repeated; all raise Unavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def refund(self, wish: Refund, now: datetime) -> Entry:
        """Gives a charge back, or a part of it. Locks the head and the balance.

        Returns the entry on the account; the first one when the request is a repeat.

        Args:
            wish: what to give back.
            now: time of grant and entries.

        Raises:
            NotFound: there is no such record.
            InvalidArgument: REQUEST_ID_REUSED, or it is more than what is left of the charge.
            FailedPrecondition: WRONG_STATE, nothing is left of it.
        """
        async with self._database.transaction() as connection:
            head = await lock_head(connection)
            balances = await lock_balances(connection, [wish.account_id])
            if wish.account_id not in balances:
                raise not_found(wish.record_name)
            stored = await find_requested(connection, wish.account_id, wish.request_id)
            if stored is not None:
                await _check_repeat(connection, wish, stored)
                return stored
            amount = _amount(wish, await _read_left(connection, wish))
            head = await expire_due(connection, head, balances, now)
            check_room(balances[wish.account_id], amount, "amount.nanos")
            number = head.entry_count + 1
            entries = movement(
                [(wish.account_id, amount), (REVENUE, -amount)],
                number=number,
                kind=EntryKind.REFUND,
                source=wish.request_id,
                description=wish.description,
                now=now,
                grant_id=grant_of_entry(number),
            )
            await give(connection, balances[wish.account_id], entries, grant_by_entry(entries[0]))
            await connection.execute(
                """
                INSERT INTO refund (number, account_id, generation_id, amount, create_time)
                VALUES ($1, $2, $3, $4, $5)
                """,
                number,
                wish.account_id,
                wish.generation_id,
                amount,
                now,
            )
        return entries[0]


async def _read_left(connection: Connection, wish: Refund) -> int:
    """Reads what of a charge was not given back yet; the part that nobody paid is no charge."""
    left = await connection.fetchval(
        """
        SELECT amount - shortfall - coalesce((
                   SELECT sum(refund.amount)
                     FROM refund
                    WHERE refund.generation_id = usage_record.generation_id
               ), 0)::bigint
          FROM usage_record
         WHERE account_id = $1
           AND generation_id = $2
        """,
        wish.account_id,
        wish.generation_id,
    )
    if left is None:
        raise not_found(wish.record_name)
    return int(left)


def _amount(wish: Refund, left: int) -> int:
    if left == 0:
        raise FailedPrecondition(
            f"nothing is left to refund of {wish.record_name}",
            reason=Reason.WRONG_STATE,
            metadata={"resource": wish.record_name, "state": "REFUNDED"},
        )
    if wish.amount is None:
        return left
    if wish.amount > left:
        raise invalid_field(
            "amount.nanos",
            FieldRule.OUT_OF_RANGE,
            f"must not exceed {left}, what is left of the charge",
        )
    return wish.amount


async def _check_repeat(connection: Connection, wish: Refund, stored: Entry) -> None:
    generation_id = await connection.fetchval(
        "SELECT generation_id FROM refund WHERE number = $1", stored.number
    )
    # Whoever asked for all that was left asks for the same again.
    wanted = stored.amount if wish.amount is None else wish.amount
    mine = (wish.generation_id, wanted, wish.description)
    if mine != (generation_id, stored.amount, stored.description):
        raise request_id_reused(wish.request_id)
