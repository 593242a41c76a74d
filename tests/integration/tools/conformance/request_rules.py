"""What the stand-in refuses of a request, and how it is wrong at that."""

from __future__ import annotations

import dataclasses

from google.protobuf.message import Message
from maas.common.v1 import capabilities_pb2
from maas.inference.v1 import generation_pb2

from libs import capabilities
from libs.chat_rules import check_spec
from libs.errors import (
    FieldRule,
    InvalidArgument,
    NotFound,
    Reason,
    Violation,
    invalid_field,
)
from libs.rpc.validation import Validator
from tests.integration.tools.conformance.request_faults import Wrong

DIMENSIONS = 512
_NUMBERS = {"max_outputs": 8, "max_top_logprobs": 5, "embedding_dimensions": DIMENSIONS}
_DAY_NS = 86_400 * 10**9
_OPEN = 10**6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Refuses what is not allowed.

    Attributes:
        wrong: how it is wrong.
        off: flags that are false.
        accepted: flag that is false and taken all the same; empty for none.
        unchecked: path of a field whose bound nobody checks; empty for none.
    """

    wrong: Wrong = Wrong.NOTHING
    off: tuple[str, ...] = ()
    accepted: str = ""
    unchecked: str = ""

    def able(self) -> capabilities_pb2.Capabilities:
        """What GetCapabilities says."""
        able = capabilities_pb2.Capabilities()
        for flag in capabilities.FLAGS:
            if self._is_on(flag):
                setattr(able, flag, _NUMBERS.get(flag, True))
        return able

    def _is_on(self, flag: str) -> bool:
        return flag not in self.off or self.wrong is Wrong.FLAGS_STAY

    def check(self, request: Message) -> None:
        """Checks the bounds of the contract, and the rules between fields.

        Raises:
            InvalidArgument: one is broken.
        """
        try:
            Validator().check(request)
            spec = getattr(request, "spec", None)
            if isinstance(spec, generation_pb2.GenerationSpec):
                self._check_spec(spec)
        except InvalidArgument as error:
            left = [item for item in error.violations if not self._is_unchecked(item.field)]
            if not left:
                return
            if self.wrong is Wrong.BOUND_UNNAMED:
                left = [Violation("spec", item.rule, item.description) for item in left]
            raise InvalidArgument(error.message, reason=error.reason, violations=left) from error

    def _is_unchecked(self, path: str) -> bool:
        if self.wrong is Wrong.BOMB_ACCEPTED and path.endswith("variables_json"):
            return True
        return bool(self.unchecked) and path.startswith(self.unchecked)

    def _check_spec(self, spec: generation_pb2.GenerationSpec) -> None:
        lasts_ns = spec.max_duration.ToNanoseconds()
        if spec.HasField("max_duration") and not 10**6 <= lasts_ns <= _DAY_NS:
            raise invalid_field("spec.max_duration", FieldRule.OUT_OF_RANGE, "odd")
        if spec.output.top_logprobs and not spec.output.return_logprobs:
            raise invalid_field("spec.output.top_logprobs", FieldRule.CONFLICTING, "alone")
        if self.wrong is not Wrong.TURNS_UNCHECKED:
            check_spec(spec)

    def require(self, message: Message, model: str, prefix: str) -> None:
        """Sees that the model can do what is asked for.

        Raises:
            InvalidArgument: it cannot.
        """
        able = self.able()
        if self.accepted:
            setattr(able, self.accepted, _NUMBERS.get(self.accepted, True))
        if self.wrong is Wrong.FLAGS_STAY:
            for flag in self.off:
                setattr(able, flag, 0)
        if self.wrong is Wrong.TOO_MANY_CLAMPED:
            able.max_outputs = able.max_top_logprobs = _OPEN
        if self.wrong is Wrong.WIDE_ANSWER:
            able.embedding_dimensions = _OPEN
        try:
            capabilities.require(message, able, model=model, prefix=prefix)
        except InvalidArgument as error:
            violations, reason = list(error.violations), error.reason
            if self.wrong is Wrong.FLAG_UNNAMED:
                violations = [Violation("spec", item.rule, "no") for item in violations]
            if self.wrong is Wrong.FLAG_REASON:
                reason = Reason.INVALID_FIELD
            raise InvalidArgument(
                error.message, reason=reason, metadata=error.metadata, violations=violations
            ) from error

    def require_vectors(self) -> None:
        """Sees that the model makes embeddings.

        Raises:
            InvalidArgument: it does not.
        """
        if "embedding_dimensions" in self.off and self.wrong is not Wrong.VECTORS_UNASKED:
            flag = "embedding_dimensions"
            raise InvalidArgument(
                "no embeddings",
                reason=Reason.FEATURE_UNSUPPORTED,
                metadata={"feature": flag},
                violations=[Violation("model", FieldRule.UNSUPPORTED, "no")],
            )


def too_long(path: str) -> InvalidArgument:
    """How a prompt that does not fit is refused."""
    return InvalidArgument(
        "too long",
        reason=Reason.CONTEXT_LENGTH_EXCEEDED,
        violations=[Violation(path, FieldRule.TOO_LONG, "too long")],
    )


def unknown(what: str) -> NotFound:
    """How a name that is not there is refused."""
    return NotFound(f"no {what}", reason=Reason.RESOURCE_NOT_FOUND)
