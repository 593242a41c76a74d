"""The price book and its watch."""

from __future__ import annotations

import asyncio

import pytest
from maas.billing.v1 import ledger_pb2
from maas.billing.v1 import price_service_pb2 as price_pb
from maas.common.v1 import money_pb2

from libs.errors import AlreadyExists, InvalidArgument, NotFound, PermissionDenied, Reason
from libs.limits import WATCH_POLL_S
from tests.integration.services.billing.world import Billing, running, time_pb, usd


def price(**fields: object) -> ledger_pb2.Price:
    """A price that is fine, but for what the test changes."""
    whole: dict[str, object] = {
        "offering": "offerings/tiny",
        "input_price_per_million": usd(150_000_000),
        "output_price_per_million": usd(600_000_000),
        **fields,
    }
    return ledger_pb2.Price(**whole)  # type: ignore[arg-type] # fields of the test's choice


async def create(
    billing: Billing, message: ledger_pb2.Price, price_id: str = "p1"
) -> ledger_pb2.Price:
    response = await billing.admin.peer.call(
        billing.admin.prices.CreatePrice,
        price_pb.CreatePriceRequest(price_id=price_id, price=message),
    )
    return response.price


async def test_price_is_in_force_at_once_unless_it_says_when(billing: Billing) -> None:
    now = await create(billing, price(), "now")
    later = await create(billing, price(effective_time=time_pb(30)), "later")

    assert now.name == "prices/now"
    assert now.effective_time == now.create_time
    assert later.effective_time == time_pb(30)
    found = await billing.tenant.peer.call(
        billing.tenant.prices.GetPrice, price_pb.GetPriceRequest(name="prices/later")
    )
    assert found.price == later


@pytest.mark.parametrize("nanos", [0, 75_000_000, 150_000_000])
async def test_cached_input_may_have_a_price_of_its_own(billing: Billing, nanos: int) -> None:
    made = await create(billing, price(cached_input_price_per_million=usd(nanos)))

    assert made.cached_input_price_per_million == usd(nanos)
    assert await create(billing, price(cached_input_price_per_million=usd(nanos))) == made
    found = await billing.tenant.peer.call(
        billing.tenant.prices.GetPrice, price_pb.GetPriceRequest(name="prices/p1")
    )
    assert found.price == made


async def test_price_has_lines_for_reasoning_requests_and_the_background(
    billing: Billing,
) -> None:
    lines = price(
        reasoning_price_per_million=usd(0),
        request_price=usd(1000),
        background_discount_percent=50,
    )

    made = await create(billing, lines)

    assert made.reasoning_price_per_million == usd(0)
    assert (made.request_price, made.background_discount_percent) == (usd(1000), 50)
    assert await create(billing, lines) == made
    with pytest.raises(AlreadyExists):
        await create(billing, price(request_price=usd(1000), background_discount_percent=51))


async def test_what_an_engine_costs_is_for_administrators(billing: Billing) -> None:
    made = await create(billing, price(engine_second_cost=usd(7)))

    request = price_pb.GetPriceRequest(name="prices/p1")
    seen = (await billing.admin.peer.call(billing.admin.prices.GetPrice, request)).price
    hidden = (await billing.tenant.peer.call(billing.tenant.prices.GetPrice, request)).price
    listed = await billing.tenant.peer.call(
        billing.tenant.prices.ListPrices, price_pb.ListPricesRequest()
    )

    assert made.engine_second_cost == seen.engine_second_cost == usd(7)
    assert not hidden.HasField("engine_second_cost")
    assert list(listed.prices) == [hidden]


async def test_price_without_one_for_cached_input_says_none(billing: Billing) -> None:
    made = await create(billing, price())

    assert not made.HasField("cached_input_price_per_million")


async def test_free_price_is_allowed(billing: Billing) -> None:
    free = price(input_price_per_million=usd(0), output_price_per_million=usd(0))

    assert (await create(billing, free)).output_price_per_million == usd(0)


@pytest.mark.parametrize("message", [price(), price(effective_time=time_pb(30))])
async def test_creating_a_price_again_returns_it(
    billing: Billing, message: ledger_pb2.Price
) -> None:
    first = await create(billing, message)
    billing.clock.advance(60)

    assert await create(billing, message) == first


@pytest.mark.parametrize(
    "other",
    [
        price(offering="offerings/other"),
        price(input_price_per_million=usd(1)),
        price(output_price_per_million=usd(1)),
        price(cached_input_price_per_million=usd(1), effective_time=time_pb(30)),
        price(effective_time=time_pb(31)),
        price(),
    ],
)
async def test_creating_a_price_with_other_content_is_refused(
    billing: Billing, other: ledger_pb2.Price
) -> None:
    first = await create(billing, price(effective_time=time_pb(30)))

    with pytest.raises(AlreadyExists):
        await create(billing, other)

    found = await billing.admin.peer.call(
        billing.admin.prices.GetPrice, price_pb.GetPriceRequest(name="prices/p1")
    )
    assert found.price == first


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (price(input_price_per_million=usd(-1)), "price.input_price_per_million.nanos"),
        (price(output_price_per_million=usd(10**15 + 1)), "price.output_price_per_million.nanos"),
        (
            price(cached_input_price_per_million=usd(150_000_001)),
            "price.cached_input_price_per_million.nanos",
        ),
        (
            price(cached_input_price_per_million=usd(-1)),
            "price.cached_input_price_per_million.nanos",
        ),
        (
            price(cached_input_price_per_million=money_pb2.Money(nanos=1)),
            "price.cached_input_price_per_million.currency_code",
        ),
        (price(reasoning_price_per_million=usd(-1)), "price.reasoning_price_per_million.nanos"),
        (
            price(reasoning_price_per_million=usd(10**15 + 1)),
            "price.reasoning_price_per_million.nanos",
        ),
        (price(request_price=usd(-1)), "price.request_price.nanos"),
        (price(request_price=usd(10**15 + 1)), "price.request_price.nanos"),
        (price(background_discount_percent=101), "price.background_discount_percent"),
        (price(engine_second_cost=usd(-1)), "price.engine_second_cost.nanos"),
        (price(engine_second_cost=usd(10**12 + 1)), "price.engine_second_cost.nanos"),
        (price(input_price_per_million=None), "price.input_price_per_million"),
        (price(offering=""), "price.offering"),
        (price(offering="models/x"), "price.offering"),
        (price(effective_time={"seconds": 2**60}), "price.effective_time"),
    ],
)
async def test_prices_that_are_refused(
    billing: Billing, message: ledger_pb2.Price, field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await create(billing, message)

    assert [item.field for item in caught.value.violations] == [field]


async def test_price_in_another_currency_is_refused(billing: Billing) -> None:
    euro = money_pb2.Money(currency_code="EUR", nanos=1)

    with pytest.raises(InvalidArgument) as caught:
        await create(billing, price(input_price_per_million=euro))

    assert caught.value.reason is Reason.CURRENCY_MISMATCH


async def test_unknown_price_is_not_found(billing: Billing) -> None:
    with pytest.raises(NotFound):
        await billing.tenant.peer.call(
            billing.tenant.prices.GetPrice, price_pb.GetPriceRequest(name="prices/none")
        )


async def test_prices_are_listed_by_name_and_offering(billing: Billing) -> None:
    await create(billing, price(), "b")
    await create(billing, price(), "a")
    await create(billing, price(offering="offerings/other"), "c")

    async def names(offering: str, token: str = "") -> tuple[list[str], str]:
        response = await billing.tenant.peer.call(
            billing.tenant.prices.ListPrices,
            price_pb.ListPricesRequest(offering=offering, page_size=2, page_token=token),
        )
        return [item.name for item in response.prices], response.next_page_token

    first, token = await names("")
    assert first == ["prices/a", "prices/b"]
    assert await names("", token) == (["prices/c"], "")
    assert await names("offerings/tiny") == (["prices/a", "prices/b"], "")
    assert await names("offerings/other") == (["prices/c"], "")


async def test_tenant_cannot_create_a_price(billing: Billing) -> None:
    with pytest.raises(PermissionDenied):
        await billing.tenant.peer.call(
            billing.tenant.prices.CreatePrice,
            price_pb.CreatePriceRequest(price_id="mine", price=price()),
        )


async def test_watch_lists_everything_then_each_new_price(billing: Billing) -> None:
    await create(billing, price(), "p1")

    watch = billing.gateway.peer.stream(
        billing.gateway.prices.WatchPrices, price_pb.WatchPricesRequest()
    )
    async with watch as stream:
        snapshot = await stream.read()
        await create(billing, price(cached_input_price_per_million=usd(7)), "p2")
        async with asyncio.timeout(1):
            change = await stream.read()

    assert isinstance(snapshot, price_pb.WatchPricesResponse)
    assert isinstance(change, price_pb.WatchPricesResponse)
    assert [item.name for item in snapshot.prices] == ["prices/p1"]
    assert snapshot.snapshot_complete
    assert [item.name for item in change.prices] == ["prices/p2"]
    assert change.prices[0].cached_input_price_per_million == usd(7)
    assert not change.snapshot_complete


async def test_watch_of_another_replica_sees_the_price_with_its_next_poll(
    billing: Billing,
) -> None:
    async with running(billing.dsn, connections_max=2) as replica:
        watch = replica.gateway.peer.stream(
            replica.gateway.prices.WatchPrices, price_pb.WatchPricesRequest()
        )
        async with watch as stream:
            await stream.read()
            await create(billing, price(), "p1")
            replica.clock.advance(WATCH_POLL_S)
            async with asyncio.timeout(1):
                change = await stream.read()

    assert isinstance(change, price_pb.WatchPricesResponse)
    assert [item.name for item in change.prices] == ["prices/p1"]


async def test_watch_is_for_the_gateway(billing: Billing) -> None:
    watch = billing.tenant.peer.stream(
        billing.tenant.prices.WatchPrices, price_pb.WatchPricesRequest()
    )

    with pytest.raises(Exception, match="token is not known"):
        async with watch as stream:
            await stream.read()
