from __future__ import annotations

import pytest

from services.worker import reports as module
from services.worker.reports import Reports


def test_nothing_is_kept_while_nobody_is_connected() -> None:
    reports = Reports()

    reports.started("a")
    reports.open()

    assert reports.take(9) == ([], [])


def test_an_end_never_comes_before_its_start() -> None:
    reports = Reports()
    reports.open()
    for execution_id in "abc":
        reports.started(execution_id)
        reports.ended(execution_id)

    assert reports.take(2) == (["a", "b"], [])
    assert reports.take(2) == (["c"], ["a", "b"])
    assert reports.take(2) == ([], ["c"])
    assert reports.take(2) == ([], [])


def test_more_than_is_kept_is_said_and_not_lost_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENDING_MAX", 2)
    reports = Reports()
    reports.open()
    for execution_id in "abc":
        reports.started(execution_id)

    assert reports.overflowed
    assert reports.changed.is_set()
    reports.open()
    assert not reports.overflowed
