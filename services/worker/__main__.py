"""The worker process: python -m services.worker --config worker.toml."""

from __future__ import annotations

import faulthandler
import sys
from contextlib import AsyncExitStack

from maas.engine.v1 import engine_service_pb2

from libs import limits, process
from libs.auth import KeyTable
from libs.clock import SystemClock
from libs.config import read_secret
from libs.process import Background, StartError
from libs.rpc import Peer, Server
from libs.rpc.identity import Identity
from libs.rpc.policy import policies_of
from libs.rpc.run import start_metrics
from services.worker import loading, registry, versions
from services.worker.assembly import assemble
from services.worker.config import Config
from services.worker.loading import LoadedModel
from services.worker.preparation import Preparation
from services.worker.registry import Registration, Serving
from services.worker.reports import Reports

# How long the thread that makes prompts may keep the interpreter from the event loop, which all
# streams wait for: a fifth of what Python has by itself.
SWITCH_INTERVAL_S = 0.001


async def main(config: Config) -> None:
    """Serves until it is told to stop, or the engine dies."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    start_metrics(config)
    async with AsyncExitStack() as stack:
        try:
            await _serve(config, stack)
        finally:
            _exit_within(config.worker.exit_within)


def _exit_within(seconds: float) -> None:
    """Ends the process with status 1 after that long, should it be there still.

    An engine may hang when it is stopped, and Python waits at its exit for threads that never end.
    This needs neither the event loop nor the interpreter, and shows on stderr where each thread
    hangs.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)


async def _serve(config: Config, stack: AsyncExitStack) -> None:
    clock = SystemClock()
    worker = config.worker
    service = engine_service_pb2.DESCRIPTOR.services_by_name["EngineService"]
    # Only services call a worker: no API key is ever looked up.
    identity = Identity.from_config(config.identity, KeyTable())
    # Here, so that a mistake is not found after minutes of loading only.
    identity.require_allow_lists(policies_of(service).values())
    server = Server(config.server, identity, message_bytes_max=limits.INTERNAL_MESSAGE_BYTES_MAX)
    credential = read_secret(config.identity.token_file)
    peer = Peer(config.peers.scheduler, credential, registry.SERVICES)
    await stack.enter_async_context(peer)
    reports = Reports()
    register = registry.register_of(worker)
    registration = Registration(peer, reports, register=register, clock=clock)
    connecting = await stack.enter_async_context(Background(on_failure=server.fail))
    # From here on the scheduler lists the worker, as loading.
    disconnect = connecting.start(registration.run(), name="registration")

    async def load() -> LoadedModel:
        checked = worker
        if config.peers.catalog is not None:
            async with Peer(config.peers.catalog, credential, versions.SERVICES) as catalog:
                checked = await versions.with_digest(worker, catalog, clock)
        return await loading.load(checked, clock, stack, registration.tell)

    found = await loading.unless_stopped(
        load(),
        lambda: _exit_within(worker.exit_within),
        lambda: server.fail(StartError("told to stop before it served")),
    )
    if found is None:
        return
    assembly = assemble(
        found.engine,
        found.info,
        found.model,
        adapters=found.adapters,
        # One: making a prompt is Python's work, which a second thread would not speed up.
        preparation=Preparation(stack.enter_context(loading.thread("prompts"))),
        clock=clock,
        worker=f"workers/{worker.name}",
        versions=[worker.model_version],
        max_waiting=worker.max_waiting,
        reports=reports,
    )
    executions = assembly.executions
    server.add(assembly.service, service)
    background = await stack.enter_async_context(Background(on_failure=server.fail))
    background.start(executions.pump(), name="pump")
    background.start(executions.watch(), name="watch")
    background.start(found.engine.run(executions.die), name="watchdog")
    await server.start()
    registration.loaded(
        Serving(engine=found.engine, executions=executions, info=assembly.described)
    )

    def abandon() -> None:
        _exit_within(worker.exit_within)
        disconnect()

    async def drain() -> None:
        registration.drain()
        await executions.drain()

    await server.serve(drain=drain, abandon=abandon)


if __name__ == "__main__":
    process.run(Config, main)
