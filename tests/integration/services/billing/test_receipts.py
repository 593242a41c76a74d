"""Receipts: checked when their generations are settled, given out, never in the way of money."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import date
from pathlib import Path

import pytest
from google.protobuf import json_format
from maas.billing.v1 import credit_slice_service_pb2 as slice_pb
from maas.billing.v1 import invoice_service_pb2, invoice_service_pb2_grpc, ledger_pb2
from maas.billing.v1 import usage_service_pb2 as usage_pb
from maas.common.v1 import receipt_pb2
from prometheus_client import REGISTRY

from libs.config import ConfigError
from libs.errors import InvalidArgument, NotFound
from libs.receipts import ReceiptKeys, ReceiptSigner, key_id_of
from libs.testing import eventually
from services.billing.grants import Refund
from services.billing.receipts import (
    BAD_SIGNATURE,
    CONTRADICTION,
    UNKNOWN_KEY,
    UNREADABLE,
    VERIFIED_MAX,
    read_keys,
    read_reviewed,
)
from services.billing.store.invoices import InvoiceStore
from services.billing.store.refunds import RefundStore
from services.billing.store.reports import Reports
from tests.conftest import DatabaseFactory
from tests.integration.services.billing.audit import audit
from tests.integration.services.billing.signing import (
    SIGNER,
    reconcile,
    running_signed,
    signed,
)
from tests.integration.services.billing.world import (
    NANO_PER_TOKEN,
    Billing,
    Client,
    running,
    settlement,
)
from tools import verify

Settlement = slice_pb.Settlement
STRANGER = ReceiptSigner(bytes(32))


@pytest.fixture
async def billing(database: DatabaseFactory, tmp_path: Path) -> AsyncIterator[Billing]:
    """Billing that knows the key of the gateway, with credit on an open slice."""
    async with running_signed(await database("billing"), tmp_path) as world:
        await world.open_account(1000)
        await world.acquire("s1", 500)
        yield world
        await audit(world.connection)


def settled(generation_id: str, *, request_id: str = "") -> Settlement:
    return settlement(generation_id, slice_id="s1", tokens=7, request_id=request_id)


async def get(
    client: Client, generation_id: str = "", *, request_id: str = ""
) -> receipt_pb2.SignedReceipt:
    request = usage_pb.GetReceiptRequest(generation_id=generation_id, request_id=request_id)
    return (await client.peer.call(client.usage.GetReceipt, request)).receipt


def counted(outcome: str) -> float:
    return REGISTRY.get_sample_value("maas_billing_receipts_total", {"outcome": outcome}) or 0.0


async def test_receipt_comes_back_as_the_client_got_it(billing: Billing) -> None:
    sent = signed(settled("gen_1", request_id="order-7"))
    before = counted("kept")

    await billing.settle(sent)

    for found in (
        await get(billing.tenant, "gen_1"),
        await get(billing.tenant, request_id="order-7"),
        await get(billing.admin, "gen_1"),
    ):
        assert found == sent.receipt
        content = ReceiptKeys([SIGNER.public_key]).verify(
            receipt=found.receipt, key_id=found.key_id, signature=found.signature
        )
        assert (content.charge_nanos, content.output_tokens) == (7, 7)
    assert counted("kept") - before == 1


async def test_receipts_of_others_are_not_found(billing: Billing) -> None:
    await billing.settle(signed(settled("gen_1", request_id="order-7")))

    # The stranger's project has the same name, and its organization another one.
    for asked in ({"generation_id": "gen_1"}, {"request_id": "order-7"}):
        with pytest.raises(NotFound):
            await get(billing.stranger, **asked)
    with pytest.raises(NotFound):
        await get(billing.tenant, "gen_2")


async def test_a_receipt_is_asked_for_by_something(billing: Billing) -> None:
    for client, request_id in ((billing.tenant, ""), (billing.admin, "order-7")):
        with pytest.raises(InvalidArgument) as caught:
            await get(client, request_id=request_id)
        assert [item.field for item in caught.value.violations] == ["generation_id"]


async def test_the_receipt_of_a_request_is_that_of_what_was_charged(billing: Billing) -> None:
    lost = ledger_pb2.END_CAUSE_WORKER_LOST
    first = settlement("gen_1", slice_id="s1", request_id="r", end_cause=lost)
    second = settlement("gen_2", slice_id="s1", request_id="r", end_cause=lost)
    await billing.settle(signed(first, 0), signed(second, 0))
    assert await get(billing.tenant, request_id="r") == second.receipt

    third = signed(settled("gen_3", request_id="r"))
    await billing.settle(third)

    assert await get(billing.tenant, request_id="r") == third.receipt


def of_unknown_key(wish: Settlement) -> Settlement:
    return signed(wish, signer=STRANGER)


def with_other_charge(wish: Settlement) -> Settlement:
    return signed(wish, 8)


def with_other_tokens(wish: Settlement) -> Settlement:
    signed(wish)
    wish.usage.output_tokens = 8
    return wish


def with_flipped_bit(wish: Settlement) -> Settlement:
    signature = bytearray(signed(wish).receipt.signature)
    signature[0] ^= 1
    wish.receipt.signature = bytes(signature)
    return wish


def with_nonsense(wish: Settlement) -> Settlement:
    wish.receipt.CopyFrom(
        receipt_pb2.SignedReceipt(receipt=b"\xff\0", key_id=SIGNER.key_id, signature=b"\0")
    )
    return wish


def with_nothing_in_it(wish: Settlement) -> Settlement:
    wish.receipt.SetInParent()
    return wish


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (of_unknown_key, UNKNOWN_KEY),
        (with_nothing_in_it, UNKNOWN_KEY),
        (with_nonsense, UNREADABLE),
        (with_flipped_bit, BAD_SIGNATURE),
        (with_other_charge, CONTRADICTION),
        (with_other_tokens, CONTRADICTION),
    ],
)
async def test_a_bad_receipt_costs_no_money_and_is_named(
    billing: Billing, spoil: Callable[[Settlement], Settlement], fault: str
) -> None:
    before = counted("refused")

    response = await billing.settle(signed(settled("gen_0")), spoil(settled("gen_1")))

    assert response.settled_count == 2
    assert [item.generation_id for item in await billing.records()] == ["gen_0", "gen_1"]
    with pytest.raises(NotFound):
        await get(billing.tenant, "gen_1")
    await get(billing.tenant, "gen_0")
    assert counted("refused") - before == 1
    (violation,), _ = await reconcile(billing)
    assert violation.invariant == "I8"
    assert violation.resource == "accounts/acme/usageRecords/gen_1"
    assert fault in violation.description


async def test_of_a_large_batch_the_auditor_verifies_the_rest(billing: Billing) -> None:
    good = [
        signed(settlement(f"gen_{number}", slice_id="s1")) for number in range(VERIFIED_MAX - 1)
    ]
    bad = [with_flipped_bit(settled(f"gen_{name}")) for name in ("a", "b")]
    wrong = with_other_charge(settled("gen_c"))

    await billing.settle(*good, *bad, wrong)

    violations, _ = await reconcile(billing)
    assert {(item.resource.rpartition("/")[2], item.description) for item in violations} == {
        ("gen_a", f"the receipt that came with it was refused: {BAD_SIGNATURE}"),
        ("gen_b", f"its receipt: {BAD_SIGNATURE}"),
        ("gen_c", f"the receipt that came with it was refused: {CONTRADICTION}"),
    }


async def test_a_bad_receipt_that_was_looked_at_is_named_no_more(
    database: DatabaseFactory, tmp_path: Path
) -> None:
    """Refused, or kept and found by the auditor: others are named as before."""
    reviewed = tmp_path / "reviewed"
    reviewed.write_text("# wrong key, 3 May\ngen_a\n\ngen_b # the same\n", encoding="utf-8")
    dsn = await database("billing")
    bad = [with_flipped_bit(settled(f"gen_{name}")) for name in ("a", "b", "c")]
    async with running_signed(dsn, tmp_path) as billing:
        await billing.open_account(1000)
        await billing.acquire("s1", 500)
        good = (signed(settlement(f"gen_{n}", slice_id="s1")) for n in range(VERIFIED_MAX - 1))
        await billing.settle(*good, *bad)
        before, _ = await reconcile(billing)

    settings = {"receipts_reviewed_file": str(reviewed)}
    async with running_signed(dsn, tmp_path, settings=settings) as billing:
        after, summary = await reconcile(billing)

    assert [item.resource.rpartition("/")[2] for item in before] == ["gen_a", "gen_b", "gen_c"]
    assert [item.resource.rpartition("/")[2] for item in after] == ["gen_c"]
    assert summary.violation_count == 1


def test_file_of_what_was_looked_at_says_which_line_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "reviewed"
    path.write_text("gen_1\ngen_2 gen_3\n", encoding="utf-8")

    with pytest.raises(ConfigError, match="line 2"):
        read_reviewed(path)
    with pytest.raises(ConfigError, match="missing"):
        read_reviewed(tmp_path / "missing")


async def test_the_first_settlement_of_a_generation_keeps_its_receipt(billing: Billing) -> None:
    first = signed(settled("gen_1"))
    other = with_flipped_bit(settled("gen_1"))
    await billing.settle(first, other)

    await billing.settle(other)

    assert await get(billing.tenant, "gen_1") == first.receipt
    assert (await reconcile(billing))[0] == []


async def test_without_keys_no_receipt_is_kept_and_none_is_wrong(
    database: DatabaseFactory,
) -> None:
    before = counted("no_keys")
    async with running(await database("billing")) as other:
        await other.open_account(1000)
        await other.acquire("s1", 500)
        await other.settle(signed(settled("gen_1")))

        with pytest.raises(NotFound):
            await get(other.tenant, "gen_1")
        assert (await reconcile(other))[0] == []
    assert counted("no_keys") - before == 1


async def test_keys_are_listed_and_remembered(billing: Billing) -> None:
    async def is_there() -> bool:
        response = await billing.tenant.peer.call(
            billing.tenant.usage.ListReceiptKeys, usage_pb.ListReceiptKeysRequest()
        )
        return [key.public_key for key in response.keys] == [SIGNER.public_key]

    await eventually(is_there)
    retired = STRANGER.public_key
    await billing.connection.execute(
        "INSERT INTO receipt_key (key_id, public_key, create_time) VALUES ($1, $2, now())",
        key_id_of(retired),
        retired,
    )

    found: list[receipt_pb2.ReceiptKey] = []
    request = usage_pb.ListReceiptKeysRequest(page_size=1)
    while True:
        page = await billing.tenant.peer.call(billing.tenant.usage.ListReceiptKeys, request)
        assert len(page.keys) == 1
        found += page.keys
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token

    assert [key.key_id for key in found] == sorted([SIGNER.key_id, STRANGER.key_id])
    assert all(key.key_id == key_id_of(key.public_key) for key in found)
    assert all(key.create_time.seconds > 0 for key in found)


async def test_receipts_of_a_month_sum_to_its_invoice(billing: Billing, tmp_path: Path) -> None:
    lost = ledger_pb2.END_CAUSE_WORKER_LOST
    await billing.create_price("dear", 3 * NANO_PER_TOKEN, "offerings/big")
    big = settlement("gen_3", slice_id="s1", tokens=5, price="prices/dear")
    big.offering = "offerings/big"
    await billing.settle(
        signed(settled("gen_1")),
        signed(settled("gen_2")),
        signed(big, 15),
        # It ended by our fault, before there was a last frame.
        settlement("gen_4", slice_id="s1", tokens=2, end_cause=lost),
    )
    refund = Refund(
        account_id="acme", generation_id="gen_1", amount=2, request_id="r", description=""
    )
    await RefundStore(billing.database).refund(refund, billing.clock.now())
    invoices = InvoiceStore(billing.database, Reports(billing.database), delay_s=0.0)
    await invoices.issue("acme", date(2026, 1, 1), billing.clock.now(), timeout_s=5.0)

    # As a tenant does it, with nothing but what the public methods say.
    peer = billing.tenant.peer
    stub = invoice_service_pb2_grpc.InvoiceServiceStub(peer.channel)
    name = "accounts/acme/invoices/INV-000001"
    answers = {
        "keys": await peer.call(
            billing.tenant.usage.ListReceiptKeys, usage_pb.ListReceiptKeysRequest()
        ),
        "invoice": await peer.call(
            stub.GetInvoice, invoice_service_pb2.GetInvoiceRequest(name=name)
        ),
    }
    for file, answer in answers.items():
        (tmp_path / file).write_text(json_format.MessageToJson(answer))
    receipts = [
        await peer.call(
            billing.tenant.usage.GetReceipt,
            usage_pb.GetReceiptRequest(generation_id=f"gen_{number}"),
        )
        for number in (1, 2, 3)
    ]
    texts = [json_format.MessageToJson(item) for item in receipts]

    def verdict() -> int:
        (tmp_path / "receipts").write_text("\n".join(texts))
        options = ["--keys", tmp_path / "keys", "--invoice", tmp_path / "invoice"]
        return verify.main([str(item) for item in (tmp_path / "receipts", *options)])

    assert verdict() == verify.EXIT_OK
    texts.pop()
    assert verdict() == verify.EXIT_BAD


def test_a_file_of_keys_that_is_wrong_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(ConfigError, match="keys"):
        read_keys(path)
    path.write_text("nonsense")

    with pytest.raises(ConfigError, match="line 1"):
        read_keys(path)
    assert read_keys(None).public_keys == {}


async def test_keys_in_use_are_known_to_the_auditor_before_they_are_in_the_history(
    billing: Billing,
) -> None:
    """As right behind a start: the history is written beside the first settlements."""
    await billing.settle(signed(settled("gen_1")))
    await billing.connection.execute(
        "ALTER TABLE receipt_key DISABLE TRIGGER receipt_key_is_immutable"
    )
    await billing.connection.execute("DELETE FROM receipt_key")

    assert (await reconcile(billing))[0] == []
