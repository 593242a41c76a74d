"""An Engine whose model lives in a child process: what all such engines have in common.

This side starts and ends the child, turns calls into frames and frames into StepBatches. It runs
on the event loop; the only work off it is waiting for a dead child. Whatever hangs or breaks in the
child, the worker's event loop goes on.

Never: touches text, tokenises, or keeps a finished lane.
"""

from __future__ import annotations

import asyncio
import collections
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from services.worker.engine.base import (
    LOCAL_ENDS,
    Adapter,
    AdapterUnusable,
    EmbeddingFailed,
    EngineDied,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EngineStartError,
    Lane,
    StepBatch,
    Tell,
)
from services.worker.engine.child_calls import Calls
from services.worker.engine.child_processes import ChildProcess, ChildProgram
from services.worker.engine.wire import (
    VERSION,
    Counters,
    FrameReader,
    Kind,
    Value,
    pack_abort,
    pack_control,
    pack_drop_embed,
    pack_embed,
    pack_submit,
    unpack_control,
    unpack_embedded,
    unpack_residents,
    unpack_step,
)
from services.worker.engine.wire_facts import (
    Setting,
    pack_settings,
    unpack_kv,
    unpack_progress,
    unpack_ready,
)

_STOPPED: Final = "the engine was stopped"
_LOAD_UNKNOWN: Final = EngineLoad(
    running=None, waiting=None, waiting_tokens=None, kv_used_tokens=None, kv_total_tokens=None
)


class ChildEngine:
    """An Engine in a child process, as services.worker.engine.base says.

    Args:
        program: what runs as the child.
        settings: what it is told at its start.
        start_timeout_s: most time that loading may take.
    """

    def __init__(
        self, program: ChildProgram, settings: Mapping[str, Setting], *, start_timeout_s: float
    ) -> None:
        self._program = program
        self._settings = dict(settings)
        self._start_timeout_s = start_timeout_s
        self._kv_total_tokens: int | None = None
        self._process: ChildProcess | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._stderr_fd: int | None = None
        self._tell: Tell | None = None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._reaped: asyncio.Future[str] | None = None
        self._is_stopping = False
        self._is_link_lost = False
        self._is_over = False
        self._death: str | None = "the engine has not been started"

        self._live: set[Lane] = set()
        self._counters = Counters()
        self._steps = 0
        # Prompt tokens of each submit that the child has not reported as taken, oldest first.
        self._in_flight: collections.deque[int] = collections.deque()
        self._batch = StepBatch()
        self._has_news = asyncio.Event()
        self._loads: Calls[str] = Calls()
        self._embeds: Calls[npt.NDArray[np.float32] | str] = Calls()
        self._residents: tuple[str, ...] = ()

    async def start(self, tell: Tell | None = None) -> EngineInfo:
        """Starts the child and waits until it has loaded the model; once for each engine.

        Args:
            tell: hears how far it is.

        Raises:
            EngineStartError: with what to do about it.
        """
        if self._process is not None:
            raise EngineStartError("an engine can be started only once")
        self._tell = tell
        try:
            async with asyncio.timeout(self._start_timeout_s):
                return await self._start()
        except TimeoutError:
            self._kill()
            await self.stop()
            raise EngineStartError(
                f"the model was not loaded within {self._start_timeout_s:g} s"
            ) from None
        except BaseException:
            # Cancelled, too: no child outlives a start that nobody waits for.
            self._kill()
            await self.stop()
            raise

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        """Queues an execution; see base.Engine.

        Raises:
            EngineDied: it is gone.
            ValueError: the lane is in use.
        """
        transport = self._living()
        if lane in self._live:
            raise ValueError(f"lane {lane} is in use")
        transport.write(pack_submit(lane, request))
        self._live.add(lane)
        self._in_flight.append(len(request.prompt_ids) + len(request.continue_ids))

    def abort(self, lane: Lane) -> None:
        """Stops an execution at the child's next step; see base.Engine."""
        if lane in self._live and self._death is None and self._transport is not None:
            self._transport.write(pack_abort(lane))

    async def next_step(self) -> StepBatch:
        """Waits for what happened since the call before; see base.Engine.

        Steps that piled up come as one batch. That batch is bounded by the output that the lanes
        inside may still produce.

        Raises:
            EngineDied: it is gone; raised after what had arrived was handed out.
        """
        if self._process is None:
            raise EngineDied(self._death)
        await self._has_news.wait()
        batch = self._batch
        if not _has_any(batch):
            raise EngineDied(self._death)
        self._batch = StepBatch()
        if not self._is_over:
            self._has_news.clear()
        return batch

    def load(self) -> EngineLoad:
        """The load at the child's last step, and what was submitted since."""
        if self._death is not None:
            return _LOAD_UNKNOWN
        counters = self._counters
        return EngineLoad(
            running=counters.running,
            waiting=_sum_known(counters.waiting, len(self._in_flight)),
            waiting_tokens=_sum_known(counters.waiting_tokens, sum(self._in_flight)),
            kv_used_tokens=counters.kv_used_tokens,
            kv_total_tokens=self._kv_total_tokens,
            resident_adapters=self._residents,
            steps=self._steps,
        )

    async def load_adapter(self, adapter: Adapter) -> None:
        """Loads a LoRA adapter, unless it is loaded; see base.Engine.

        Raises:
            AdapterUnusable: its file is no adapter, or not one of this model.
            EngineDied: it is gone.
        """
        transport = self._living()
        with self._loads.open() as (call, answer):
            path = None if adapter.path is None else str(adapter.path.absolute())
            asked: dict[str, Value] = {"call": call, "name": adapter.name, "path": path}
            asked["digest"] = adapter.digest
            transport.write(pack_control(Kind.LOAD_ADAPTER, asked))
            message = await answer
        if message:
            raise AdapterUnusable(message)

    async def embed(self, inputs: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Embeds prompts between the steps of the lanes; see base.Engine.

        Raises:
            EmbeddingFailed: these inputs cannot be embedded.
            EngineDied: it is gone.
        """
        transport = self._living()
        with self._embeds.open() as (call, answer):
            try:
                transport.write(pack_embed(call, inputs))
            except OverflowError:
                raise EmbeddingFailed("a token id is not in the vocabulary") from None
            try:
                outcome = await answer
            except asyncio.CancelledError:
                if self._death is None:
                    transport.write(pack_drop_embed(call))
                raise
        if isinstance(outcome, str):
            raise EmbeddingFailed(outcome)
        return outcome

    async def stop(self) -> None:
        """Ends the child, within its exit timeout and about a second; see base.Engine."""
        self._is_stopping = True
        self._death = self._death or _STOPPED
        if self._transport is not None:
            # Not `close`: it waits until all is read, and a child that hangs reads nothing.
            self._transport.abort()
        if self._reaped is not None:
            # More than one may wait, and one that is cancelled must not take the others along.
            await asyncio.shield(self._reaped)

    def _living(self) -> asyncio.WriteTransport:
        """The way to a child that lives.

        Raises:
            EngineDied: it does not.
        """
        if self._death is not None or self._transport is None:
            raise EngineDied(self._death)
        return self._transport

    # The child's life.

    async def _start(self) -> EngineInfo:
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = ChildProcess(self._program, theirs)
            except OSError as error:
                ours.close()
                raise EngineStartError(f"no process can be started: {error}") from error
        self._reaped = loop.create_future()
        self._watch_stderr(loop, self._process)
        ours.setblocking(False)
        try:
            transport, _ = await loop.create_unix_connection(lambda: _Link(self), sock=ours)
        except BaseException:
            ours.close()
            self.on_link_lost()
            raise
        self._transport = transport
        settings = {**self._settings, "wire": VERSION, "parent_process_id": os.getpid()}
        transport.write(pack_settings(settings))
        return await self._ready

    def on_frame(self, kind: Kind, body: bytes) -> None:
        """Takes a frame of the child."""
        if kind is Kind.STEP:
            self._on_step(body)
        elif kind is Kind.KV:
            self._batch.kv_events += unpack_kv(body)
            self._has_news.set()
        elif kind is Kind.EMBEDDED:
            self._embeds.answer(*unpack_embedded(body))
        elif kind is Kind.ADAPTER_ANSWER:
            told = unpack_control(body)
            self._loads.answer(int(told["call"] or 0), str(told["message"]))
        elif kind is Kind.RESIDENTS:
            self._residents = unpack_residents(body)
        elif self._ready is not None and not self._ready.done():
            self._on_start_frame(self._ready, kind, body)

    def _on_start_frame(self, ready: asyncio.Future[EngineInfo], kind: Kind, body: bytes) -> None:
        if kind is Kind.PROGRESS:
            if self._tell is not None:
                self._tell(unpack_progress(body))
        elif kind is Kind.READY:
            info, self._kv_total_tokens = unpack_ready(body)
            self._death = None
            ready.set_result(info)
        elif kind is Kind.REFUSED:
            ready.set_exception(EngineStartError(str(unpack_control(body)["message"])))

    def on_link_lost(self) -> None:
        """Takes note that the child closed its end, or we did: it is dead or about to be."""
        if self._process is None or self._is_link_lost:
            return
        self._is_link_lost = True
        self._death = self._death or f"the {self._program.name} process ended"
        loop = asyncio.get_running_loop()
        # From here on stderr is read by whoever waits for the end.
        self._unwatch_stderr(loop)
        waiting = loop.run_in_executor(None, self._process.reap)
        waiting.add_done_callback(self._on_reaped)

    def _on_step(self, body: bytes) -> None:
        batch = self._batch
        known, known_ends = _size(batch), len(batch.ended)
        self._counters = unpack_step(body, batch)
        for _ in range(self._counters.taken):
            self._in_flight.popleft()
        ends = batch.ended[known_ends:]
        for ended in ends:
            self._live.discard(ended.lane)
        is_local = bool(ends) and all(ended.reason in LOCAL_ENDS for ended in ends)
        if _size(batch) > known or not is_local:
            self._steps += 1
        if _has_any(batch):
            self._has_news.set()

    def _on_reaped(self, reaping: asyncio.Future[str]) -> None:
        how = reaping.result()
        self._death = _STOPPED if self._is_stopping else how
        self._is_over = True
        self._live.clear()
        for calls in (self._loads, self._embeds):
            calls.fail(self._death)
        self._has_news.set()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(
                EngineStartError(f"{how} while it loaded the model; was there enough memory?")
            )
            # Nobody may be waiting any more, which is no reason for a warning.
            self._ready.exception()
        if self._reaped is not None and not self._reaped.done():
            self._reaped.set_result(how)

    def _watch_stderr(self, loop: asyncio.AbstractEventLoop, process: ChildProcess) -> None:
        descriptor = process.stderr_fd
        if descriptor is not None:
            self._stderr_fd = descriptor
            loop.add_reader(descriptor, self._on_stderr, loop, process)

    def _on_stderr(self, loop: asyncio.AbstractEventLoop, process: ChildProcess) -> None:
        if not process.read_stderr():
            self._unwatch_stderr(loop)

    def _unwatch_stderr(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._stderr_fd is not None:
            loop.remove_reader(self._stderr_fd)
            self._stderr_fd = None

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()


class _Link(asyncio.Protocol):
    """The parent's end of the socket."""

    def __init__(self, engine: ChildEngine) -> None:
        self._engine = engine
        self._reader = FrameReader()

    @override
    def data_received(self, data: bytes) -> None:
        for kind, body in self._reader.feed(data):
            self._engine.on_frame(kind, body)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.on_link_lost()


def _has_any(batch: StepBatch) -> bool:
    return bool(
        batch.lanes or batch.ended or batch.prefilled or batch.prompt_scores or batch.kv_events
    )


def _size(batch: StepBatch) -> int:
    """How much a batch says but ends."""
    return len(batch.lanes) + len(batch.prefilled) + len(batch.prompt_scores)


def _sum_known(known: int | None, more: int) -> int | None:
    return None if known is None else known + more
