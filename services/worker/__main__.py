"""The worker process: python -m services.worker --config worker.toml."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack

from maas.engine.v1 import engine_pb2, engine_service_pb2
from maas.scheduler.v1 import worker_registry_service_pb2 as registry_pb

from libs import limits, process
from libs.auth import KeyTable
from libs.clock import Clock, SystemClock
from libs.config import read_secret
from libs.process import Background, StartError
from libs.rpc import Peer, Server
from libs.rpc.identity import Identity
from libs.rpc.run import start_metrics
from services.worker import registry
from services.worker.admission import Admission
from services.worker.chat import ChatTemplate, TemplateInvalid
from services.worker.config import Config, WorkerSection
from services.worker.convert import info_to_pb
from services.worker.engine.base import EngineStartError
from services.worker.engines import Equipment, make_equipment, probe
from services.worker.executions import Executions
from services.worker.prompt import PromptBuilder
from services.worker.registry import Registration
from services.worker.reports import Reports
from services.worker.service import EngineService
from services.worker.text import TokenPieces


async def main(config: Config) -> None:
    """Serves until it is told to stop, or the engine dies."""
    clock = SystemClock()
    worker = config.worker
    start_metrics(config)
    async with AsyncExitStack() as stack:
        try:
            equipment = make_equipment(worker, clock)
            stack.push_async_callback(equipment.engine.stop)
            info = await equipment.engine.start()
            await probe(equipment.engine, worker.probe_within)
        except EngineStartError as error:
            raise StartError(str(error)) from error
        pieces = TokenPieces.of(equipment.tokenizer)
        # One thread: a long prompt is Python's work, and a second thread would not speed it up.
        threads = stack.enter_context(ThreadPoolExecutor(1, "tokenize"))
        reports = Reports()
        executions = Executions(
            equipment.engine,
            info,
            admission=Admission(
                info, prompt_builder(equipment, pieces, clock), [worker.model_version]
            ),
            pieces=pieces,
            reports=reports,
            threads=threads,
            clock=clock,
            worker=f"workers/{worker.name}",
            max_waiting=worker.max_waiting,
        )
        # Only services call a worker: no API key is ever looked up.
        server = Server(
            config.server,
            Identity.from_config(config.identity, KeyTable()),
            clock=clock,
            message_bytes_max=limits.INTERNAL_MESSAGE_BYTES_MAX,
        )
        described = info_to_pb(
            info, model_versions=[worker.model_version], max_waiting=worker.max_waiting
        )
        server.add(
            EngineService(equipment.engine, executions, described),
            engine_service_pb2.DESCRIPTOR.services_by_name["EngineService"],
        )
        peer = await stack.enter_async_context(
            Peer(config.peers.scheduler, read_secret(config.identity.token_file), registry.SERVICES)
        )
        registration = Registration(
            peer,
            equipment.engine,
            executions,
            reports,
            register=register_of(worker, described),
            clock=clock,
        )
        background = await stack.enter_async_context(Background(on_failure=server.fail))
        background.start(executions.pump(), name="pump")
        background.start(executions.watch_deadlines(), name="watch deadlines")
        await server.start()
        background.start(registration.run(), name="registration")

        async def drain() -> None:
            registration.drain()
            await executions.drain()

        await server.serve(drain=drain)


def prompt_builder(equipment: Equipment, pieces: TokenPieces, clock: Clock) -> PromptBuilder:
    """Makes prompts for the engine's model.

    Raises:
        StartError: the model's chat template cannot be used.
    """
    tokenizer = equipment.tokenizer
    template = None
    try:
        if tokenizer.chat_template:
            template = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, clock.now)
    except TemplateInvalid as error:
        raise StartError(str(error)) from error
    return PromptBuilder(tokenizer, pieces, template, bos_id=equipment.bos_id)


def register_of(worker: WorkerSection, info: engine_pb2.EngineInfo) -> registry_pb.Register:
    """Says who this process is."""
    return registry_pb.Register(
        worker=f"workers/{worker.name}",
        incarnation=secrets.token_hex(16),
        endpoint=worker.endpoint,
        info=info,
    )


if __name__ == "__main__":
    process.run(Config, main)
