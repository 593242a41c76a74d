"""The auditor on line: looks at what is new all the time, and at everything now and then.

Replicas take turns: who has the lock in the database audits, the others skip. What is found is
logged and counted; nothing is repaired, for only people know which of two numbers is the wrong one.
"""

from __future__ import annotations

from collections import Counter
from contextlib import aclosing
from datetime import datetime

import structlog

from libs.clock import Clock
from libs.errors import Unavailable
from services.billing import metrics
from services.billing.invariants import INVARIANTS
from services.billing.store.audit import AuditResult, AuditStore, AuditWish, Finding, Progress
from services.billing.store.findings import Scope

log = structlog.get_logger(__name__)

FINDINGS_LOGGED_MAX = 100
"""Of one audit. All are counted, and Reconcile tells them."""
FULL_COST = 100
"""A small ledger is looked at as a whole more often: so much longer than it takes to do it."""
RECEIPT_PARTS = 24
"""Old receipts are verified in parts, another one each hour: signatures are the dearest."""
_TIMEOUT_S = 1800.0
_NEW = frozenset({Scope.WINDOW, Scope.STATE})


class Auditor:
    """Audits all the time.

    Args:
        store: the ledger.
        clock: when.
        interval_s: between two audits of what is new.
        full_interval_s: between two audits of everything, at most.
    """

    def __init__(
        self, store: AuditStore, clock: Clock, *, interval_s: float, full_interval_s: float
    ) -> None:
        self._store = store
        self._clock = clock
        self._interval_s = interval_s
        self._full_interval_s = full_interval_s
        # What windows and history have shown since the last whole audit, and what is now.
        self._found: Counter[tuple[str, Scope]] = Counter()

    async def run(self) -> None:
        """Audits for ever. A database that is away only delays the next audit."""
        while True:
            await self._clock.sleep_s(self._interval_s)
            try:
                await self.audit()
            except Unavailable:
                log.warning("audit failed", cause="database is away")

    async def audit(self) -> AuditResult | None:
        """Audits once; returns what came of it, None when another replica is at it or just was.

        Raises:
            Unavailable: the database is away.
        """
        now = self._clock.now()
        progress = await self._store.read_progress()
        if _age_s(now, progress.time) < self._interval_s / 2:
            return None
        is_full = self._is_full_due(now, progress)
        started_s = self._clock.monotonic_s()
        result = await self._look(self._wish(now, progress, is_full=is_full))
        if result is None:
            return None
        duration_s = self._clock.monotonic_s() - started_s
        self._report(result, is_full=is_full, duration_s=duration_s)
        await self._store.add_checkpoint(
            result.end, is_full=is_full, duration_s=duration_s, now=now
        )
        return result

    def _is_full_due(self, now: datetime, progress: Progress) -> bool:
        cheap_s = max(self._interval_s, FULL_COST * progress.full_duration_s)
        return _age_s(now, progress.full_time) >= min(cheap_s, self._full_interval_s)

    def _wish(self, now: datetime, progress: Progress, *, is_full: bool) -> AuditWish:
        if not is_full:
            return AuditWish(
                start=progress.checkpoint,
                scopes=_NEW,
                findings_max=FINDINGS_LOGGED_MAX,
                timeout_s=_TIMEOUT_S,
                is_leading=True,
            )
        part = int(now.timestamp() // self._full_interval_s) % RECEIPT_PARTS
        return AuditWish(
            receipt_share=(part, RECEIPT_PARTS),
            receipts_after=progress.checkpoint.record_count,
            findings_max=FINDINGS_LOGGED_MAX,
            timeout_s=_TIMEOUT_S,
            is_leading=True,
        )

    async def _look(self, wish: AuditWish) -> AuditResult | None:
        async with aclosing(self._store.audit(wish)) as found:
            async for item in found:
                match item:
                    case Finding():
                        log.error(
                            "invariant broken",
                            invariant=item.invariant_id,
                            resource=item.resource,
                            description=item.description,
                        )
                    case AuditResult():
                        return item
        return None

    def _report(self, result: AuditResult, *, is_full: bool, duration_s: float) -> None:
        kind = "full" if is_full else "new"
        metrics.AUDITS.labels(kind).inc()
        metrics.AUDIT_DURATION.labels(kind).observe(duration_s)
        if is_full:
            self._found = Counter(result.counts)
        else:
            for key, count in result.counts.items():
                # What is in a window is looked at once until the next whole audit.
                self._found[key] = count + (self._found[key] if key[1] is Scope.WINDOW else 0)
        for invariant in INVARIANTS:
            total = sum(
                count for key, count in self._found.items() if key[0] == invariant.invariant_id
            )
            metrics.VIOLATIONS.labels(invariant.invariant_id).set(total)


def _age_s(now: datetime, time: datetime | None) -> float:
    return float("inf") if time is None else (now - time).total_seconds()
