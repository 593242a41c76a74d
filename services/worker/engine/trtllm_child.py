"""The child process of the trtllm engine: loads a model with TensorRT-LLM and serves it.

    python -m services.worker.engine.trtllm_child <socket descriptor>

The parent sends START, then SUBMIT and ABORT, LOAD_ADAPTER and EMBED; this process answers PROGRESS
while it loads, READY or REFUSED, then STEP at most once in each turn of its loop, and KV with what
changed in the prefix cache. It ends when the socket does, or with its parent.

One event loop on the main thread has the socket and all calls of TensorRT-LLM, which wants one loop
and one thread. Threads beside it: the constructor and shutdown(), which block; the digest and
constraints; trtllm_poller and trtllm_monitor. Nothing is ended in order: what could hang gets some
seconds, then comes os._exit.

TensorRT-LLM has Python of its own: what is imported here is the standard library, numpy and modules
of this package that keep to the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Final

from typing_extensions import override

from services.worker.engine.base import (
    Adapter,
    AdapterUnusable,
    EngineStartError,
    LoadProgress,
)
from services.worker.engine.child_life import die_with_parent, ignore_signals
from services.worker.engine.kv_events import KvEvent
from services.worker.engine.trtllm_api import Llm
from services.worker.engine.trtllm_lanes import Fatal, Lanes
from services.worker.engine.trtllm_load import Measured
from services.worker.engine.trtllm_monitor import die
from services.worker.engine.trtllm_poller import Poller, Wanted
from services.worker.engine.trtllm_start import Loaded, load
from services.worker.engine.trtllm_state import LaneLimits
from services.worker.engine.wire import (
    Counters,
    FrameReader,
    Kind,
    Report,
    pack_control,
    pack_embedded,
    pack_residents,
    pack_step,
    unpack_abort,
    unpack_control,
    unpack_embed,
    unpack_submit,
)
from services.worker.engine.wire_facts import (
    pack_kv,
    pack_progress,
    pack_ready,
    unpack_settings,
)

_SHUT_DOWN_WITHIN_S: Final = 5.0
_REFUSED_WITHIN_S: Final = 2.0
_MEASURE_WITHIN_S: Final = 0.5
_FRESH_S: Final = 1.0
_ERROR_SHOWN: Final = 300


class Link(asyncio.Protocol):
    """The child's end of the socket."""

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._transport: asyncio.WriteTransport | None = None
        self._server: Server | None = None
        self.start: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.lost = asyncio.Event()

    def serve(self, server: Server) -> None:
        """Hands what comes from here on to a server."""
        self._server = server

    def send(self, frame: bytes) -> None:
        """Sends a frame; never waits. What is not read is bounded by what lanes may say."""
        if self._transport is not None:
            self._transport.write(frame)

    def close(self) -> None:
        """Closes it when all has been sent."""
        if self._transport is not None:
            self._transport.close()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    @override
    def data_received(self, data: bytes) -> None:
        for kind, body in self._reader.feed(data):
            if self._server is not None:
                self._server.take(kind, body)
            elif kind is Kind.START and not self.start.done():
                self.start.set_result(body)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


class Server:
    """Serves a loaded engine. Belongs to the event loop.

    Args:
        link: to the parent.
        loaded: the engine.
        fatal: is told what has ended the engine; None ends this process.
    """

    def __init__(self, link: Link, loaded: Loaded, fatal: Fatal | None = None) -> None:
        self._link = link
        self._loaded = loaded
        self._residents: tuple[str, ...] = ()
        self._loading: set[asyncio.Task[None]] = set()
        self._taken = 0
        self._measured = Measured()
        self._measured_s = 0.0
        self._has_measured = asyncio.Event()
        batching = loaded.settings.values("batching")
        statistics = loaded.settings.values("statistics")
        limits = LaneLimits(
            capacity=loaded.settings.capacity,
            context_length=loaded.info.context_length,
            end_ids=frozenset(loaded.model.eos_ids),
            interval_under_load=batching.integer("stream_interval_under_load"),
        )
        self._lanes = Lanes(
            loaded.requests,
            loaded.guides,
            limits,
            request_error=loaded.surface.request_error,
            dead_error=loaded.surface.engine_dead_error,
            send=self._send_step,
            fatal=fatal or _die_of,
        )
        wanted = Wanted(
            stats=statistics.flag("iterations"),
            block_tokens=loaded.info.abilities.kv_block_tokens,
            interval_s=statistics.number("poll_interval"),
        )
        loop = asyncio.get_running_loop()

        def hand_over(measured: Measured, events: list[KvEvent]) -> None:
            loop.call_soon_threadsafe(self._on_measured, measured, events)

        self._poller = Poller(loaded.llm, wanted, hand_over)
        self._measures = wanted.stats

    async def begin(self) -> None:
        """Says that the engine is ready, as soon as its KV cache has been measured."""
        self._poller.start()
        if self._measures:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_measured.wait(), _MEASURE_WITHIN_S)
        kv = self._measured.kv
        self._link.serve(self)
        self._link.send(pack_ready(self._loaded.info, None if kv is None else kv.total_tokens))

    def stop(self) -> None:
        """Asks the engine nothing more: it is about to be ended."""
        self._poller.stop()
        self._loaded.monitor.stop()

    def take(self, kind: Kind, body: bytes) -> None:
        """Takes a frame of the parent."""
        if kind is Kind.SUBMIT:
            self._taken += 1
            self._lanes.submit(*unpack_submit(body))
        elif kind is Kind.ABORT:
            self._lanes.abort(unpack_abort(body))
        elif kind is Kind.LOAD_ADAPTER:
            task = asyncio.get_running_loop().create_task(self._load_adapter(body))
            self._loading.add(task)
            task.add_done_callback(self._loading.discard)
        elif kind is Kind.EMBED:
            job, _ = unpack_embed(body)
            self._link.send(pack_embedded(job, "TensorRT-LLM makes no embeddings"))

    async def _load_adapter(self, body: bytes) -> None:
        asked = unpack_control(body)
        path, message = asked["path"], ""
        adapter = Adapter(
            name=str(asked["name"]),
            path=None if path is None else Path(str(path)),
            digest=str(asked["digest"]),
        )
        try:
            await asyncio.to_thread(self._loaded.shelf.check, adapter)
        except AdapterUnusable as error:
            message = str(error)
        else:
            self._loaded.shelf.load(adapter)
        self._tell_residents()
        answer = {"call": asked["call"], "message": message}
        self._link.send(pack_control(Kind.ADAPTER_ANSWER, answer))

    def _tell_residents(self) -> None:
        names = self._loaded.shelf.names
        if names != self._residents:
            self._residents = names
            self._link.send(pack_residents(names))

    def _send_step(self, report: Report) -> None:
        counts = self._lanes.counts
        counters = Counters(
            running=counts.running,
            waiting=counts.waiting,
            waiting_tokens=counts.waiting_tokens,
            kv_used_tokens=self._kv_used(counts.running, counts.held_tokens),
            taken=self._taken,
        )
        self._taken = 0
        self._link.send(pack_step(counters, report))

    def _kv_used(self, running: int, held_tokens: int) -> int | None:
        """Tokens in the KV cache: as measured lately, or what our own executions hold by now.

        None where the engine has never told of its cache: nothing is known of it then.
        """
        kv = self._measured.kv
        if kv is None:
            return None
        if not running:
            return 0
        used = held_tokens
        if time.perf_counter() - self._measured_s < _FRESH_S:
            used = max(used, kv.used_tokens)
        return used if kv.total_tokens is None else min(used, kv.total_tokens)

    def _on_measured(self, measured: Measured, events: list[KvEvent]) -> None:
        """Takes what the poller has fetched."""
        has_moved = measured.iteration != self._measured.iteration
        self._measured, self._measured_s = measured, time.perf_counter()
        if measured.kv is not None:
            self._has_measured.set()
        if events:
            self._link.send(pack_kv(events))
        if has_moved:
            # A sign of life, also while no token comes.
            self._send_step(Report())
        self._tell_residents()


def main() -> None:
    """Runs the child until its parent is gone; does not return."""
    ignore_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What TensorRT-LLM says is wanted when it says it, and most when it is about to die.
        sys.stdout.reconfigure(line_buffering=True)
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    asyncio.run(_main(connection))


async def _main(connection: socket.socket) -> None:
    """Ends the process when it is through: no thread and no hook at exit may hold it up."""
    status = 1
    try:
        status = await _run(connection)
    except Exception as error:  # noqa: BLE001 - a bug of ours, and the last thing to be said
        _die_of(error)
    finally:
        sys.stdout.flush()
        os._exit(status)


async def _run(connection: socket.socket) -> int:
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    _, link = await loop.create_unix_connection(Link, sock=connection)
    lost = asyncio.ensure_future(link.lost.wait())
    starting = asyncio.ensure_future(_start(link))
    await asyncio.wait([lost, starting], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        return 0
    loaded = starting.result()
    if loaded is None:
        await asyncio.wait([lost], timeout=_REFUSED_WITHIN_S)
        return 1
    server = Server(link, loaded)
    await server.begin()
    await lost
    server.stop()
    shut_down(loaded.llm)
    return 0


def shut_down(llm: Llm, within_s: float = _SHUT_DOWN_WITHIN_S) -> None:
    """Ends the engine, as far as it lets itself be ended.

    Args:
        llm: the engine.
        within_s: longest wait; an engine that is dead or stuck may never come back.
    """

    def end() -> None:
        # Whatever it dislikes, this process is about to end.
        with contextlib.suppress(Exception):
            llm.shutdown()

    ending = threading.Thread(target=end, name="shutdown", daemon=True)
    ending.start()
    ending.join(within_s)


async def _start(link: Link) -> Loaded | None:
    """Loads the engine; None when that was refused, and said."""
    told = unpack_settings(await link.start)
    parent = told.get("parent_process_id")
    if not die_with_parent(parent if isinstance(parent, int) else 0):
        return None

    def tell(progress: LoadProgress) -> None:
        link.send(pack_progress(progress))

    try:
        return await load(told, tell)
    except EngineStartError as error:
        link.send(pack_control(Kind.REFUSED, {"message": str(error)}))
        link.close()
        return None


def _die_of(error: BaseException) -> None:
    """Ends the process by an error, without shutdown(), which may hang."""
    die(f"{type(error).__name__}: {error}"[:_ERROR_SHOWN])


if __name__ == "__main__":
    main()
