"""Usage records as CloudEvents 1.0, one JSON object a line. Pure.

An event is a fact that never changes: what may come later, as a refund, is no part of it. So an
export that is repeated gives the same bytes, and whoever imports tells repeats by source and id.
Counts that may leave the 53 bits of a JSON number, amounts, are texts.
"""

from __future__ import annotations

import json

from maas.billing.v1 import ledger_pb2

from tools.export.amounts import decimal_of_nanos, text_of

TYPE = "maas.usage.settled.v1"


def line_of(record: ledger_pb2.UsageRecord, *, source: str) -> str:
    """Writes the event of a record, with the end of its line.

    Args:
        record: a settled generation.
        source: which deployment it comes from, a URI reference.
    """
    event = {
        "specversion": "1.0",
        "id": record.generation_id,
        "source": source,
        "type": TYPE,
        "subject": record.name.partition("/usageRecords/")[0],
        "time": record.settle_time.ToJsonString(),
        "datacontenttype": "application/json",
        "data": _data_of(record),
    }
    # No text of JSON has a line break inside.
    return json.dumps(event, ensure_ascii=False, separators=(",", ":")) + "\n"


def end_cause_of(record: ledger_pb2.UsageRecord) -> str:
    """Names how a generation ended; a number where billing knows more causes than this does."""
    number = record.end_cause
    known = number in ledger_pb2.EndCause.values()
    return ledger_pb2.EndCause.Name(number) if known else str(int(number))


def _data_of(record: ledger_pb2.UsageRecord) -> dict[str, object]:
    usage = record.usage
    return {
        "generation_id": record.generation_id,
        "project": record.project,
        "api_key": record.api_key,
        "offering": record.offering,
        "model_version": record.model_version,
        "price": record.price,
        "end_cause": end_cause_of(record),
        "input_tokens": usage.input_tokens,
        "cached_input_tokens": usage.cached_input_tokens,
        "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "charge_nanos": str(record.charge.nanos),
        "charge": text_of(decimal_of_nanos(record.charge.nanos)),
        "currency": record.charge.currency_code,
        "engine_time_us": record.engine_time.ToMicroseconds(),
        "background": record.background,
        "start_time": record.start_time.ToJsonString(),
        "end_time": record.end_time.ToJsonString(),
        "request_id": record.request_id,
        "end_user": record.end_user,
        "labels": {key: record.labels[key] for key in sorted(record.labels)},
    }
