"""Signed receipts, and the public keys that they are verified with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from libs.paging import Page
from libs.postgres import Connection, Database
from libs.units import Nanos
from services.billing.domain import EndCause, Receipt, Settlement, UsageRecord

CheckReceipts = Callable[[Sequence[Settlement], Sequence[Nanos]], Awaitable[Mapping[str, Receipt]]]
"""Takes settlements and their amounts; returns what is to be kept of their receipts, by generation.

Never refuses: money is settled whatever the receipt is.
"""

_RECEIPT = """
    SELECT receipt.content, receipt.key_id, receipt.signature
      FROM usage_record
      JOIN receipt ON receipt.record_number = usage_record.number
     WHERE receipt.fault = ''
"""
_CHARGED = [cause.value for cause in EndCause if cause.is_charged]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceiptKeyRow:
    """A public key that billing was told of.

    Attributes:
        key_id: made of the key.
        public_key: 32 bytes.
        create_time: when billing first heard of it.
    """

    key_id: str
    public_key: bytes
    create_time: datetime


class ReceiptStore:
    """Receipts. Every method may be repeated; all raise Unavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find_of_generation(
        self, generation_id: str, *, account_id: str | None
    ) -> Receipt | None:
        """Reads the receipt of a generation; None when there is none.

        Args:
            generation_id: whose.
            account_id: who has to have paid for it; None for anybody.
        """
        row = await self._database.fetch_row(
            f"{_RECEIPT} AND generation_id = $1 AND ($2::text IS NULL OR account_id = $2)",
            generation_id,
            account_id,
        )
        return None if row is None else _receipt_from_row(row)

    async def find_of_request(
        self, request_id: str, *, project_id: str, account_id: str
    ) -> Receipt | None:
        """Reads the receipt of a request: the first that was charged, or else the last.

        Args:
            request_id: the idempotency key, not empty.
            project_id: who gave it.
            account_id: who has to have paid for it.
        """
        row = await self._database.fetch_row(
            f"""
            {_RECEIPT}
               AND project_id = $1
               AND request_id = $2
               AND request_id <> ''
               AND account_id = $3
             ORDER BY end_cause = ANY($4::smallint[]) DESC,
                      CASE WHEN end_cause = ANY($4::smallint[]) THEN number ELSE -number END
             LIMIT 1
            """,
            project_id,
            request_id,
            account_id,
            _CHARGED,
        )
        return None if row is None else _receipt_from_row(row)

    async def add_keys(self, public_keys: Mapping[str, bytes], now: datetime) -> None:
        """Remembers public keys, by their ids. Those that are there stay as they are."""
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                INSERT INTO receipt_key (key_id, public_key, create_time)
                SELECT fresh.*, $3
                  FROM unnest($1::text[], $2::bytea[]) AS fresh
                ON CONFLICT DO NOTHING
                """,
                list(public_keys.keys()),
                list(public_keys.values()),
                now,
            )

    async def list_keys(self, page: Page) -> list[ReceiptKeyRow]:
        """Reads `page.read_size` keys by id."""
        rows = await self._database.fetch(
            """
            SELECT key_id, public_key, create_time
              FROM receipt_key
             WHERE key_id > $1
             ORDER BY key_id
             LIMIT $2
            """,
            page.after,
            page.read_size,
        )
        return [
            ReceiptKeyRow(
                key_id=row["key_id"],
                public_key=row["public_key"],
                create_time=row["create_time"],
            )
            for row in rows
        ]


async def keep_nothing(
    _settlements: Sequence[Settlement], _amounts: Sequence[Nanos]
) -> Mapping[str, Receipt]:
    """A CheckReceipts that knows no key: no receipt is kept."""
    return {}


async def insert_receipts(
    connection: Connection, records: Iterable[UsageRecord], receipts: Mapping[str, Receipt]
) -> None:
    """Keeps the receipts of new records, in the transaction of their settlement.

    Args:
        connection: of that transaction.
        records: new ones.
        receipts: by generation id, what a CheckReceipts returned.
    """
    if not receipts:
        return
    found = [(record.number, receipts.get(record.settlement.generation_id)) for record in records]
    await connection.copy_records_to_table(
        "receipt",
        columns=("record_number", "content", "key_id", "signature", "fault"),
        records=[
            (number, receipt.content, receipt.key_id, receipt.signature, receipt.fault)
            for number, receipt in found
            if receipt is not None
        ],
    )


def _receipt_from_row(row: asyncpg.Record) -> Receipt:
    return Receipt(content=row["content"], key_id=row["key_id"], signature=row["signature"])
