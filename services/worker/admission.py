"""What an execution has to be before the engine sees it. Pure; no clock, no state.

Checks are in the order of their cost. A refusal is a typed error that names the field of the public
request, and says nothing of its content.
"""

from __future__ import annotations

from collections.abc import Collection

from maas.common.v1 import capabilities_pb2
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2, tools_pb2

from libs.chat_rules import PIECES_MAX, check_spec, has_more_pieces
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
from libs.units import Rates
from services.worker.abilities import require_able
from services.worker.constraints import compile_constraint
from services.worker.engine.base import Constraint, EndReason, EngineInfo, EngineRequest
from services.worker.formats import Formats
from services.worker.parsing import starts_in_reasoning
from services.worker.prompt import SHORT_PIECES_MAX, PromptBuilder
from services.worker.requests import count_of, engine_requests
from services.worker.rich import NO_EXTRAS, Extras
from services.worker.stops import matcher_of
from services.worker.work import Splitting, Work

# Longest time for which output may be kept back, in nanoseconds.
OUTPUT_INTERVAL_NANOS_MAX = 1_000_000_000
# Of the largest public request, and as much again of output released elsewhere.
EXECUTION_BYTES_MAX = 2 * PUBLIC_REQUEST_BYTES_MAX


class Admission:
    """The rules of one worker."""

    def __init__(
        self,
        info: EngineInfo,
        prompts: PromptBuilder,
        model_versions: Collection[str],
        *,
        capabilities: capabilities_pb2.Capabilities,
        formats: Formats,
    ) -> None:
        """Keeps what it needs.

        Args:
            info: of the engine.
            prompts: makes the prompts of its model.
            model_versions: that are served here.
            capabilities: of the model on this engine.
            formats: that the model's output is written in.
        """
        self._info = info
        self._prompts = prompts
        self._model_versions = frozenset(model_versions)
        self._capabilities = capabilities
        self._formats = formats
        self._validator = Validator()
        self._validator.prepare(engine_pb2.Execution.DESCRIPTOR)

    def check(self, execution: engine_pb2.Execution) -> None:
        """Checks all but the prompt; of long conversations only what costs no time on the loop.

        Raises:
            NotFound: the model version is not served here.
            InvalidArgument: a field breaks a limit of the contract, is not set, or asks for what
                the model cannot do here.
        """
        self.require_version(execution.model_version)
        if execution.ByteSize() > EXECUTION_BYTES_MAX:
            raise invalid_field(
                "spec.input", FieldRule.TOO_LONG, f"is longer than {EXECUTION_BYTES_MAX} bytes"
            )
        if not _is_long(execution):
            self._check_fields(execution)
        require_able(execution, self._capabilities)
        _require(execution)
        self._prompts.check_ids(execution.stop.stop_token_ids, "spec.stop.stop_token_ids")
        self._prompts.check_ids(execution.continue_token_ids, "continue_token_ids")
        if execution.sampling.logit_bias:
            self._check_bias(execution.sampling.logit_bias)

    def require_version(self, model_version: str) -> None:
        """Checks that a model version is served here.

        Raises:
            NotFound: it is not.
        """
        if model_version not in self._model_versions:
            raise not_found(model_version)

    def work(self, execution: engine_pb2.Execution) -> Work:
        """Makes the work of a checked execution. May run in a thread.

        Raises:
            InvalidArgument: a field of a long conversation breaks a limit; the prompt is wrong,
                does not fit, or costs more than the charge limit; or the constraint is none that
                can be enforced.
        """
        if _is_long(execution):
            self._check_fields(execution)
        prompt = self._prompts.build(execution)
        most = self._info.context_length - 1
        if len(prompt.ids) > most:
            raise InvalidArgument(
                f"the prompt has {len(prompt.ids)} tokens; at most {most} leave room for output",
                reason=Reason.CONTEXT_LENGTH_EXCEEDED,
                metadata={"tokens": str(len(prompt.ids)), "limit": str(most)},
            )
        stop, output = execution.stop, execution.output
        affordable = _affordable(execution, len(prompt.ids))
        requests = engine_requests(
            execution,
            prompt.ids,
            max_output_tokens=min(stop.max_output_tokens, affordable),
            constraint=self._constraint(execution),
            has_cache=self._capabilities.prompt_cache,
        )
        return Work(
            requests=requests,
            matcher=matcher_of(tuple(stop.stop_sequences)),
            includes_stop=stop.include_stop,
            is_capped=affordable < stop.max_output_tokens,
            extras=_extras(output) if execution.HasField("output") else NO_EXTRAS,
            splitting=self._splitting(execution, prompt.tail),
        )

    def ended_before(self, request: EngineRequest) -> EndReason | None:
        """Tells how a continuation has ended that leaves nothing to do; None for all others."""
        if len(request.continue_ids) >= request.max_output_tokens:
            return EndReason.MAX_TOKENS
        if len(request.prompt_ids) + len(request.continue_ids) >= self._info.context_length:
            return EndReason.CONTEXT_FULL
        return None

    def _check_fields(self, execution: engine_pb2.Execution) -> None:
        """Checks the limits of single fields, and whether the prompt can fit."""
        try:
            self._validator.check(execution)
        except InvalidArgument as error:
            raise _of_request(error) from error
        self._prompts.check_size(execution)

    def _constraint(self, execution: engine_pb2.Execution) -> Constraint | None:
        """Compiles what the output has to be."""
        has_constraint, has_tools = execution.HasField("constraint"), execution.HasField("tools")
        if not has_constraint and not has_tools:
            return None
        return compile_constraint(
            execution.constraint if has_constraint else None,
            execution.tools if has_tools else None,
            tool_format=self._formats.tools,
        )

    def _splitting(self, execution: engine_pb2.Execution, tail: str) -> Splitting | None:
        """Decides how the output is split; None when it is the answer as it is.

        Text and token ids are used as they are, and so is what comes of them. An output that is
        constrained as a whole, or has to be a call, has no room for reasoning.
        """
        if execution.WhichOneof("input") != "chat":
            return None
        options = execution.tools
        has_tools = options.tools and options.mode != tools_pb2.TOOL_MODE_NONE
        is_bound = execution.HasField("constraint") or options.mode == tools_pb2.TOOL_MODE_REQUIRED
        tools = self._formats.tools if has_tools else None
        has_reasoning = self._capabilities.reasoning and not is_bound
        reasoning = self._formats.reasoning if has_reasoning else None
        if tools is None and reasoning is None:
            return None
        return Splitting(
            formats=Formats(tools=tools, reasoning=reasoning, marks=self._formats.marks),
            tool_names=frozenset(tool.name for tool in options.tools),
            is_parallel=options.parallel_calls if options.HasField("parallel_calls") else True,
            starts_in_reasoning=reasoning is not None and starts_in_reasoning(reasoning, tail),
            key=execution.execution_id,
        )

    def _check_bias(self, bias: Collection[int]) -> None:
        if max(bias) < self._info.vocabulary_size:
            return
        raise invalid_field(
            f"spec.sampling.logit_bias[{max(bias)}]",
            FieldRule.OUT_OF_RANGE,
            f"must be below {self._info.vocabulary_size}, the size of the vocabulary",
        )


def _is_long(execution: engine_pb2.Execution) -> bool:
    """Tells whether a conversation has too many pieces to look at each of them on the event loop.

    Raises:
        InvalidArgument: it has too many for anybody to look at.
    """
    if not has_more_pieces(execution.chat, SHORT_PIECES_MAX):
        return False
    if has_more_pieces(execution.chat, PIECES_MAX):
        check_spec(execution)
    return True


def _extras(output: generation_pb2.OutputOptions) -> Extras:
    return Extras(
        top=output.top_logprobs if output.return_logprobs else None,
        has_bytes=output.return_token_bytes,
        has_prompt_scores=output.return_prompt_logprobs,
    )


def _affordable(execution: engine_pb2.Execution, input_tokens: int) -> int:
    """Returns the most tokens of an output that the charge limit allows.

    Several outputs have equal shares. Without a limit: max_output_tokens.

    Raises:
        InvalidArgument: the prompt leaves no room for one token of each output.
    """
    if not execution.HasField("charge_limit"):
        return execution.stop.max_output_tokens
    limit = execution.charge_limit
    count = count_of(execution)
    rates = Rates(input_price=limit.input_price, output_price=limit.output_price)
    most = rates.affordable(nanos=limit.nanos, input_tokens=input_tokens)
    if most is None:
        return execution.stop.max_output_tokens
    if most < count:
        # The limit may be less than what the client said: the price of the request is off.
        missing = rates.most(input_tokens=input_tokens, output_tokens=count) - limit.nanos
        wanted = "one of output" if count == 1 else f"one of each of {count} outputs"
        raise invalid_field(
            "spec.max_charge",
            FieldRule.OUT_OF_RANGE,
            f"must be {missing} nanos more for {input_tokens} input tokens and {wanted}",
        )
    return most // count


def _require(execution: engine_pb2.Execution) -> None:
    """Checks that what the gateway resolves has been resolved, and fits together."""
    if not 0 <= execution.output_interval.ToNanoseconds() <= OUTPUT_INTERVAL_NANOS_MAX:
        raise invalid_field("output_interval", FieldRule.OUT_OF_RANGE, "must be 0 s to 1 s")
    sampling, stop = execution.sampling, execution.stop
    for name in ("temperature", "top_p", "top_k", "seed"):
        if not sampling.HasField(name):
            raise invalid_field(f"spec.sampling.{name}", FieldRule.REQUIRED, "must be resolved")
    if not stop.max_output_tokens:
        raise invalid_field("spec.stop.max_output_tokens", FieldRule.REQUIRED, "must be resolved")
    if stop.min_output_tokens > stop.max_output_tokens:
        raise invalid_field(
            "spec.stop.min_output_tokens", FieldRule.CONFLICTING, "is above max_output_tokens"
        )
    if any(not sequence for sequence in stop.stop_sequences):
        raise invalid_field("spec.stop.stop_sequences", FieldRule.REQUIRED, "must not be empty")
    if execution.HasField("output"):
        _require_outputs(execution)
    if execution.WhichOneof("input") != "chat":
        _require_no_chat(execution)


def _require_no_chat(execution: engine_pb2.Execution) -> None:
    for name, is_set in (
        ("tools", execution.HasField("tools")),
        ("reasoning", execution.HasField("reasoning")),
    ):
        if is_set:
            raise invalid_field(f"spec.{name}", FieldRule.CONFLICTING, "needs spec.chat")


def _require_outputs(execution: engine_pb2.Execution) -> None:
    output = execution.output
    if output.top_logprobs and not output.return_logprobs:
        raise invalid_field(
            "spec.output.top_logprobs", FieldRule.CONFLICTING, "needs return_logprobs"
        )
    if count_of(execution) > 1 and execution.continue_token_ids:
        raise invalid_field(
            "continue_token_ids", FieldRule.CONFLICTING, "several outputs cannot be continued"
        )


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


_OF_SPEC = frozenset(
    {
        "chat", "text", "tokens", "sampling", "stop", "output", "tools", "constraint", "reasoning",
        "priority",
    }
)  # fmt: skip
