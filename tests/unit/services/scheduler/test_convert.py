"""Messages to values and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TypeVar

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from maas.common.v1 import capabilities_pb2
from maas.engine.v1 import engine_pb2
from maas.inference.v1 import generation_pb2
from maas.scheduler.v1 import placement_service_pb2, worker_pb2, worker_registry_service_pb2

from libs.errors import InvalidArgument
from services.scheduler import convert
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
    Spare,
    Target,
    WorkerHeard,
)
from tests.unit.services.scheduler.core.driver import VERSION, Core

MessageT = TypeVar("MessageT", bound=Message)
WORDS = st.text(st.characters(codec="utf-8"), max_size=10)
UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
INFOS = st.builds(
    EngineInfo,
    engine=WORDS,
    engine_version=WORDS,
    model_versions=st.lists(WORDS, unique=True).map(tuple),
    context_length=UINT32,
    max_running=UINT32,
    max_waiting=UINT32,
    vocabulary_size=UINT32,
    digest=WORDS,
)
LOADS = st.builds(
    Load,
    running=st.none() | UINT32,
    waiting=st.none() | UINT32,
    waiting_tokens=st.none() | UINT64,
    kv_used_tokens=st.none() | UINT64,
    kv_total_tokens=st.none() | UINT64,
)


@given(INFOS)
def test_what_a_worker_is_survives_the_round_trip(info: EngineInfo) -> None:
    assert convert.info_from_pb(convert.info_to_pb(info)) == info


@given(LOADS)
def test_load_survives_the_round_trip(load: Load) -> None:
    assert convert.load_from_pb(convert.load_to_pb(load)) == load


def _filled(message: MessageT) -> MessageT:
    """Sets every field, those of messages in it too, to something that is not its default."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None:
            _filled(getattr(message, field.name)).SetInParent()
            continue
        value: object = field.number
        if field.cpp_type == field.CPPTYPE_STRING:
            value = f"text {field.number}"
        elif field.cpp_type == field.CPPTYPE_BOOL:
            value = True
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    return message


def test_every_field_that_workers_say_of_themselves_is_passed_on() -> None:
    info = _filled(engine_pb2.EngineInfo())
    load = _filled(engine_pb2.LoadReport())

    assert info.capabilities.max_top_logprobs
    assert convert.info_to_pb(convert.info_from_pb(info)) == info
    assert convert.load_to_pb(convert.load_from_pb(load)) == load


def test_no_capabilities_and_none_set_are_told_apart() -> None:
    silent = engine_pb2.EngineInfo()
    unable = engine_pb2.EngineInfo(capabilities=capabilities_pb2.Capabilities())

    assert not convert.info_to_pb(convert.info_from_pb(silent)).HasField("capabilities")
    assert convert.info_to_pb(convert.info_from_pb(unable)).HasField("capabilities")


def test_a_version_named_twice_counts_once() -> None:
    info = convert.info_from_pb(engine_pb2.EngineInfo(model_versions=["b", "a", "b"]))

    assert info.model_versions == ("b", "a")


def test_executions_that_may_come_are_read_once_each() -> None:
    ask = convert.ask_from_pb(
        _ask(spare_execution_ids=["s1", "s0", "s1"]), wait_default_s=30.0, wait_max_s=55.0
    )

    assert ask.spare_execution_ids == ("s1", "s0")


def test_an_execution_that_may_come_has_an_id() -> None:
    with pytest.raises(InvalidArgument) as caught:
        convert.ask_from_pb(
            _ask(spare_execution_ids=["s0", ""]), wait_default_s=30.0, wait_max_s=55.0
        )

    assert caught.value.metadata == {"field": "spare_execution_ids[1]"}


def test_spares_are_written_with_their_targets() -> None:
    target = Target(worker="workers/a", endpoint="a:1", epoch=7)
    spare = Spare(execution_id="s0", slot_id="slot-1", target=target)
    grant = Grant(
        execution_id="e1",
        slot_id="slot-0",
        target=target,
        fallbacks=(),
        queued_s=0.0,
        spares=(spare,),
    )

    (got,) = convert.grant_to_pb(grant, Duration(seconds=5)).spares

    assert (got.slot_id, got.execution_id) == ("slot-1", "s0")
    assert (got.target.worker, got.target.endpoint, got.target.epoch) == ("workers/a", "a:1", 7)


def _ask(**fields: object) -> placement_service_pb2.AcquireSlotRequest:
    values: dict[str, object] = {"execution_id": "e1", "model_version": VERSION, **fields}
    return placement_service_pb2.AcquireSlotRequest(**values)  # type: ignore[arg-type]  # any field


@pytest.mark.parametrize(
    ("max_wait", "want_s"),
    [
        (None, 30.0),
        (Duration(), 0.0),
        (Duration(seconds=2, nanos=500_000_000), 2.5),
        (Duration(seconds=600), 55.0),
    ],
)
def test_the_wait_has_a_default_and_a_bound(max_wait: Duration | None, want_s: float) -> None:
    got = convert.ask_from_pb(_ask(max_wait=max_wait), wait_default_s=30.0, wait_max_s=55.0)

    assert got.max_wait_s == want_s


def test_a_request_is_read_whole() -> None:
    request = _ask(project="projects/p", exclude_workers=["workers/a", "workers/a"])

    got = convert.ask_from_pb(request, wait_default_s=1.0, wait_max_s=1.0)

    assert (got.execution_id, got.model_version) == ("e1", VERSION)
    assert (got.project, got.excluded) == ("projects/p", frozenset({"workers/a"}))
    assert (got.places, got.affinity, got.priority) == (1, b"", Priority.STANDARD)


@pytest.mark.parametrize(
    ("priority", "want"),
    [
        (generation_pb2.PRIORITY_CLASS_UNSPECIFIED, Priority.STANDARD),
        (generation_pb2.PRIORITY_CLASS_STANDARD, Priority.STANDARD),
        (generation_pb2.PRIORITY_CLASS_BACKGROUND, Priority.BACKGROUND),
    ],
)
def test_places_affinity_and_class_are_read(
    priority: generation_pb2.PriorityClass.ValueType, want: Priority
) -> None:
    request = _ask(places=3, affinity=b"key", priority=priority)

    got = convert.ask_from_pb(request, wait_default_s=1.0, wait_max_s=1.0)

    assert (got.places, got.affinity, got.priority) == (3, b"key", want)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_version", "tiny"),
        ("max_wait", Duration(seconds=-1)),
        ("max_wait", Duration(nanos=-1)),
    ],
)
def test_bad_requests_name_the_field(field: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        convert.ask_from_pb(_ask(**{field: value}), wait_default_s=1.0, wait_max_s=1.0)

    assert caught.value.violations[0].field == field


def test_a_slot_is_written_whole() -> None:
    targets = [Target(worker=f"workers/{n}", endpoint=f"{n}:1", epoch=n) for n in range(3)]
    grant = Grant(
        execution_id="e1",
        slot_id="s1",
        target=targets[0],
        fallbacks=tuple(targets[1:]),
        queued_s=1.25,
    )

    got = convert.grant_to_pb(grant, Duration(seconds=5))

    assert got.slot_id == "s1"
    assert [got.target.worker, *(item.worker for item in got.fallbacks)] == [
        "workers/0",
        "workers/1",
        "workers/2",
    ]
    assert (got.fallbacks[1].endpoint, got.fallbacks[1].epoch) == ("2:1", 2)
    assert got.start_within.ToSeconds() == 5
    assert got.queued.ToMilliseconds() == 1250


def test_what_workers_say_is_told_apart() -> None:
    request = worker_registry_service_pb2.ConnectRequest
    report = worker_registry_service_pb2.ExecutionReport(
        started_execution_ids=["e1"], ended_execution_ids=["e2", "e3"]
    )

    progress = engine_pb2.LoadProgress(stage=engine_pb2.LOAD_STAGE_LOADING, fraction=0.5)
    info = register_of("a").info

    got = [
        convert.heard_from_pb(message, "workers/a", 3)
        for message in (
            request(loading=progress),
            request(loaded=info),
            request(load=engine_pb2.LoadReport(running=1)),
            request(executions=report),
            request(drain=worker_registry_service_pb2.Drain()),
            request(),
        )
    ]

    assert got == [
        LoadingReported(worker="workers/a", epoch=3, loading=progress.SerializeToString()),
        Loaded(worker="workers/a", epoch=3, info=convert.info_from_pb(info)),
        LoadReported(worker="workers/a", epoch=3, load=Load(running=1)),
        ExecutionsReported(worker="workers/a", epoch=3, started=("e1",), ended=("e2", "e3")),
        DrainAsked(worker="workers/a", epoch=3),
        WorkerHeard(worker="workers/a", epoch=3),
    ]


def register_of(worker: str, **info: object) -> worker_registry_service_pb2.Register:
    values: dict[str, object] = {"model_versions": [VERSION], "max_running": 2, **info}
    return worker_registry_service_pb2.Register(
        worker=f"workers/{worker}",
        incarnation="one",
        endpoint=f"{worker}:1",
        info=engine_pb2.EngineInfo(**values),  # type: ignore[arg-type]  # any field
    )


def test_what_a_loading_worker_can_run_need_not_be_known() -> None:
    message = register_of("a", max_running=0)
    with pytest.raises(InvalidArgument) as caught:
        convert.registration_from_pb(message)
    assert caught.value.violations[0].field == "register.info.max_running"
    message.loading.SetInParent()

    assert convert.registration_from_pb(message).loading == b""


@pytest.mark.parametrize(
    ("field", "value"), [("max_running", 0), ("model_versions", []), ("model_versions", ["m"])]
)
def test_a_loaded_worker_can_run_something(field: str, value: object) -> None:
    loaded = register_of("a", **{field: value}).info
    message = worker_registry_service_pb2.ConnectRequest(loaded=loaded)

    with pytest.raises(InvalidArgument) as caught:
        convert.heard_from_pb(message, "workers/a", 3)

    assert caught.value.violations[0].field.startswith(f"loaded.{field}")


def test_a_loading_worker_is_written_with_how_far_it_is() -> None:
    progress = engine_pb2.LoadProgress(stage=engine_pb2.LOAD_STAGE_CHECKING, fraction=0.25)
    core = Core()
    core.register("a", loading=progress.SerializeToString())

    got = convert.worker_to_pb(core.worker("a"), lambda _: datetime(2026, 1, 1, tzinfo=UTC))

    assert (got.state, got.loading) == (worker_pb2.WORKER_STATE_LOADING, progress)


def test_registering_twice_is_refused() -> None:
    message = worker_registry_service_pb2.ConnectRequest(
        register=worker_registry_service_pb2.Register()
    )

    with pytest.raises(InvalidArgument):
        convert.heard_from_pb(message, "workers/a", 3)


def test_a_worker_is_written_with_wall_times() -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    core = Core()
    core.register("a", running=("e1",))
    core.now_s += 2.0
    core.drain("a")
    worker = core.worker("a")

    got = convert.worker_to_pb(worker, lambda moment_s: start + timedelta(seconds=moment_s))

    assert got.state == worker_pb2.WORKER_STATE_DRAINING
    assert got.slots_in_use == 1
    assert not got.HasField("load")
    assert got.connect_time.ToDatetime(UTC) == start + timedelta(seconds=1000)
    assert got.last_heartbeat_time.ToDatetime(UTC) == start + timedelta(seconds=1002)
