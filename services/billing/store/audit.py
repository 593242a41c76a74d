"""The auditor's reads: every check on one snapshot, and how far it came.

A check is a statement of findings.py; receipts are read here and judged by who asks. Nothing is
locked, and nothing is written but the checkpoints.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from libs.errors import not_found
from libs.postgres import Connection, Database
from libs.receipts import PUBLIC_KEY_BYTES, ReceiptContent, ReceiptKeys
from services.billing.domain import Receipt, account_name
from services.billing.store import findings, sums
from services.billing.store.findings import RECEIPTS, Check, Scope

FaultOf = Callable[[Receipt, ReceiptContent, ReceiptKeys], str]
"""Takes a receipt, what it has to say, and the keys; says what is wrong, '' when nothing is."""

CHECKS = (*findings.CHECKS, *sums.CHECKS)
CHECKPOINTS_MAX = 20_000
"""As many are kept: two weeks of one a minute."""
# The arguments have their types here, whichever of them the statement takes.
_BROKEN = """
    WITH argument AS (SELECT $1::text, $2::bigint, $3::bigint, $4::interval, $5::text[])
    SELECT resource, description, count(*) OVER () AS total
      FROM
"""
_CHECKPOINT = "SELECT record_count, entry_count FROM audit_checkpoint"
# Any constant, as long as every replica takes the same.
_LEADER_LOCK = 0x6D616173_61756474
# Whoever reads what is found may be slow, but not for ever: the snapshot keeps dead rows alive.
_IDLE_MS = 60_000
_WORK_MEMORY = "64MB"
# The server gives up first; this only is for one that no longer answers.
_SLACK_S = 5.0
_RECEIPTS_READ = 500
# Signatures that are verified at a time, about 1.5 ms: other calls are served in between.
_AT_ONCE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """How far ledger and usage were written when they were looked at.

    Attributes:
        record_count: number of the last usage record.
        entry_count: number of the last ledger entry.
    """

    record_count: int = 0
    entry_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the audits so far did.

    Attributes:
        checkpoint: of the last one.
        time: of the last one; None when there was none.
        full_time: of the last one of all; None when there was none.
        full_duration_s: how long that took.
    """

    checkpoint: Checkpoint = Checkpoint()
    time: datetime | None = None
    full_time: datetime | None = None
    full_duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditWish:
    """What is to be looked at.

    Attributes:
        account_id: only this account, besides the sums of all; empty for all.
        start: only records and entries behind it.
        scopes: which checks.
        receipt_share: (index, of how many): receipts whose number leaves this rest are verified.
        receipts_after: behind this record number all receipts are.
        findings_max: most that are told.
        timeout_s: longest time of a statement.
        is_leading: only if no other replica audits at this moment.
    """

    account_id: str = ""
    start: Checkpoint = Checkpoint()
    scopes: frozenset[Scope] = frozenset(Scope)
    receipt_share: tuple[int, int] = (0, 1)
    receipts_after: int = 0
    findings_max: int = 1000
    timeout_s: float = 600.0
    is_leading: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One broken invariant.

    Attributes:
        invariant_id: "I1" to "I12".
        resource: a resource name, or "ledger".
        description: what should be and what is, for people.
    """

    invariant_id: str
    resource: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """How far an audit came.

    Attributes:
        counts: violations, told or not, by invariant and scope; zero where all is well.
        record_count: usage records that were looked at.
        entry_count: ledger entries that were looked at.
        end: how far ledger and usage were written.
    """

    counts: Mapping[tuple[str, Scope], int]
    record_count: int
    entry_count: int
    end: Checkpoint

    @property
    def violation_count(self) -> int:
        """All violations."""
        return sum(self.counts.values())


class AuditStore:
    """Checks of the ledger. All methods raise Unavailable.

    Args:
        database: the ledger.
        overdue_s: longest time that a slice may hold money after its lease: the grace, and until
            the sweeper comes.
        fault_of: judges receipts.
        keys: that are in use; those of the history are known besides. A process that has just
            started settles with them before it has put them there.
        reviewed: generations whose bad receipts an operator has looked at; not told any more.
    """

    def __init__(
        self,
        database: Database,
        *,
        overdue_s: float,
        fault_of: FaultOf,
        keys: ReceiptKeys | None = None,
        reviewed: Collection[str] = (),
    ) -> None:
        self._database = database
        self._overdue = timedelta(seconds=overdue_s)
        self._fault_of = fault_of
        self._reviewed = frozenset(reviewed)
        self._in_use = () if keys is None else tuple(keys.public_keys.values())

    async def audit(self, wish: AuditWish) -> AsyncGenerator[Finding | AuditResult, None]:
        """Looks for what is broken, on one snapshot: findings, then the result.

        Nothing at all comes when `is_leading` is wanted and another replica is at it.

        Raises:
            NotFound: there is no such account.
        """
        counts: Counter[tuple[str, Scope]] = Counter()
        told = 0
        async with self._database.transaction() as connection:
            await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            if wish.is_leading and not await connection.fetchval(
                "SELECT pg_try_advisory_xact_lock($1)", _LEADER_LOCK
            ):
                return
            await _prepare(connection, wish)
            for check in CHECKS:
                if check.scope not in wish.scopes:
                    continue
                found, count = await self._look(connection, check, wish, told)
                counts[check.invariant_id, check.scope] += count
                for finding in found[: wish.findings_max - told]:
                    yield finding
                    told += 1
            async for finding in self._receipts(connection, wish):
                counts["I8", Scope.WINDOW] += 1
                if told < wish.findings_max:
                    yield finding
                    told += 1
            result = await _result(connection, wish, counts)
        yield result

    async def _look(
        self, connection: Connection, check: Check, wish: AuditWish, told: int
    ) -> tuple[list[Finding], int]:
        """Runs a check; returns what it finds first, and how much there is."""
        try:
            async with connection.transaction():
                rows = await connection.fetch(
                    f"{_BROKEN} ({check.statement}) AS broken ORDER BY resource LIMIT $6",
                    wish.account_id,
                    wish.start.record_count,
                    wish.start.entry_count,
                    self._overdue,
                    list(self._reviewed),
                    # One at least, for its total.
                    max(wish.findings_max - told, 1),
                    timeout=wish.timeout_s + _SLACK_S,
                )
        except asyncpg.DataError as error:
            # A hand has written what no sum holds. That must not end the process, nor stay unsaid.
            text = f"cannot be computed: {error.args[0]}"
            return [
                Finding(invariant_id=check.invariant_id, resource="ledger", description=text)
            ], 1
        found = [
            Finding(
                invariant_id=check.invariant_id,
                resource=row["resource"],
                description=row["description"],
            )
            for row in rows
        ]
        return found, rows[0]["total"] if rows else 0

    async def _receipts(
        self, connection: Connection, wish: AuditWish
    ) -> AsyncGenerator[Finding, None]:
        """Verifies receipts and compares them with their records."""
        rows = await connection.fetch(
            "SELECT public_key FROM receipt_key WHERE octet_length(public_key) = $1",
            PUBLIC_KEY_BYTES,
        )
        keys = ReceiptKeys([*self._in_use, *(row["public_key"] for row in rows)])
        index, parts = wish.receipt_share
        number = 0
        cursor = connection.cursor(
            RECEIPTS,
            wish.account_id,
            wish.start.record_count,
            parts,
            index,
            wish.receipts_after,
            prefetch=_RECEIPTS_READ,
            timeout=wish.timeout_s + _SLACK_S,
        )
        async for row in cursor:
            number += 1
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)
            receipt = Receipt(
                content=row["content"], key_id=row["key_id"], signature=row["signature"]
            )
            content = _content_from_row(row)
            fault = self._fault_of(receipt, content, keys)
            if fault and content.generation_id not in self._reviewed:
                yield Finding(
                    invariant_id="I8",
                    resource=f"{content.account}/usageRecords/{content.generation_id}",
                    description=f"its receipt: {fault}",
                )

    async def checkpoint_before(self, record_number: int) -> Checkpoint:
        """Finds where to begin so that all behind a record is looked at."""
        row = await self._database.fetch_row(
            f"""
            {_CHECKPOINT}
             WHERE record_count <= $1
             ORDER BY record_count DESC, entry_count
             LIMIT 1
            """,
            record_number,
        )
        return Checkpoint() if row is None else _checkpoint_from_row(row)

    async def read_progress(self) -> Progress:
        """Reads what the audits so far did, of all replicas."""
        row = await self._database.fetch_row(
            """
            SELECT last.record_count, last.entry_count, last.create_time,
                   whole.create_time AS full_time, whole.duration_us
              FROM (SELECT * FROM audit_checkpoint ORDER BY number DESC LIMIT 1) AS last
              LEFT JOIN LATERAL (
                       SELECT create_time, duration_us
                         FROM audit_checkpoint
                        WHERE is_full
                        ORDER BY number DESC
                        LIMIT 1
                   ) AS whole ON true
            """
        )
        if row is None:
            return Progress()
        return Progress(
            checkpoint=_checkpoint_from_row(row),
            time=row["create_time"],
            full_time=row["full_time"],
            full_duration_s=(row["duration_us"] or 0) / 1e6,
        )

    async def add_checkpoint(
        self, checkpoint: Checkpoint, *, is_full: bool, duration_s: float, now: datetime
    ) -> None:
        """Says how far an audit came, and forgets the oldest that are too many."""
        async with self._database.transaction() as connection:
            number = await connection.fetchval(
                """
                INSERT INTO audit_checkpoint (
                    record_count, entry_count, is_full, duration_us, create_time
                )
                VALUES ($1, $2, $3, $4, $5)
                RETURNING number
                """,
                checkpoint.record_count,
                checkpoint.entry_count,
                is_full,
                round(duration_s * 1e6),
                now,
            )
            await connection.execute(
                "DELETE FROM audit_checkpoint WHERE number <= $1", number - CHECKPOINTS_MAX
            )


async def _prepare(connection: Connection, wish: AuditWish) -> None:
    """Sets what statements of an audit may take.

    Raises:
        NotFound: there is no such account.
    """
    await connection.execute(
        """
        SELECT set_config('statement_timeout', $1, true),
               set_config('idle_in_transaction_session_timeout', $2, true),
               set_config('work_mem', $3, true),
               -- Plans depend on whether an account and a number are given.
               set_config('plan_cache_mode', 'force_custom_plan', true)
        """,
        str(max(int(wish.timeout_s * 1000), 1)),
        str(_IDLE_MS),
        _WORK_MEMORY,
    )
    if wish.account_id and not await connection.fetchval(
        "SELECT EXISTS (SELECT FROM account WHERE account_id = $1)", wish.account_id
    ):
        raise not_found(account_name(wish.account_id))


async def _result(
    connection: Connection, wish: AuditWish, counts: Mapping[tuple[str, Scope], int]
) -> AuditResult:
    head = await connection.fetchrow("SELECT record_count, entry_count FROM ledger_head")
    assert head is not None
    records = head["record_count"] - wish.start.record_count
    entries = head["entry_count"] - wish.start.entry_count
    if wish.account_id:
        own = await connection.fetchrow(
            """
            SELECT (SELECT count(*) FROM usage_record WHERE account_id = $1 AND number > $2)
                       AS records,
                   (SELECT count(*) FROM ledger_entry WHERE account_id = $1 AND number > $3)
                       AS entries
            """,
            wish.account_id,
            wish.start.record_count,
            wish.start.entry_count,
        )
        assert own is not None
        records, entries = own["records"], own["entries"]
    return AuditResult(
        counts=counts,
        # After a hand at the head there may be less than nothing behind the start.
        record_count=max(records, 0),
        entry_count=max(entries, 0),
        end=_checkpoint_from_row(head),
    )


def _checkpoint_from_row(row: asyncpg.Record) -> Checkpoint:
    return Checkpoint(record_count=row["record_count"], entry_count=row["entry_count"])


def _content_from_row(row: asyncpg.Record) -> ReceiptContent:
    return ReceiptContent(
        generation_id=row["generation_id"],
        request_id=row["request_id"],
        account=account_name(row["account_id"]),
        project=f"projects/{row['project_id']}",
        offering=f"offerings/{row['offering_id']}",
        model_version=f"models/{row['model_id']}/versions/{row['version_id']}",
        price=f"prices/{row['price_id']}",
        input_tokens=row["input_tokens"],
        cached_input_tokens=row["cached_input_tokens"],
        output_tokens=row["output_tokens"],
        reasoning_tokens=row["reasoning_tokens"],
        charge_nanos=row["amount"],
        end_cause=row["end_cause"],
        start_time=row["start_time"],
        end_time=row["end_time"],
    )
