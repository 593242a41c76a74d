"""The parts of a worker behind its RPCs, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maas.engine.v1 import engine_pb2

from libs.clock import Clock
from services.worker.adapters import Adapters
from services.worker.admission import Admission
from services.worker.convert import info_to_pb
from services.worker.embedding import Embedder
from services.worker.engine.base import Engine, EngineInfo
from services.worker.executions import Executions
from services.worker.kv_watch import KvLog
from services.worker.model import Model
from services.worker.preparation import Preparation
from services.worker.reports import Reports
from services.worker.service import EngineService


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What serves. `executions.pump` and `executions.watch` have to run beside it.

    Attributes:
        executions: all that runs.
        reports: what the scheduler is told of it.
        described: what the worker is.
        service: the RPCs.
    """

    executions: Executions
    reports: Reports
    described: engine_pb2.EngineInfo
    service: EngineService


def assemble(
    engine: Engine,
    info: EngineInfo,
    model: Model,
    *,
    adapters: Adapters,
    preparation: Preparation,
    clock: Clock,
    worker: str,
    versions: Sequence[str],
    max_waiting: int,
    reports: Reports | None = None,
) -> Assembly:
    """Puts a worker together.

    Args:
        engine: started.
        info: of it.
        model: that it runs.
        adapters: of the model.
        preparation: the thread in which prompts are made.
        clock: for deadlines.
        worker: "workers/{name}".
        versions: "models/{model}/versions/{version}" that are served.
        max_waiting: outputs that may be here beyond those that the engine runs.
        reports: where starts and ends are noted for the scheduler; None makes one.
    """
    reports = reports if reports is not None else Reports()
    admission = Admission(
        info, model.prompts, versions, capabilities=model.capabilities, formats=model.formats
    )
    kv_log = KvLog(info.abilities.kv_block_tokens, clock=clock, worker=worker)
    executions = Executions(
        engine,
        info,
        admission=admission,
        adapters=adapters,
        pieces=model.pieces,
        reports=reports,
        preparation=preparation,
        kv_log=kv_log,
        clock=clock,
        worker=worker,
        max_waiting=max_waiting,
    )
    described = info_to_pb(
        info,
        model_versions=versions,
        max_waiting=max_waiting,
        capabilities=model.capabilities,
    )
    embedder = Embedder(
        engine,
        executions,
        admission=admission,
        vocabulary=model.vocabulary,
        preparation=preparation,
        dimensions=model.capabilities.embedding_dimensions,
        worker=worker,
    )
    service = EngineService(
        engine,
        executions,
        described,
        embedder=embedder,
        admission=admission,
        vocabulary=model.vocabulary,
        preparation=preparation,
        kv_log=kv_log,
    )
    return Assembly(executions=executions, reports=reports, described=described, service=service)
