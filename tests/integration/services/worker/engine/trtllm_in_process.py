"""The adapter itself, as its child process runs it: all of it but the socket and the process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import cast

import pytest
from typing_extensions import override

from libs.testing.clock import FakeClock
from services.worker.engine import trtllm_start
from services.worker.engine.base import (
    Adapter,
    AdapterUnusable,
    Engine,
    EngineDied,
    EngineLoad,
    EngineRequest,
    Lane,
    StepBatch,
)
from services.worker.engine.trtllm_child import Link, Server, shut_down
from services.worker.engine.trtllm_monitor import STUCK_S, Monitor
from services.worker.engine.trtllm_start import Loaded, load
from services.worker.engine.wire import (
    VERSION,
    Counters,
    FrameReader,
    Kind,
    pack_abort,
    pack_control,
    pack_submit,
    unpack_control,
    unpack_step,
)
from services.worker.engine.wire_facts import Setting, pack_settings, unpack_kv
from services.worker.watchdog import CANARY, TICK_S, Patience, Watchdog
from tests.integration.services.worker.engine.trtllm_subjects import (
    BLOCK_TOKENS,
    CAPACITY,
    OLD,
    PATIENCE_S,
    STANDINS,
    Bench,
    Setup,
    Subject,
    Told,
    ends,
    install,
)
from tests.unit.services.worker.engine.trtllm_world import told

_WATCH_S = 12.0
_ENGINE_WITHIN_S = 0.05
_LATE_S = 0.15
"""How long the event loop has stood still when another thread notices, on a clock that is ahead."""


class Wire(Link):
    """Where the socket to the parent would be."""

    def __init__(self, subject: AdapterSubject) -> None:
        super().__init__()
        self._subject = subject
        self._frames = FrameReader()

    @override
    def send(self, frame: bytes) -> None:
        for kind, body in self._frames.feed(frame):
            self._subject.take(kind, body)


class AdapterSubject(Subject):
    """The adapter."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self._setup = setup
        self._frames = FrameReader()
        self._counters = Counters()
        self.batches: asyncio.Queue[StepBatch] = asyncio.Queue()
        self._answers: dict[str, asyncio.Future[str]] = {}
        self.steps = 0
        self._is_down = False
        self._loaded: Loaded | None = None
        self._server: Server | None = None

    @property
    def loaded(self) -> Loaded:
        """The engine and what goes with it."""
        assert self._loaded is not None
        return self._loaded

    @property
    def server(self) -> Server:
        """What serves it."""
        assert self._server is not None
        return self._server

    @override
    async def open(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # It must not end the process of the tests.
            patch.setattr(trtllm_start, "Monitor", partial(Monitor, end=self.deaths.append))
            self._loaded = await load(settings_of(self._setup), lambda _: None)
        # What it finds is asked for by `noticed`.
        self._loaded.monitor.stop()
        self.llm = self._loaded.llm
        self.abilities = self._loaded.info.abilities
        wire = Wire(self)
        self._server = Server(wire, self._loaded, lambda error: self.deaths.append(str(error)))
        if self._setup.polls:
            await self._server.begin()

    @override
    def _submit(self, lane: Lane, request: EngineRequest) -> None:
        for kind, body in self._frames.feed(pack_submit(lane, request)):
            self.server.take(kind, body)

    @override
    def abort(self, lane: Lane) -> None:
        for kind, body in self._frames.feed(pack_abort(lane)):
            self.server.take(kind, body)

    @override
    async def load_adapter(self, adapter: Adapter) -> None:
        values = {
            "call": adapter.name,
            "name": adapter.name,
            "path": str(adapter.path),
            "digest": adapter.digest,
        }
        self._answers[adapter.name] = asyncio.get_running_loop().create_future()
        for kind, body in self._frames.feed(pack_control(Kind.LOAD_ADAPTER, values)):
            self.server.take(kind, body)
        async with asyncio.timeout(PATIENCE_S):
            message = await self._answers[adapter.name]
        if message:
            raise AdapterUnusable(message)

    def take(self, kind: Kind, body: bytes) -> None:
        """Takes what the parent would get."""
        if kind is Kind.ADAPTER_ANSWER:
            answer = unpack_control(body)
            self._answers[str(answer["call"])].set_result(str(answer["message"]))
        elif kind is Kind.KV:
            self.events += unpack_kv(body)
        elif kind is Kind.STEP:
            batch = StepBatch()
            self._counters = unpack_step(body, batch)
            self.steps += 1
            self._take_step(batch)
            self.batches.put_nowait(batch)

    def _take_step(self, batch: StepBatch) -> None:
        for prefilled in batch.prefilled:
            self.begin(prefilled.lane, prefilled.cached_tokens)
        for row, (lane, token_id) in enumerate(zip(batch.lanes, batch.token_ids, strict=True)):
            self.told[lane].token_ids.append(token_id)
            if batch.scores is not None:
                self.told[lane].logprobs.append(batch.scores.logprobs[row])
        for ended in batch.ended:
            self.end(ended)

    @property
    @override
    def running(self) -> int | None:
        return self._counters.running

    @property
    @override
    def kv_used(self) -> int | None:
        return self._counters.kv_used_tokens

    @property
    @override
    def iteration(self) -> int | None:
        return self.server._measured.iteration

    @override
    async def noticed(self) -> str:
        monitor, now_s = self.loaded.monitor, time.perf_counter()
        # Twice: who shuts down by a fault gets a moment to say why.
        why = monitor.find_fault(now_s) or monitor.find_fault(now_s + 1.0)
        return why or await self._watch()

    async def _watch(self) -> str:
        """Looks as the worker's watchdog does, on a clock that runs ahead."""
        clock = FakeClock()
        watched = Watched(self)
        engine = cast("Engine", watched)
        patience = Patience(
            canary_after_s=4.0, silent_within_s=9.0, abort_within_s=60.0, adapter_within_s=30.0
        )
        dog = Watchdog(engine, self.loaded.info, patience, clock)
        watching = asyncio.create_task(dog.run(lambda: None))
        reading = asyncio.create_task(_read(dog))
        try:
            for _ in range(round(_WATCH_S / TICK_S)):
                await asyncio.sleep(0)
                clock.advance(TICK_S)
                await asyncio.sleep(0)
                if watching.done():
                    return str(watching.exception())
                await watched.answered()
            return ""
        finally:
            for task in (watching, reading):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, EngineDied):
                    await task

    @override
    def noticed_meanwhile(self) -> str:
        return self.loaded.monitor.find_fault(time.perf_counter() + STUCK_S - _LATE_S)

    @override
    async def shut_down(self) -> None:
        if self._server is not None and not self._is_down:
            self._is_down = True
            self._server.stop()
            shut_down(self.loaded.llm, _ENGINE_WITHIN_S)


class Watched:
    """The adapter as an Engine, as far as a watchdog needs one."""

    def __init__(self, subject: AdapterSubject) -> None:
        self._subject = subject

    async def answered(self) -> None:
        """Waits for the answer to a canary: on this clock it takes no time. None comes of a stuck
        engine."""
        canary = self._subject.told.get(CANARY)
        engine = self._subject.llm._executor.engine
        async with asyncio.timeout(PATIENCE_S):
            while canary is not None and canary.ended is None and not engine.is_stuck:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def submit(self, lane: Lane, request: EngineRequest) -> None:
        """Starts an execution under the number that the watchdog gives it."""
        self._subject.told[lane] = Told()
        self._subject._submit(lane, request)

    async def next_step(self) -> StepBatch:
        """The next batch."""
        return await self._subject.batches.get()

    def load(self) -> EngineLoad:
        """What is told of the load."""
        return EngineLoad(
            running=self._subject.running,
            waiting=None,
            waiting_tokens=None,
            kv_used_tokens=self._subject.kv_used,
            kv_total_tokens=None,
            steps=self._subject.steps,
        )


async def _read(dog: Watchdog) -> None:
    """Consumes batches, as a worker does beside the watchdog."""
    while True:
        await dog.next_step()


def settings_of(setup: Setup) -> dict[str, Setting]:
    """What a worker tells the child."""
    common: dict[str, object] = {
        "kv_cache": {"tokens_per_block": BLOCK_TOKENS},
        "statistics": {"poll_interval": "10ms"},
    }
    sections = {
        name: {**_mapping(common.get(name)), **_mapping(setup.section.get(name))}
        for name in {*common, *setup.section}
    }
    given = told(model_path=setup.model.folder, capacity=CAPACITY, context_length=None, **sections)
    return {**given, "wire": VERSION, "parent_process_id": os.getpid()}


def _mapping(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, Mapping) else {}


async def run_child(bench: Bench) -> bool:
    """Starts the child process, kills the engine's own process, and waits for the child's end."""
    bench.folder.mkdir()
    switch = bench.folder / "kill"
    setup = Setup(
        version=OLD, section={}, standin={}, polls=False, model=bench.model, folder=bench.folder
    )
    # Of the tests' process this is as good as nothing: the child imports it anew.
    fault = {"name": "rank_killed", "when_file": str(switch)}
    install(OLD, {}, bench.sets_environment, (fault,))
    bench.sets_environment("PYTHONPATH", str(STANDINS))
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-m", "services.worker.engine.trtllm_child", str(theirs.fileno())]
    child = await asyncio.create_subprocess_exec(*command, pass_fds=[theirs.fileno()])
    theirs.close()
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    try:
        writer.write(pack_settings(settings_of(setup)))
        frames = FrameReader()
        async with asyncio.timeout(PATIENCE_S):
            kinds: list[Kind] = []
            while Kind.READY not in kinds:
                kinds = [kind for kind, _ in frames.feed(await reader.read(1 << 16))]
        switch.touch()
        return await ends(child, bench.patience_s)
    finally:
        writer.close()
