"""What an execution has to be before the engine sees it. Pure; no clock, no state.

Checks are in the order of their cost. A refusal is a typed error that names the field of the public
request, and says nothing of its content.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from maas.engine.v1 import engine_pb2

from libs.errors import (
    FieldRule,
    InvalidArgument,
    Reason,
    Violation,
    invalid_field,
    not_found,
)
from libs.limits import PUBLIC_REQUEST_BYTES_MAX
from libs.rpc.validation import Validator
from libs.units import affordable_output_tokens, charge_usage
from services.worker.engine.base import EndReason, EngineInfo, EngineRequest, Sampling
from services.worker.prompt import PromptBuilder
from services.worker.stops import StopMatcher, matcher_of

# Longest time for which output may be kept back, in nanoseconds.
OUTPUT_INTERVAL_NANOS_MAX = 1_000_000_000
# Of the largest public request, and as much again of output released elsewhere.
EXECUTION_BYTES_MAX = 2 * PUBLIC_REQUEST_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Work:
    """An admitted execution, as the worker runs it.

    Attributes:
        request: for the engine.
        matcher: finds its stop sequences; None for none.
        is_capped: max_output_tokens of the request is what the charge limit allows, and less than
            what was asked for.
    """

    request: EngineRequest
    matcher: StopMatcher | None
    is_capped: bool


class Admission:
    """The rules of one worker."""

    def __init__(
        self, info: EngineInfo, prompts: PromptBuilder, model_versions: Collection[str]
    ) -> None:
        self._info = info
        self._prompts = prompts
        self._model_versions = frozenset(model_versions)
        self._validator = Validator()
        self._validator.prepare(engine_pb2.Execution.DESCRIPTOR)

    def check(self, execution: engine_pb2.Execution) -> None:
        """Checks all but the prompt.

        Raises:
            NotFound: the model version is not served here.
            InvalidArgument: a field breaks a limit of the contract, or is not set.
        """
        if execution.model_version not in self._model_versions:
            raise not_found(execution.model_version)
        if execution.ByteSize() > EXECUTION_BYTES_MAX:
            raise invalid_field(
                "spec.input", FieldRule.TOO_LONG, f"is longer than {EXECUTION_BYTES_MAX} bytes"
            )
        try:
            self._validator.check(execution)
        except InvalidArgument as error:
            raise _of_request(error) from error
        _require(execution)
        self._prompts.check_ids(execution.stop.stop_token_ids, "spec.stop.stop_token_ids")
        self._prompts.check_ids(execution.continue_token_ids, "continue_token_ids")

    def work(self, execution: engine_pb2.Execution) -> Work:
        """Makes the work of a checked execution. May run in a thread.

        Raises:
            InvalidArgument: the prompt is wrong, does not fit, or costs more than the charge limit.
        """
        prompt = self._prompts.build(execution)
        most = self._info.context_length - 1
        if len(prompt) > most:
            raise InvalidArgument(
                f"the prompt has {len(prompt)} tokens; at most {most} leave room for output",
                reason=Reason.CONTEXT_LENGTH_EXCEEDED,
                metadata={"tokens": str(len(prompt)), "limit": str(most)},
            )
        sampling = execution.sampling
        stop = execution.stop
        affordable = _affordable(execution, len(prompt))
        request = EngineRequest(
            prompt_ids=tuple(prompt),
            continue_ids=tuple(execution.continue_token_ids),
            max_output_tokens=min(stop.max_output_tokens, affordable),
            stop_token_ids=frozenset(stop.stop_token_ids),
            ignore_eos=stop.ignore_eos,
            sampling=Sampling(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
            ),
        )
        matcher = matcher_of(tuple(stop.stop_sequences))
        return Work(request, matcher, is_capped=affordable < stop.max_output_tokens)

    def ended_before(self, request: EngineRequest) -> EndReason | None:
        """Tells how a continuation has ended that leaves nothing to do; None for all others."""
        if len(request.continue_ids) >= request.max_output_tokens:
            return EndReason.MAX_TOKENS
        if len(request.prompt_ids) + len(request.continue_ids) >= self._info.context_length:
            return EndReason.CONTEXT_FULL
        return None


def _affordable(execution: engine_pb2.Execution, input_tokens: int) -> int:
    """Returns the most output tokens that the charge limit allows; max_output_tokens without one.

    Raises:
        InvalidArgument: the prompt leaves no room for one token.
    """
    if not execution.HasField("charge_limit"):
        return execution.stop.max_output_tokens
    limit = execution.charge_limit
    most = affordable_output_tokens(
        nanos=limit.nanos,
        input_tokens=input_tokens,
        input_price=limit.input_price,
        output_price=limit.output_price,
    )
    if most is None:
        return execution.stop.max_output_tokens
    if most < 1:
        least = charge_usage(
            input_tokens=input_tokens,
            output_tokens=1,
            input_price=limit.input_price,
            output_price=limit.output_price,
        )
        raise invalid_field(
            "spec.max_charge",
            FieldRule.OUT_OF_RANGE,
            f"must be at least {least} nanos: {input_tokens} input tokens and one of output",
        )
    return most


def _require(execution: engine_pb2.Execution) -> None:
    """Checks that what the gateway resolves has been resolved."""
    if not 0 <= execution.output_interval.ToNanoseconds() <= OUTPUT_INTERVAL_NANOS_MAX:
        raise invalid_field("output_interval", FieldRule.OUT_OF_RANGE, "must be 0 s to 1 s")
    sampling, stop = execution.sampling, execution.stop
    for name in ("temperature", "top_p", "top_k", "seed"):
        if not sampling.HasField(name):
            raise invalid_field(f"spec.sampling.{name}", FieldRule.REQUIRED, "must be resolved")
    if not stop.max_output_tokens:
        raise invalid_field("spec.stop.max_output_tokens", FieldRule.REQUIRED, "must be resolved")
    if any(not sequence for sequence in stop.stop_sequences):
        raise invalid_field("spec.stop.stop_sequences", FieldRule.REQUIRED, "must not be empty")


def _of_request(error: InvalidArgument) -> InvalidArgument:
    """Names fields as the public request does, where they come from it."""
    violations = [_renamed(violation) for violation in error.violations]
    first = violations[0]
    return InvalidArgument(
        f"{first.field}: {first.description}",
        metadata={"field": first.field},
        violations=violations,
    )


def _renamed(violation: Violation) -> Violation:
    if violation.field.partition(".")[0].partition("[")[0] not in _OF_SPEC:
        return violation
    return Violation(f"spec.{violation.field}", violation.rule, violation.description)


_OF_SPEC = frozenset({"chat", "text", "tokens", "sampling", "stop"})
