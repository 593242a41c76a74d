"""libs/ids.py: ids and resource names."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.errors import FieldRule, InvalidArgument
from libs.ids import last_part, parse_name, time_of_ulid, ulid

times = st.datetimes(
    min_value=datetime(2020, 1, 1),  # noqa: DTZ001 - hypothesis wants it so
    max_value=datetime(2100, 1, 1),  # noqa: DTZ001 - hypothesis wants it so
    timezones=st.just(UTC),
)
chance = st.integers(0, 2**80 - 1)


def test_ulid_is_that_of_the_specification() -> None:
    # The example of github.com/ulid/spec: this time encodes as 01ARYZ6S41.
    now = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=1469918176385)

    assert ulid(now, 0) == "01ARYZ6S410000000000000000"
    assert ulid(now, 2**80 - 1) == "01ARYZ6S41ZZZZZZZZZZZZZZZZ"


@given(times, chance, chance)
def test_ulids_sort_by_time(now: datetime, one: int, other: int) -> None:
    assert ulid(now, one) < ulid(now + timedelta(milliseconds=2), other)


@given(times, chance)
def test_ulid_has_26_characters_and_keeps_all_the_chance(now: datetime, bits: int) -> None:
    made = ulid(now, bits)

    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    value = 0
    for character in made:
        value = value * 32 + alphabet.index(character)
    assert len(made) == 26
    assert value % 2**80 == bits


@given(times, chance)
def test_a_ulid_tells_when_it_was_made(now: datetime, bits: int) -> None:
    made = time_of_ulid(ulid(now, bits))

    assert made is not None
    assert abs(made - now) <= timedelta(milliseconds=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "01ARYZ6S41000000000000000",
        "01ARYZ6S4100000000000000000",
        "01aryz6s410000000000000000",
        "01ARYZ6S41000000000000000U",
        "81ARYZ6S410000000000000000",
        "01ARYZ6S41000000000000000\n",
        "7ZZZZZZZZZZZZZZZZZZZZZZZZZ",
    ],
)
def test_what_is_no_ulid_or_beyond_the_calendar_has_no_time(text: str) -> None:
    assert time_of_ulid(text) is None


def test_name_is_taken_apart() -> None:
    got = parse_name("models/Qwen2.5/versions/1_0-a", "models/*/versions/*", field="name")

    assert got == ("Qwen2.5", "1_0-a")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "models/",
        "models/a/versions",
        "models/a/versions/",
        "models/a/versions/b/c",
        "models//versions/b",
        "models/a/versions/b\n",
        "models/.a/versions/b",
        "models/a b/versions/b",
        "models/a/Versions/b",
        "models/é/versions/b",
        f"models/{'a' * 64}/versions/b",
    ],
)
def test_name_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_name(name, "models/*/versions/*", field="offering.model_version")

    (violation,) = caught.value.violations
    assert violation.field == "offering.model_version"
    assert violation.rule is FieldRule.BAD_FORMAT
    assert violation.description == "must have the form models/*/versions/*"


def test_longest_id_is_accepted() -> None:
    assert parse_name(f"models/{'a' * 63}", "models/*", field="name") == ("a" * 63,)


@pytest.mark.parametrize(
    ("name", "want"), [("models/a/versions/b", "b"), ("projects/p", "p"), ("", ""), ("p", "p")]
)
def test_last_part_stands_behind_the_last_slash(name: str, want: str) -> None:
    assert last_part(name) == want
