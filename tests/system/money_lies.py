"""Ways to be wrong with money, each of which group money of the kit has to see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.any_pb2 import Any as Packed
from google.rpc import error_details_pb2, status_pb2
from maas.billing.v1 import ledger_pb2

from tests.system.liar import Lie

Answer = Callable[[Any], None]


def _each_record(alter: Answer) -> Answer:
    def answer(response: Any) -> None:
        for record in response.usage_records:
            alter(record)

    return answer


def _more_tokens(record: Any) -> None:
    record.usage.output_tokens += 1


def _dearer(record: Any) -> None:
    record.charge.nanos += 1


def _completed(record: Any) -> None:
    record.end_cause = ledger_pb2.END_CAUSE_COMPLETED


def _no_engine(record: Any) -> None:
    record.ClearField("engine_time")


def _nothing_held(response: Any) -> None:
    response.balance.held.nanos = 0


def _below_zero(response: Any) -> None:
    response.balance.posted.nanos -= 10**12


def _twice(response: Any) -> None:
    if response.entries:
        response.entries.append(response.entries[-1])


def _without_refunds(response: Any) -> None:
    kept = [item for item in response.entries if item.kind != ledger_pb2.ENTRY_KIND_REFUND]
    del response.entries[:]
    response.entries.extend(kept)


def _other_order(response: Any) -> None:
    found = list(response.grants)[::-1]
    del response.grants[:]
    response.grants.extend(found)


def _higher_hold(response: Any) -> None:
    response.hold.nanos += 1


def _higher_most(response: Any) -> None:
    response.most.nanos += 1


def _double_spend(request: Any) -> None:
    if request.limit.HasField("spend"):
        request.limit.spend.amount.nanos *= 2


def _double_output(request: Any) -> None:
    if request.limit.rate.output_tokens_per_minute > 1:
        request.limit.rate.output_tokens_per_minute *= 2


def _not_concurrent(request: Any) -> None:
    request.limit.rate.ClearField("concurrent_generations")


def _alert_again(response: Any) -> None:
    response.spend_alerts.extend(list(response.spend_alerts))


def _sum_more(response: Any) -> None:
    for summary in response.summaries[:1]:
        summary.charge.nanos += 1


def _unfiltered(request: Any) -> None:
    request.filter.ClearField("labels")


def _no_receipt(response: Any) -> None:
    response.frame.finished.ClearField("receipt")


def _not_finished_without(response: Any) -> None:
    if response.frame.HasField("finished"):
        _no_receipt(response)


def _other_key(response: Any) -> None:
    for key in response.keys:
        key.public_key = bytes(reversed(key.public_key))


def _higher_bill(response: Any) -> None:
    response.invoice.total.nanos += 1
    response.invoice.lines[0].charge.nanos += 1


def _quiet(response: Any) -> None:
    if response.HasField("violation"):
        response.violation.invariant = "I5"
        response.violation.resource = "elsewhere"


def _changing() -> Answer:
    count = iter(range(10**6))

    def answer(record: Any) -> None:
        record.settle_time.nanos = next(count)

    return answer


def _details(status: status_pb2.Status, alter: Callable[[Packed], Packed | None]) -> None:
    found = [alter(detail) for detail in status.details]
    del status.details[:]
    status.details.extend(detail for detail in found if detail is not None)


def _no_time(status: status_pb2.Status) -> None:
    kind = error_details_pb2.RetryInfo.DESCRIPTOR
    _details(status, lambda detail: None if detail.Is(kind) else detail)


def _too_early(status: status_pb2.Status) -> None:
    def alter(detail: Packed) -> Packed:
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(retry):
            retry.retry_delay.FromMilliseconds(retry.retry_delay.ToMilliseconds() // 8)
            detail.Pack(retry)
        return detail

    _details(status, alter)


def _other_limit(status: status_pb2.Status) -> None:
    def alter(detail: Packed) -> Packed:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and "limit" in info.metadata:
            info.metadata["limit"] = "limits/another"
            detail.Pack(info)
        return detail

    _details(status, alter)


def _answers(feature: str, name: str, seen_as: str, answer: Answer, method: str) -> Lie:
    methods = frozenset({method})
    return Lie(feature=feature, name=name, seen_as=seen_as, methods=methods, answer=answer)


_LIST = "ListUsageRecords"
_GENERATE = ("Generate", "StreamGenerate")

LIES = (
    _answers(
        "B-1",
        "a record counts a token more",
        "tokens of a stream: expected 60, got 61",
        _each_record(_more_tokens),
        _LIST,
    ),
    _answers(
        "B-1", "a record costs a nano more", "charge of the record", _each_record(_dearer), _LIST
    ),
    _answers("B-2", "nothing is ever held", "0 nanos held of", _nothing_held, "GetBalance"),
    _answers(
        "B-2",
        "the last entry comes twice",
        "settlements in the ledger",
        _twice,
        "ListLedgerEntries",
    ),
    _answers(
        "U9",
        "the hold is not the quoted one",
        "one nano less than the hold",
        _higher_hold,
        "QuoteGeneration",
    ),
    _answers(
        "U9",
        "the charge is not the quoted one",
        "charge against the most that was quoted",
        _higher_most,
        "QuoteGeneration",
    ),
    _answers(
        "U2", "the balance is below zero", "the balance went down to", _below_zero, "GetBalance"
    ),
    _answers(
        "B-6",
        "a refund is no entry",
        "posted, against the sum of the ledger entries",
        _without_refunds,
        "ListLedgerEntries",
    ),
    _answers(
        "B-6", "grants are used in another order", "grants in order", _other_order, "ListGrants"
    ),
    Lie(
        feature="B-3",
        name="twice as much may be spent",
        seen_as="ends of 200 calls under a limit",
        methods=frozenset({"CreateLimit"}),
        ask=_double_spend,
    ),
    Lie(
        feature="B-3",
        name="another limit is named",
        seen_as="limits that the refusals name",
        methods=frozenset(_GENERATE),
        refuse=_other_limit,
    ),
    Lie(
        feature="B-8",
        name="twice as many tokens a minute",
        seen_as="of 5 calls of 60 tokens",
        methods=frozenset({"CreateLimit"}),
        ask=_double_output,
    ),
    Lie(
        feature="B-8",
        name="any number at the same time",
        seen_as="two ran at the same time",
        methods=frozenset({"CreateLimit"}),
        ask=_not_concurrent,
    ),
    Lie(
        feature="B-9",
        name="no RetryInfo",
        seen_as="a refusal for a rate has no RetryInfo",
        methods=frozenset(_GENERATE),
        refuse=_no_time,
    ),
    Lie(
        feature="B-9",
        name="RetryInfo is too early",
        seen_as="that it was told",
        methods=frozenset(_GENERATE),
        refuse=_too_early,
    ),
    _answers(
        "B-11", "each alert comes twice", "alerts at 85 percent", _alert_again, "ListSpendAlerts"
    ),
    _answers(
        "B-7", "a sum is a nano too high", "charges of groups by", _sum_more, "SummarizeUsage"
    ),
    Lie(
        feature="B-7",
        name="labels filter nothing",
        seen_as="records behind a filter",
        methods=frozenset({_LIST}),
        ask=_unfiltered,
    ),
    _answers(
        "B-12", "an export changes", "a repeated export differs", _each_record(_changing()), _LIST
    ),
    _answers(
        "U4",
        "no receipt in the last frame",
        "a finished generation has no receipt",
        _not_finished_without,
        "StreamGenerate",
    ),
    _answers(
        "U4", "receipts of another key", "exit code of the verifier", _other_key, "ListReceiptKeys"
    ),
    _answers(
        "U4",
        "the bill is a nano higher",
        "exit code of the verifier",
        _higher_bill,
        "PreviewInvoice",
    ),
    _answers("B-13", "no engine time", "s of an engine in", _each_record(_no_engine), _LIST),
    _answers(
        "B-4",
        "every end is recorded as completed",
        "end cause: expected 'CLIENT_CANCELLED'",
        _each_record(_completed),
        _LIST,
    ),
    _answers(
        "U6", "the auditor names something else", "a balance altered by hand", _quiet, "Reconcile"
    ),
)
