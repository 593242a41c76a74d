"""Usage: lists of records, and sums over them."""

from __future__ import annotations

import json
from dataclasses import dataclass

import asyncpg

from libs.errors import not_found
from libs.paging import Page
from libs.postgres import Connection, Database
from services.billing.domain import EndCause, UsageRecord, account_name
from services.billing.store.ledger import number_after
from services.billing.store.records import RECORD, record_from_row
from services.billing.store.reports import Reports
from services.billing.usage import (
    Dimension,
    Grouping,
    UsageFilter,
    UsageSummary,
    values_of_key,
)

_ADVICE = "narrow filter.start_time and filter.end_time"
_END_CAUSES = " ".join(f"WHEN {item.value} THEN 'END_CAUSE_{item.name}'" for item in EndCause)
# The texts that a group's values are; a label's takes the number of its argument.
_VALUES = {
    Dimension.DAY: "to_char(settle_time AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    Dimension.PROJECT: "'projects/' || project_id",
    Dimension.API_KEY: "'apiKeys/' || api_key_id",
    Dimension.OFFERING: "'offerings/' || offering_id",
    Dimension.MODEL_VERSION: "'models/' || model_id || '/versions/' || version_id",
    Dimension.PRICE: "'prices/' || price_id",
    Dimension.LABEL: "coalesce(labels ->> ${label}, '')",
    Dimension.END_CAUSE: f"CASE end_cause {_END_CAUSES} ELSE end_cause::text END",
}
_SUMS = """
    count(*) AS record_count,
    coalesce(sum(input_tokens), 0)::bigint AS input_tokens,
    coalesce(sum(cached_input_tokens), 0)::bigint AS cached_input_tokens,
    coalesce(sum(output_tokens), 0)::bigint AS output_tokens,
    coalesce(sum(reasoning_tokens), 0)::bigint AS reasoning_tokens,
    coalesce(sum(amount - shortfall), 0)::bigint AS charge,
    coalesce(sum(given_back), 0)::bigint AS refunded,
    coalesce(sum(engine_time_us), 0)::bigint AS engine_time_us,
    coalesce(sum(ceil(engine_time_us::numeric * engine_second_cost / 1000000)), 0)::bigint
        AS engine_cost
"""
_REFUNDS = """
    SELECT generation_id, sum(amount) AS given_back
      FROM refund
     WHERE account_id = $1
     GROUP BY generation_id
"""
# The index of times has what it takes to find the numbers. In order of numbers, all records before
# that time would be read first: the sum keeps the planner from it.
_RECORDS_FROM_A_TIME = """
    {record}
     WHERE account_id = $1
       AND number = ANY (ARRAY(
               SELECT number
                 FROM usage_record
                WHERE {conditions}
                ORDER BY number + 0
                LIMIT $3
           ))
     ORDER BY number
"""
_SUMMARY = """
    SELECT *
      FROM (
               SELECT {columns}
                 FROM usage_record
                 LEFT JOIN (SELECT price_id, engine_second_cost FROM price) AS cost
                USING (price_id)
                 LEFT JOIN ({refunds}) AS given
                USING (generation_id)
                WHERE {conditions}
                {group}
           ) AS summary
    {behind}
    {order}
     LIMIT $2
"""


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement and its arguments."""

    text: str
    arguments: list[object]


class UsageStore:
    """Usage. Every method may be repeated; all raise Unavailable.

    Args:
        database: where records are.
        reports: for what may take long.
    """

    def __init__(self, database: Database, reports: Reports) -> None:
        self._database = database
        self._reports = reports

    async def list_records(
        self,
        account_id: str,
        page: Page,
        *,
        generation_id: str,
        wanted: UsageFilter,
        timeout_s: float,
    ) -> list[UsageRecord]:
        """Reads `page.read_size` records of an account by number.

        Args:
            account_id: whose.
            page: which.
            generation_id: only the record of this generation, when not empty.
            wanted: only those that it lets through.
            timeout_s: longest time that it may take, with a filter.

        Raises:
            NotFound: there is no such account.
            InvalidArgument: BAD_PAGE_TOKEN.
            DeadlineExceeded, ResourceExhausted: as Reports.open says.
        """
        statement = records_statement(account_id, page, generation_id, wanted)
        if wanted.is_empty:
            async with self._database.transaction() as connection:
                await _check_account(connection, account_id)
                rows = await connection.fetch(statement.text, *statement.arguments)
        else:
            async with self._reports.open(account_id, timeout_s, advice=_ADVICE) as report:
                await _check_account(report.connection, account_id)
                rows = await report.fetch(statement.text, statement.arguments)
        return [record_from_row(row) for row in rows]

    async def summarize(
        self,
        account_id: str,
        page: Page,
        *,
        wanted: UsageFilter,
        grouping: Grouping,
        timeout_s: float,
    ) -> list[UsageSummary]:
        """Reads the sums of `page.read_size` groups, in order of their values.

        Args:
            account_id: whose.
            page: which.
            wanted: what is summed.
            grouping: how.
            timeout_s: longest time that it may take.

        Raises:
            NotFound: there is no such account.
            InvalidArgument: BAD_PAGE_TOKEN.
            DeadlineExceeded, ResourceExhausted: as Reports.open says.
        """
        statement = summary_statement(account_id, page, wanted, grouping)
        async with self._reports.open(account_id, timeout_s, advice=_ADVICE) as report:
            await _check_account(report.connection, account_id)
            rows = await report.fetch(statement.text, statement.arguments)
        return [_summary_from_row(row, len(grouping.dimensions)) for row in rows]


def records_statement(
    account_id: str, page: Page, generation_id: str, wanted: UsageFilter
) -> Statement:
    """Makes the statement that reads a page of records.

    Raises:
        InvalidArgument: BAD_PAGE_TOKEN.
    """
    arguments: list[object] = [account_id, number_after(page), page.read_size]
    where = ["account_id = $1", "number > $2", *_conditions(wanted, arguments)]
    if generation_id:
        arguments.append(generation_id)
        where.append(f"generation_id = ${len(arguments)}")
    conditions = " AND ".join(where)
    if wanted.start_time is None:
        text = f"{RECORD} WHERE {conditions} ORDER BY number LIMIT $3"
    else:
        text = _RECORDS_FROM_A_TIME.format(record=RECORD, conditions=conditions)
    return Statement(text, arguments)


def summary_statement(
    account_id: str, page: Page, wanted: UsageFilter, grouping: Grouping
) -> Statement:
    """Makes the statement that sums a page of groups.

    Raises:
        InvalidArgument: BAD_PAGE_TOKEN.
    """
    arguments: list[object] = [account_id, page.read_size]
    where = ["account_id = $1", *_conditions(wanted, arguments)]
    label = ""
    if grouping.label_key:
        arguments.append(grouping.label_key)
        label = str(len(arguments))
    values = [
        f'({_VALUES[item].replace("{label}", label)}) COLLATE "C" AS value_{index}'
        for index, item in enumerate(grouping.dimensions)
    ]
    names = [f"value_{index}" for index in range(len(values))]
    group = f"GROUP BY {', '.join(names)}" if names else ""
    order = f"ORDER BY {', '.join(names)}" if names else ""
    behind = ""
    if page.after:
        after = values_of_key(page.after, len(names))
        places = [f"${len(arguments) + index}::text" for index in range(1, len(after) + 1)]
        arguments += after
        behind = f"WHERE ({', '.join(names)}) > ({', '.join(places)})"
    text = _SUMMARY.format(
        columns=", ".join([*values, _SUMS]),
        refunds=_REFUNDS,
        conditions=" AND ".join(where),
        group=group,
        behind=behind,
        order=order,
    )
    return Statement(text, arguments)


def _conditions(wanted: UsageFilter, arguments: list[object]) -> list[str]:
    """Lists what the filter asks for; appends the arguments that it needs."""
    model_id, version_id = wanted.model_version or ("", "")
    asked: list[tuple[str, object]] = [
        ("project_id = $", wanted.project_id),
        ("api_key_id = $", wanted.api_key_id),
        ("offering_id = $", wanted.offering_id),
        ("model_id = $", model_id),
        ("version_id = $", version_id),
        ("end_user = $", wanted.end_user),
        ("labels @> $", json.dumps(dict(wanted.labels)) if wanted.labels else ""),
        ("settle_time >= $", wanted.start_time),
        ("settle_time < $", wanted.end_time),
    ]
    found: list[str] = []
    for condition, argument in asked:
        if argument is not None and argument != "":
            arguments.append(argument)
            found.append(f"{condition}{len(arguments)}")
    return found


async def _check_account(connection: Connection, account_id: str) -> None:
    if not await connection.fetchval(
        "SELECT EXISTS (SELECT FROM account WHERE account_id = $1)", account_id
    ):
        raise not_found(account_name(account_id))


def _summary_from_row(row: asyncpg.Record, value_count: int) -> UsageSummary:
    return UsageSummary(
        values=tuple(row[f"value_{index}"] for index in range(value_count)),
        record_count=row["record_count"],
        input_tokens=row["input_tokens"],
        cached_input_tokens=row["cached_input_tokens"],
        output_tokens=row["output_tokens"],
        reasoning_tokens=row["reasoning_tokens"],
        charge=row["charge"],
        refunded=row["refunded"],
        engine_time_us=row["engine_time_us"],
        engine_cost=row["engine_cost"],
    )
