"""Billing that knows the key of a gateway, and settlements with receipts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from maas.billing.v1 import audit_service_pb2 as audit_pb
from maas.billing.v1 import credit_slice_service_pb2 as slice_pb

from libs.receipts import ReceiptContent, ReceiptSigner, key_to_text
from services.billing.convert import time_from_pb
from tests.integration.services.billing.world import Billing, running

SIGNER = ReceiptSigner(bytes(range(32)))
# So long that no test meets an audit that it has not asked for.
AUDIT_INTERVAL_S = 86_400


@asynccontextmanager
async def running_signed(
    dsn: str, folder: Path, *, settings: Mapping[str, str] | None = None
) -> AsyncIterator[Billing]:
    """Billing that accepts the receipts of SIGNER, with more keys of its configuration."""
    keys = folder / "receipt_keys"
    keys.write_text(f"# of the gateway\n{key_to_text(SIGNER.public_key)}\n", encoding="utf-8")
    own = {"receipt_keys_file": str(keys), "audit_interval": f"{AUDIT_INTERVAL_S}s"}
    async with running(dsn, settings=own | dict(settings or {})) as world:
        yield world


def content_for(settlement: slice_pb.Settlement, charge: int) -> ReceiptContent:
    """What a gateway says of a settlement."""
    usage = settlement.usage
    return ReceiptContent(
        generation_id=settlement.generation_id,
        request_id=settlement.request_id,
        account=settlement.account,
        project=settlement.project,
        offering=settlement.offering,
        model_version=settlement.model_version,
        price=settlement.price,
        input_tokens=usage.input_tokens,
        cached_input_tokens=usage.cached_input_tokens,
        output_tokens=usage.output_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        charge_nanos=charge,
        end_cause=settlement.end_cause,
        start_time=time_from_pb(settlement.start_time, "start_time"),
        end_time=time_from_pb(settlement.end_time, "end_time"),
    )


def signed(
    settlement: slice_pb.Settlement, charge: int | None = None, signer: ReceiptSigner = SIGNER
) -> slice_pb.Settlement:
    """The settlement with its receipt; at a nano a token when the charge is not said."""
    nanos = settlement.usage.output_tokens if charge is None else charge
    settlement.receipt.CopyFrom(signer.sign(content_for(settlement, nanos)))
    return settlement


async def reconcile(
    billing: Billing, account: str = "", *, after_record: int = 0, max_violations: int = 0
) -> tuple[list[audit_pb.Violation], audit_pb.AuditSummary]:
    """Asks for an audit; returns what is broken, and the summary."""
    request = audit_pb.ReconcileRequest(
        account=account, after_record=after_record, max_violations=max_violations
    )
    async with billing.admin.peer.stream(billing.admin.audits.Reconcile, request) as answers:
        # To the very end: only then is there room for the next one.
        *rest, last = [answer async for answer in answers]
    assert last.HasField("summary")
    return [answer.violation for answer in rest], last.summary
