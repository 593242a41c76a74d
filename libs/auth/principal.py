"""Who calls and what they may do.

Pure. Roles are sets of permissions "<collection>.<verb>"; methods name theirs in the contract.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.Enum):
    """A set of permissions."""

    TENANT = "tenant"
    ADMINISTRATOR = "administrator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """The caller of a public or administrative method.

    Attributes:
        key_id: id of its API key.
        role: what it may do.
        project: id of its project; empty for administrators.
        organization: id of the organization that pays; empty for administrators.
    """

    key_id: str
    role: Role
    project: str
    organization: str


# What a tenant's application may do. Everything it reads is its own or public.
_TENANT = frozenset(
    {
        "accounts.get",
        "adapters.get",
        "adapters.list",
        "balances.get",
        "callers.get",
        "embeddings.create",
        "generations.cancel",
        "generations.create",
        "generations.get",
        "grants.list",
        "invoices.get",
        "invoices.list",
        "ledgerEntries.list",
        "limits.get",
        "limits.list",
        "offerings.get",
        "offerings.list",
        "prices.get",
        "prices.list",
        "receiptKeys.list",
        "spendAlerts.list",
        "tokens.count",
        "usageRecords.get",
        "usageRecords.list",
    }
)
# An administrator has no project to charge, so generating and embedding need a tenant's key.
_NOT_ADMINISTRATOR = frozenset(
    {"embeddings.create", "generations.cancel", "generations.create", "generations.get"}
)


def permits(role: Role, permission: str) -> bool:
    """Tells whether a role has a permission."""
    match role:
        case Role.TENANT:
            return permission in _TENANT
        case Role.ADMINISTRATOR:
            return permission not in _NOT_ADMINISTRATOR
