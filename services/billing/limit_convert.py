"""Messages of limits and quotas to values and back. Pure; bad ones are refused with the path."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from maas.billing.v1 import limit_service_pb2 as limit_pb
from maas.billing.v1 import quota_service_pb2 as quota_pb

from libs.errors import FieldRule, invalid_field
from libs.ids import bad_name
from services.billing.convert import (
    account_id_of,
    ids_of,
    money_to_pb,
    nanos_from_pb,
    time_to_pb,
)
from services.billing.domain import account_name
from services.billing.limits import (
    PER_MINUTE_MAX,
    Limit,
    LimitUsage,
    RateLimit,
    Scope,
    ScopeKind,
    Span,
    SpendAlert,
    SpendLimit,
    limit_name,
)
from services.billing.quotas import Metric, PlaceWish, QuotaAmount

_COLLECTIONS = {
    "accounts": ScopeKind.ACCOUNT,
    "projects": ScopeKind.PROJECT,
    "apiKeys": ScopeKind.API_KEY,
}
_COLLECTION_OF = {kind: collection for collection, kind in _COLLECTIONS.items()}
_SPANS = {
    limit_pb.SPEND_WINDOW_DAY: Span.DAY,
    limit_pb.SPEND_WINDOW_MONTH: Span.MONTH,
}
_SPAN_TO_PB = {span: number for number, span in _SPANS.items()}
_METRICS = {metric.value: metric for metric in Metric}


def limit_id_of(name: str, field: str) -> str:
    """Reads the name of a limit.

    Raises:
        InvalidArgument: it is none.
    """
    return ids_of(name, "limits/*", field)[0]


def scope_of(name: str, field: str) -> Scope:
    """Reads the name of whom a limit limits.

    Raises:
        InvalidArgument: it is none.
    """
    collection = name.partition("/")[0]
    kind = _COLLECTIONS.get(collection)
    if kind is None:
        raise bad_name("accounts/*, projects/* or apiKeys/*", field=field)
    return Scope(kind, ids_of(name, f"{collection}/*", field)[0])


def limit_from_pb(limit_id: str, message: limit_pb.Limit, now: datetime) -> Limit:
    """Reads a new limit.

    Raises:
        InvalidArgument: names the field.
    """
    for field in ("account", "scope"):
        # Only here: an update may leave them out.
        if not getattr(message, field):
            raise invalid_field(f"limit.{field}", FieldRule.REQUIRED, "must not be empty")
    account_id = account_id_of(message.account, "limit.account")
    scope = scope_of(message.scope, "limit.scope")
    if scope.kind is ScopeKind.ACCOUNT and scope.scope_id != account_id:
        raise invalid_field("limit.scope", FieldRule.CONFLICTING, "must be the limit's account")
    return Limit(
        limit_id=limit_id,
        account_id=account_id,
        scope=scope,
        kind=kind_from_pb(message),
        create_time=now,
    )


def kind_from_pb(message: limit_pb.Limit) -> SpendLimit | RateLimit:
    """Reads what a limit allows.

    Raises:
        InvalidArgument: names the field.
    """
    match message.WhichOneof("kind"):
        case "spend":
            return _spend_from_pb(message.spend)
        case "rate":
            return _rate_from_pb(message.rate)
        case _:
            raise invalid_field("limit.spend", FieldRule.REQUIRED, "spend or rate is required")


def _spend_from_pb(message: limit_pb.SpendLimit) -> SpendLimit:
    amount = nanos_from_pb(message.amount)
    if amount < 0:
        raise invalid_field(
            "limit.spend.amount.nanos", FieldRule.OUT_OF_RANGE, "must not be negative"
        )
    if 0 in message.alert_percents:
        place = list(message.alert_percents).index(0)
        raise invalid_field(
            f"limit.spend.alert_percents[{place}]",
            FieldRule.OUT_OF_RANGE,
            "must be between 1 and 100",
        )
    return SpendLimit(
        amount=amount,
        span=_SPANS[message.window],
        alert_percents=tuple(sorted(set(message.alert_percents))),
    )


def _rate_from_pb(message: limit_pb.RateLimit) -> RateLimit:
    found = RateLimit(
        requests=_count(message, "requests_per_minute"),
        input_tokens=_count(message, "input_tokens_per_minute"),
        output_tokens=_count(message, "output_tokens_per_minute"),
        concurrent_generations=_count(message, "concurrent_generations"),
    )
    if found == RateLimit():
        raise invalid_field("limit.rate", FieldRule.REQUIRED, "must limit something")
    return found


def _count(message: limit_pb.RateLimit, field: str) -> int | None:
    if field not in {descriptor.name for descriptor, _ in message.ListFields()}:
        return None
    count: int = getattr(message, field)
    if not 1 <= count <= PER_MINUTE_MAX:
        raise invalid_field(
            f"limit.rate.{field}",
            FieldRule.OUT_OF_RANGE,
            f"must be between 1 and {PER_MINUTE_MAX}",
        )
    return count


def limit_to_pb(limit: Limit) -> limit_pb.Limit:
    """Writes a limit."""
    message = limit_pb.Limit(
        name=limit.name,
        account=account_name(limit.account_id),
        scope=f"{_COLLECTION_OF[limit.scope.kind]}/{limit.scope.scope_id}",
        create_time=time_to_pb(limit.create_time),
        deleted=limit.is_deleted,
    )
    if isinstance(limit.kind, SpendLimit):
        message.spend.CopyFrom(
            limit_pb.SpendLimit(
                amount=money_to_pb(limit.kind.amount),
                window=_SPAN_TO_PB[limit.kind.span],
                alert_percents=limit.kind.alert_percents,
            )
        )
    else:
        message.rate.CopyFrom(
            limit_pb.RateLimit(
                requests_per_minute=limit.kind.requests,
                input_tokens_per_minute=limit.kind.input_tokens,
                output_tokens_per_minute=limit.kind.output_tokens,
                concurrent_generations=limit.kind.concurrent_generations,
            )
        )
    return message


def usage_to_pb(limit: Limit, usage: LimitUsage) -> limit_pb.LimitUsage:
    """Writes what is used of a limit."""
    if isinstance(limit.kind, RateLimit):
        return limit_pb.LimitUsage(concurrent_generations=usage.places)
    end: Timestamp | None = None if usage.window_end is None else time_to_pb(usage.window_end)
    return limit_pb.LimitUsage(
        spent=money_to_pb(usage.spent), held=money_to_pb(usage.held), window_end_time=end
    )


def alert_to_pb(alert: SpendAlert) -> limit_pb.SpendAlert:
    """Writes an alert."""
    return limit_pb.SpendAlert(
        limit=limit_name(alert.limit_id),
        percent=alert.percent,
        window_start_time=time_to_pb(alert.window_start),
        spent=money_to_pb(alert.spent),
        create_time=time_to_pb(alert.create_time),
    )


def amounts_from_pb(messages: Iterable[quota_pb.QuotaAmount]) -> list[QuotaAmount]:
    """Reads amounts of quota.

    Raises:
        InvalidArgument: names the field; two amounts are of the same metric of a limit.
    """
    amounts: dict[tuple[str, int], QuotaAmount] = {}
    for index, message in enumerate(messages):
        amount = QuotaAmount(
            limit_id=limit_id_of(message.limit, f"amounts[{index}].limit"),
            metric=_METRICS[message.metric],
            required=message.required,
            wanted=message.wanted,
        )
        if amount.key in amounts:
            raise invalid_field(
                f"amounts[{index}].metric", FieldRule.CONFLICTING, "stands there twice"
            )
        amounts[amount.key] = amount
    return list(amounts.values())


def places_from_pb(messages: Iterable[quota_pb.Places]) -> list[PlaceWish]:
    """Reads how many places are wanted.

    Raises:
        InvalidArgument: names the field; a limit stands there twice.
    """
    wishes: dict[str, PlaceWish] = {}
    for index, message in enumerate(messages):
        limit_id = limit_id_of(message.limit, f"places[{index}].limit")
        if limit_id in wishes:
            raise invalid_field(
                f"places[{index}].limit", FieldRule.CONFLICTING, "stands there twice"
            )
        wishes[limit_id] = PlaceWish(limit_id=limit_id, wanted=message.count, in_use=message.in_use)
    return list(wishes.values())
