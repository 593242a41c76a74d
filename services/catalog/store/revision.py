"""The counter that watches follow."""

from __future__ import annotations

from libs.postgres import Connection


async def next_revision(connection: Connection) -> int:
    """Raises the revision, and locks it until the transaction ends."""
    value = await connection.fetchval("UPDATE revision SET value = value + 1 RETURNING value")
    return int(value)
