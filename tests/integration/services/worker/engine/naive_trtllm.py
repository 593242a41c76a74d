"""A first version of an adapter for TensorRT-LLM, as one writes it from the quick-start.

Each habit is one thing that looks right and is not; a test switches on the one that it is about, so
that it fails by that and nothing else. Without habits it serves ordinary requests well enough.
What it does wrong in any case, it does wrong where only the tests of that look: it hands stop
texts, penalties, grammars and adapters on as they are, does not think of errors, and asks nobody
what the installed version can do.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import secrets
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from services.worker.engine.base import (
    Adapter,
    Constraint,
    ConstraintKind,
    Ended,
    EndReason,
    EngineAbilities,
    EngineRequest,
    Lane,
)
from services.worker.engine.kv_events import KvCleared, KvStored, chain
from tests.integration.services.worker.engine.trtllm_habits import Habit
from tests.integration.services.worker.engine.trtllm_subjects import (
    BLOCK_TOKENS,
    CAPACITY,
    OLD,
    STANDINS,
    Bench,
    Setup,
    Subject,
    Told,
    ends,
    install,
)

REASONS = {
    "stop": EndReason.END_OF_SEQUENCE,
    "length": EndReason.MAX_TOKENS,
    "cancelled": EndReason.ABORTED,
}
_PROGRAM = Path(__file__).with_name("naive_trtllm_process.py")
_ASK_S = 0.002
_KILLED_S = 0.1
_HANGS_AFTER_S = 0.5


class NaiveAdapter(Subject):
    """Everything in one process and one class. See the habits."""

    def __init__(self, setup: Setup, habit: Habit) -> None:
        super().__init__()
        self._setup, self._habit = setup, habit
        self._trtllm: Any = importlib.import_module("tensorrt_llm")
        self._parts: Any = importlib.import_module("tensorrt_llm.llmapi")
        self._request_error = importlib.import_module("tensorrt_llm.executor.utils").RequestError
        # It is all in the documentation.
        self.abilities = EngineAbilities(
            constraints=frozenset(ConstraintKind),
            penalties=True,
            repetition_penalty=True,
            min_p=True,
            min_output_tokens=True,
            ignore_eos=True,
        )
        self._shared: Any = None
        self._results: dict[Lane, Any] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: dict[Lane, list[int]] = {}
        self._adapters: dict[str, int] = {}
        self._statistics: dict[str, Any] = {}
        self._is_fresh = False
        self._blocks: dict[int, int] = {}
        self._next_event: int | None = None
        self._window = 0

    # Loading.

    @override
    async def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._habit is Habit.LOADS_IN_LOOP:
            self._load()
        else:
            await asyncio.to_thread(self._load)
        if self._habit is not Habit.NO_WARM_UP:
            await self._warm_up()
        if self._setup.polls:
            self._spawn(self._poll())

    def _load(self) -> None:
        self.llm = self._trtllm.LLM(model=str(self._setup.model.folder), **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        section: Any = self._setup.section
        habit = self._habit
        parallelism = section.get("parallelism", {})
        batching = section.get("batching", {})
        cache = {
            "tokens_per_block": BLOCK_TOKENS,
            "max_tokens": section.get("kv_cache", {}).get("max_tokens"),
            "event_buffer_max_size": 0 if habit is Habit.NO_EVENT_BUFFER else 1000,
        }
        arguments: dict[str, Any] = {
            "max_batch_size": CAPACITY,
            "kv_cache_config": self._parts.KvCacheConfig(**cache),
            "enable_iter_perf_stats": habit is not Habit.NO_STATISTICS,
            "tensor_parallel_size": parallelism.get("tensor", 1),
            "enable_attention_dp": parallelism.get("attention_data_parallel", False),
            "max_num_tokens": batching.get("max_num_tokens", 8192),
            "enable_chunked_prefill": batching.get("chunked_prefill", True),
        }
        if habit is not Habit.NO_BACKEND:
            arguments["guided_decoding_backend"] = "llguidance"
        if section.get("speculative"):
            arguments["speculative_config"] = {
                "decoding_type": "MTP",
                "num_nextn_predict_layers": 1,
            }
        if section.get("lora"):
            adapters = sorted(self._setup.folder.glob("*/adapter_config.json"))
            known = [str(path.parent) for path in adapters if habit is Habit.LORA_DIR]
            module = importlib.import_module("tensorrt_llm.lora_helper")
            arguments["lora_config"] = module.LoraConfig(lora_dir=known)
        return arguments

    async def _warm_up(self) -> None:
        params = self._trtllm.SamplingParams(max_tokens=1, detokenize=False)
        salt = {} if self._habit is Habit.UNSALTED_CANARY else {"cache_salt": "canary"}
        await self.llm.generate_async([1], sampling_params=params, **salt)

    # Requests.

    @override
    def _submit(self, lane: Lane, request: EngineRequest) -> None:
        if self._habit is Habit.LOOP_EACH:
            self._spawn(asyncio.to_thread(asyncio.run, self._serve(lane, request)))
        elif self._habit is Habit.CALL_IN_THREAD:
            self._spawn(self._serve(lane, request))
        else:
            result = self._call(request)
            self._spawn(self._follow(lane, request, result))

    async def _serve(self, lane: Lane, request: EngineRequest) -> None:
        if self._habit is Habit.CALL_IN_THREAD:
            result = await asyncio.to_thread(self._call, request)
        else:
            result = self._call(request)
        await self._follow(lane, request, result)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        # For the test to see.
        self.crash = self.crash or (None if task.cancelled() else task.exception())

    @override
    def submit_outputs(self, request: EngineRequest, count: int) -> list[Lane]:
        if self._habit is not Habit.N_OUTPUTS:
            return super().submit_outputs(request, count)
        lanes = list(range(self._lanes + 1, self._lanes + 1 + count))
        self.told |= {lane: Told() for lane in lanes}
        self._lanes += count
        result = self._call(request, n=count)
        self._spawn(self._follow_all(lanes, result))
        return lanes

    def _call(self, request: EngineRequest, **more: object) -> Any:
        habit = self._habit
        params = self._params(request, **more)
        prompt: Any = [*request.prompt_ids, *request.continue_ids]
        if habit is Habit.NUMPY:
            prompt = np.array(prompt)
        if habit is Habit.TEXT:
            prompt = self.llm.tokenizer.decode(prompt, skip_special_tokens=True)
        if habit is Habit.BY_PLACE:
            return self.llm.generate_async(prompt, params, None, None, True)
        call: dict[str, Any] = {"sampling_params": params, "streaming": True}
        if habit is not Habit.NO_SALT:
            salt = request.cache_salt.hex() or None
            call["cache_salt"] = salt if request.reads_cache else secrets.token_hex(8)
        if habit is Habit.NEWEST:
            call["priority"] = 0.1 if request.is_background else 0.5
        if request.adapter is not None:
            call["lora_request"] = self._lora(request.adapter)
        return self.llm.generate_async(prompt, **call)

    def _params(self, request: EngineRequest, **more: object) -> Any:
        if self._habit is Habit.SHARED_PARAMS and self._shared is not None:
            return self._shared
        fields = {**self._drawing(request), **self._ending(request), **more}
        if request.top_logprobs is not None:
            fields["logprobs"] = request.top_logprobs
        if request.constraint is not None:
            fields["guided_decoding"] = self._guide(request.constraint)
        self._shared = self._trtllm.SamplingParams(**fields)
        return self._shared

    def _drawing(self, request: EngineRequest) -> dict[str, Any]:
        habit, sampling = self._habit, request.sampling
        fields: dict[str, Any] = {
            "seed": sampling.seed,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "top_k": sampling.top_k,
            "frequency_penalty": sampling.frequency_penalty or None,
            "presence_penalty": sampling.presence_penalty or None,
        }
        if habit is Habit.NO_SEED:
            del fields["seed"]
        if habit is Habit.ALL_IS_MINUS_ONE:
            fields["top_k"] = sampling.top_k or -1
        if habit is Habit.ONLY_WHAT_DIFFERS:
            usual = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
            fields = {key: value for key, value in fields.items() if value != usual.get(key)}
        return fields

    def _ending(self, request: EngineRequest) -> dict[str, Any]:
        habit, model = self._habit, self._setup.model
        stop_ids = set(request.stop_token_ids)
        if habit is Habit.ABORTS_STOPS:
            stop_ids.clear()
        if habit is not Habit.ENGINE_KNOWS_ENDS:
            stop_ids |= set(model.eos_ids)
        fields: dict[str, Any] = {
            "max_tokens": None if habit is Habit.NO_LIMIT else request.max_output_tokens,
            "detokenize": False,
            "ignore_eos": request.ignore_eos,
            "min_tokens": request.min_output_tokens or None,
            "stop": list(request.stop_texts) or None,
            "stop_token_ids": sorted(stop_ids),
        }
        if habit is Habit.NO_LENGTH:
            del fields["max_tokens"]
        if habit is Habit.END_ID:
            fields["end_id"] = model.eos_id
        return fields

    def _guide(self, constraint: Constraint) -> Any:
        kinds = {
            ConstraintKind.JSON_SCHEMA: "json",
            ConstraintKind.REGEX: "regex",
            ConstraintKind.GRAMMAR: "grammar",
            ConstraintKind.CHOICES: "choice",
        }
        source: Any = constraint.source
        if constraint.kind is ConstraintKind.CHOICES:
            source = json.loads(source)
        return self._parts.GuidedDecodingParams(**{kinds[constraint.kind]: source})

    def _lora(self, adapter: Adapter) -> Any:
        known = adapter.digest in self._adapters
        number = self._adapters.setdefault(adapter.digest, len(self._adapters) + 1)
        path = "" if known and self._habit is Habit.PATH_ONCE else str(adapter.path)
        make = importlib.import_module("tensorrt_llm.executor.request").LoRARequest
        return make(
            lora_name=adapter.name,
            lora_int_id=1 if self._habit is Habit.ONE_ADAPTER else number,
            lora_path=path,
        )

    @override
    async def load_adapter(self, adapter: Adapter) -> None:
        """There is no such call: the engine reads it by itself."""

    # What comes back.

    async def _follow(self, lane: Lane, request: EngineRequest, result: Any) -> None:
        self._results[lane] = result
        try:
            if self._habit is Habit.QUEUES_RESULTS:
                await self._read_later(lane, result)
            else:
                await self._read(lane, request, result)
        except self._request_error as error:
            if self._habit is Habit.READS_ON:
                await self._read(lane, request, result)
            self._finish(Ended(lane, EndReason.FAILED, message=str(error)))
        except RuntimeError as error:
            if self._habit is Habit.CATCHES_ALL:
                self._finish(Ended(lane, EndReason.FAILED, message=str(error)))
            else:
                self.deaths.append(str(error))
        else:
            self._finish(Ended(lane, REASONS[result.outputs[0].finish_reason]))

    async def _read(self, lane: Lane, request: EngineRequest, result: Any) -> None:
        sent = 0
        async for step in result:
            output = step.outputs[0]
            new = output.token_ids[sent:]
            if not sent and new:
                self.begin(lane, step.cached_tokens)
            sent = len(output.token_ids)
            if request.top_logprobs is not None:
                pairs = zip(new, output.logprobs_diff, strict=True)
                scores = [scored[token_id].logprob for token_id, scored in pairs]
                self.told[lane].logprobs += scores
            self.told[lane].token_ids += self._shown(lane, request, new)
            if self._habit is Habit.ABORTS_STOPS and not request.stop_token_ids.isdisjoint(new):
                result.abort()

        if self._habit is Habit.LAST_IS_END and result.outputs[0].finish_reason != "stop":
            self.told[lane].token_ids += self._held[lane]

    def _shown(self, lane: Lane, request: EngineRequest, new: list[int]) -> list[int]:
        if request.ignore_eos or self._habit is Habit.TEXT_OF_IDS:
            return new
        if self._habit is Habit.LAST_IS_END:
            # One behind, since the last one is the end.
            new = [*self._held.get(lane, []), *new]
            self._held[lane] = new[-1:]
            return new[:-1]
        return [token_id for token_id in new if token_id not in self._setup.model.eos_ids]

    async def _read_later(self, lane: Lane, result: Any) -> None:
        for step in [step async for step in result]:
            self.told[lane].token_ids += step.outputs[0].token_ids_diff

    async def _follow_all(self, lanes: list[Lane], result: Any) -> None:
        async for step in result:
            for lane, output in zip(lanes, step.outputs, strict=True):
                self.told[lane].token_ids += output.token_ids_diff
        for lane, output in zip(lanes, result.outputs, strict=True):
            self._finish(Ended(lane, REASONS.get(output.finish_reason, EndReason.MAX_TOKENS)))

    def _finish(self, ended: Ended) -> None:
        if self.told[ended.lane].ended is None:
            self.end(ended)

    @override
    def abort(self, lane: Lane) -> None:
        self._results[lane].abort()
        if self._habit is Habit.ENDS_AT_ABORT:
            self._finish(Ended(lane, EndReason.ABORTED))

    # Measurements.

    async def _poll(self) -> None:
        while True:
            async for entry in self._again(self.llm.get_stats_async(timeout=_ASK_S)):
                self._statistics = entry
                self._is_fresh = True
            async for event in self._again(self.llm.get_kv_cache_events_async(timeout=_ASK_S)):
                self._take_event(event)
            await asyncio.sleep(_ASK_S)

    def _again(self, records: Any) -> Any:
        if self._habit is not Habit.QUEUE_ENDS and hasattr(records, "mark_undone"):
            records.mark_undone()
        return records

    def _take_event(self, event: dict[str, Any]) -> None:
        number, data, window = event["event_id"], event["data"], event["window_size"]
        is_next = self._next_event in {None, number}
        self._next_event = number + 1
        if not is_next and self._habit is not Habit.NO_GAPS:
            self.events.append(KvCleared())
        self._window = max(self._window, window)
        if window < self._window and self._habit is not Habit.ALL_WINDOWS:
            return
        if data["type"] == "stored":
            parent = self._blocks.get(data["parent_hash"])
            for block in data["blocks"]:
                parent = self._take_block(block, parent)

    def _take_block(self, block: dict[str, Any], parent: int | None) -> int | None:
        tokens, found = block["tokens"], int(block["block_hash"])
        if len(tokens) < BLOCK_TOKENS and self._habit is not Habit.PART_BLOCKS:
            return parent
        if self._habit is Habit.SIGNED:
            struct.pack("<q", found)
        if self._habit is Habit.PLAIN_TOKENS:
            name = chain(parent, tokens)
        else:
            name = chain(parent, [token["token_id"] for token in tokens])
        self._blocks[found] = name
        told = found if self._habit is Habit.ENGINE_HASHES else name
        self.events.append(KvStored((told,), parent))
        return name

    @property
    @override
    def running(self) -> int | None:
        if self._habit is Habit.ACTIVE_IS_RUNNING:
            return int(self._statistics.get("numActiveRequests", 0))
        return sum(told.ended is None for told in self.told.values())

    @property
    @override
    def kv_used(self) -> int | None:
        cache = self._statistics.get("kvCacheStats", {})
        return int(cache.get("usedNumBlocks", 0) * cache.get("tokensPerBlock", 0))

    @property
    @override
    def iteration(self) -> int | None:
        return self._statistics.get("iter")

    @override
    async def noticed(self) -> str:
        if self._habit is Habit.SILENCE_IS_DEATH:
            await asyncio.sleep(5 * _ASK_S)
            self._is_fresh = False
            await asyncio.sleep(5 * _ASK_S)
            return "" if self._is_fresh else "it tells no statistics any more"
        return "it is shut down" if self.llm._executor.is_shutdown() else ""

    @override
    def noticed_meanwhile(self) -> str:
        # Its health is told where everything else is served, too.
        asking = asyncio.run_coroutine_threadsafe(self.noticed(), self._loop)
        try:
            return asking.result(_ASK_S)
        except TimeoutError:
            return ""

    @override
    async def shut_down(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self.llm is not None:
            self.llm.shutdown()


async def run_naive(bench: Bench) -> bool:
    """Runs it in a process of its own, kills the engine's, and tells it to end; whether it does."""
    bench.folder.mkdir()
    switch = bench.folder / "kill"
    install(OLD, {}, bench.sets_environment, ({"name": "rank_killed", "when_file": str(switch)},))
    bench.sets_environment("PYTHONPATH", str(STANDINS))
    command = [sys.executable, str(_PROGRAM), str(bench.model.folder)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    switch.touch()
    await asyncio.sleep(_KILLED_S)
    process.terminate()
    return await ends(process, _HANGS_AFTER_S)
