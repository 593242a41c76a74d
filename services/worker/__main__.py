"""The worker process: python -m services.worker --config worker.toml."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

from maas.engine.v1 import engine_service_pb2

from libs import limits, process
from libs.auth import KeyTable
from libs.clock import SystemClock
from libs.config import read_secret
from libs.process import Background, StartError
from libs.rpc import Peer, Server
from libs.rpc.identity import Identity
from libs.rpc.run import start_metrics
from services.worker import registry
from services.worker.admission import Admission
from services.worker.config import Config
from services.worker.convert import info_to_pb
from services.worker.engine.base import EngineStartError
from services.worker.engines import make_equipment
from services.worker.executions import Executions
from services.worker.registry import Registration
from services.worker.reports import Reports
from services.worker.service import EngineService
from services.worker.text import TokenPieces


async def main(config: Config) -> None:
    """Serves until it is told to stop, or the engine dies."""
    clock = SystemClock()
    worker = config.worker
    versions = [worker.model_version]
    start_metrics(config)
    async with AsyncExitStack() as stack:
        try:
            equipment = make_equipment(worker, clock)
            engine = equipment.engine
            stack.push_async_callback(engine.stop)
            info = await equipment.start(worker.probe_within)
            pieces = TokenPieces.of(equipment.tokenizer)
            prompts = equipment.prompts(pieces, clock.now)
        except EngineStartError as error:
            raise StartError(str(error)) from error
        # One: making a prompt is Python's work, which a second thread would not speed up.
        threads = ThreadPoolExecutor(1, "prompts")
        stack.callback(threads.shutdown, wait=False, cancel_futures=True)
        reports = Reports()
        executions = Executions(
            engine,
            info,
            admission=Admission(info, prompts, versions),
            pieces=pieces,
            reports=reports,
            threads=threads,
            clock=clock,
            worker=f"workers/{worker.name}",
            max_waiting=worker.max_waiting,
            abort_within_s=worker.abort_within,
        )
        # Only services call a worker: no API key is ever looked up.
        identity = Identity.from_config(config.identity, KeyTable())
        server = Server(
            config.server, identity, message_bytes_max=limits.INTERNAL_MESSAGE_BYTES_MAX
        )
        described = info_to_pb(info, model_versions=versions, max_waiting=worker.max_waiting)
        service = engine_service_pb2.DESCRIPTOR.services_by_name["EngineService"]
        server.add(EngineService(engine, executions, described), service)

        credential = read_secret(config.identity.token_file)
        peer = Peer(config.peers.scheduler, credential, registry.SERVICES)
        await stack.enter_async_context(peer)
        register = registry.register_of(worker, described)
        registration = Registration(
            peer, engine, executions, reports, register=register, clock=clock
        )
        background = await stack.enter_async_context(Background(on_failure=server.fail))
        background.start(executions.pump(), name="pump")
        background.start(executions.watch(), name="watch")
        await server.start()
        background.start(registration.run(), name="registration")

        async def drain() -> None:
            registration.drain()
            await executions.drain()

        await server.serve(drain=drain)


if __name__ == "__main__":
    process.run(Config, main)
