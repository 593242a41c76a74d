"""Questions about usage, and their answers: messages to values and back. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from maas.billing.v1 import usage_service_pb2 as usage_pb
from maas.common.v1 import usage_pb2

from libs.errors import FieldRule, invalid_field
from services.billing import convert
from services.billing.usage import Dimension, Grouping, UsageFilter, UsageSummary

_DIMENSIONS = {item.value: item for item in Dimension}


def filter_from_pb(message: usage_pb.UsageFilter) -> UsageFilter:
    """Reads a filter; an absent one lets everything through.

    Raises:
        InvalidArgument: names the field.
    """
    start_time = end_time = None
    if message.HasField("start_time"):
        start_time = convert.time_from_pb(message.start_time, "filter.start_time")
    if message.HasField("end_time"):
        end_time = convert.time_from_pb(message.end_time, "filter.end_time")
    if start_time is not None and end_time is not None and start_time >= end_time:
        raise invalid_field(
            "filter.end_time", FieldRule.CONFLICTING, "must be after filter.start_time"
        )
    labels = {
        convert.text_of(key, "filter.labels"): convert.text_of(value, "filter.labels")
        for key, value in message.labels.items()
    }
    return UsageFilter(
        project_id=_id_of(message.project, "projects/*", "filter.project"),
        api_key_id=_id_of(message.api_key, "apiKeys/*", "filter.api_key"),
        offering_id=_id_of(message.offering, "offerings/*", "filter.offering"),
        model_version=_model_version(message.model_version),
        labels=labels,
        end_user=convert.text_of(message.end_user, "filter.end_user"),
        start_time=start_time,
        end_time=end_time,
    )


def _id_of(name: str, pattern: str, field: str) -> str:
    return convert.ids_of(name, pattern, field)[0] if name else ""


def _model_version(name: str) -> tuple[str, str] | None:
    if not name:
        return None
    model_id, version_id = convert.ids_of(name, "models/*/versions/*", "filter.model_version")
    return model_id, version_id


def grouping_from_pb(dimensions: Sequence[int], label_key: str) -> Grouping:
    """Reads how to group.

    Raises:
        InvalidArgument: a dimension is unknown or comes twice, or there is a label's key without
            the dimension, or the dimension without a key.
    """
    found: list[Dimension] = []
    for index, number in enumerate(dimensions):
        dimension = _DIMENSIONS.get(number)
        if dimension is None:
            raise invalid_field(f"group_by[{index}]", FieldRule.UNKNOWN_ENUM, "is no dimension")
        if dimension in found:
            raise invalid_field(f"group_by[{index}]", FieldRule.CONFLICTING, "comes twice")
        found.append(dimension)
    if Dimension.LABEL in found and not label_key:
        raise invalid_field(
            "label_key", FieldRule.REQUIRED, "must say whose value USAGE_DIMENSION_LABEL is"
        )
    if label_key and Dimension.LABEL not in found:
        raise invalid_field(
            "label_key", FieldRule.CONFLICTING, "is for group_by USAGE_DIMENSION_LABEL"
        )
    return Grouping(dimensions=tuple(found), label_key=convert.text_of(label_key, "label_key"))


def summary_to_pb(summary: UsageSummary, *, shows_cost: bool) -> usage_pb.UsageSummary:
    """Writes the sums of a group.

    Args:
        summary: what to write.
        shows_cost: with what the engines' time cost the operator.
    """
    engine_time = Duration()
    engine_time.FromMicroseconds(summary.engine_time_us)
    return usage_pb.UsageSummary(
        values=summary.values,
        record_count=summary.record_count,
        usage=usage_pb2.TokenUsage(
            input_tokens=summary.input_tokens,
            cached_input_tokens=summary.cached_input_tokens,
            output_tokens=summary.output_tokens,
            reasoning_tokens=summary.reasoning_tokens,
        ),
        charge=convert.money_to_pb(summary.charge),
        refunded=convert.money_to_pb(summary.refunded),
        engine_time=engine_time,
        engine_cost=convert.money_to_pb(summary.engine_cost) if shows_cost else None,
    )
