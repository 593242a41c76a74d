"""Between messages and the engine's values. Pure and total."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.duration_pb2 import Duration
from maas.common.v1 import capabilities_pb2
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2

from libs.errors import MaasError
from services.worker.engine.base import (
    Ended,
    EndReason,
    EngineInfo,
    EngineLoad,
    LoadProgress,
    LoadStage,
)

_FINISH_REASONS = {
    EndReason.END_OF_SEQUENCE: generation_pb2.FINISH_REASON_END,
    EndReason.STOP_TOKEN: generation_pb2.FINISH_REASON_STOP_SEQUENCE,
    EndReason.MAX_TOKENS: generation_pb2.FINISH_REASON_MAX_TOKENS,
    EndReason.CONTEXT_FULL: generation_pb2.FINISH_REASON_CONTEXT_FULL,
    EndReason.CONSTRAINT_LIMIT: generation_pb2.FINISH_REASON_CONSTRAINT_LIMIT,
}

_LOAD_STAGES = {
    LoadStage.CHECKING: engine_pb2.LOAD_STAGE_CHECKING,
    LoadStage.LOADING: engine_pb2.LOAD_STAGE_LOADING,
    LoadStage.WARMING: engine_pb2.LOAD_STAGE_WARMING,
}


def duration_to_pb(seconds: float) -> Duration:
    """Turns seconds into a Duration, to the nearest nanosecond."""
    nanos = round(seconds * 1e9)
    return Duration(seconds=nanos // 1_000_000_000, nanos=nanos % 1_000_000_000)


def failure_to_pb(error: MaasError) -> engine_pb2.Failure:
    """Turns an error into what an Ended carries."""
    return engine_pb2.Failure(
        code=int(error.code),
        reason=error.reason.value,
        message=error.message,
        metadata=error.metadata,
        violations=[
            engine_pb2.FailureViolation(
                field=violation.field, rule=violation.rule, description=violation.description
            )
            for violation in error.violations
        ],
    )


def end_to_pb(ended: Ended, *, is_capped: bool) -> generation_pb2.OutputEnd:
    """Turns an end that is neither an abort nor a failure into that of an output.

    Args:
        ended: from the engine.
        is_capped: its most tokens were what the charge limit allowed, and not what was asked for.
    """
    end = generation_pb2.OutputEnd(reason=_FINISH_REASONS[ended.reason])
    if is_capped and ended.reason is EndReason.MAX_TOKENS:
        end.reason = generation_pb2.FINISH_REASON_CHARGE_LIMIT
    if ended.stop_token_id is not None:
        end.stop_token_id = ended.stop_token_id
    return end


def stop_to_pb(sequence: str) -> generation_pb2.OutputEnd:
    """Makes the end of an output that a stop sequence ended."""
    return generation_pb2.OutputEnd(
        reason=generation_pb2.FINISH_REASON_STOP_SEQUENCE, stop_sequence=sequence
    )


def time_limit_to_pb() -> generation_pb2.OutputEnd:
    """Makes the end of an output whose time is up."""
    return generation_pb2.OutputEnd(reason=generation_pb2.FINISH_REASON_TIME_LIMIT)


def info_to_pb(
    info: EngineInfo,
    *,
    model_versions: Sequence[str],
    max_waiting: int,
    capabilities: capabilities_pb2.Capabilities,
) -> engine_pb2.EngineInfo:
    """Describes a worker."""
    return engine_pb2.EngineInfo(
        engine=info.engine,
        engine_version=info.version,
        model_versions=model_versions,
        context_length=info.context_length,
        max_running=info.max_running,
        max_waiting=max_waiting,
        vocabulary_size=info.vocabulary_size,
        digest=info.digest,
        capabilities=capabilities,
        kv_block_tokens=info.abilities.kv_block_tokens,
    )


def load_to_pb(load: EngineLoad, *, preparing: int) -> engine_pb2.LoadReport:
    """Describes a load. What was not measured stays absent.

    Args:
        load: of the engine.
        preparing: executions that the engine does not know yet; they wait too.
    """
    return engine_pb2.LoadReport(
        running=load.running,
        waiting=None if load.waiting is None else load.waiting + preparing,
        waiting_tokens=load.waiting_tokens,
        kv_used_tokens=load.kv_used_tokens,
        kv_total_tokens=load.kv_total_tokens,
        resident_adapters=load.resident_adapters,
    )


def progress_to_pb(progress: LoadProgress) -> engine_pb2.LoadProgress:
    """Describes how far a starting engine is."""
    return engine_pb2.LoadProgress(stage=_LOAD_STAGES[progress.stage], fraction=progress.fraction)
