"""Usage records as they are written and read, in one place for all stores."""

from __future__ import annotations

import json
from collections.abc import Iterable

import asyncpg

from libs.postgres import Connection
from services.billing.domain import EndCause, Settlement, UsageRecord

_COLUMNS = (
    "generation_id",
    "account_id",
    "number",
    "credit_slice_id",
    "project_id",
    "api_key_id",
    "offering_id",
    "model_id",
    "version_id",
    "price_id",
    "input_tokens",
    "output_tokens",
    "amount",
    "shortfall",
    "end_cause",
    "start_time",
    "end_time",
    "settle_time",
    "request_id",
    "request_sha256",
    "cached_input_tokens",
    "reasoning_tokens",
    "labels",
    "end_user",
    "engine_time_us",
    "is_background",
)
RECORD = f"""
    SELECT {", ".join(_COLUMNS)},
           coalesce((
               SELECT sum(refund.amount)
                 FROM refund
                WHERE refund.generation_id = usage_record.generation_id
           ), 0)::bigint AS refunded
      FROM usage_record
"""  # noqa: S608 - made of constants


async def insert_records(connection: Connection, records: Iterable[UsageRecord]) -> None:
    """Writes new records, under the lock of the head."""
    await connection.copy_records_to_table(
        "usage_record", columns=_COLUMNS, records=[_row_of(record) for record in records]
    )


def _row_of(record: UsageRecord) -> tuple[object, ...]:
    """Lists the values of the columns."""
    told = record.settlement
    return (
        told.generation_id,
        told.account_id,
        record.number,
        told.slice_id,
        told.project_id,
        told.api_key_id,
        told.offering_id,
        told.model_id,
        told.version_id,
        told.price_id,
        told.input_tokens,
        told.output_tokens,
        record.amount,
        record.shortfall,
        told.end_cause.value,
        told.start_time,
        told.end_time,
        record.settle_time,
        told.request_id,
        told.request_sha256,
        told.cached_input_tokens,
        told.reasoning_tokens,
        # Most requests have no labels.
        json.dumps(dict(told.labels)) if told.labels else "{}",
        told.end_user,
        told.engine_time_us,
        told.is_background,
    )


def record_from_row(row: asyncpg.Record) -> UsageRecord:
    """Reads a record."""
    return UsageRecord(
        settlement=Settlement(
            generation_id=row["generation_id"],
            slice_id=row["credit_slice_id"],
            account_id=row["account_id"],
            project_id=row["project_id"],
            api_key_id=row["api_key_id"],
            offering_id=row["offering_id"],
            model_id=row["model_id"],
            version_id=row["version_id"],
            price_id=row["price_id"],
            input_tokens=row["input_tokens"],
            output_tokens=row["output_tokens"],
            end_cause=EndCause(row["end_cause"]),
            start_time=row["start_time"],
            end_time=row["end_time"],
            request_id=row["request_id"],
            request_sha256=row["request_sha256"],
            cached_input_tokens=row["cached_input_tokens"],
            reasoning_tokens=row["reasoning_tokens"],
            labels=json.loads(row["labels"]),
            end_user=row["end_user"],
            engine_time_us=row["engine_time_us"],
            is_background=row["is_background"],
        ),
        number=row["number"],
        amount=row["amount"],
        shortfall=row["shortfall"],
        settle_time=row["settle_time"],
        refunded=row["refunded"],
    )
