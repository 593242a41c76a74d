"""libs/limits.py: the relations between limits, and those that the contract promises."""

from __future__ import annotations

from libs import limits
from libs.paging import PAGE_BYTES_MAX


def test_signs_of_life_keep_the_promise_of_the_contract() -> None:
    # "A response without changes is a sign of life, sent at least every five seconds."
    assert limits.WATCH_BOOKMARK_S < 5


def test_watcher_outwaits_two_lost_signs_of_life() -> None:
    assert limits.WATCH_BOOKMARK_S * 2 < limits.WATCH_SILENCE_MAX_S


def test_revoked_key_is_seen_everywhere_within_two_seconds() -> None:
    # Found by a replica at its next look, then pushed.
    assert limits.WATCH_POLL_S * 2 < 2


def test_lost_watch_is_found_long_before_the_key_table_is_too_old() -> None:
    assert limits.WATCH_SILENCE_MAX_S * 4 < limits.KEY_TABLE_AGE_MAX_S


def test_page_fits_into_what_clients_accept() -> None:
    assert PAGE_BYTES_MAX < 4 * 1024 * 1024


def test_status_details_fit_into_trailers() -> None:
    assert limits.STATUS_DETAILS_BYTES_MAX < limits.METADATA_BYTES_MAX


def test_pings_of_our_own_clients_are_welcome() -> None:
    assert limits.PING_INTERVAL_MIN_MS < limits.KEEPALIVE_TIME_MS
