"""Rules between the fields of a spec, which no single field's limits can say.

Pure. Checked before anything is looked up or held; capabilities of models and the limits of single
fields are not here (libs/capabilities.py, libs/rpc/validation.py).
"""

from __future__ import annotations

from maas.inference.v1 import generation_pb2, tools_pb2

from libs.chat_rules import check_spec as check_chat
from libs.errors import FieldRule, InvalidArgument, invalid_field

DURATION_MIN_S = 0.001
DURATION_MAX_S = 86_400.0


def check(spec: generation_pb2.GenerationSpec) -> None:
    """Checks a spec.

    Raises:
        InvalidArgument: names the first field that does not go with the others.
    """
    if spec.WhichOneof("input") is None:
        raise invalid_field("spec.input", FieldRule.REQUIRED, "chat, text or tokens is required")
    if spec.HasField("max_duration"):
        _check_duration(spec)
    if spec.HasField("stop"):
        _check_stop(spec)
    if spec.output.top_logprobs and not spec.output.return_logprobs:
        raise invalid_field(
            "spec.output.top_logprobs", FieldRule.CONFLICTING, "needs return_logprobs"
        )
    if spec.HasField("constraint"):
        _check_constraint(spec)
    check_chat(spec)


def count_of(spec: generation_pb2.GenerationSpec) -> int:
    """Returns how many outputs are asked for."""
    return spec.output.count if spec.output.HasField("count") else 1


def has_tools(spec: generation_pb2.GenerationSpec) -> bool:
    """Tells whether the model is told of tools."""
    return bool(spec.tools.tools) and spec.tools.mode != tools_pb2.TOOL_MODE_NONE


def max_duration_s(spec: generation_pb2.GenerationSpec) -> float | None:
    """Returns the longest time from the call's arrival on, seconds; None for no limit."""
    if not spec.HasField("max_duration"):
        return None
    return spec.max_duration.seconds + spec.max_duration.nanos / 1e9


def _check_duration(spec: generation_pb2.GenerationSpec) -> None:
    seconds = max_duration_s(spec)
    if seconds is not None and not DURATION_MIN_S <= seconds <= DURATION_MAX_S:
        raise invalid_field(
            "spec.max_duration", FieldRule.OUT_OF_RANGE, "must be from 1 ms to 24 h"
        )


def _check_stop(spec: generation_pb2.GenerationSpec) -> None:
    stop = spec.stop
    has_both = stop.HasField("min_output_tokens") and stop.HasField("max_output_tokens")
    if has_both and stop.min_output_tokens > stop.max_output_tokens:
        raise too_few_output_tokens(stop.max_output_tokens)


def too_few_output_tokens(max_output_tokens: int) -> InvalidArgument:
    """Makes the error for a least count above the most."""
    return invalid_field(
        "spec.stop.min_output_tokens",
        FieldRule.OUT_OF_RANGE,
        f"must be at most max_output_tokens, {max_output_tokens}",
    )


def _check_constraint(spec: generation_pb2.GenerationSpec) -> None:
    if spec.constraint.WhichOneof("kind") is None:
        raise invalid_field("spec.constraint", FieldRule.REQUIRED, "a kind is required")
    if spec.tools.mode == tools_pb2.TOOL_MODE_REQUIRED:
        raise invalid_field(
            "spec.constraint",
            FieldRule.CONFLICTING,
            "an output that has to be a call of a tool cannot be constrained",
        )
