"""The child process of the llamacpp engine: loads a model, decodes on its main thread, reports.

    python -m services.worker.engine.llamacpp_child <socket descriptor>

The parent sends START, then SUBMIT and ABORT, LOAD_ADAPTER, EMBED and DROP_EMBED; this process
answers READY or REFUSED, one STEP for each step it computed, and what was asked for besides. It
ends when the socket does, or with its parent.

A process of its own, because an assertion in native code ends a process, and because whoever holds
the worker's streams must not wait for a decoder. What goes wrong is told by the last line that the
parent finds in the stderr of a dead child; no line ever holds a prompt, an output or a token id.

Never: imports grpc, asyncio or xllamacpp's Python side; listens on anything but its socket.
"""

from __future__ import annotations

import concurrent.futures
import os
import socket
import sys
from pathlib import Path
from typing import Final

import numpy as np

from services.worker.engine.base import (
    Adapter,
    AdapterUnusable,
    ConstraintKind,
    EngineAbilities,
    EngineInfo,
    EngineStartError,
    LoadProgress,
    LoadStage,
)
from services.worker.engine.child_life import STDERR, die_with_parent, ignore_signals
from services.worker.engine.file_digest import digest_of_file, require_digest
from services.worker.engine.llamacpp_adapters import AdapterShelf
from services.worker.engine.llamacpp_api import PACKAGE, open_library
from services.worker.engine.llamacpp_api import VERSION as LIBRARY_VERSION
from services.worker.engine.llamacpp_embedding import SLOTS_MAX, EmbeddingQueue, LlamaStates
from services.worker.engine.llamacpp_inflight import InflightBatch
from services.worker.engine.llamacpp_model import LlamaModel, ModelSettings
from services.worker.engine.matcher import MatcherFactory
from services.worker.engine.wire import (
    VERSION,
    FrameReader,
    Kind,
    Value,
    pack_control,
    pack_embedded,
    pack_residents,
    pack_step,
    unpack_abort,
    unpack_control,
    unpack_drop_embed,
    unpack_embed,
    unpack_submit,
)
from services.worker.engine.wire_facts import pack_progress, pack_ready

_RECEIVE_SIZE: Final = 1 << 18
TOP_LOGPROBS_MAX: Final = 20
"""Most alternatives with a log-probability; each is found in every row of the vocabulary."""


class ParentGoneError(Exception):
    """The parent closed the socket or died: nobody is left to compute for."""


class Link:
    """The child's end of the socket. Blocks; frames go whole.

    Args:
        connection: connected stream socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader = FrameReader()

    def receive(self, *, wait: bool) -> list[tuple[Kind, bytes]]:
        """Frames that have arrived; with wait, blocks for at least some bytes.

        Raises:
            ParentGoneError: the other end is closed.
        """
        try:
            data = self._connection.recv(_RECEIVE_SIZE, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ParentGoneError from error
        if not data:
            raise ParentGoneError
        return self._reader.feed(data)

    def receive_one(self) -> bytes:
        """Waits for a frame that is the only one on its way, and returns its body."""
        while True:
            for _, body in self.receive(wait=True):
                return body

    def send(self, frame: bytes) -> None:
        """Sends a frame; waits while the parent does not read.

        Raises:
            ParentGoneError: the other end is closed.
        """
        try:
            self._connection.sendall(frame)
        except OSError as error:
            raise ParentGoneError from error


def main() -> int:
    """Runs the child until its parent is gone; returns the exit status."""
    ignore_signals()
    # Nobody reads the pipe before the end, so a full one must not block.
    os.set_blocking(STDERR, False)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    link = Link(connection)
    try:
        told = unpack_control(link.receive_one())
        if not die_with_parent(int(told["parent_process_id"] or 0)):
            return 0
        try:
            settings = _settings(told)
            expected = told.get("expected_digest")
            model, digest = _load(settings, None if expected is None else str(expected), link)
        except EngineStartError as error:
            link.send(pack_control(Kind.REFUSED, {"message": str(error)}))
            return 1
        grammars = _read_vocabulary(model)
        info = _describe(model, digest, settings, constrains=grammars is not None)
        link.send(pack_ready(info, settings.capacity * model.context_length))
        Server(link, model, grammars, settings).serve()
    except ParentGoneError:
        return 0
    return 0


def _read_vocabulary(model: LlamaModel) -> MatcherFactory | None:
    """What compiles constraints; None when there can be none.

    It takes up to a second for large vocabularies, half of it with the interpreter to itself, so it
    is done before there are lanes that would wait.
    """
    ends: list[int] = np.flatnonzero(model.is_end).tolist()
    if not ends:
        # Without a token that ends a generation no constrained output could end.
        return None
    pieces, specials = model.pieces()
    try:
        return MatcherFactory(pieces, end_ids=ends, control_ids=specials)
    except ValueError:
        # llguidance cannot read it. Whoever asks for no constraint can be served all the same.
        return None


class Server:
    """Takes commands and computes, one step after the other.

    Args:
        link: to the parent.
        model: that is loaded.
        grammars: compiles constraints, always on the same thread; None when there are none.
        settings: of the model.
    """

    def __init__(
        self,
        link: Link,
        model: LlamaModel,
        grammars: MatcherFactory | None,
        settings: ModelSettings,
    ) -> None:
        self._link = link
        capacity, rows = settings.capacity, settings.prefill_tokens
        self._shelf = AdapterShelf(model)
        self._residents: tuple[str, ...] = ()
        self._batch = InflightBatch(
            model,
            capacity=capacity,
            context_length=model.context_length,
            prefill_tokens=rows,
            shelf=self._shelf,
            compile_grammar=None if grammars is None else grammars.make,
        )
        self._embeddings = EmbeddingQueue(
            lambda: LlamaStates(model, slots=min(SLOTS_MAX, capacity), rows=rows), rows=rows
        )

    def serve(self) -> None:
        """Serves for ever.

        Raises:
            ParentGoneError: the normal end.
            DecodeFailedError: nothing can be computed any more.
        """
        batch, embeddings, link = self._batch, self._embeddings, self._link
        while True:
            is_idle = batch.is_idle and embeddings.is_idle
            for kind, body in link.receive(wait=is_idle):
                self._take(kind, body)
            if batch.has_news:
                # Aborted lanes need not wait for a step of the others.
                link.send(pack_step(*batch.take_report()))
            if not batch.is_idle:
                batch.step()
                link.send(pack_step(*batch.take_report()))
            if not embeddings.is_idle:
                for job, outcome in embeddings.step():
                    link.send(pack_embedded(job, outcome))
                # A sign of life: long inputs take many steps.
                link.send(pack_step(*batch.take_report()))
            self._tell_residents()

    def _take(self, kind: Kind, body: bytes) -> None:
        if kind is Kind.SUBMIT:
            self._batch.submit(*unpack_submit(body))
        elif kind is Kind.ABORT:
            self._batch.abort(unpack_abort(body))
        elif kind is Kind.LOAD_ADAPTER:
            self._load_adapter(unpack_control(body))
        elif kind is Kind.EMBED:
            self._embeddings.add(*unpack_embed(body))
        elif kind is Kind.DROP_EMBED:
            self._embeddings.drop(unpack_drop_embed(body))

    def _load_adapter(self, asked: dict[str, Value]) -> None:
        path = asked["path"]
        adapter = Adapter(
            name=str(asked["name"]),
            path=None if path is None else Path(str(path)),
            digest=str(asked["digest"]),
        )
        message = ""
        try:
            self._shelf.load(adapter)
        except AdapterUnusable as error:
            message = str(error)
        self._tell_residents()
        self._link.send(
            pack_control(Kind.ADAPTER_ANSWER, {"call": asked["call"], "message": message})
        )

    def _tell_residents(self) -> None:
        names = self._shelf.names
        if names != self._residents:
            self._residents = names
            self._link.send(pack_residents(names))


def _settings(settings: dict[str, Value]) -> ModelSettings:
    if settings["wire"] != VERSION:
        raise EngineStartError("the engine's files changed since this worker started: restart it")
    context_length = settings["context_length"]
    return ModelSettings(
        path=Path(str(settings["path"])),
        capacity=int(settings["capacity"] or 0),
        context_length=None if context_length is None else int(context_length),
        threads=int(settings["threads"] or 0),
        kv_dtype_k=str(settings["kv_dtype_k"]),
        kv_dtype_v=str(settings["kv_dtype_v"]),
        prefill_tokens=int(settings["prefill_tokens"] or 0),
    )


def _load(settings: ModelSettings, expected: str | None, link: Link) -> tuple[LlamaModel, str]:
    """Loads the model; returns its digest too.

    Args:
        settings: of the model.
        expected: the only digest that is loaded: native code does not read a file of which nobody
            knows what it is. Without one the digest is made on another thread meanwhile.
        link: hears how far it is.

    Raises:
        EngineStartError: the file has another digest, or cannot be loaded.
    """
    if expected is not None:
        require_digest(settings.path, expected, lambda share: _tell_checking(link, share))
    link.send(pack_progress(LoadProgress(LoadStage.LOADING)))
    open_library().hook_abort(_write_last_words)
    if expected is not None:
        return LlamaModel(settings), expected
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        digest = pool.submit(digest_of_file, settings.path)
        model = LlamaModel(settings)
        return model, digest.result()


def _tell_checking(link: Link, share: float) -> None:
    link.send(pack_progress(LoadProgress(LoadStage.CHECKING, share)))


def _describe(
    model: LlamaModel, digest: str, settings: ModelSettings, *, constrains: bool
) -> EngineInfo:
    return EngineInfo(
        engine="llamacpp",
        version=f"{PACKAGE} {LIBRARY_VERSION}",
        context_length=model.context_length,
        max_running=settings.capacity,
        vocabulary_size=model.vocabulary_size,
        digest=digest,
        is_deterministic=model.is_deterministic,
        abilities=EngineAbilities(
            constraints=frozenset(ConstraintKind if constrains else ()),
            min_p=True,
            penalties=True,
            repetition_penalty=True,
            logit_bias=True,
            min_output_tokens=True,
            ignore_eos=True,
            max_top_logprobs=TOP_LOGPROBS_MAX,
            prompt_logprobs=True,
            adapters=True,
            embedding_dimensions=model.embedding_dimensions,
            prompt_cache=model.keeps_prefixes,
        ),
    )


def _write_last_words(message: bytes) -> None:
    os.write(STDERR, message + b"\n")


if __name__ == "__main__":
    sys.exit(main())
