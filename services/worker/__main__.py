"""The worker process: python -m services.worker --config worker.toml."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager

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
from services.worker.adapters import Adapters
from services.worker.assembly import assemble
from services.worker.config import Config
from services.worker.engine.base import EngineStartError
from services.worker.engines import make_equipment
from services.worker.executions import Limits
from services.worker.model import TextSettings, make_model, read_template
from services.worker.preparation import Preparation
from services.worker.registry import Registration

# How long the thread that makes prompts may keep the interpreter from the event loop, which all
# streams wait for: a fifth of what Python has by itself.
SWITCH_INTERVAL_S = 0.001


@contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """Gives a thread; what still waits for it at the end is dropped."""
    threads = ThreadPoolExecutor(1, name)
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


async def main(config: Config) -> None:
    """Serves until it is told to stop, or the engine dies."""
    clock = SystemClock()
    worker = config.worker
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    start_metrics(config)
    async with AsyncExitStack() as stack:
        try:
            equipment = make_equipment(worker, clock)
            engine = equipment.engine
            stack.push_async_callback(engine.stop)
            info = await equipment.start(worker.probe_within)
            adapters = Adapters(
                engine,
                worker.adapters_dir,
                reads_files=equipment.reads_adapters,
                threads=stack.enter_context(_thread("adapters")),
                load_within_s=worker.adapter_within,
            )
            model = make_model(
                equipment.tokenizer,
                info,
                TextSettings(
                    chat_template=read_template(worker.chat_template),
                    tool_parser=worker.tool_parser,
                    reasoning_parser=worker.reasoning_parser,
                    disabled=worker.disabled,
                ),
                bos_id=equipment.bos_id,
                has_adapters=adapters.is_there,
                now=clock.now,
            )
        except EngineStartError as error:
            raise StartError(str(error)) from error
        # One: making a prompt is Python's work, which a second thread would not speed up.
        preparation = Preparation(stack.enter_context(_thread("prompts")))
        assembly = assemble(
            engine,
            info,
            model,
            adapters=adapters,
            preparation=preparation,
            clock=clock,
            worker=f"workers/{worker.name}",
            versions=[worker.model_version],
            limits=Limits(max_waiting=worker.max_waiting, abort_within_s=worker.abort_within),
        )
        executions = assembly.executions
        # Only services call a worker: no API key is ever looked up.
        identity = Identity.from_config(config.identity, KeyTable())
        server = Server(
            config.server, identity, message_bytes_max=limits.INTERNAL_MESSAGE_BYTES_MAX
        )
        service = engine_service_pb2.DESCRIPTOR.services_by_name["EngineService"]
        server.add(assembly.service, service)

        credential = read_secret(config.identity.token_file)
        peer = Peer(config.peers.scheduler, credential, registry.SERVICES)
        await stack.enter_async_context(peer)
        register = registry.register_of(worker, assembly.described)
        registration = Registration(
            peer, engine, executions, assembly.reports, register=register, clock=clock
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
