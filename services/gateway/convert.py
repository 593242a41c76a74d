"""Between messages and the gateway's own values. Pure and total."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from maas.billing.v1 import (
    credit_slice_service_pb2,
    ledger_pb2,
    limit_service_pb2,
    quota_service_pb2,
)
from maas.catalog.v1 import model_pb2
from maas.common.v1 import money_pb2, receipt_pb2, usage_pb2
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2
from maas.scheduler.v1 import placement_service_pb2, worker_pb2

from libs.units import CURRENCY, Rates
from services.gateway.domain import (
    Adapter,
    Charged,
    Closing,
    Offering,
    Opening,
    Price,
    Usage,
    usage_of,
)
from services.gateway.limits import Limit, Rate
from services.gateway.placement import Slot, Target
from services.gateway.quotas import Key
from services.gateway.spares import Spare
from services.gateway.tables import Worker

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)
_BILLION = 1_000_000_000


def duration_to_pb(seconds: float) -> Duration:
    """Turns seconds into a Duration."""
    return nanoseconds_to_pb(round(seconds * 1e9))


def nanoseconds_to_pb(nanoseconds: int) -> Duration:
    """Turns nanoseconds into a Duration."""
    return Duration(seconds=nanoseconds // _BILLION, nanos=nanoseconds % _BILLION)


def seconds_of(duration: Duration) -> float:
    """Reads a Duration."""
    return duration.seconds + duration.nanos / 1e9


def timestamp_to_pb(time: datetime) -> Timestamp:
    """Turns an aware time into a Timestamp, to the microsecond."""
    seconds = (time - _EPOCH) // _SECOND
    return Timestamp(seconds=seconds, nanos=time.microsecond * 1000)


def offering_from_pb(message: model_pb2.Offering) -> Offering:
    """Reads an offering, with the suite's defaults where it has none."""
    has = message.HasField
    return Offering(
        name=message.name,
        model_version=message.model_version,
        context_length=message.context_length,
        default_max_output_tokens=message.default_max_output_tokens or 512,
        default_temperature=message.default_temperature if has("default_temperature") else 1.0,
        default_top_p=message.default_top_p if has("default_top_p") else 1.0,
        default_top_k=message.default_top_k if has("default_top_k") else 0,
        prompt_overhead_tokens=message.prompt_overhead_tokens,
        message_overhead_tokens=message.message_overhead_tokens,
    )


def price_from_pb(message: ledger_pb2.Price) -> Price:
    """Reads a price."""
    return Price(
        name=message.name,
        offering=message.offering,
        rates=Rates(
            input_price=message.input_price_per_million.nanos,
            output_price=message.output_price_per_million.nanos,
            cached_input_price=(
                message.cached_input_price_per_million.nanos
                if message.HasField("cached_input_price_per_million")
                else None
            ),
            reasoning_price=(
                message.reasoning_price_per_million.nanos
                if message.HasField("reasoning_price_per_million")
                else None
            ),
            request_price=message.request_price.nanos,
            background_discount_percent=message.background_discount_percent,
        ),
        effective_time=message.effective_time.ToDatetime(UTC),
    )


def limit_from_pb(message: limit_service_pb2.Limit) -> Limit:
    """Reads a limit."""
    rate = message.rate
    has = rate.HasField
    return Limit(
        name=message.name,
        account=message.account,
        scope=message.scope,
        rate=Rate(
            requests=rate.requests_per_minute if has("requests_per_minute") else None,
            input_tokens=(rate.input_tokens_per_minute if has("input_tokens_per_minute") else None),
            output_tokens=(
                rate.output_tokens_per_minute if has("output_tokens_per_minute") else None
            ),
            generations=rate.concurrent_generations if has("concurrent_generations") else None,
        )
        if message.HasField("rate")
        else None,
        is_deleted=message.deleted,
    )


def quota_to_pb(key: Key, required: int, wanted: int) -> quota_service_pb2.QuotaAmount:
    """Makes an amount of a limit."""
    limit, metric = key
    return quota_service_pb2.QuotaAmount(
        limit=limit,
        metric=quota_service_pb2.QuotaMetric.ValueType(metric.value),
        required=required,
        wanted=wanted,
    )


def adapter_from_pb(message: model_pb2.Adapter) -> Adapter:
    """Reads a LoRA adapter."""
    return Adapter(
        name=message.name,
        model_version=message.model_version,
        path=message.path,
        digest=message.digest,
        project=message.project,
    )


def worker_from_pb(message: worker_pb2.Worker) -> Worker:
    """Reads a worker."""
    return Worker(
        name=message.name,
        endpoint=message.endpoint,
        epoch=message.epoch,
        model_versions=frozenset(message.info.model_versions),
        capabilities=message.info.capabilities if message.info.HasField("capabilities") else None,
    )


def slot_from_pb(message: placement_service_pb2.AcquireSlotResponse) -> Slot:
    """Reads a slot: its target, then its fallbacks; and the spares that came with it."""
    return Slot(
        slot_id=message.slot_id,
        targets=[
            Target(worker=target.worker, endpoint=target.endpoint, epoch=target.epoch)
            for target in (message.target, *message.fallbacks)
        ],
        spares=tuple(
            Spare(
                slot_id=spare.slot_id,
                execution_id=spare.execution_id,
                worker=spare.target.worker,
                endpoint=spare.target.endpoint,
                epoch=spare.target.epoch,
            )
            for spare in message.spares
        ),
        start_within_s=message.start_within.seconds + message.start_within.nanos / 1e9,
    )


def execution_to_pb(
    spec: generation_pb2.GenerationSpec,
    offering: Offering,
    price: Price,
    *,
    seed: int,
    max_output_tokens: int,
    interval_s: float = 0.0,
    adapter: Adapter | None = None,
    cache_salt: bytes = b"",
) -> engine_pb2.Execution:
    """Makes what is common to all attempts to run a spec: input, concrete sampling, stops.

    Args:
        spec: what to generate; checked.
        offering: that is called.
        price: frozen at admission.
        seed: given or picked.
        max_output_tokens: of each output, given or the default.
        interval_s: how long the worker may collect output, seconds; 0 for not at all.
        adapter: that spec.adapter names; None for none.
        cache_salt: of the prefix cache.
    """
    execution = engine_pb2.Execution(
        model_version=offering.model_version,
        sampling=_sampling(spec.sampling, offering, seed),
        stop=spec.stop,
        cache_salt=cache_salt,
        bypass_cache=spec.cache.bypass,
        priority=spec.priority,
    )
    execution.stop.max_output_tokens = max_output_tokens
    for field in ("output", "tools", "constraint", "reasoning"):
        if spec.HasField(field):
            getattr(execution, field).CopyFrom(getattr(spec, field))
    if adapter is not None:
        execution.adapter.name = adapter.name
        execution.adapter.path = adapter.path
        execution.adapter.digest = adapter.digest
    if spec.HasField("max_charge"):
        bound = price.bound(
            spec.max_charge.nanos,
            is_background=spec.priority == generation_pb2.PRIORITY_CLASS_BACKGROUND,
        )
        execution.charge_limit.nanos = bound.nanos
        execution.charge_limit.input_price = bound.input_price
        execution.charge_limit.output_price = bound.output_price
    if interval_s > 0:
        execution.output_interval.CopyFrom(duration_to_pb(interval_s))
    match spec.WhichOneof("input"):
        case "text":
            execution.text = spec.text
        case "tokens":
            execution.tokens.CopyFrom(spec.tokens)
        case "chat":
            execution.chat.CopyFrom(spec.chat)
        case _:
            pass
    return execution


def _sampling(
    given: generation_pb2.SamplingOptions, offering: Offering, seed: int
) -> generation_pb2.SamplingOptions:
    sampling = generation_pb2.SamplingOptions()
    # With min_p, penalties and bias as they were given: absent, they change nothing.
    sampling.CopyFrom(given)
    sampling.seed = seed
    if not given.HasField("temperature"):
        sampling.temperature = offering.default_temperature
    if not given.HasField("top_p"):
        sampling.top_p = offering.default_top_p
    if not given.HasField("top_k"):
        sampling.top_k = offering.default_top_k
    return sampling


def sha256_of(spec: generation_pb2.GenerationSpec) -> str:
    """Returns the digest of a spec, hexadecimal."""
    return hashlib.sha256(spec.SerializeToString(deterministic=True)).hexdigest()


def money_to_pb(nanos: int) -> money_pb2.Money:
    """Makes an amount."""
    return money_pb2.Money(currency_code=CURRENCY, nanos=nanos)


def usage_to_pb(usage: Usage) -> usage_pb2.TokenUsage:
    """Makes counts."""
    return usage_pb2.TokenUsage(
        input_tokens=usage.input_tokens,
        cached_input_tokens=usage.cached_input_tokens,
        output_tokens=usage.output_tokens,
        reasoning_tokens=usage.reasoning_tokens,
    )


def receipt_to_pb(receipt: bytes) -> receipt_pb2.SignedReceipt | None:
    """Reads a receipt that was kept; None when there is none."""
    return receipt_pb2.SignedReceipt.FromString(receipt) if receipt else None


def settlement_to_pb(
    opening: Opening, closing: Closing, *, engine_time_ns: int
) -> credit_slice_service_pb2.Settlement:
    """Makes what billing settles.

    Args:
        opening: from the acceptance.
        closing: from the end.
        engine_time_ns: nanoseconds of engines that are known of by now.
    """
    return credit_slice_service_pb2.Settlement(
        generation_id=opening.generation_id,
        slice_id=opening.slice_id,
        account=opening.account,
        project=opening.project,
        api_key=opening.api_key,
        offering=opening.offering,
        model_version=opening.model_version,
        price=opening.price,
        usage=usage_to_pb(usage_of(opening, closing)),
        end_cause=ledger_pb2.EndCause.ValueType(closing.cause.value),
        start_time=timestamp_to_pb(opening.start_time),
        end_time=timestamp_to_pb(closing.end_time),
        request_id=opening.request_id,
        request_sha256=bytes.fromhex(opening.request_sha256),
        labels=opening.labels,
        end_user=opening.end_user,
        engine_time=nanoseconds_to_pb(engine_time_ns),
        background=opening.background,
        receipt=receipt_to_pb(closing.receipt),
    )


def charged_from_pb(
    message: credit_slice_service_pb2.FindSettlementResponse,
) -> Charged | None:
    """Reads what was settled under an idempotency key."""
    if not message.HasField("usage_record"):
        return None
    record = message.usage_record
    return Charged(
        generation_id=record.generation_id,
        request_sha256=message.request_sha256.hex(),
        usage=Usage(
            input_tokens=record.usage.input_tokens,
            output_tokens=record.usage.output_tokens,
            cached_input_tokens=record.usage.cached_input_tokens,
            reasoning_tokens=record.usage.reasoning_tokens,
        ),
        nanos=record.charge.nanos,
    )
