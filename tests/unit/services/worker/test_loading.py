"""How long an engine may be silent, from what is configured and what was measured."""

from __future__ import annotations

from services.worker.config import WorkerSection
from services.worker.loading import patience_of


def section(**fields: object) -> WorkerSection:
    values = {"name": "w", "endpoint": "h:1", "model_version": "models/m/versions/1"}
    return WorkerSection.model_validate({**values, "engine": "sim", **fields})


def test_a_fast_engine_gets_what_is_configured() -> None:
    got = patience_of(section(canary_every="1s", silent_within="3s", abort_within="7s"), 0.1)

    assert (got.canary_after_s, got.silent_within_s, got.abort_within_s) == (1.0, 3.0, 7.0)


def test_the_defaults_notice_a_hung_engine_within_ten_seconds() -> None:
    assert patience_of(section(), 0.1).silent_within_s < 9.5


def test_a_slow_engine_may_be_silent_for_longer_than_its_longest_step() -> None:
    """A canary may come just before the step begins: only the time behind it is the step's."""
    got = patience_of(section(), 12.0)

    assert got.silent_within_s - got.canary_after_s == 36.0
