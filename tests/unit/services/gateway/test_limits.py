"""The table of limits: what applies to a request, after whatever the watch has said."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.errors import Unavailable
from services.gateway.limits import Limit, Limits, Rate
from services.gateway.slices import Purse

ACCOUNT = "accounts/a"
SCOPES = (ACCOUNT, "projects/p", "apiKeys/k")
RATE = Rate(requests=10)


def limit(
    number: int, scope: str, rate: Rate | None = RATE, *, account: str = ACCOUNT, gone: bool = False
) -> Limit:
    return Limit(name=f"limits/l{number}", account=account, scope=scope, rate=rate, is_deleted=gone)


def table(*limits: Limit) -> Limits:
    made = Limits()
    made.apply(limits, is_snapshot=True, is_complete=True)
    return made


def change(limits: Limits, *changed: Limit) -> None:
    limits.apply(changed, is_snapshot=False, is_complete=False)


def test_before_the_first_listing_is_complete_nobody_is_let_in() -> None:
    limits = Limits()
    limits.apply([limit(1, ACCOUNT)], is_snapshot=True, is_complete=False)

    with pytest.raises(Unavailable):
        limits.purse_of(*SCOPES)
    limits.apply([], is_snapshot=True, is_complete=True)
    assert limits.purse_of(*SCOPES) == Purse(ACCOUNT)


def test_a_new_listing_forgets_what_it_does_not_list_and_only_once_it_is_complete() -> None:
    limits = table(limit(1, ACCOUNT, None), limit(2, "apiKeys/k", None))

    limits.begin()
    limits.apply([limit(1, ACCOUNT, None)], is_snapshot=True, is_complete=False)
    assert limits.purse_of(*SCOPES).api_key == "apiKeys/k"
    limits.apply([], is_snapshot=True, is_complete=True)

    assert limits.purse_of(*SCOPES) == Purse(ACCOUNT, is_limited=True)


def test_a_change_leaves_what_is_known_of_others_as_it_is() -> None:
    # A gateway knows the limits of all keys of all tenants; each change is one of them.
    limits = table(*(limit(number, f"apiKeys/{number}") for number in range(100)))
    others = limits.of(ACCOUNT)
    assert others is not None
    before = others.rates(ACCOUNT, "", "apiKeys/7")[0]

    change(limits, limit(100, "apiKeys/k"), limit(101, ACCOUNT, account="accounts/b"))

    assert limits.of(ACCOUNT) is others
    assert others.rates(ACCOUNT, "", "apiKeys/7")[0] is before


def test_an_account_without_limits_is_forgotten() -> None:
    limits = table(limit(1, ACCOUNT), limit(2, "apiKeys/k", None))

    change(limits, limit(1, ACCOUNT, gone=True), limit(2, "apiKeys/k", None, gone=True))
    change(limits, limit(3, ACCOUNT, gone=True))

    assert limits.of(ACCOUNT) is None


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(SCOPES),
            st.sampled_from([ACCOUNT, "accounts/b"]),
            st.booleans(),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_what_applies_is_what_the_last_word_on_each_limit_says(
    steps: list[tuple[int, str, str, bool, bool]],
) -> None:
    limits = table()
    last: dict[str, Limit] = {}
    for number, scope, account, spends, gone in steps:
        said = limit(number, scope, None if spends else RATE, account=account, gone=gone)
        change(limits, said)
        last[said.name] = said
    there = [item for item in last.values() if not item.is_deleted and item.account == ACCOUNT]
    spend_scopes = {item.scope for item in there if item.rate is None}
    names = [
        item.name
        for scope in reversed(SCOPES)
        for item in sorted(there, key=lambda item: item.name)
        if item.scope == scope and item.rate is not None
    ]

    found = limits.of(ACCOUNT)

    assert (found is None) == (not there)
    assert [item.name for item in found.rates(*SCOPES)] == names if found else not names
    purse = limits.purse_of(*SCOPES)
    assert purse.is_limited == bool(spend_scopes)
    assert bool(purse.api_key) == ("apiKeys/k" in spend_scopes)
    assert bool(purse.project) == bool(spend_scopes - {ACCOUNT})
