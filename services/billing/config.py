"""Configuration of the billing service."""

from __future__ import annotations

import pydantic

from libs.config import AuthSection, PostgresSection, Seconds, Section, ServiceConfig


class BillingSection(Section):
    """Leases of credit slices.

    Attributes:
        lease_duration: how long a slice may be spent from without being renewed.
        grace: how long the money of an expired slice stays held, so that a gateway that comes
            back can still settle on it.
        sweep_interval: time between two looks for slices that have expired.
    """

    lease_duration: Seconds = pydantic.Field(default=60.0, ge=1.0)
    grace: Seconds = pydantic.Field(default=600.0, ge=0.0)
    sweep_interval: Seconds = pydantic.Field(default=5.0, gt=0.0)


class Config(ServiceConfig):
    """Everything the process is told.

    Attributes:
        postgres: where the ledger is.
        auth: where the table of API keys comes from.
        billing: leases.
    """

    postgres: PostgresSection
    auth: AuthSection
    billing: BillingSection = BillingSection()
