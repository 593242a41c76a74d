from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from maas.billing.v1 import usage_service_pb2 as usage_pb

from libs.errors import InvalidArgument, Reason
from services.billing.usage import Dimension, key_of_values, values_of_key


@given(st.lists(st.text(max_size=256), min_size=1, max_size=8))
def test_values_survive_the_way_into_a_key_and_back(values: list[str]) -> None:
    assert values_of_key(key_of_values(values), len(values)) == tuple(values)


@given(st.text(max_size=12), st.integers(0, 8))
def test_any_text_is_a_key_or_a_bad_token(key: str, count: int) -> None:
    with contextlib.suppress(InvalidArgument):
        assert len(values_of_key(key, count)) == count > 0


@pytest.mark.parametrize("key", ["", "1:", "2:a", "a", ":", "1000:a", "-1:a", "1:ab", "\u00b2:ab"])
def test_keys_that_nobody_wrote_are_refused(key: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        values_of_key(key, 1)

    assert caught.value.reason is Reason.BAD_PAGE_TOKEN


def test_dimensions_are_those_of_the_contract() -> None:
    contract = {
        value.name.removeprefix("USAGE_DIMENSION_"): value.number
        for value in usage_pb.UsageDimension.DESCRIPTOR.values
        if value.number
    }

    assert {item.name: item.value for item in Dimension} == contract
