"""Grants, credit limits and refunds: messages to values and back. Pure."""

from __future__ import annotations

from datetime import datetime

from maas.billing.v1 import account_service_pb2, ledger_pb2

from libs.errors import FieldRule, invalid_field
from libs.ids import bad_name
from services.billing.convert import (
    account_id_of,
    money_to_pb,
    nanos_from_pb,
    text_of,
    time_from_pb,
    time_to_pb,
)
from services.billing.domain import SYSTEM_PREFIX, GrantKind
from services.billing.grants import ENTRY_PREFIX, PRIORITY_DEFAULT, Grant, Refund

_RECORDS = "/usageRecords/"
_KINDS = {
    ledger_pb2.GRANT_KIND_UNSPECIFIED: GrantKind.GIFT,
    ledger_pb2.GRANT_KIND_GIFT: GrantKind.GIFT,
    ledger_pb2.GRANT_KIND_TOP_UP: GrantKind.TOP_UP,
}
_KIND_TO_PB = {
    GrantKind.GIFT: ledger_pb2.GRANT_KIND_GIFT,
    GrantKind.TOP_UP: ledger_pb2.GRANT_KIND_TOP_UP,
}


def customer_id_of(name: str, field: str) -> str:
    """Reads the name of a customer's account.

    Raises:
        InvalidArgument: it is none, or the ledger's own.
    """
    account_id = account_id_of(name, field)
    if account_id.startswith(SYSTEM_PREFIX):
        raise invalid_field(field, FieldRule.BAD_FORMAT, "must be a customer's account")
    return account_id


def grant_from_pb(request: account_service_pb2.CreateGrantRequest, now: datetime) -> Grant:
    """Reads a new grant.

    Raises:
        InvalidArgument: names the field.
    """
    message = request.grant
    if request.grant_id.startswith(ENTRY_PREFIX):
        raise invalid_field("grant_id", FieldRule.BAD_FORMAT, f"must not start with {ENTRY_PREFIX}")
    if not message.amount.currency_code:
        raise invalid_field("grant.amount", FieldRule.REQUIRED, "is required")
    amount = nanos_from_pb(message.amount)
    if amount <= 0:
        raise invalid_field("grant.amount.nanos", FieldRule.OUT_OF_RANGE, "must be positive")
    expire_time = None
    if message.HasField("expire_time"):
        expire_time = time_from_pb(message.expire_time, "grant.expire_time")
    return Grant(
        account_id=customer_id_of(request.parent, "parent"),
        grant_id=request.grant_id,
        number=0,
        kind=_KINDS[message.kind],
        amount=amount,
        remaining=amount,
        priority=message.priority if message.HasField("priority") else PRIORITY_DEFAULT,
        expire_time=expire_time,
        create_time=now,
        description=text_of(message.description, "grant.description"),
    )


def grant_to_pb(grant: Grant) -> ledger_pb2.Grant:
    """Writes a grant."""
    expiry = grant.expire_time
    return ledger_pb2.Grant(
        name=grant.name,
        amount=money_to_pb(grant.amount),
        remaining=money_to_pb(grant.remaining),
        priority=grant.priority,
        expire_time=None if expiry is None else time_to_pb(expiry),
        create_time=time_to_pb(grant.create_time),
        description=grant.description,
        kind=_KIND_TO_PB[grant.kind],
    )


def credit_limit_from_pb(request: account_service_pb2.SetCreditLimitRequest) -> int:
    """Reads a credit limit, nanos.

    Raises:
        InvalidArgument: names the field.
    """
    limit = nanos_from_pb(request.credit_limit)
    if limit < 0:
        raise invalid_field("credit_limit.nanos", FieldRule.OUT_OF_RANGE, "must be zero or more")
    return limit


def refund_from_pb(request: account_service_pb2.RefundUsageRequest) -> Refund:
    """Reads what an operator wants to give back.

    Raises:
        InvalidArgument: names the field.
    """
    # A generation id is any text, longer than other ids may be.
    account, _, generation_id = request.usage_record.partition(_RECORDS)
    if not generation_id:
        raise bad_name("accounts/*/usageRecords/*", field="usage_record")
    amount = None
    if request.HasField("amount"):
        amount = nanos_from_pb(request.amount)
        if amount <= 0:
            raise invalid_field("amount.nanos", FieldRule.OUT_OF_RANGE, "must be positive")
    return Refund(
        account_id=customer_id_of(account, "usage_record"),
        generation_id=text_of(generation_id, "usage_record"),
        amount=amount,
        request_id=text_of(request.request_id, "request_id"),
        description=text_of(request.description, "description"),
    )
