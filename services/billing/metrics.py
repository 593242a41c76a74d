"""Metrics of the billing service. No label names a tenant: their number has no bound."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

SETTLEMENTS = Counter(
    "maas_billing_settlements_total", "Settlements, by whether they were new.", ["outcome"]
)
SETTLEMENTS_LATE = Counter(
    "maas_billing_settlements_late_total", "Settlements that their slice could not pay as a whole."
)
BAD_DEBT = Counter(
    "maas_billing_bad_debt_nanos_total", "Charges that accounts could not pay, nanos."
)
SLICES_EXPIRED = Counter("maas_billing_slices_expired_total", "Slices whose lease ran out.")
SLICES_RECLAIMED = Counter(
    "maas_billing_slices_reclaimed_total", "Expired slices whose rest was freed after the grace."
)
RECEIPTS = Counter(
    "maas_billing_receipts_total",
    "Receipts that came with settlements: kept, refused, or no_keys to check them with.",
    ["outcome"],
)
VIOLATIONS = Gauge(
    "maas_billing_violations",
    "Broken invariants that the auditor knows of, by invariant. Zero when all is well.",
    ["invariant"],
)
AUDITS = Counter(
    "maas_billing_audits_total",
    "Audits that came to their end, of what is new or of all.",
    ["kind"],
)
AUDIT_DURATION = Histogram(
    "maas_billing_audit_duration_seconds",
    "Duration of audits.",
    ["kind"],
    buckets=(0.01, 0.05, 0.25, 1, 5, 30, 120, 600, 3600),
)
GRANTS_EXPIRED = Counter(
    "maas_billing_grants_expired_nanos_total", "What was left of grants when they expired, nanos."
)
SETTLEMENTS_CONTRADICTED = Counter(
    "maas_billing_settlements_contradicted_total",
    "Repeats of settlements that say something else than the first, which counts.",
)
SLICES_PRUNED = Counter(
    "maas_billing_slices_pruned_total", "Rows of ended slices that were deleted."
)
