"""Workers over real gRPC: register, report, drain, lose, replace, rebuild."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from maas.engine.v1 import engine_pb2
from maas.scheduler.v1 import worker_pb2, worker_registry_service_pb2

from libs.errors import DeadlineExceeded, MaasError, Reason, Unavailable
from libs.testing.relay import Relay
from services.scheduler.config import SchedulerSection
from services.scheduler.core.messages import WorkerState
from tests.conftest import DatabaseFactory
from tests.integration.services.scheduler.harness import (
    CONFIG,
    VERSION,
    Running,
    register,
    running_scheduler,
    until,
)


async def test_a_worker_is_welcomed_with_an_epoch_and_its_duties(suite: Running) -> None:
    async with suite.connecting() as stream:
        welcome = await stream.register(register())

    assert welcome.epoch == 1
    assert welcome.heartbeat_interval.ToSeconds() == CONFIG.heartbeat_interval
    assert welcome.lease_duration.ToSeconds() == CONFIG.lease_duration


async def test_epochs_grow_by_name_over_restarts_of_the_scheduler(
    database: DatabaseFactory,
) -> None:
    dsn = await database("scheduler")
    got = []
    for _ in range(2):
        async with running_scheduler(dsn) as suite:
            for name in ("a", "a", "b"):
                async with suite.registered(name) as stream:
                    got.append((name, stream.epoch))

    assert got == [("a", 1), ("a", 2), ("b", 1), ("a", 3), ("a", 4), ("b", 2)]


async def test_a_restarted_scheduler_counts_what_its_workers_run(
    database: DatabaseFactory,
) -> None:
    dsn = await database("scheduler")
    async with running_scheduler(dsn) as suite, suite.registered(capacity=2) as worker:
        for name in ("e1", "e2"):
            await suite.acquire(name)
        await worker.report(started=["e1", "e2"])
    async with (
        running_scheduler(dsn) as suite,
        suite.registered(capacity=2, running=["e1", "e2"]) as worker,
        suite.waiting("e3") as call,
    ):
        assert suite.queued == ["e3"]
        await worker.report(ended=["e1"])

        assert (await call).target.epoch == 2
        assert (await suite.acquire("e2")).target.worker == "workers/a"


async def test_a_restart_of_the_scheduler_is_a_wait_and_no_refusal(
    database: DatabaseFactory,
) -> None:
    """Its workers need a moment to come back; requests in between do not fail."""
    config = SchedulerSection()
    async with running_scheduler(await database("scheduler"), config) as suite:
        async with suite.waiting("e1") as call, suite.registered():
            assert (await call).target.worker == "workers/a"
        async with suite.waiting("e2") as call:
            await suite.advance(config.gather_for)

            with pytest.raises(Unavailable) as caught:
                await call
        assert caught.value.reason is Reason.NO_READY_WORKER


async def test_a_newer_process_that_loads_is_sent_away_while_the_older_serves(
    suite: Running,
) -> None:
    loading = register(incarnation="two", loading=engine_pb2.LoadProgress())
    async with suite.connecting() as newer:
        async with suite.registered(incarnation="one") as older:
            await newer.send(worker_registry_service_pb2.ConnectRequest(register=loading))
            error = await newer.error()

            assert error.reason is Reason.FENCED
            assert error.metadata["currentEpoch"] == str(older.epoch)
            assert (await suite.acquire("e1")).target.epoch == older.epoch
        await until(lambda: suite.scheduler.workers()[0].state is WorkerState.LOST)
    async with suite.connecting() as newer:
        await newer.register(loading)

        assert (await suite.worker_named()).state == worker_pb2.WORKER_STATE_LOADING


async def test_what_a_gateway_placed_by_itself_is_counted(suite: Running) -> None:
    async with suite.registered() as worker:
        await worker.report(started=["own"])
        await until(lambda: suite.slots() == ["own"])
        async with suite.waiting("e1") as call:
            await worker.report(ended=["own"])

            assert (await call).target.worker == "workers/a"


async def test_an_execution_takes_its_slot_to_the_worker_that_runs_it(suite: Running) -> None:
    async with suite.registered("a"), suite.registered("b") as other:
        slot = await suite.acquire("e1")
        assert slot.target.worker == "workers/a"

        await other.report(started=["e1"])
        await until(lambda: suite.slots("b") == ["e1"])

        assert suite.slots("a") == []
        await suite.release(slot.slot_id)
        assert suite.slots("b") == []


async def test_a_draining_worker_gets_nothing_new(suite: Running) -> None:
    async with suite.registered() as worker:
        await suite.acquire("e1")
        async with suite.waiting("e2") as call:
            await worker.drain()

            with pytest.raises(Unavailable) as caught:
                await call
        assert caught.value.reason is Reason.NO_READY_WORKER
        assert (await suite.worker_named()).state == worker_pb2.WORKER_STATE_DRAINING
        assert suite.slots() == ["e1"]


@pytest.mark.parametrize("way", ["closes", "cancels"])
async def test_a_worker_whose_stream_ends_is_lost_at_once(suite: Running, way: str) -> None:
    async with suite.registered() as worker:
        await suite.acquire("e1")
        async with suite.waiting("e2") as call:
            if way == "closes":
                await worker.close()
            else:
                worker._call.cancel()

            with pytest.raises(Unavailable) as caught:
                await call
        assert caught.value.reason is Reason.NO_READY_WORKER
        assert (await suite.worker_named()).state == worker_pb2.WORKER_STATE_LOST
        assert suite.slots() == []


async def test_a_silent_worker_is_lost_and_told_so(suite: Running) -> None:
    async with suite.registered() as worker:
        await suite.acquire("e1")
        await suite.advance(CONFIG.lease_duration)

        error = await worker.error()

        assert error.reason is Reason.WORKER_LOST
        assert error.metadata == {"worker": "workers/a"}
        assert (await suite.worker_named()).state == worker_pb2.WORKER_STATE_LOST
        assert suite.slots() == []
        async with suite.registered(running=["e1"]) as again:
            assert again.epoch == 2
            assert suite.slots() == ["e1"]


async def test_any_message_renews_the_lease(suite: Running) -> None:
    async with suite.registered() as worker:
        for number in range(3):
            await suite.advance(CONFIG.lease_duration - 1.0)
            await worker.load(running=number)
            await until(lambda: suite.scheduler.workers()[0].heard_s == suite.clock.monotonic_s())

        found = await suite.worker_named()
        assert found.state == worker_pb2.WORKER_STATE_READY
        assert found.load.running == 2
        assert not found.load.HasField("kv_used_tokens")


async def test_a_newer_incarnation_replaces_the_older(suite: Running) -> None:
    async with suite.registered(incarnation="one") as older:
        await suite.acquire("e1")
        async with suite.registered(incarnation="two") as newer:
            error = await older.error()

            assert error.reason is Reason.FENCED
            assert error.metadata == {"epoch": "1", "currentEpoch": "2"}
            found = await suite.worker_named()
            assert (found.incarnation, found.epoch) == ("two", 2)
            assert found.state == worker_pb2.WORKER_STATE_READY
            assert suite.slots() == []
            await newer.report(started=["e2"])
            await until(lambda: suite.slots() == ["e2"])


async def _refusal(
    suite: Running, *messages: worker_registry_service_pb2.ConnectRequest
) -> MaasError:
    async with suite.connecting() as stream:
        for message in messages:
            await stream.send(message)
        while True:
            try:
                return await stream.error()
            except AssertionError:  # The welcome.
                continue


def _message(**fields: object) -> worker_registry_service_pb2.ConnectRequest:
    changed = register()
    for name, value in fields.items():
        target = changed if name != "max_running" else changed.info
        setattr(target, name, value)
    return worker_registry_service_pb2.ConnectRequest(register=changed)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (worker_registry_service_pb2.ConnectRequest(), "register"),
        (
            worker_registry_service_pb2.ConnectRequest(drain=worker_registry_service_pb2.Drain()),
            "register",
        ),
        (_message(worker="a"), "register.worker"),
        (_message(worker="workers/a/b"), "register.worker"),
        (_message(worker=""), "register.worker"),
        (_message(incarnation=""), "register.incarnation"),
        (_message(endpoint=""), "register.endpoint"),
        (_message(max_running=0), "register.info.max_running"),
        (
            worker_registry_service_pb2.ConnectRequest(register=register(versions=[])),
            "register.info.model_versions",
        ),
        (
            worker_registry_service_pb2.ConnectRequest(register=register(versions=[VERSION, "x"])),
            "register.info.model_versions[1]",
        ),
    ],
)
async def test_a_bad_registration_is_refused(
    suite: Running, message: worker_registry_service_pb2.ConnectRequest, field: str
) -> None:
    error = await _refusal(suite, message)

    assert error.reason is Reason.INVALID_FIELD
    assert error.metadata == {"field": field}
    assert suite.scheduler.workers() == []


async def test_a_second_registration_on_one_stream_is_refused(suite: Running) -> None:
    error = await _refusal(suite, _message(), _message())

    assert error.metadata == {"field": "register"}
    assert (await suite.worker_named()).state == worker_pb2.WORKER_STATE_LOST


async def test_a_stream_that_closes_without_a_word_is_refused(suite: Running) -> None:
    async with suite.connecting() as stream:
        await stream.close()

        assert (await stream.error()).metadata == {"field": "register"}


async def test_a_stream_that_never_registers_is_ended(database: DatabaseFactory) -> None:
    config = SchedulerSection.model_validate(
        {"heartbeat_interval": "10ms", "lease_duration": "50ms"}
    )
    async with (
        running_scheduler(await database("scheduler"), config) as suite,
        suite.connecting() as stream,
    ):
        assert isinstance(await stream.error(), DeadlineExceeded)


async def test_a_message_of_the_future_is_a_sign_of_life(suite: Running) -> None:
    async with suite.registered() as worker:
        await suite.advance(CONFIG.lease_duration - 1.0)
        await worker.send(worker_registry_service_pb2.ConnectRequest())
        await until(lambda: suite.scheduler.workers()[0].heard_s == suite.clock.monotonic_s())
        await suite.advance(CONFIG.lease_duration - 1.0)

        assert (await suite.worker_named()).state == worker_pb2.WORKER_STATE_READY


async def test_a_registration_outlives_a_restart_of_the_database(
    database: DatabaseFactory, tmp_path_short: Path
) -> None:
    async with (
        Relay(await database("scheduler"), tmp_path_short) as relay,
        running_scheduler(relay.dsn) as suite,
        suite.connecting() as stream,
    ):
        await relay.take_away()
        call = asyncio.create_task(stream.register(register()))
        await until(lambda: len(suite.clock._sleepers) == 2)
        assert not call.done()
        await relay.bring_back()
        suite.clock.advance(0.1)

        assert (await call).epoch >= 1


async def test_a_registration_is_refused_while_the_database_stays_away(
    database: DatabaseFactory, tmp_path_short: Path
) -> None:
    config = SchedulerSection.model_validate({"register_within": "1s"})
    async with (
        Relay(await database("scheduler"), tmp_path_short) as relay,
        running_scheduler(relay.dsn, config) as suite,
        suite.registered("b"),
        suite.connecting() as stream,
    ):
        await relay.take_away()
        await stream.send(_message())
        await until(lambda: len(suite.clock._sleepers) == 2)
        suite.clock.advance(config.register_within)

        error = await stream.error()

        assert error.reason is Reason.SERVICE_UNAVAILABLE
        assert error.metadata == {"dependency": "postgresql"}
        # Who is there already is used without a database.
        assert (await suite.acquire("e1")).target.worker == "workers/b"


async def test_a_broken_connection_takes_the_worker_out(suite: Running) -> None:
    """Not the stream alone: the process is gone and the kernel has closed its socket."""
    async with grpc.aio.insecure_channel(suite.endpoint) as channel:
        suite_worker = suite.worker.channel
        suite.worker.channel = channel
        async with suite.registered():
            await channel.close()
            await until(lambda: not suite.scheduler._state.ready)
        suite.worker.channel = suite_worker
