"""The settlement queue: each once acknowledged, none lost, one bad one holds up nobody."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from maas.billing.v1 import credit_slice_service_pb2
from maas.common.v1 import options_pb2

from libs.errors import FieldRule, Unavailable, invalid_field, unavailable
from libs.limits import PUBLIC_REQUEST_BYTES_MAX
from libs.receipts import ReceiptSigner
from libs.testing import FakeClock
from libs.units import NANOS_MAX
from services.gateway import convert
from services.gateway.domain import Closing, EndCause, Opening
from services.gateway.journal import Journal
from services.gateway.receipts import signed_receipt
from services.gateway.settlement import BATCH_MAX, Settled, Settlement, Settler
from services.gateway.slices import Grant, Purse, Sizes, SliceBook

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RENEWED = credit_slice_service_pb2.SettleRequest.DESCRIPTOR.fields_by_name["renew_slice_ids"]
RENEW_CONTRACT_MAX = RENEWED.GetOptions().Extensions[options_pb2.rules].max_items


class Billing:
    def __init__(self) -> None:
        self.settled: list[str] = []
        self.calls: list[int] = []
        self.renewed: list[list[str]] = []
        self.is_away = False
        self.bad: set[str] = set()

    async def settle(self, settlements: list[Settlement], renew: list[str]) -> Settled:
        if self.is_away:
            raise unavailable("billing")
        if len(renew) > RENEW_CONTRACT_MAX:
            raise invalid_field("renew_slice_ids", FieldRule.TOO_MANY, "too many")
        names = [item.opening.generation_id for item in settlements]
        if self.bad & set(names):
            raise invalid_field("settlements", FieldRule.BAD_FORMAT, "bad")
        self.calls.append(len(names))
        self.renewed.append(renew)
        self.settled += names
        return Settled(lost_slice_ids=[], lease_s=60.0)


class World:
    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.billing = Billing()
        self.numbers = itertools.count(1)
        self.journal = Journal(folder)
        self.book = SliceBook(
            acquire=self._acquire,
            close=self._close,
            new_id=lambda: f"s{next(self.numbers)}",
            clock=self.clock,
            sizes=Sizes(nanos_max=1000, refill_s=1.0, count_max=5000),
            start=asyncio.ensure_future,
        )
        self.settler = Settler(
            settle=self.billing.settle,
            book=self.book,
            journal=self.journal,
            clock=self.clock,
            interval_s=0.1,
            idle_s=2.0,
        )

    async def _acquire(self, slice_id: str, purse: Purse, required: int, wanted: int) -> Grant:
        del slice_id, purse, required
        return Grant(wanted, 60.0)

    async def _close(self, slice_ids: list[str]) -> None:
        del slice_ids

    def put(self, number: int, request_id: str = "", cause: EndCause = EndCause.COMPLETED) -> None:
        opening = Opening(
            generation_id=f"g{number}",
            slice_id="s1",
            account="accounts/dev",
            project="projects/dev",
            api_key="apiKeys/k",
            offering="offerings/x",
            model_version="models/x/versions/1",
            price="prices/p",
            input_tokens=1,
            start_time=NOW,
            request_id=request_id,
            request_sha256="ab" if request_id else "",
        )
        closing = Closing(output_tokens=1, cause=cause, end_time=NOW)
        ordinal = self.journal.opened(opening)
        self.journal.closed(ordinal, closing)
        self.settler.put(Settlement(ordinal=ordinal, opening=opening, closing=closing, owed=0))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_batches_are_bounded_and_complete(world: World) -> None:
    for number in range(1200):
        world.put(number)

    await world.settler.flush()

    assert world.billing.calls == [500, 500, 200]
    assert world.billing.settled == [f"g{number}" for number in range(1200)]
    assert world.settler.queued == 0


async def test_nothing_leaves_the_queue_while_billing_is_away(world: World) -> None:
    world.put(1)
    world.billing.is_away = True

    with pytest.raises(Unavailable):
        await world.settler.flush()
    assert world.settler.queued == 1
    world.billing.is_away = False
    await world.settler.flush()

    assert world.billing.settled == ["g1"]


async def test_a_refused_settlement_is_set_aside_alone(world: World) -> None:
    for number in range(20):
        world.put(number)
    world.billing.bad = {"g7"}

    await world.settler.flush()

    assert world.billing.settled == [f"g{number}" for number in range(20) if number != 7]
    assert world.settler.queued == 0


async def test_the_journal_keeps_what_was_set_aside(world: World) -> None:
    world.put(1)
    world.put(2)
    world.billing.bad = {"g1"}

    await world.settler.flush()
    world.journal.close()

    recovered = Journal(world.journal._folder).recover(NOW)
    assert [item.generation_id for item, _ in recovered.settlements] == ["g1"]


async def test_leases_are_renewed_with_and_without_settlements(world: World) -> None:
    await world.book.reserve(Purse("accounts/dev"), 10)
    await world.settler.flush()
    world.clock.advance(16)

    await world.settler.flush()

    assert world.billing.calls == [0, 0]
    assert world.billing.renewed == [["s1"], ["s1"]]


async def test_slices_are_named_when_their_renewal_is_due_and_not_with_every_batch(
    world: World,
) -> None:
    await world.book.reserve(Purse("accounts/dev"), 10)
    for number in range(3):
        world.put(number)
        await world.settler.flush()
        world.clock.advance(7)

    assert world.billing.settled == ["g0", "g1", "g2"]
    assert world.billing.renewed == [["s1"], [], []]
    world.put(3)
    await world.settler.flush()
    assert world.billing.renewed == [["s1"], [], [], ["s1"]]


async def test_slices_are_named_again_where_a_part_of_them_was_not_renewed(world: World) -> None:
    for number in range(RENEW_CONTRACT_MAX + 1):
        await world.book.reserve(Purse(f"accounts/a{number}"), 1)
    settle = world.billing.settle

    async def once(settlements: list[Settlement], renew: list[str]) -> Settled:
        world.billing.is_away = True
        return await settle(settlements, renew)

    async def first(settlements: list[Settlement], renew: list[str]) -> Settled:
        settled = await settle(settlements, renew)
        world.settler._settle = once
        return settled

    world.settler._settle = first
    with pytest.raises(Unavailable):
        await world.settler.flush()
    world.settler._settle = settle
    world.billing.is_away = False

    await world.settler.flush()

    parts = [len(part) for part in world.billing.renewed]
    assert parts == [RENEW_CONTRACT_MAX, RENEW_CONTRACT_MAX, 1]


async def test_what_is_queued_is_found_by_its_key_until_billing_has_it(world: World) -> None:
    world.put(1, "r-1")
    world.put(2, "r-2", EndCause.ENGINE_FAILURE)
    world.put(3)

    found = world.settler.find_charged("projects/dev", "r-1")

    assert found is not None
    assert (found.generation_id, found.request_sha256) == ("g1", "ab")
    assert (found.usage.input_tokens, found.usage.output_tokens) == (1, 1)
    # Not charged, another project's, without a key.
    assert world.settler.find_charged("projects/dev", "r-2") is None
    assert world.settler.find_charged("projects/other", "r-1") is None
    assert world.settler.find_charged("projects/dev", "") is None
    await world.settler.flush()
    assert world.settler.find_charged("projects/dev", "r-1") is None


async def test_what_billing_refuses_frees_its_key(world: World) -> None:
    world.put(1, "r-1")
    world.billing.bad = {"g1"}

    await world.settler.flush()

    assert world.settler.find_charged("projects/dev", "r-1") is None


async def test_an_end_free_of_charge_does_not_hide_the_one_that_is_charged(world: World) -> None:
    # The first attempt was lost and is settled while the repeat ends.
    answered = asyncio.Event()
    settle = world.billing.settle

    async def slowly(settlements: list[Settlement], renew: list[str]) -> Settled:
        await answered.wait()
        return await settle(settlements, renew)

    world.settler._settle = slowly
    world.put(1, "r", EndCause.WORKER_LOST)
    flush = asyncio.create_task(world.settler.flush())
    await asyncio.sleep(0)
    world.put(2, "r")
    answered.set()
    await flush

    assert world.settler.queued == 1
    found = world.settler.find_charged("projects/dev", "r")
    assert found is not None
    assert found.generation_id == "g2"


async def test_more_slices_than_one_call_renews_cost_no_settlement(world: World) -> None:
    for number in range(2 * RENEW_CONTRACT_MAX + 1):
        await world.book.reserve(Purse(f"accounts/a{number}"), 1)
    world.put(1)

    await world.settler.flush()

    assert world.billing.settled == ["g1"]
    assert world.settler.refused == 0
    renewed = [slice_id for part in world.billing.renewed for slice_id in part]
    assert renewed == world.book.open_ids()


def test_the_largest_batch_is_a_request_that_billing_takes() -> None:
    # Or it would be refused for ever, with the settlements of everybody else.
    longest = "x" * 63
    opening = Opening(
        generation_id="g" * 128,
        slice_id="s" * 128,
        account=f"accounts/{longest}",
        project=f"projects/{longest}",
        api_key=f"apiKeys/{longest}",
        offering=f"offerings/{longest}",
        model_version=f"models/{longest}/versions/{longest}",
        price=f"prices/{longest}",
        input_tokens=2**32 - 1,
        start_time=NOW,
        request_id="r" * 128,
        request_sha256="0" * 64,
        labels={f"{number:x>63}": "v" * 256 for number in range(16)},
        end_user="u" * 128,
    )
    closing = Closing(output_tokens=2**32 - 1, cause=EndCause.COMPLETED, end_time=NOW)
    receipt = signed_receipt(ReceiptSigner(bytes(32)), opening, closing, NANOS_MAX)
    closing = replace(closing, receipt=receipt)
    one = credit_slice_service_pb2.SettleRequest(
        settlements=[convert.settlement_to_pb(opening, closing, engine_time_ns=10**15)]
    )
    slices = credit_slice_service_pb2.SettleRequest(renew_slice_ids=["s" * 128] * 1000)

    assert BATCH_MAX * one.ByteSize() + slices.ByteSize() <= PUBLIC_REQUEST_BYTES_MAX
