"""The scheduler's configuration."""

from __future__ import annotations

import pydantic
import pytest
from maas.scheduler.v1 import placement_service_pb2

from libs.rpc.policy import policies_of
from services.scheduler.config import SchedulerSection


def test_the_defaults_hold() -> None:
    section = SchedulerSection()

    core = section.for_core()

    assert (core.lease_s, core.start_within_s, core.queue_length_max) == (5.0, 5.0, 1000)
    assert (core.lost_kept_s, core.lost_kept_max) == (600.0, 100)


def test_the_longest_wait_is_over_before_the_call() -> None:
    """Else the caller would never learn that it was the queue."""
    service = placement_service_pb2.DESCRIPTOR.services_by_name["PlacementService"]
    deadline_s = policies_of(service)["AcquireSlot"].default_deadline_s

    assert deadline_s is not None
    assert SchedulerSection().wait_max < deadline_s


@pytest.mark.parametrize(
    "values",
    [
        {"heartbeat_interval": "3s"},
        {"wait_default": "2m"},
        {"queue_length_max": 0},
        {"start_within": 5},
        {"unknown": 1},
    ],
)
def test_what_cannot_work_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError):
        SchedulerSection.model_validate(values)
