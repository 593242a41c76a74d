"""Receipts of generations: what was delivered and charged, signed at the end. Pure.

Every end that is charged has one, whether or not there is a last frame to send it with: so the
receipts of an account sum to what it was charged.
"""

from __future__ import annotations

from libs.receipts import ReceiptContent, ReceiptSigner
from services.gateway.domain import Closing, Opening, usage_of


def signed_receipt(
    signer: ReceiptSigner | None, opening: Opening, closing: Closing, charge: int
) -> bytes:
    """Signs what a generation delivered and cost. About 50 us.

    Args:
        signer: with the gateway's key; None makes no receipts.
        opening: from the acceptance.
        closing: from the end.
        charge: nanos.

    Returns:
        a serialized SignedReceipt; empty for an end that is not charged.
    """
    if signer is None or not closing.cause.is_charged:
        return b""
    usage = usage_of(opening, closing)
    signed = signer.sign(
        ReceiptContent(
            generation_id=opening.generation_id,
            request_id=opening.request_id,
            account=opening.account,
            project=opening.project,
            offering=opening.offering,
            model_version=opening.model_version,
            price=opening.price,
            input_tokens=usage.input_tokens,
            cached_input_tokens=usage.cached_input_tokens,
            output_tokens=usage.output_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            charge_nanos=charge,
            end_cause=closing.cause.value,
            start_time=opening.start_time,
            end_time=closing.end_time,
        )
    )
    return signed.SerializeToString()
