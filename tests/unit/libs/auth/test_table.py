"""libs/auth/table.py: the table that every service checks credentials against."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.auth import KeyRecord, KeyTable, Principal, Role, new_key, sha256_of
from libs.errors import Reason, Unauthenticated, Unavailable
from libs.limits import KEY_TABLE_AGE_MAX_S

KEY = new_key(1, 1)
NOW_S = 1000.0
RECORD = KeyRecord(
    key_id=KEY.key_id,
    secret_sha256=sha256_of(KEY.secret),
    role=Role.TENANT,
    is_active=True,
    project="demo",
    organization="acme",
    revision=5,
)
REVOKED = dataclasses.replace(RECORD, is_active=False, revision=6)


def table_of(*records: KeyRecord) -> KeyTable:
    table = KeyTable()
    table.apply(records)
    table.touch(NOW_S)
    return table


def refusal(table: KeyTable, credential: str, now_s: float = NOW_S) -> Reason | None:
    try:
        table.authenticate(credential, now_s)
    except Unauthenticated as error:
        return error.reason
    return None


def test_key_says_who_calls() -> None:
    got = table_of(RECORD).authenticate(KEY.secret, NOW_S)

    assert got == Principal(
        key_id=KEY.key_id, role=Role.TENANT, project="demo", organization="acme"
    )


def test_unknown_key_is_refused() -> None:
    assert refusal(table_of(), KEY.secret) is Reason.CREDENTIALS_INVALID


def test_same_id_with_another_secret_is_refused() -> None:
    assert refusal(table_of(RECORD), new_key(1, 2).secret) is Reason.CREDENTIALS_INVALID


def test_malformed_key_is_refused_before_anything_is_looked_up() -> None:
    assert refusal(KeyTable(), "mk_nonsense") is Reason.CREDENTIALS_INVALID


def test_revoked_key_is_refused_and_told_so() -> None:
    assert refusal(table_of(RECORD, REVOKED), KEY.secret) is Reason.CREDENTIALS_REVOKED


def test_revoked_key_with_a_wrong_secret_learns_nothing() -> None:
    assert refusal(table_of(REVOKED), new_key(1, 2).secret) is Reason.CREDENTIALS_INVALID


@given(st.permutations([5, 6, 7, 8]), st.integers(0, 3))
def test_highest_revision_wins_in_any_order(revisions: list[int], repeated: int) -> None:
    records = [
        dataclasses.replace(RECORD, revision=number, is_active=number != 8) for number in revisions
    ]

    table = table_of(*records, records[repeated])

    assert refusal(table, KEY.secret) is Reason.CREDENTIALS_REVOKED


def test_equal_revision_changes_nothing() -> None:
    table = table_of(REVOKED, dataclasses.replace(RECORD, revision=REVOKED.revision))

    assert refusal(table, KEY.secret) is Reason.CREDENTIALS_REVOKED


def test_table_that_was_never_complete_can_tell_nothing() -> None:
    table = KeyTable()
    table.apply([RECORD])

    assert table.age_s(NOW_S) is None
    with pytest.raises(Unavailable) as caught:
        table.authenticate(KEY.secret, NOW_S)
    assert caught.value.metadata == {"dependency": "auth"}


def test_table_is_good_for_60_seconds() -> None:
    table = table_of(RECORD)

    assert KEY_TABLE_AGE_MAX_S == 60
    assert refusal(table, KEY.secret, NOW_S + 60) is None
    with pytest.raises(Unavailable):
        table.authenticate(KEY.secret, NOW_S + 60.001)


def test_touch_makes_it_fresh_again() -> None:
    table = table_of(RECORD)
    table.touch(NOW_S + 100)

    assert table.age_s(NOW_S + 101) == pytest.approx(1)
    assert refusal(table, KEY.secret, NOW_S + 101) is None


def test_listeners_hear_once_of_each_key_that_was_good_and_is_not_any_more() -> None:
    table, heard = table_of(RECORD), list[str]()
    table.on_revoked(heard.append)

    table.apply([REVOKED])
    table.apply([REVOKED, dataclasses.replace(REVOKED, revision=7)])

    assert heard == [KEY.key_id]


def test_nobody_hears_of_a_key_that_was_never_good_here_or_of_a_late_message() -> None:
    table, heard = table_of(), list[str]()
    table.on_revoked(heard.append)

    table.apply([REVOKED])
    table.apply([RECORD])
    table.apply([dataclasses.replace(RECORD, revision=8, project="other")])

    assert heard == []


def test_a_listener_finds_the_table_as_it_is_now() -> None:
    table, heard = table_of(RECORD), list[bool]()
    table.on_revoked(lambda key_id: heard.append(table.is_revoked(key_id)))

    assert not table.is_revoked(KEY.key_id)
    table.apply([REVOKED])

    assert heard == [True]
    assert table_of().is_revoked(KEY.key_id)
