"""The llamacpp engine: a GGUF model on the CPU, in a child process (llamacpp_child).

This side starts and ends the child, turns calls into frames and frames into StepBatches. It runs
on the event loop; the only work off it is waiting for a dead child.

Exactness. A token is drawn from (logits, seed, output position). The default KV cache, keys in
q8_0 and values in f16, makes llama.cpp compute attention for each row alone; with weights whose
kernels do so, too (Q8_0 and Q4_0 do; F16, F32 and the K types do not), a lane's logits have the
same bits alone and in company, in one prefill or continued after a death. Whether the loaded model
is such is measured at start and told by EngineInfo.is_deterministic. Without it the last bits
differ with the company, and a lane takes another token only where two are nearly tied. The same
holds between kinds of CPU in any case, and for lanes with an adapter, since its matrices are F32 or
F16.

Prefix cache. What a lane computed stays in its slot until that is needed; see llamacpp_slots. It is
no load: kv_used_tokens counts what running lanes hold.

Never: touches text, tokenises (LlamaCppTokenizer does), or keeps a finished lane.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from services.worker.engine.base import (
    Adapter,
    AdapterUnusable,
    ConstraintKind,
    EmbeddingFailed,
    EngineAbilities,
    EngineDied,
    EngineInfo,
    EngineLoad,
    EngineRequest,
    EngineStartError,
    Lane,
    StepBatch,
)
from services.worker.engine.llamacpp_calls import Calls
from services.worker.engine.llamacpp_wire import (
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

_CHILD_MODULE: Final = "services.worker.engine.llamacpp_child"
_ROOT: Final = Path(__file__).parents[3]
_EXIT_TIMEOUT_S: Final = 1.0
"""How long a child whose socket is closed may take to exit before it is killed."""
_STOPPED: Final = "the engine was stopped"
_LAST_WORDS_MAX: Final = 1 << 16
_LAST_WORDS_SHOWN: Final = 400
TOP_LOGPROBS_MAX: Final = 20
"""Most alternatives with a log-probability; each is found in every row of the vocabulary."""
_LOAD_UNKNOWN: Final = EngineLoad(
    running=None, waiting=None, waiting_tokens=None, kv_used_tokens=None, kv_total_tokens=None
)


class LlamaCppEngine:
    """An Engine over a GGUF file, as services.worker.engine.base says.

    The KV cache is allocated whole at start: capacity * context_length * layers * KV heads * head
    size * about 3 bytes (1.06 for keys, 2 for values).

    Args:
        model_path: GGUF file of a decoder-only model.
        capacity: executions in the batch, 1 to 256. More submits than that wait, first come first
            served; the caller bounds how many.
        context_length: prompt and output together, tokens. None takes the length the model was
            trained for, at most 8192, so that a 128k model does not ask for tens of gigabytes.
        threads: that compute. One for each core that nobody else wants: the threads wait for each
            other by spinning, so one that is kept from its core slows all down several times.
        kv_dtype_k: number type of the cached keys: "q8_0", "f16" or "f32".
        kv_dtype_v: number type of the cached values, likewise. The defaults are needed for
            exactness and are about as fast as f16; f16 for both prefills long prompts faster and
            takes head sizes that are no multiple of 32.
        prefill_tokens: most prompt tokens in one step, which is what a long prompt adds to the
            time until the other lanes' next token.
        start_timeout_s: most time that loading may take, hashing the file included.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        capacity: int,
        context_length: int | None = None,
        threads: int,
        kv_dtype_k: str = "q8_0",
        kv_dtype_v: str = "f16",
        prefill_tokens: int = 128,
        start_timeout_s: float = 600.0,
    ) -> None:
        self._settings: dict[str, Value] = {
            "path": str(model_path.absolute()),
            "capacity": capacity,
            "context_length": context_length,
            "threads": threads,
            "kv_dtype_k": kv_dtype_k,
            "kv_dtype_v": kv_dtype_v,
            "prefill_tokens": prefill_tokens,
        }
        self._capacity = capacity
        self._start_timeout_s = start_timeout_s
        self._kv_total_tokens = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._ready: asyncio.Future[EngineInfo] | None = None
        self._reaped: asyncio.Future[str] | None = None
        self._is_stopping = False
        self._is_link_lost = False
        self._is_over = False
        self._death: str | None = "the engine has not been started"

        self._live: set[Lane] = set()
        self._counters = Counters()
        # Prompt tokens of each submit that the child has not reported as taken, oldest first.
        self._in_flight: collections.deque[int] = collections.deque()
        self._batch = StepBatch()
        self._has_news = asyncio.Event()
        self._loads: Calls[str] = Calls()
        self._embeds: Calls[npt.NDArray[np.float32] | str] = Calls()
        self._residents: tuple[str, ...] = ()

    async def start(self) -> EngineInfo:
        """Starts the child and waits until it has loaded the model; once for each engine.

        Raises:
            EngineStartError: with what to do about it.
        """
        if self._process is not None:
            raise EngineStartError("an engine can be started only once")
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
            waiting=counters.waiting + len(self._in_flight),
            waiting_tokens=counters.waiting_tokens + sum(self._in_flight),
            kv_used_tokens=counters.kv_used_tokens,
            kv_total_tokens=self._kv_total_tokens,
            resident_adapters=self._residents,
        )

    async def load_adapter(self, adapter: Adapter) -> None:
        """Loads a LoRA adapter, unless it is loaded; see base.Engine.

        Eight stay loaded; those of running lanes always do. Loading delays the step in progress
        by about the time it takes to read the file.

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

        The first call makes room for up to four more contexts of KV cache.

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
        """Ends the child, within about a second; see base.Engine."""
        self._is_stopping = True
        self._death = self._death or _STOPPED
        if self._transport is not None:
            self._transport.close()
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
                self._process = _spawn(theirs)
            except OSError as error:
                ours.close()
                raise EngineStartError(f"no process can be started: {error}") from error
        self._reaped = loop.create_future()
        ours.setblocking(False)
        try:
            transport, _ = await loop.create_unix_connection(lambda: _Link(self), sock=ours)
        except BaseException:
            ours.close()
            self.on_link_lost()
            raise
        self._transport = transport
        transport.write(
            pack_control(
                Kind.START, {**self._settings, "wire": VERSION, "parent_process_id": os.getpid()}
            )
        )
        return await self._ready

    def on_frame(self, kind: Kind, body: bytes) -> None:
        """Takes a frame of the child."""
        if kind is Kind.STEP:
            self._on_step(body)
        elif kind is Kind.EMBEDDED:
            self._embeds.answer(*unpack_embedded(body))
        elif kind is Kind.ADAPTER_ANSWER:
            told = unpack_control(body)
            self._loads.answer(int(told["call"] or 0), str(told["message"]))
        elif kind is Kind.RESIDENTS:
            self._residents = unpack_residents(body)
        elif self._ready is None or self._ready.done():
            return
        elif kind is Kind.READY:
            self._on_ready(unpack_control(body))
        elif kind is Kind.REFUSED:
            self._ready.set_exception(EngineStartError(str(unpack_control(body)["message"])))

    def on_link_lost(self) -> None:
        """Takes note that the child closed its end, or we did: it is dead or about to be."""
        if self._process is None or self._is_link_lost:
            return
        self._is_link_lost = True
        self._death = self._death or "the llama.cpp process ended"
        waiting = asyncio.get_running_loop().run_in_executor(None, _reap, self._process)
        waiting.add_done_callback(self._on_reaped)

    def _on_ready(self, facts: dict[str, Value]) -> None:
        context_length = int(facts["context_length"] or 0)
        info = EngineInfo(
            engine="llamacpp",
            version=str(facts["version"]),
            context_length=context_length,
            max_running=self._capacity,
            vocabulary_size=int(facts["vocabulary_size"] or 0),
            digest=str(facts["digest"]),
            is_deterministic=bool(facts["is_deterministic"]),
            abilities=_abilities(facts),
        )
        self._kv_total_tokens = context_length * self._capacity
        self._death = None
        if self._ready is not None:
            self._ready.set_result(info)

    def _on_step(self, body: bytes) -> None:
        batch = self._batch
        known_ends = len(batch.ended)
        self._counters = unpack_step(body, batch)
        for _ in range(self._counters.taken):
            self._in_flight.popleft()
        for ended in batch.ended[known_ends:]:
            self._live.discard(ended.lane)
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

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()


class _Link(asyncio.Protocol):
    """The parent's end of the socket."""

    def __init__(self, engine: LlamaCppEngine) -> None:
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
    return bool(batch.lanes or batch.ended or batch.prefilled or batch.prompt_scores)


def _abilities(facts: dict[str, Value]) -> EngineAbilities:
    """What the loaded model can be asked for."""
    return EngineAbilities(
        constraints=frozenset(ConstraintKind if facts["constrains"] else ()),
        min_p=True,
        penalties=True,
        repetition_penalty=True,
        logit_bias=True,
        min_output_tokens=True,
        ignore_eos=True,
        max_top_logprobs=TOP_LOGPROBS_MAX,
        prompt_logprobs=True,
        adapters=True,
        embedding_dimensions=int(facts["embedding_dimensions"] or 0),
        prompt_cache=bool(facts["keeps_prefixes"]),
    )


def _spawn(theirs: socket.socket) -> subprocess.Popen[bytes]:
    """Starts the child from this thread: on Linux it dies with the thread that started it."""
    process = subprocess.Popen(
        [sys.executable, "-m", _CHILD_MODULE, str(theirs.fileno())],
        # The same checkout as ours, wherever we were started.
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[theirs.fileno()],
    )
    if process.stderr is not None:
        os.set_blocking(process.stderr.fileno(), False)
    return process


def _reap(process: subprocess.Popen[bytes]) -> str:
    """Waits for a child whose socket is closed, kills it if need be; says how it ended."""
    try:
        process.wait(_EXIT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    status = process.returncode
    how = f"exited with status {status}"
    if status < 0:
        with contextlib.suppress(ValueError):
            how = f"was killed by {signal.Signals(-status).name}"
    words = _last_words(process)
    return f"the llama.cpp process {how}" + (f": {words}" if words else "")


def _last_words(process: subprocess.Popen[bytes]) -> str:
    """The last line on a dead child's stderr."""
    if process.stderr is None:
        return ""
    with process.stderr as stream:
        words = stream.read(_LAST_WORDS_MAX) or b""
    lines = words.decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:_LAST_WORDS_SHOWN]
