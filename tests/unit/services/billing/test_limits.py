"""What fits into the windows of spend limits: arithmetic only."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from libs.errors import Reason, ResourceExhausted
from services.billing.limits import Window, room_of

NOW = datetime(2026, 3, 1, 18, tzinfo=UTC)
DAY = timedelta(hours=6)
MONTH = timedelta(days=30, hours=6)


def window(
    limit_id: str, amount: int, *, spent: int = 0, held: int = 0, rest: timedelta = DAY
) -> Window:
    return Window(
        limit_id=limit_id,
        amount=amount,
        start=NOW - timedelta(hours=18),
        end=NOW + rest,
        spent=spent,
        held=held,
    )


@pytest.mark.parametrize(
    ("required", "wanted", "nanos"), [(0, 500, 60), (10, 40, 40), (60, 0, 60), (0, 0, 0)]
)
def test_room_is_what_the_fullest_window_has(required: int, wanted: int, nanos: int) -> None:
    windows = [
        window("day", 100, spent=30, held=10),
        window("month", 900, spent=5, rest=MONTH),
    ]

    room = room_of(windows, required=required, wanted=wanted, now=NOW)

    assert room.nanos == nanos
    assert room.end == NOW + DAY


def test_window_above_its_limit_has_no_room_and_not_less() -> None:
    assert window("day", 100, spent=80, held=50).room == 0


def refused(*windows: Window, required: int) -> ResourceExhausted:
    with pytest.raises(ResourceExhausted) as caught:
        room_of(windows, required=required, wanted=required, now=NOW)
    assert caught.value.reason is Reason.SPEND_LIMIT_REACHED
    return caught.value


def test_of_several_full_windows_the_last_to_end_says_when_to_come_back() -> None:
    error = refused(
        window("day", 100, spent=95),
        window("month", 900, spent=899, rest=MONTH),
        window("roomy", 900),
        required=10,
    )

    assert error.metadata["limit"] == "limits/month"
    assert error.metadata["availableNanos"] == "1"
    assert error.retry_after_s == MONTH.total_seconds()


def test_what_never_fits_has_no_time_to_come_back() -> None:
    error = refused(
        window("day", 9, spent=1), window("month", 900, spent=899, rest=MONTH), required=10
    )

    assert error.metadata["limit"] == "limits/day"
    assert error.retry_after_s is None
