"""Configuration of the scheduler."""

from __future__ import annotations

from typing import Self

import pydantic

from libs.config import AuthSection, PostgresSection, Seconds, Section, ServiceConfig
from services.scheduler.core.state import Settings


class SchedulerSection(Section):
    """How workers are watched and requests queued.

    Attributes:
        heartbeat_interval: workers say something at least this often.
        lease_duration: a worker that says nothing for this long is lost.
        start_within: a granted slot whose execution was not reported started by then is freed.
        queue_length_max: requests of one class that may wait for one model version; more are
            refused.
        wait_default: longest wait of a request that names none.
        wait_max: longest wait that a request may name; longer ones are cut to it. Below the
            default deadline of AcquireSlot, so that the refusal says why.
        gather_for: after a start, how long requests wait for workers that are not back yet before
            they are refused for want of one. Above the longest pause between a worker's attempts.
        register_within: how long a worker's registration waits for a database that is away.
        lost_kept_for: how long a lost worker stays in the listing.
        lost_kept_max: how many lost workers stay in the listing.
    """

    heartbeat_interval: Seconds = 1.0
    lease_duration: Seconds = 5.0
    start_within: Seconds = 5.0
    queue_length_max: int = pydantic.Field(default=1000, ge=1, le=100_000)
    wait_default: Seconds = 30.0
    wait_max: Seconds = 55.0
    gather_for: Seconds = 3.0
    register_within: Seconds = 10.0
    lost_kept_for: Seconds = 600.0
    lost_kept_max: int = pydantic.Field(default=100, ge=0, le=10_000)

    @pydantic.model_validator(mode="after")
    def _check_relations(self) -> Self:
        if self.lease_duration < 2 * self.heartbeat_interval:
            raise ValueError("lease_duration must be at least twice heartbeat_interval")
        if self.wait_default > self.wait_max:
            raise ValueError("wait_default must not exceed wait_max")
        return self

    def for_core(self) -> Settings:
        """Picks what the core has to know."""
        return Settings(
            lease_s=self.lease_duration,
            start_within_s=self.start_within,
            queue_length_max=self.queue_length_max,
            gather_s=self.gather_for,
            lost_kept_s=self.lost_kept_for,
            lost_kept_max=self.lost_kept_max,
        )


class Config(ServiceConfig):
    """Everything in the scheduler's file.

    Attributes:
        postgres: where epochs are kept.
        auth: where API keys come from.
        scheduler: leases and queues.
    """

    postgres: PostgresSection
    auth: AuthSection
    scheduler: SchedulerSection = SchedulerSection()
