"""Receipts in billing: checked when their generations are settled, kept, and given out.

A gateway signs what it tells the client; billing computes the same anew and keeps a receipt only if
it says that. Whatever is wrong with one, the money is settled: the fault is counted, logged and
kept in its place, and the auditor names it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog
from maas.billing.v1 import usage_service_pb2 as usage_pb
from maas.common.v1 import receipt_pb2

from libs import paging
from libs.auth import Principal, Role
from libs.clock import Clock
from libs.config import ConfigError
from libs.errors import FieldRule, Unavailable, invalid_field, not_found
from libs.receipts import BadReceipt, ReceiptContent, ReceiptKeys, content_of, keys_from_text
from libs.units import Nanos
from services.billing import metrics
from services.billing.convert import text_of, time_to_pb
from services.billing.domain import Receipt, Settlement, account_name
from services.billing.store.receipts import ReceiptKeyRow, ReceiptStore

log = structlog.get_logger(__name__)

UNKNOWN_KEY = "signed with a key that billing does not know"
BAD_SIGNATURE = "the signature is not that of the receipt"
UNREADABLE = "is no receipt"
CONTRADICTION = "contradicts what was settled"
VERIFIED_MAX = 16
"""Signatures of a batch that are verified before it is settled; the auditor verifies all that are
kept. A gateway with a wrong key has it in all of them, so a few show it, and a batch of hundreds
waits about 1.5 ms for its signatures, and not fifty."""
# Receipts that are checked at a time, about 0.5 ms: other calls are served in between.
_AT_ONCE = 64
_RETRY_S = 1.0


class ReceiptCheck:
    """Checks the receipts of settlements. A CheckReceipts of the store.

    Args:
        keys: of all gateways that may sign. Without any, no receipt is kept.
    """

    def __init__(self, keys: ReceiptKeys) -> None:
        self._keys = keys

    async def __call__(
        self, settlements: Sequence[Settlement], amounts: Sequence[Nanos]
    ) -> Mapping[str, Receipt]:
        """Returns what is to be kept, by generation: the receipt, or its fault."""
        found: dict[str, Receipt] = {}
        outcomes: Counter[str] = Counter()
        for settlement, amount in zip(settlements, amounts, strict=True):
            if settlement.receipt is None:
                continue
            if not self._keys.public_keys:
                outcomes["no_keys"] += 1
                continue
            # The first settlement of a generation counts, and so does its receipt.
            if settlement.generation_id in found:
                continue
            fault = fault_of(
                settlement.receipt,
                content_of_settlement(settlement, amount),
                self._keys,
                with_signature=len(found) < VERIFIED_MAX,
            )
            found[settlement.generation_id] = Receipt(fault=fault) if fault else settlement.receipt
            outcomes["refused" if fault else "kept"] += 1
            if len(found) % _AT_ONCE == 0:
                await asyncio.sleep(0)
        _report(found, outcomes)
        return found


class ReceiptReader:
    """Gives receipts and keys out: what UsageService says about them."""

    def __init__(self, store: ReceiptStore) -> None:
        self._store = store

    async def get(
        self, request: usage_pb.GetReceiptRequest, caller: Principal
    ) -> usage_pb.GetReceiptResponse:
        """Finds a receipt: by generation, or else by the request_id of the caller's project.

        Raises:
            InvalidArgument: neither is named, or an administrator, who has no project, names a
                request_id.
            NotFound: there is none, or it is another organization's.
        """
        generation_id = text_of(request.generation_id, "generation_id")
        request_id = text_of(request.request_id, "request_id")
        is_administrator = caller.role is Role.ADMINISTRATOR
        if not generation_id and (is_administrator or not request_id):
            raise invalid_field("generation_id", FieldRule.REQUIRED, "must not be empty")
        if generation_id:
            found = await self._store.find_of_generation(
                generation_id, account_id=None if is_administrator else caller.organization
            )
        else:
            found = await self._store.find_of_request(
                request_id, project_id=caller.project, account_id=caller.organization
            )
        if found is None:
            raise not_found(f"receipt of {generation_id or request_id}")
        return usage_pb.GetReceiptResponse(
            receipt=receipt_pb2.SignedReceipt(
                receipt=found.content, key_id=found.key_id, signature=found.signature
            )
        )

    async def list_keys(
        self, request: usage_pb.ListReceiptKeysRequest
    ) -> usage_pb.ListReceiptKeysResponse:
        """Lists the keys, those out of use included.

        Raises:
            InvalidArgument: BAD_PAGE_TOKEN.
        """
        page = paging.page_of(request.page_size, request.page_token)
        rows = await self._store.list_keys(page)
        items, token = paging.cut([_key_to_pb(row) for row in rows], page, lambda item: item.key_id)
        return usage_pb.ListReceiptKeysResponse(keys=items, next_page_token=token)


async def remember_keys(store: ReceiptStore, keys: ReceiptKeys, clock: Clock) -> None:
    """Puts the keys into their history; waits for a database that is away."""
    while keys.public_keys:
        try:
            await store.add_keys(keys.public_keys, clock.now())
        except Unavailable:
            await clock.sleep_s(_RETRY_S)
        else:
            return


def read_keys(path: Path | None) -> ReceiptKeys:
    """Reads the file of public keys; none without a file.

    Raises:
        ConfigError: the file cannot be read, or has a line that is no key.
    """
    if path is None:
        return ReceiptKeys([])
    try:
        return ReceiptKeys(keys_from_text(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, BadReceipt) as error:
        raise ConfigError(f"{path}: {error}") from error


def read_reviewed(path: Path | None) -> frozenset[str]:
    """Reads the file of generations whose bad receipts were looked at; none without a file.

    Raises:
        ConfigError: the file cannot be read, or a line has more than an id and a comment.
    """
    if path is None:
        return frozenset()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    found: set[str] = set()
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if len(words) > 1:
            raise ConfigError(f"{path}: line {number} must be one generation id")
        found.update(words)
    return frozenset(found)


def content_of_settlement(settlement: Settlement, amount: Nanos) -> ReceiptContent:
    """Computes what the receipt of a settlement has to say."""
    return ReceiptContent(
        generation_id=settlement.generation_id,
        request_id=settlement.request_id,
        account=account_name(settlement.account_id),
        project=f"projects/{settlement.project_id}",
        offering=f"offerings/{settlement.offering_id}",
        model_version=f"models/{settlement.model_id}/versions/{settlement.version_id}",
        price=f"prices/{settlement.price_id}",
        input_tokens=settlement.input_tokens,
        cached_input_tokens=settlement.cached_input_tokens,
        output_tokens=settlement.output_tokens,
        reasoning_tokens=settlement.reasoning_tokens,
        charge_nanos=amount,
        end_cause=settlement.end_cause.value,
        start_time=settlement.start_time,
        end_time=settlement.end_time,
    )


def fault_of(
    receipt: Receipt, content: ReceiptContent, keys: ReceiptKeys, *, with_signature: bool = True
) -> str:
    """Says what is wrong with a receipt; empty when it verifies and says just this content.

    About 100 us, 10 us without the signature. Does not suspend.
    """
    if receipt.key_id not in keys:
        return UNKNOWN_KEY
    try:
        said = content_of(receipt.content)
    except BadReceipt:
        return UNREADABLE
    if said != content:
        return CONTRADICTION
    return _signature_fault(receipt, keys) if with_signature else ""


def _signature_fault(receipt: Receipt, keys: ReceiptKeys) -> str:
    try:
        keys.verify(receipt=receipt.content, key_id=receipt.key_id, signature=receipt.signature)
    except BadReceipt:
        return BAD_SIGNATURE
    return ""


def _report(found: Mapping[str, Receipt], outcomes: Mapping[str, int]) -> None:
    for outcome, count in outcomes.items():
        metrics.RECEIPTS.labels(outcome).inc(count)
    if not outcomes.get("refused"):
        return
    # One line a batch: a gateway with a wrong key has it in all of them.
    generation_id, first = next(item for item in found.items() if item[1].fault)
    log.error(
        "receipts refused",
        receipts=outcomes["refused"],
        generation_id=generation_id,
        cause=first.fault,
    )


def _key_to_pb(row: ReceiptKeyRow) -> receipt_pb2.ReceiptKey:
    return receipt_pb2.ReceiptKey(
        key_id=row.key_id, public_key=row.public_key, create_time=time_to_pb(row.create_time)
    )
