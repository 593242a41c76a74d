from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from maas.billing.v1 import ledger_pb2

from libs.errors import InvalidArgument
from services.billing import convert
from services.billing.domain import EndCause, EntryKind

TIMES = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis wants bounds without a zone


@given(TIMES)
def test_times_survive_the_way_there_and_back(time: datetime) -> None:
    assert convert.time_from_pb(convert.time_to_pb(time), "t") == time


def test_times_are_cut_to_the_microsecond() -> None:
    message = Timestamp(seconds=1, nanos=1999)

    got = convert.time_from_pb(message, "t")

    assert got == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=1, microseconds=1)


@pytest.mark.parametrize("seconds", [2**40, -(2**40), 2**63 - 1, -(2**63)])
def test_times_out_of_range_are_refused(seconds: int) -> None:
    with pytest.raises(InvalidArgument) as caught:
        convert.time_from_pb(Timestamp(seconds=seconds), "start_time")

    assert caught.value.violations[0].field == "start_time"


def test_end_causes_are_those_of_the_contract() -> None:
    contract = {
        value.name.removeprefix("END_CAUSE_"): value.number
        for value in ledger_pb2.EndCause.DESCRIPTOR.values
        if value.number
    }

    assert {cause.name: cause.value for cause in EndCause} == contract


def test_entry_kinds_are_those_of_the_contract() -> None:
    contract = {
        value.name.removeprefix("ENTRY_KIND_")
        for value in ledger_pb2.EntryKind.DESCRIPTOR.values
        if value.number
    }

    assert {kind.name for kind in EntryKind} == contract


@pytest.mark.parametrize(
    ("texts", "field"), [(["a", ""], "ids[1]"), (["a\0"], "ids[0]"), (["", "\0"], "ids[1]")]
)
def test_texts_that_are_refused(texts: list[str], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        convert.texts_of(texts, "ids")

    assert caught.value.violations[0].field == field
