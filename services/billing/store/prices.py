"""The price book."""

from __future__ import annotations

import asyncpg

from libs.errors import already_exists, not_found
from libs.paging import Page
from libs.postgres import Connection, Database
from services.billing.domain import Price

_PRICE = """
    SELECT price_id, offering_id, input_price, output_price, cached_input_price, reasoning_price,
           request_price, background_discount_percent, engine_second_cost, effective_time,
           create_time, revision
      FROM price
"""


class PriceStore:
    """Prices. Every method may be repeated; all raise Unavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create_price(self, price: Price) -> Price:
        """Stores a price, or returns the equal one that is there. Locks the revision.

        Raises:
            AlreadyExists: there is one with other content.
        """
        async with self._database.transaction() as connection:
            # A repeat raises the revision and changes nothing; watchers look once in vain.
            await connection.execute(
                """
                WITH next AS (UPDATE price_revision SET value = value + 1 RETURNING value)
                INSERT INTO price (
                    price_id, offering_id, input_price, output_price, cached_input_price,
                    reasoning_price, request_price, background_discount_percent,
                    engine_second_cost, effective_time, create_time, revision
                )
                SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, value FROM next
                ON CONFLICT DO NOTHING
                """,
                price.price_id,
                price.offering_id,
                price.input_price,
                price.output_price,
                price.cached_input_price,
                price.reasoning_price,
                price.request_price,
                price.background_discount_percent,
                price.engine_second_cost,
                price.effective_time,
                price.create_time,
            )
            stored = await _get_price(connection, price.price_id)
        if not price.is_repeat_of(stored):
            raise already_exists(f"prices/{price.price_id}")
        return stored

    async def get_price(self, price_id: str) -> Price:
        """Reads a price.

        Raises:
            NotFound: there is none.
        """
        async with self._database.transaction() as connection:
            return await _get_price(connection, price_id)

    async def list_prices(self, offering_id: str, page: Page) -> list[Price]:
        """Reads `page.read_size` prices by id: of an offering, or of all when it is empty."""
        if not offering_id:
            rows = await self._database.fetch(
                f"{_PRICE} WHERE price_id > $1 ORDER BY price_id LIMIT $2",
                page.after,
                page.read_size,
            )
        else:
            rows = await self._database.fetch(
                f"{_PRICE} WHERE offering_id = $1 AND price_id > $2 ORDER BY price_id LIMIT $3",
                offering_id,
                page.after,
                page.read_size,
            )
        return [price_from_row(row) for row in rows]

    async def list_prices_after(self, revision: int, count: int) -> list[Price]:
        """Reads at most `count` prices that were created after a revision, by revision."""
        rows = await self._database.fetch(
            f"{_PRICE} WHERE revision > $1 ORDER BY revision LIMIT $2", revision, count
        )
        return [price_from_row(row) for row in rows]

    async def get_revision(self) -> int:
        """Reads how far the price book has changed."""
        row = await self._database.fetch_row("SELECT value FROM price_revision")
        assert row is not None
        return int(row["value"])


async def find_prices(database: Database, price_ids: set[str]) -> dict[str, Price]:
    """Reads prices by id; those that there are."""
    rows = await database.fetch(f"{_PRICE} WHERE price_id = ANY($1::text[])", list(price_ids))
    return {row["price_id"]: price_from_row(row) for row in rows}


async def _get_price(connection: Connection, price_id: str) -> Price:
    row = await connection.fetchrow(f"{_PRICE} WHERE price_id = $1", price_id)
    if row is None:
        raise not_found(f"prices/{price_id}")
    return price_from_row(row)


def price_from_row(row: asyncpg.Record) -> Price:
    """Reads a price."""
    return Price(
        price_id=row["price_id"],
        offering_id=row["offering_id"],
        input_price=row["input_price"],
        output_price=row["output_price"],
        cached_input_price=row["cached_input_price"],
        reasoning_price=row["reasoning_price"],
        request_price=row["request_price"],
        background_discount_percent=row["background_discount_percent"],
        engine_second_cost=row["engine_second_cost"],
        effective_time=row["effective_time"],
        create_time=row["create_time"],
        revision=row["revision"],
    )
