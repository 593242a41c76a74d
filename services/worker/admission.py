"""What an execution has to be before the engine sees it. Pure; no clock, no state.

Checks are in the order of their cost. A refusal is a typed error that names the field of the public
request, and says nothing of its content.
"""

from __future__ import annotations

from collections.abc import Collection

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
from services.worker.engine.base import EndReason, EngineInfo, EngineRequest, Sampling
from services.worker.prompt import PromptBuilder

# Of the largest public request, and as much again of output released elsewhere.
EXECUTION_BYTES_MAX = 2 * PUBLIC_REQUEST_BYTES_MAX


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

    def request(self, execution: engine_pb2.Execution) -> EngineRequest:
        """Makes the engine's request of a checked execution. May run in a thread.

        Raises:
            InvalidArgument: the prompt is wrong, or does not fit.
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
        return EngineRequest(
            prompt_ids=tuple(prompt),
            continue_ids=tuple(execution.continue_token_ids),
            max_output_tokens=stop.max_output_tokens,
            stop_token_ids=frozenset(stop.stop_token_ids),
            ignore_eos=stop.ignore_eos,
            sampling=Sampling(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed,
            ),
        )

    def ended_before(self, request: EngineRequest) -> EndReason | None:
        """Tells how a continuation has ended that leaves nothing to do; None for all others."""
        if len(request.continue_ids) >= request.max_output_tokens:
            return EndReason.MAX_TOKENS
        if len(request.prompt_ids) + len(request.continue_ids) >= self._info.context_length:
            return EndReason.CONTEXT_FULL
        return None


def _require(execution: engine_pb2.Execution) -> None:
    """Checks that what the gateway resolves has been resolved."""
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
