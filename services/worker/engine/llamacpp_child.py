"""The child process of the llamacpp engine: loads a model, decodes on its main thread, reports.

    python -m services.worker.engine.llamacpp_child <socket descriptor>

The parent sends START, then SUBMIT and ABORT; this process answers READY or REFUSED and then one
STEP for each step it computed. It ends when the socket does, or with its parent.

A process of its own, because an assertion in native code ends a process, and because whoever holds
the worker's streams must not wait for a decoder. What goes wrong is told by the last line that the
parent finds in the stderr of a dead child; no line ever holds a prompt, an output or a token id.

Never: imports grpc, asyncio or xllamacpp's Python side; listens on anything but its socket.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import hashlib
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

from services.worker.engine.base import EngineStartError
from services.worker.engine.llamacpp_api import PACKAGE, VERSION, open_library
from services.worker.engine.llamacpp_inflight import InflightBatch
from services.worker.engine.llamacpp_model import LlamaModel, ModelSettings
from services.worker.engine.llamacpp_wire import (
    FrameReader,
    Kind,
    Value,
    pack_control,
    pack_step,
    unpack_abort,
    unpack_control,
    unpack_submit,
)

_RECEIVE_SIZE: Final = 1 << 18
_STDERR: Final = 2
_PR_SET_PDEATHSIG: Final = 1


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
    # The terminal's Ctrl-C and a supervisor's SIGTERM reach the whole group. The parent drains
    # then, which needs this process; it ends by the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Nobody reads the pipe before the end, so a full one must not block.
    os.set_blocking(_STDERR, False)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    link = Link(connection)
    try:
        settings = unpack_control(link.receive_one())
        _die_with_parent(int(settings["parent_process_id"] or 0))
        try:
            model, digest = _load(settings)
        except EngineStartError as error:
            link.send(pack_control(Kind.REFUSED, {"message": str(error)}))
            return 1
        link.send(pack_control(Kind.READY, _describe(model, digest)))
        serve(
            link,
            InflightBatch(
                model,
                capacity=int(settings["capacity"] or 0),
                context_length=model.context_length,
                prefill_tokens=int(settings["prefill_tokens"] or 0),
            ),
        )
    except ParentGoneError:
        return 0
    return 0


def serve(link: Link, batch: InflightBatch) -> None:
    """Takes commands and computes steps, for ever.

    Raises:
        ParentGoneError: the normal end.
        DecodeFailedError: nothing can be computed any more.
    """
    while True:
        for kind, body in link.receive(wait=batch.is_idle):
            if kind is Kind.SUBMIT:
                batch.submit(*unpack_submit(body))
            elif kind is Kind.ABORT:
                batch.abort(unpack_abort(body))
        if batch.has_news:
            # Aborted lanes need not wait for a step of the others.
            link.send(pack_step(*batch.take_report()))
        if not batch.is_idle:
            batch.step()
            link.send(pack_step(*batch.take_report()))


def _load(settings: dict[str, Value]) -> tuple[LlamaModel, str]:
    """Loads the model on this thread and its digest on another."""
    context_length = settings["context_length"]
    model_settings = ModelSettings(
        path=Path(str(settings["path"])),
        capacity=int(settings["capacity"] or 0),
        context_length=None if context_length is None else int(context_length),
        threads=int(settings["threads"] or 0),
        kv_dtype_k=str(settings["kv_dtype_k"]),
        kv_dtype_v=str(settings["kv_dtype_v"]),
        prefill_tokens=int(settings["prefill_tokens"] or 0),
    )
    open_library().hook_abort(_write_last_words)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        digest = pool.submit(_digest, model_settings.path)
        model = LlamaModel(model_settings)
        return model, digest.result()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise EngineStartError(f"the model file cannot be read: {error}") from error


def _describe(model: LlamaModel, digest: str) -> dict[str, Value]:
    return {
        "version": f"{PACKAGE} {VERSION}",
        "context_length": model.context_length,
        "vocabulary_size": model.vocabulary_size,
        "digest": digest,
        "is_deterministic": model.is_deterministic,
    }


def _die_with_parent(parent_process_id: int) -> None:
    """Has the kernel end this process with its parent, which may have died already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_process_id:
        raise ParentGoneError


def _write_last_words(message: bytes) -> None:
    os.write(_STDERR, message + b"\n")


if __name__ == "__main__":
    sys.exit(main())
