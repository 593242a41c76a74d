"""Prices: messages to values and back. Pure; what is wrong is refused with its path."""

from __future__ import annotations

from datetime import datetime

from maas.billing.v1 import ledger_pb2
from maas.common.v1 import money_pb2

from libs.errors import FieldRule, invalid_field
from services.billing.convert import (
    money_to_pb,
    nanos_from_pb,
    offering_id_of,
    time_from_pb,
    time_to_pb,
)
from services.billing.domain import ENGINE_SECOND_COST_MAX, PRICE_MAX, Price


def price_from_pb(price_id: str, message: ledger_pb2.Price, now: datetime) -> Price:
    """Reads a new price.

    Raises:
        InvalidArgument: names the field.
    """
    effective_time = now
    if message.HasField("effective_time"):
        effective_time = time_from_pb(message.effective_time, "price.effective_time")
    input_price = _nanos(message.input_price_per_million, "input_price_per_million")
    cached = None
    if message.HasField("cached_input_price_per_million"):
        cached = _nanos(message.cached_input_price_per_million, "cached_input_price_per_million")
    if cached is not None and cached > input_price:
        raise invalid_field(
            "price.cached_input_price_per_million.nanos",
            FieldRule.OUT_OF_RANGE,
            "must not exceed input_price_per_million",
        )
    reasoning = None
    if message.HasField("reasoning_price_per_million"):
        reasoning = _nanos(message.reasoning_price_per_million, "reasoning_price_per_million")
    request_price = 0
    if message.HasField("request_price"):
        request_price = _nanos(message.request_price, "request_price")
    cost = None
    if message.HasField("engine_second_cost"):
        cost = _nanos(message.engine_second_cost, "engine_second_cost", most=ENGINE_SECOND_COST_MAX)
    return Price(
        price_id=price_id,
        offering_id=offering_id_of(message.offering, "price.offering"),
        input_price=input_price,
        cached_input_price=cached,
        output_price=_nanos(message.output_price_per_million, "output_price_per_million"),
        reasoning_price=reasoning,
        request_price=request_price,
        background_discount_percent=message.background_discount_percent,
        engine_second_cost=cost,
        effective_time=effective_time,
        create_time=now,
    )


def _nanos(money: money_pb2.Money, field: str, *, most: int = PRICE_MAX) -> int:
    path = f"price.{field}"
    if not money.currency_code:
        raise invalid_field(path, FieldRule.REQUIRED, "is required")
    nanos = nanos_from_pb(money)
    if not 0 <= nanos <= most:
        raise invalid_field(
            f"{path}.nanos", FieldRule.OUT_OF_RANGE, f"must be between 0 and {most}"
        )
    return nanos


def price_to_pb(price: Price, *, with_cost: bool) -> ledger_pb2.Price:
    """Writes a price.

    Args:
        price: which.
        with_cost: what an engine costs the operator is told, too; to administrators.
    """
    return ledger_pb2.Price(
        name=f"prices/{price.price_id}",
        offering=f"offerings/{price.offering_id}",
        input_price_per_million=money_to_pb(price.input_price),
        output_price_per_million=money_to_pb(price.output_price),
        cached_input_price_per_million=_money(price.cached_input_price),
        reasoning_price_per_million=_money(price.reasoning_price),
        request_price=_money(price.request_price or None),
        background_discount_percent=price.background_discount_percent,
        engine_second_cost=_money(price.engine_second_cost) if with_cost else None,
        effective_time=time_to_pb(price.effective_time),
        create_time=time_to_pb(price.create_time),
    )


def _money(nanos: int | None) -> money_pb2.Money | None:
    return None if nanos is None else money_to_pb(nanos)
