"""Configuration of the billing service."""

from __future__ import annotations

from pathlib import Path

import pydantic

from libs.config import AuthSection, PostgresSection, Seconds, Section, ServiceConfig


class BillingSection(Section):
    """Leases of credit slices.

    Attributes:
        lease_duration: how long a slice may be spent from without being renewed.
        grace: how long the money of an expired slice stays held, so that a gateway that comes
            back can still settle on it.
        sweep_interval: time between two looks for slices and grants that have expired.
        slice_retention: how long slices are kept after they ended; a gateway's clock may be behind
            the database's by less than that.
        invoice_delay: how long after its end a month can be invoiced, so that generations that
            ended in it have settled.
        receipt_keys_file: file with the public keys that gateways sign receipts with, one base64
            text a line; without it no receipt is kept. A key that is new is added here first.
        receipts_reviewed_file: file with the ids of generations whose bad receipts an operator has
            looked at, one a line, with a # comment; the auditor names them no more.
        audit_interval: time between two audits of what is new.
        audit_full_interval: longest time between two audits of everything.
    """

    lease_duration: Seconds = pydantic.Field(default=60.0, ge=1.0)
    grace: Seconds = pydantic.Field(default=600.0, ge=0.0)
    sweep_interval: Seconds = pydantic.Field(default=5.0, gt=0.0)
    slice_retention: Seconds = pydantic.Field(default=86_400.0, ge=3600.0)
    invoice_delay: Seconds = pydantic.Field(default=3600.0, ge=0.0, le=2_678_400.0)
    receipt_keys_file: Path | None = None
    receipts_reviewed_file: Path | None = None
    audit_interval: Seconds = pydantic.Field(default=60.0, ge=1.0)
    audit_full_interval: Seconds = pydantic.Field(default=3600.0, ge=1.0)


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
