"""Messages to values and back. Pure and total, but for names that have the wrong form."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from maas.common.v1 import capabilities_pb2
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2
from maas.scheduler.v1 import (
    placement_service_pb2,
    worker_pb2,
    worker_registry_service_pb2,
)

from libs import ids
from libs.errors import FieldRule, invalid_field
from services.scheduler.core.messages import (
    DrainAsked,
    EngineInfo,
    ExecutionsReported,
    Grant,
    Load,
    Loaded,
    LoadingReported,
    LoadReported,
    Priority,
    Registration,
    SlotAsked,
    Target,
    WorkerHeard,
    WorkerState,
)
from services.scheduler.core.state import Worker

WORKER_PATTERN = "workers/*"
VERSION_PATTERN = "models/*/versions/*"

_STATES = {
    WorkerState.LOADING: worker_pb2.WORKER_STATE_LOADING,
    WorkerState.READY: worker_pb2.WORKER_STATE_READY,
    WorkerState.DRAINING: worker_pb2.WORKER_STATE_DRAINING,
    WorkerState.LOST: worker_pb2.WORKER_STATE_LOST,
}


def duration_to_pb(seconds: float) -> Duration:
    """Writes a duration, to the microsecond."""
    message = Duration()
    message.FromMicroseconds(round(seconds * 1e6))
    return message


def time_to_pb(moment: datetime) -> Timestamp:
    """Writes a time."""
    message = Timestamp()
    message.FromDatetime(moment)
    return message


# Placement.


def ask_from_pb(
    request: placement_service_pb2.AcquireSlotRequest, *, wait_default_s: float, wait_max_s: float
) -> SlotAsked:
    """Reads a request for a slot; a longer wait than allowed is cut.

    Raises:
        InvalidArgument: the version has another form, the wait is negative, or an execution that
            may come has no id.
    """
    ids.parse_name(request.model_version, VERSION_PATTERN, field="model_version")
    wait_s = wait_default_s
    if request.HasField("max_wait"):
        wait_s = request.max_wait.seconds + request.max_wait.nanos / 1e9
        if wait_s < 0:
            raise invalid_field("max_wait", FieldRule.OUT_OF_RANGE, "must not be negative")
    return SlotAsked(
        execution_id=request.execution_id,
        model_version=request.model_version,
        project=request.project,
        excluded=frozenset(request.exclude_workers),
        max_wait_s=min(wait_s, wait_max_s),
        places=max(request.places, 1),
        affinity=request.affinity,
        priority=(
            Priority.BACKGROUND
            if request.priority == generation_pb2.PRIORITY_CLASS_BACKGROUND
            else Priority.STANDARD
        ),
        spare_execution_ids=_spare_ids(request),
    )


def _spare_ids(request: placement_service_pb2.AcquireSlotRequest) -> tuple[str, ...]:
    """Reads the executions that may come; one that is named twice counts once."""
    wanted = request.spare_execution_ids
    if "" in wanted:
        field = f"spare_execution_ids[{list(wanted).index('')}]"
        raise invalid_field(field, FieldRule.REQUIRED, "must not be empty")
    return tuple(dict.fromkeys(wanted))


def grant_to_pb(grant: Grant, start_within: Duration) -> placement_service_pb2.AcquireSlotResponse:
    """Writes a slot."""
    return placement_service_pb2.AcquireSlotResponse(
        slot_id=grant.slot_id,
        target=_target_to_pb(grant.target),
        fallbacks=[_target_to_pb(item) for item in grant.fallbacks],
        start_within=start_within,
        queued=duration_to_pb(grant.queued_s),
        spares=[
            placement_service_pb2.SpareSlot(
                slot_id=spare.slot_id,
                execution_id=spare.execution_id,
                target=_target_to_pb(spare.target),
            )
            for spare in grant.spares
        ],
    )


def _target_to_pb(target: Target) -> placement_service_pb2.SlotTarget:
    return placement_service_pb2.SlotTarget(
        worker=target.worker, endpoint=target.endpoint, epoch=target.epoch
    )


# Registry.


def registration_from_pb(message: worker_registry_service_pb2.Register) -> Registration:
    """Reads who a worker is.

    Raises:
        InvalidArgument: a name has another form, or the worker could never run anything. How much
            one that is loading can run need not be known.
    """
    ids.parse_name(message.worker, WORKER_PATTERN, field="register.worker")
    is_loading = message.HasField("loading")
    _check_info(message.info, "register.info", is_loaded=not is_loading)
    return Registration(
        worker=message.worker,
        incarnation=message.incarnation,
        endpoint=message.endpoint,
        info=info_from_pb(message.info),
        running=tuple(message.running_execution_ids),
        loading=message.loading.SerializeToString() if is_loading else None,
    )


def _check_info(info: engine_pb2.EngineInfo, path: str, *, is_loaded: bool) -> None:
    if not info.model_versions:
        raise invalid_field(f"{path}.model_versions", FieldRule.REQUIRED, "must not be empty")
    for index, version in enumerate(info.model_versions):
        ids.parse_name(version, VERSION_PATTERN, field=f"{path}.model_versions[{index}]")
    if is_loaded and info.max_running < 1:
        raise invalid_field(f"{path}.max_running", FieldRule.OUT_OF_RANGE, "must be at least 1")


def heard_from_pb(
    message: worker_registry_service_pb2.ConnectRequest, worker: str, epoch: int
) -> WorkerHeard:
    """Reads what a worker says after its registration.

    What a newer worker says and this build does not know is a sign of life.

    Raises:
        InvalidArgument: it registers a second time, or could never run anything.
    """
    match message.WhichOneof("message"):
        case "load":
            return LoadReported(worker=worker, epoch=epoch, load=load_from_pb(message.load))
        case "executions":
            return ExecutionsReported(
                worker=worker,
                epoch=epoch,
                started=tuple(message.executions.started_execution_ids),
                ended=tuple(message.executions.ended_execution_ids),
            )
        case "drain":
            return DrainAsked(worker=worker, epoch=epoch)
        case "loading":
            loading = message.loading.SerializeToString()
            return LoadingReported(worker=worker, epoch=epoch, loading=loading)
        case "loaded":
            _check_info(message.loaded, "loaded", is_loaded=True)
            return Loaded(worker=worker, epoch=epoch, info=info_from_pb(message.loaded))
        case "register":
            raise invalid_field("register", FieldRule.CONFLICTING, "comes once, and first")
        case _:
            return WorkerHeard(worker=worker, epoch=epoch)


def info_from_pb(message: engine_pb2.EngineInfo) -> EngineInfo:
    """Reads what a worker is; a version that is named twice counts once."""
    return EngineInfo(
        engine=message.engine,
        engine_version=message.engine_version,
        model_versions=tuple(dict.fromkeys(message.model_versions)),
        context_length=message.context_length,
        max_running=message.max_running,
        max_waiting=message.max_waiting,
        vocabulary_size=message.vocabulary_size,
        digest=message.digest,
        kv_block_tokens=message.kv_block_tokens,
        capabilities=(
            message.capabilities.SerializeToString() if message.HasField("capabilities") else None
        ),
    )


def info_to_pb(info: EngineInfo) -> engine_pb2.EngineInfo:
    """Writes what a worker is."""
    return engine_pb2.EngineInfo(
        engine=info.engine,
        engine_version=info.engine_version,
        model_versions=info.model_versions,
        context_length=info.context_length,
        max_running=info.max_running,
        max_waiting=info.max_waiting,
        vocabulary_size=info.vocabulary_size,
        digest=info.digest,
        kv_block_tokens=info.kv_block_tokens,
        capabilities=(
            None
            if info.capabilities is None
            else capabilities_pb2.Capabilities.FromString(info.capabilities)
        ),
    )


def load_from_pb(message: engine_pb2.LoadReport) -> Load:
    """Reads a load."""
    has = message.HasField
    return Load(
        running=message.running if has("running") else None,
        waiting=message.waiting if has("waiting") else None,
        waiting_tokens=message.waiting_tokens if has("waiting_tokens") else None,
        kv_used_tokens=message.kv_used_tokens if has("kv_used_tokens") else None,
        kv_total_tokens=message.kv_total_tokens if has("kv_total_tokens") else None,
        resident_adapters=tuple(message.resident_adapters),
    )


def load_to_pb(load: Load) -> engine_pb2.LoadReport:
    """Writes a load."""
    return engine_pb2.LoadReport(
        running=load.running,
        waiting=load.waiting,
        waiting_tokens=load.waiting_tokens,
        kv_used_tokens=load.kv_used_tokens,
        kv_total_tokens=load.kv_total_tokens,
        resident_adapters=load.resident_adapters,
    )


def worker_to_pb(worker: Worker, time_of: Callable[[float], datetime]) -> worker_pb2.Worker:
    """Writes a worker.

    Args:
        worker: as the core knows it.
        time_of: turns a time of the core's clock into one of the wall clock.
    """
    return worker_pb2.Worker(
        name=worker.name,
        incarnation=worker.registration.incarnation,
        endpoint=worker.registration.endpoint,
        epoch=worker.epoch,
        state=_STATES[worker.state],
        info=info_to_pb(worker.registration.info),
        load=load_to_pb(worker.load) if worker.load is not None else None,
        slots_in_use=worker.used,
        connect_time=time_to_pb(time_of(worker.registered_s)),
        last_heartbeat_time=time_to_pb(time_of(worker.heard_s)),
        loading=(
            None if worker.loading is None else engine_pb2.LoadProgress.FromString(worker.loading)
        ),
    )
