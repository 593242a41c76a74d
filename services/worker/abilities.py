"""What the model can do on this worker, and the refusal of what it cannot. Pure."""

from __future__ import annotations

from collections.abc import Collection

from maas.common.v1 import capabilities_pb2
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import tools_pb2

from libs import capabilities as flags
from services.worker.chat import ChatTemplate
from services.worker.engine.base import ConstraintKind, EngineInfo
from services.worker.formats import Formats

# As many as the contract has lanes for.
OUTPUTS_MAX = 16


def capabilities_of(
    info: EngineInfo,
    template: ChatTemplate | None,
    formats: Formats,
    *,
    has_adapters: bool,
    disabled: Collection[str] = (),
) -> capabilities_pb2.Capabilities:
    """Says what an engine, a chat template and the formats of a model make possible together.

    Args:
        info: of the engine.
        template: of the model; None when it has none.
        formats: of the model's output.
        has_adapters: whether the worker knows where adapters are.
        disabled: flags that the operator has switched off.
    """
    able = info.abilities
    kinds = able.constraints
    has_chat = template is not None
    has_tools = template is not None and template.knows_tools and formats.tools is not None
    found = capabilities_pb2.Capabilities(
        chat=has_chat,
        tool_calls=has_tools,
        strict_tools=has_tools and ConstraintKind.TOOLS in kinds,
        reasoning=has_chat and formats.reasoning is not None,
        json_object=ConstraintKind.JSON_OBJECT in kinds,
        json_schema=ConstraintKind.JSON_SCHEMA in kinds,
        regex=ConstraintKind.REGEX in kinds,
        grammar=ConstraintKind.GRAMMAR in kinds,
        choices=ConstraintKind.CHOICES in kinds,
        min_p=able.min_p,
        penalties=able.penalties,
        repetition_penalty=able.repetition_penalty,
        logit_bias=able.logit_bias,
        min_output_tokens=able.min_output_tokens,
        ignore_eos=able.ignore_eos,
        max_outputs=min(OUTPUTS_MAX, info.max_running),
        logprobs=able.max_top_logprobs is not None,
        max_top_logprobs=able.max_top_logprobs or 0,
        prompt_logprobs=able.prompt_logprobs,
        adapters=able.adapters and has_adapters,
        embedding_dimensions=able.embedding_dimensions,
        prompt_cache=able.prompt_cache,
        deterministic=info.is_deterministic,
    )
    for flag in disabled:
        setattr(found, flag, type(getattr(found, flag))())
    return found


def require_able(
    execution: engine_pb2.Execution, capabilities: capabilities_pb2.Capabilities
) -> None:
    """Sees that an execution asks for nothing that the model cannot do here.

    Raises:
        InvalidArgument: names the public field, with FEATURE_UNSUPPORTED or OUT_OF_RANGE.
    """
    model = execution.model_version
    flags.require(execution, capabilities, model=model, prefix="spec")
    is_required = execution.tools.mode == tools_pb2.TOOL_MODE_REQUIRED
    if is_required and not capabilities.strict_tools:
        raise flags.cannot("spec.tools.mode", "strict_tools", model=model)
