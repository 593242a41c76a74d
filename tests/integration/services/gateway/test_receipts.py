"""Signed receipts: in the last frame, in the whole result, and in every settlement that costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from maas.common.v1 import receipt_pb2

from libs.clock import SystemClock
from libs.receipts import BadReceipt, ReceiptContent, ReceiptKeys, ReceiptSigner
from services.gateway import convert
from services.gateway.domain import EndCause
from services.gateway.journal import Journal
from services.gateway.settlement import Settlement
from tests.integration.services.gateway.client import Wish, answer
from tests.integration.services.gateway.client_unary import Asker, embed_request
from tests.integration.services.gateway.harness import END, gateway
from tests.integration.services.gateway.neighbours import NANOS_PER_TOKEN
from tests.integration.services.gateway.neighbours_unary import abilities

SIGNER = ReceiptSigner(bytes(range(32)))
KEYS = ReceiptKeys([SIGNER.public_key])


def read(signed: receipt_pb2.SignedReceipt) -> ReceiptContent:
    """Verifies a receipt."""
    return KEYS.verify(receipt=signed.receipt, key_id=signed.key_id, signature=signed.signature)


def settled_receipt(item: Settlement) -> receipt_pb2.SignedReceipt:
    """What billing gets; it has to say what else the settlement says."""
    made = convert.settlement_to_pb(item.opening, item.closing, engine_time_ns=0)
    said = read(made.receipt)
    assert said == ReceiptContent(
        generation_id=made.generation_id,
        request_id=made.request_id,
        account=made.account,
        project=made.project,
        offering=made.offering,
        model_version=made.model_version,
        price=made.price,
        input_tokens=made.usage.input_tokens,
        cached_input_tokens=made.usage.cached_input_tokens,
        output_tokens=made.usage.output_tokens,
        reasoning_tokens=made.usage.reasoning_tokens,
        charge_nanos=item.owed,
        end_cause=made.end_cause,
        start_time=said.start_time,
        end_time=said.end_time,
    )
    assert convert.timestamp_to_pb(said.start_time) == made.start_time
    assert convert.timestamp_to_pb(said.end_time) == made.end_time
    return made.receipt


async def test_the_last_frame_proves_what_was_delivered_and_charged(tmp_path: Path) -> None:
    async with gateway(tmp_path, signer=SIGNER) as world:
        stream = world.client.stream(Wish(request_id="r1"))
        execution = await world.accepted(input_tokens=3)
        world.workers[0].say(execution.lane, "a", "b")
        world.workers[0].end(execution.lane)
        await stream.rest()

        finished = stream.last.finished
        said = read(finished.receipt)
        assert said.generation_id == stream.generation_id
        assert (said.request_id, said.account, said.project) == ("r1", "accounts/o", "projects/p")
        assert (said.input_tokens, said.output_tokens) == (3, 2)
        assert said.charge_nanos == finished.charge.nanos == 5 * NANOS_PER_TOKEN
        assert said.end_cause == EndCause.COMPLETED.value
        assert settled_receipt(await world.only_settlement()) == finished.receipt
        # A repeat gets the very same.
        repeat = await world.client.stream(Wish(request_id="r1")).rest()
        assert repeat.last.finished.receipt == finished.receipt
        changed = finished.receipt.receipt.replace(b"accounts/o", b"accounts/x")
        with pytest.raises(BadReceipt):
            read(
                receipt_pb2.SignedReceipt(
                    receipt=changed,
                    key_id=finished.receipt.key_id,
                    signature=finished.receipt.signature,
                )
            )


async def test_a_whole_result_has_the_receipt_of_its_settlement(tmp_path: Path) -> None:
    async with gateway(tmp_path, signer=SIGNER) as world:
        call = world.client.unary()
        execution = await world.accepted(input_tokens=3)
        world.workers[0].say(execution.lane, "a")
        world.workers[0].end(execution.lane, END)

        generation = await answer(call)

        assert read(generation.receipt).charge_nanos == generation.charge.nanos
        assert settled_receipt(await world.only_settlement()) == generation.receipt


async def test_what_is_charged_without_a_last_frame_has_a_receipt_too(tmp_path: Path) -> None:
    async with (
        gateway(tmp_path, signer=SIGNER, capabilities=abilities()) as world,
        Asker(world.endpoint) as asker,
    ):
        stream = world.client.stream()
        execution = await world.accepted(input_tokens=3)
        world.workers[0].say(execution.lane, "a")
        await stream.until(1)
        await world.client.cancel(stream.generation_id)
        world.table.complete()
        embedded = await asker.call(asker.embeddings.Embed, embed_request("hello"))

        cancelled, embedding = await world.settlements(2)

        assert read(settled_receipt(cancelled)).end_cause == EndCause.CLIENT_CANCELLED.value
        assert read(settled_receipt(embedding)).charge_nanos == embedded.charge.nanos
        assert embedded.receipt == settled_receipt(embedding)
        said = read(embedded.receipt)
        assert said.generation_id == embedded.generation_id
        assert said.input_tokens == embedded.usage.input_tokens
        assert (said.output_tokens, said.end_cause) == (0, EndCause.COMPLETED.value)


async def test_what_costs_nothing_has_no_receipt(tmp_path: Path) -> None:
    async with gateway(tmp_path, signer=SIGNER) as world:
        stream = world.client.stream()
        execution = await world.accepted(input_tokens=3)
        world.workers[0].say(execution.lane, "a")
        await stream.until(1)
        world.workers[0].fail(execution.lane, 13, "ENGINE_FAILURE")
        await stream.failure()

        assert (await world.only_settlement()).closing.receipt == b""


async def test_without_a_key_there_are_no_receipts(tmp_path: Path) -> None:
    async with gateway(tmp_path) as world:
        stream = world.client.stream()
        execution = await world.accepted(input_tokens=3)
        world.workers[0].end(execution.lane)
        await stream.rest()

        assert not stream.last.finished.HasField("receipt")
        assert (await world.only_settlement()).closing.receipt == b""


async def test_without_a_key_an_embedding_has_no_receipt(tmp_path: Path) -> None:
    async with (
        gateway(tmp_path, capabilities=abilities()) as world,
        Asker(world.endpoint) as asker,
    ):
        world.table.complete()
        embedded = await asker.call(asker.embeddings.Embed, embed_request("hello"))

        assert not embedded.HasField("receipt")
        assert (await world.only_settlement()).closing.receipt == b""


async def test_what_the_client_has_is_settled_after_a_crash(tmp_path: Path) -> None:
    """The journal keeps the receipt: the next process settles with what the client got."""
    folder = tmp_path / "journal"
    async with gateway(folder, signer=SIGNER) as world:
        stream = world.client.stream()
        execution = await world.accepted(input_tokens=3)
        world.workers[0].say(execution.lane, "a")
        world.workers[0].end(execution.lane)
        await stream.rest()

    following = Journal(folder)
    ((opening, closing),) = following.recover(SystemClock().now()).settlements
    following.close()

    recovered = Settlement(ordinal=None, opening=opening, closing=closing, owed=4 * NANOS_PER_TOKEN)
    assert settled_receipt(recovered) == stream.last.finished.receipt
