"""Embedding inputs: one place of the worker for each call, beside what it generates."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import structlog
from maas.engine.v1 import engine_service_pb2 as engine_service_pb
from maas.inference.v1 import embedding_service_pb2

from libs.errors import FieldRule, invalid_field, unsupported
from libs.limits import INTERNAL_MESSAGE_BYTES_MAX
from services.worker import runs
from services.worker.admission import EXECUTION_BYTES_MAX, Admission
from services.worker.convert import duration_to_pb
from services.worker.engine.base import EmbeddingFailed, Engine, EngineDied
from services.worker.executions import Executions
from services.worker.preparation import Preparation
from services.worker.vocabulary import Vocabulary

log = structlog.get_logger(__name__)

# Of inputs that are made into ids at once: others get their turn of the thread in between.
PART_BYTES = 64 * 1024
# Of an answer: vectors, and as much again for all the rest.
VECTORS_BYTES_MAX = INTERNAL_MESSAGE_BYTES_MAX // 2
_FLOAT_BYTES = 4


@dataclass(slots=True)
class _Made:
    """Inputs as token ids.

    Attributes:
        ids: of each input.
        cut: numbers of those that were cut.
    """

    ids: list[list[int]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)


class Embedder:
    """What Embed does. Belongs to one event loop."""

    def __init__(
        self,
        engine: Engine,
        executions: Executions,
        *,
        admission: Admission,
        vocabulary: Vocabulary,
        preparation: Preparation,
        dimensions: int,
        worker: str,
    ) -> None:
        """Keeps what it needs.

        Args:
            engine: embeds.
            executions: whose places it takes.
            admission: knows which versions are served.
            vocabulary: of the model.
            preparation: where inputs become ids.
            dimensions: numbers of an embedding; 0 when the model makes none here.
            worker: name of this worker.
        """
        self._engine = engine
        self._executions = executions
        self._admission = admission
        self._vocabulary = vocabulary
        self._preparation = preparation
        self._dimensions = dimensions
        self._worker = worker

    async def embed(
        self, request: engine_service_pb.EmbedRequest
    ) -> engine_service_pb.EmbedResponse:
        """Embeds all inputs, or none.

        Raises:
            NotFound: the model version is not served here.
            InvalidArgument: the model makes no embeddings, or an input is wrong.
            FailedPrecondition: the epoch is older than ours.
            ResourceExhausted: everything is full.
            Cancelled: it was aborted.
            Unavailable: the worker is draining, or its engine is gone.
            Internal: the engine failed on these inputs.
        """
        self._check(request)
        task: asyncio.Task[engine_service_pb.EmbedResponse] | None = None

        def stop() -> None:
            if task is not None:
                task.cancel()

        with self._executions.occupy(request.execution_id, request.epoch, stop) as place:
            task = asyncio.create_task(self._embed(request), name="embed")
            try:
                return await task
            except asyncio.CancelledError:
                if place.failure is not None:
                    raise place.failure from None
                raise
            except EngineDied:
                raise runs.lost(self._worker) from None
            finally:
                task.cancel()

    def _check(self, request: engine_service_pb.EmbedRequest) -> None:
        self._admission.require_version(request.model_version)
        if not self._dimensions:
            raise unsupported(
                "inputs",
                "the model makes no embeddings",
                feature="embedding_dimensions",
                model=request.model_version,
            )
        if request.ByteSize() > EXECUTION_BYTES_MAX:
            raise invalid_field(
                "inputs", FieldRule.TOO_LONG, f"are longer than {EXECUTION_BYTES_MAX} bytes"
            )
        most = VECTORS_BYTES_MAX // (_FLOAT_BYTES * self._dimensions)
        if len(request.inputs) > most:
            raise invalid_field(
                "inputs", FieldRule.TOO_MANY, f"has more than {most} items for this model"
            )

    async def _embed(
        self, request: engine_service_pb.EmbedRequest
    ) -> engine_service_pb.EmbedResponse:
        made = _Made()
        self._preparation.require_room()
        for part in _parts(request.inputs):
            size = sum(request.inputs[place].ByteSize() for place in part)
            await self._preparation.run(
                request.execution_id, size, self._tokenize, request, part, made
            )
        try:
            with self._executions.engine_time.passing(request.execution_id) as took:
                vectors = await self._engine.embed(made.ids)
        except EmbeddingFailed as error:
            log.error("embedding failed", execution=request.execution_id, cause=str(error))  # noqa: TRY400 - the message says it all
            raise runs.engine_failure(self._worker) from None
        return engine_service_pb.EmbedResponse(
            dimensions=self._dimensions,
            vectors=_packed(vectors),
            input_tokens=[len(ids) for ids in made.ids],
            truncated_inputs=made.cut,
            engine_time=duration_to_pb(took.seconds),
        )

    def _tokenize(self, request: engine_service_pb.EmbedRequest, part: range, made: _Made) -> None:
        for place in part:
            ids, is_cut = self._vocabulary.embed_input(
                request.inputs[place], place, may_cut=request.truncate
            )
            made.ids.append(ids)
            if is_cut:
                made.cut.append(place)


def _parts(inputs: Sequence[embedding_service_pb2.EmbedInput]) -> Iterator[range]:
    """Cuts inputs into parts of about PART_BYTES."""
    begin = size = 0
    for place, item in enumerate(inputs):
        size += item.ByteSize()
        if size >= PART_BYTES:
            yield range(begin, place + 1)
            begin, size = place + 1, 0
    if begin < len(inputs):
        yield range(begin, len(inputs))


def _packed(vectors: npt.NDArray[np.float32]) -> bytes:
    return vectors.astype("<f4", copy=False).tobytes()
