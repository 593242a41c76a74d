"""Metrics of the billing service. No label names a tenant: their number has no bound."""

from __future__ import annotations

from prometheus_client import Counter

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
