"""services/gateway/convert.py: what billing says, in the gateway's own values."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp
from maas.billing.v1 import ledger_pb2, limit_service_pb2, quota_service_pb2
from maas.common.v1.money_pb2 import Money

from libs.units import Rates
from services.gateway import convert
from services.gateway.domain import Price
from services.gateway.limits import Limit, Rate
from services.gateway.quotas import Metric


def usd(nanos: int) -> Money:
    return Money(currency_code="USD", nanos=nanos)


def test_a_price_is_read_with_all_that_it_says() -> None:
    message = ledger_pb2.Price(
        name="prices/p",
        offering="offerings/x",
        input_price_per_million=usd(10),
        output_price_per_million=usd(20),
        cached_input_price_per_million=usd(0),
        reasoning_price_per_million=usd(30),
        request_price=usd(4),
        background_discount_percent=50,
        engine_second_cost=usd(99),
        effective_time=Timestamp(seconds=5),
    )

    assert convert.price_from_pb(message) == Price(
        name="prices/p",
        offering="offerings/x",
        rates=Rates(
            input_price=10,
            output_price=20,
            cached_input_price=0,
            reasoning_price=30,
            request_price=4,
            background_discount_percent=50,
        ),
        effective_time=datetime.fromtimestamp(5, UTC),
    )


def test_what_a_price_does_not_say_is_as_before() -> None:
    message = ledger_pb2.Price(
        name="prices/p", input_price_per_million=usd(10), output_price_per_million=usd(20)
    )

    assert convert.price_from_pb(message).rates == Rates(input_price=10, output_price=20)


def test_a_rate_limit_limits_what_it_names_and_nothing_else() -> None:
    message = limit_service_pb2.Limit(
        name="limits/r",
        account="accounts/o",
        scope="projects/p",
        rate=limit_service_pb2.RateLimit(output_tokens_per_minute=7, concurrent_generations=2),
    )

    assert convert.limit_from_pb(message) == Limit(
        name="limits/r",
        account="accounts/o",
        scope="projects/p",
        rate=Rate(output_tokens=7, generations=2),
    )


def test_of_a_spend_limit_only_its_scope_matters_here() -> None:
    message = limit_service_pb2.Limit(
        name="limits/s",
        account="accounts/o",
        scope="accounts/o",
        spend=limit_service_pb2.SpendLimit(
            amount=usd(5), window=limit_service_pb2.SPEND_WINDOW_DAY
        ),
        deleted=True,
    )

    found = convert.limit_from_pb(message)

    assert (found.rate, found.is_deleted) == (None, True)


def test_metrics_are_those_of_the_contract() -> None:
    for metric in Metric:
        name = f"QUOTA_METRIC_{metric.name}"
        made = convert.quota_to_pb(("limits/l", metric), 3, 4)
        assert quota_service_pb2.QuotaMetric.Name(made.metric) == name
        assert (made.limit, made.required, made.wanted) == ("limits/l", 3, 4)
