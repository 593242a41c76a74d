"""Engine time that a worker says, right or wrong, never stands in the way of a settlement."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from services.billing.domain import ENGINE_TIME_MAX_US
from services.gateway import convert
from services.gateway.domain import Closing, EndCause, Opening
from services.gateway.meter import Meter

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OPENING = Opening(
    generation_id="g1",
    slice_id="s1",
    account="accounts/dev",
    project="projects/dev",
    api_key="apiKeys/k",
    offering="offerings/x",
    model_version="models/x/versions/1",
    price="prices/p",
    input_tokens=1,
    start_time=NOW,
)
CLOSING = Closing(output_tokens=1, cause=EndCause.COMPLETED, end_time=NOW)


@pytest.mark.parametrize(
    ("said", "settled_us"),
    [
        ([1_500_000, 2_500_000], 4_000),
        ([1_500_000, -(10**18)], 1_500),
        ([315_576_000_000 * 10**9], ENGINE_TIME_MAX_US),
        ([10**15, 10**15, 10**15], ENGINE_TIME_MAX_US),
    ],
)
def test_what_is_settled_is_what_billing_takes(said: list[int], settled_us: int) -> None:
    meter = Meter()
    for engine_time_ns in said:
        meter.add(engine_time_ns)

    made = convert.settlement_to_pb(OPENING, CLOSING, engine_time_ns=meter.engine_time_ns)

    assert made.engine_time.ToMicroseconds() == settled_us <= ENGINE_TIME_MAX_US
