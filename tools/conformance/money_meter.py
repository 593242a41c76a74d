"""Features of what is counted: B-1, B-2, B-7, B-13, U9."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from maas.billing.v1 import (
    account_service_pb2,
    credit_slice_service_pb2,
    invoice_service_pb2,
    ledger_pb2,
    limit_service_pb2,
    price_service_pb2,
)
from maas.billing.v1 import usage_service_pb2 as usage_pb
from maas.common.v1 import money_pb2, receipt_pb2, usage_pb2
from maas.inference.v1 import generation_pb2

from libs.errors import Code, Reason
from tools.conformance import operator
from tools.conformance.client import Refusal, Tenant
from tools.conformance.delivery import SEED
from tools.conformance.money_customer import (
    Customer,
    Spec,
    customer,
    exact_spec,
    now_to_pb,
    prompt_ids,
)
from tools.conformance.requests import PROMPT, greedy, user
from tools.conformance.trial import Trial
from tools.conformance.verdict import Mismatch, expect, expect_equal

_MONEY_FILES = (
    account_service_pb2,
    credit_slice_service_pb2,
    invoice_service_pb2,
    ledger_pb2,
    limit_service_pb2,
    price_service_pb2,
    usage_pb,
    money_pb2,
    receipt_pb2,
    usage_pb2,
)
_FLOATS = {FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE}
_REPEATS = 16
_HELD_S = 5.0
_BUSY_SHARE = 0.02
_BUSY_REQUESTS = 24
_LABEL = "team"
_Dimension = usage_pb.UsageDimension
_DIMENSIONS = (
    usage_pb.USAGE_DIMENSION_DAY,
    usage_pb.USAGE_DIMENSION_PROJECT,
    usage_pb.USAGE_DIMENSION_API_KEY,
    usage_pb.USAGE_DIMENSION_OFFERING,
    usage_pb.USAGE_DIMENSION_MODEL_VERSION,
    usage_pb.USAGE_DIMENSION_PRICE,
    usage_pb.USAGE_DIMENSION_LABEL,
    usage_pb.USAGE_DIMENSION_END_CAUSE,
)


async def tokens_are_counted(trial: Trial) -> None:
    """B-1: records count the token ids that came; every amount is an integer."""
    count = _require_integers()
    trial.show(f"no floating point in {count} fields of the money contract")
    async with customer(trial) as buyer, buyer.caller() as tenant:
        abilities = (await tenant.capabilities()).capabilities
        ids = await prompt_ids(tenant)
        streamed = await tenant.read(exact_spec(tenant, ids, 60))
        assert streamed.finished is not None
        record = await buyer.books.record(streamed.generation_id)
        expect_equal(record.usage.output_tokens, len(streamed.token_ids), "tokens of a stream")
        expect_equal(record.usage.input_tokens, len(ids), "tokens of a prompt")
        expect_equal(record.usage, streamed.finished.usage, "usage of the record")
        expect_equal(record.charge, streamed.finished.charge, "charge of the record")
        await buyer.require_priced(record)
        two = exact_spec(tenant, ids, 20)
        if abilities.max_outputs > 1:
            two.output.count = 2
        whole = await tenant.generate(two)
        came = sum(len(output.token_ids) for output in whole.outputs)
        record = await buyer.books.record(whole.generation_id)
        expect_equal(record.usage.output_tokens, came, f"tokens of {len(whole.outputs)} outputs")
        await buyer.require_priced(record)
        trial.show(f"{len(streamed.token_ids)} ids of a stream and {came} unary ones counted")
        await _cached(trial, buyer, tenant)
        await _reasoned(trial, buyer, tenant)


def _require_integers() -> int:
    """Looks at every field of the contract that money goes through; how many there are."""
    fields = [
        field
        for module in _MONEY_FILES
        for message in module.DESCRIPTOR.message_types_by_name.values()
        for field in _fields_of(message)
    ]
    broken = [field.full_name for field in fields if field.type in _FLOATS]
    expect(not broken, f"floating point in {', '.join(broken)}")
    return len(fields)


def _fields_of(message: Descriptor) -> list[FieldDescriptor]:
    nested = [field for inner in message.nested_types for field in _fields_of(inner)]
    return [*message.fields, *nested]


async def _cached(trial: Trial, buyer: Customer, tenant: Tenant) -> None:
    if not (await tenant.capabilities()).capabilities.prompt_cache:
        trial.show("cached tokens: the engine has no cache")
        return
    spec = tenant.spec(" ".join([PROMPT] * _REPEATS), 4, seed=SEED)
    # Each worker has a cache of its own.
    spec.cache.affinity_key = "conformance"
    missed, hit = await tenant.generate(spec), await tenant.generate(spec)
    record = await buyer.books.record(hit.generation_id)
    cached = record.usage.cached_input_tokens
    expect_equal(missed.usage.cached_input_tokens, 0, "cached tokens of a new prompt")
    expect(0 < cached < record.usage.input_tokens, f"{cached} tokens of a repeat from the cache")
    await buyer.require_priced(record)
    trial.show(f"{cached} of {record.usage.input_tokens} input tokens cached, at their price")


async def _reasoned(trial: Trial, buyer: Customer, tenant: Tenant) -> None:
    if not (await tenant.capabilities()).capabilities.reasoning:
        trial.show("reasoning: the model has none")
        return
    spec = greedy(tenant, 100)
    spec.chat.messages.append(user(PROMPT))
    spec.reasoning.enabled = True
    whole = await tenant.generate(spec)
    record = await buyer.books.record(whole.generation_id)
    thought = record.usage.reasoning_tokens
    expect_equal(
        record.usage.output_tokens, len(whole.outputs[0].token_ids), "tokens with thoughts"
    )
    expect(thought <= record.usage.output_tokens, "more reasoning than output")
    await buyer.require_priced(record)
    trial.show(f"{thought} of {record.usage.output_tokens} output tokens reasoning")


async def held_then_settled_once(trial: Trial) -> None:
    """B-2: the worst case is held while it runs; afterwards one settlement, and nothing held."""
    async with customer(trial) as buyer, buyer.caller() as tenant:
        spec = exact_spec(tenant, await prompt_ids(tenant), 1500)
        quote = await tenant.quote(spec)
        before = (await buyer.at_rest()).posted.nanos
        async with tenant.stream(spec) as reading:
            await reading.until(5)

            async def is_held() -> bool:
                return (await buyer.balance()).held.nanos >= quote.hold.nanos

            was_held = await operator.within(_HELD_S, is_held)
            running = await buyer.balance()
            expect(was_held, f"{running.held.nanos} nanos held of {quote.hold.nanos}")
            expect_equal(running.posted.nanos, before, "posted while it runs")
            reading.cancel()
        record = await buyer.books.record(reading.transcript.generation_id)
        left = (await buyer.at_rest()).posted.nanos
        expect_equal(before - left, record.charge.nanos, "nanos taken")
        sources = [
            entry.source
            for entry in await buyer.entries()
            if entry.kind == ledger_pb2.ENTRY_KIND_USAGE
        ]
        expect_equal(sources, [record.generation_id], "settlements in the ledger")
        await buyer.require_sum()
        trial.show(
            f"{running.held.nanos} nanos held for a worst case of {quote.hold.nanos}; cancelled,"
            f" {record.charge.nanos} taken by one record and one entry, nothing held"
        )


async def quotes_come_true(trial: Trial) -> None:
    """U9: a quote is exact: what is held, and what a known output is charged."""
    async with customer(trial, 0) as buyer, buyer.caller() as tenant:
        spec = exact_spec(tenant, await prompt_ids(tenant), 80)
        quote = await tenant.quote(spec)
        expect_equal((await buyer.records()), [], "records after a quote")
        await buyer.post(quote.hold.nanos - 1)
        refusal = await refused(tenant, spec, "one nano less than the hold that was quoted")
        refusal.expect(Code.FAILED_PRECONDITION, Reason.INSUFFICIENT_CREDIT, "a nano too little")
        required = refusal.metadata.get("requiredNanos", "")
        expect_equal(required, str(quote.hold.nanos), "requiredNanos, against the quoted hold")
        await buyer.post(1)
        whole = await admitted(tenant, spec)
        record = await buyer.books.record(whole.generation_id)
        expect_equal(whole.usage.input_tokens, quote.input_tokens, "input tokens")
        expect_equal(whole.usage.output_tokens, quote.max_output_tokens, "output tokens")
        expect_equal(record.charge, quote.most, "charge against the most that was quoted")
        expect_equal(record.price, quote.price, "price")
        expect_equal(record.model_version, quote.model_version, "model version")
        left = (await buyer.at_rest()).posted.nanos
        expect_equal(left, quote.hold.nanos - quote.most.nanos, "nanos that are left")
        trial.show(
            f"{quote.input_tokens} input tokens, hold of {quote.hold.nanos} nanos (one less is"
            f" refused), charge of {quote.most.nanos}, as quoted; the quote was free"
        )


async def refused(tenant: Tenant, spec: Spec, what: str) -> Refusal:
    """A unary call that has to be refused.

    Raises:
        Mismatch: it was answered.
    """
    try:
        await tenant.generate(spec)
    except Refusal as refusal:
        return refusal
    raise Mismatch(f"{what}: expected a refusal, got an answer")


async def admitted(tenant: Tenant, spec: Spec) -> generation_pb2.Generation:
    """A unary call, again where the gateway remembers for a moment that there was no credit."""
    found: list[generation_pb2.Generation] = []

    async def is_admitted() -> bool:
        try:
            found.append(await tenant.generate(spec))
        except Refusal as refusal:
            if refusal.reason != Reason.INSUFFICIENT_CREDIT.value:
                raise
        return bool(found)

    if not await operator.within(_HELD_S, is_admitted):
        raise Mismatch("credit for exactly the hold that was quoted is not enough")
    return found[0]


async def sums_agree(trial: Trial) -> None:
    """B-7: records, roll-ups by any dimension and the balance say the same, for any filter."""
    async with customer(trial) as buyer:
        before = (await buyer.at_rest()).posted.nanos
        other = await buyer.new_project()
        keys = [buyer.key, await buyer.new_key(), await buyer.new_key(other)]
        await asyncio.gather(*(_use(buyer, key, number) for number, key in enumerate(keys)))
        taken = before - (await buyer.at_rest()).posted.nanos
        records = await buyer.records()
        expect_equal(len(records), 9, "records")
        expect_equal(_charges(records), taken, "sum of the records, against the balance")
        filters = [
            usage_pb.UsageFilter(),
            usage_pb.UsageFilter(project=other),
            usage_pb.UsageFilter(api_key=keys[1].name),
            usage_pb.UsageFilter(labels={_LABEL: "red"}),
            usage_pb.UsageFilter(project=buyer.project, labels={_LABEL: "blue"}),
            usage_pb.UsageFilter(end_user="somebody"),
            usage_pb.UsageFilter(offering=records[0].offering, end_time=now_to_pb()),
        ]
        sums = 0
        for wanted in filters:
            sums += await _require_sums(buyer, wanted, records)
        await buyer.require_sum()
        trial.show(
            f"{len(records)} records of {len(keys)} keys, {taken} nanos: {len(filters)} filters"
            f" by {len(_DIMENSIONS)} dimensions, {sums} groups, all sum to records and balance"
        )


async def _use(buyer: Customer, key: operator.NewKey, number: int) -> None:
    async with buyer.caller(key) as tenant:
        ids = await prompt_ids(tenant)
        for turn, colour in enumerate(("red", "blue", "")):
            spec = exact_spec(tenant, ids, 5 + 3 * number + turn)
            if colour:
                spec.labels[_LABEL] = colour
            else:
                spec.end_user = "somebody"
            generation = await tenant.generate(spec)
            await buyer.books.record(generation.generation_id)


def _charges(records: Sequence[ledger_pb2.UsageRecord]) -> int:
    return sum(record.charge.nanos for record in records)


def _agrees(record: ledger_pb2.UsageRecord, wanted: usage_pb.UsageFilter) -> bool:
    """Whether a filter lets a record through, as the contract says it."""
    return (
        wanted.project in {"", record.project}
        and wanted.api_key in {"", record.api_key}
        and wanted.offering in {"", record.offering}
        and wanted.end_user in {"", record.end_user}
        and all(record.labels.get(key) == value for key, value in wanted.labels.items())
    )


async def _require_sums(
    buyer: Customer, wanted: usage_pb.UsageFilter, records: Sequence[ledger_pb2.UsageRecord]
) -> int:
    """Compares the listing and every roll-up with what the filter has to let through."""
    mine = [record for record in records if _agrees(record, wanted)]
    listed = await buyer.records(wanted)
    expect(bool(mine), "a filter of the test lets nothing through")
    expect_equal(
        [record.generation_id for record in listed],
        [record.generation_id for record in mine],
        "records behind a filter",
    )
    groups = 0
    for dimensions in ((), *((item,) for item in _DIMENSIONS), _DIMENSIONS):
        label = _LABEL if usage_pb.USAGE_DIMENSION_LABEL in dimensions else ""
        found = await buyer.summaries(wanted, dimensions, label)
        groups += len(found)
        names = ", ".join(_Dimension.Name(item)[16:] for item in dimensions) or "nothing"
        what = f"of groups by {names}"
        expect_equal(sum(item.record_count for item in found), len(mine), f"records {what}")
        expect_equal(sum(item.charge.nanos for item in found), _charges(mine), f"charges {what}")
        output = sum(item.usage.output_tokens for item in found)
        expect_equal(output, sum(item.usage.output_tokens for item in mine), f"tokens {what}")
        taken_us = sum(item.engine_time.ToMicroseconds() for item in found)
        wanted_us = sum(item.engine_time.ToMicroseconds() for item in mine)
        expect_equal(taken_us, wanted_us, f"engine time {what}")
    return groups


async def engine_time_is_shared(trial: Trial) -> None:
    """B-13: each record has its share of the engine's time; together they are all of it."""
    async with customer(trial) as buyer:
        if trial.fleet is not None:
            await trial.fleet.require_idle("before the test")
        before_s = await _busy(trial)
        async with buyer.caller() as tenant:
            ids = await prompt_ids(tenant)
            specs = [exact_spec(tenant, ids, 20 + n, SEED + n) for n in range(_BUSY_REQUESTS)]
            answers = await asyncio.gather(*(tenant.generate(spec) for spec in specs))
        records = [await buyer.books.record(answer.generation_id) for answer in answers]
        after_s = await _busy(trial)
        for record, answer in zip(records, answers, strict=True):
            engine_s = record.engine_time.ToNanoseconds() / 1e9
            total_s = answer.timings.total.ToNanoseconds() / 1e9
            expect(0 < engine_s <= total_s, f"{engine_s} s of an engine in {total_s} s")
        (summary,) = await buyer.summaries()
    taken_s = sum(record.engine_time.ToNanoseconds() for record in records) / 1e9
    expect_equal(summary.engine_time.ToNanoseconds() / 1e9, taken_s, "engine time of the roll-up")
    expect(not summary.HasField("engine_cost"), "a tenant is shown what engines cost")
    trial.show(
        f"{len(records)} records with {taken_s:.3f} engine seconds beside {summary.charge.nanos}"
        " nanos; no cost shown to a tenant"
    )
    if before_s is None or after_s is None:
        trial.lack("time that the engines worked: only on the kit's own suite")
        return
    busy_s = after_s - before_s
    expect(
        abs(taken_s - busy_s) <= _BUSY_SHARE * busy_s,
        f"records say {taken_s:.3f} engine seconds, the workers {busy_s:.3f}",
    )
    trial.show(f"the workers worked {busy_s:.3f} s")


async def _busy(trial: Trial) -> float | None:
    read = trial.deployment.busy_s
    return None if read is None else await read()
