"""Every statement of the scheduler. Only epochs are kept; all else is rebuilt by the workers."""

from __future__ import annotations

from datetime import datetime

from libs.postgres import Database
from services.scheduler.core.messages import Registration


class SchedulerStore:
    """Epochs of workers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def next_epoch(self, registration: Registration, now: datetime) -> int:
        """Returns an epoch above all that were given under this worker's name, from 1.

        One statement, which locks the worker's row. May be repeated: an epoch is skipped.

        Raises:
            Unavailable: the database is away.
        """
        row = await self._database.fetch_row(
            """
            INSERT INTO worker (name, epoch, incarnation, endpoint, register_time)
            VALUES ($1, 1, $2, $3, $4)
            ON CONFLICT (name) DO UPDATE
               SET epoch = worker.epoch + 1,
                   incarnation = excluded.incarnation,
                   endpoint = excluded.endpoint,
                   register_time = excluded.register_time
            RETURNING epoch
            """,
            registration.worker,
            registration.incarnation,
            registration.endpoint,
            now,
        )
        assert row is not None
        return int(row["epoch"])
