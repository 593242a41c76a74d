"""Habits that lead into the pitfalls of TensorRT-LLM."""

from __future__ import annotations

import enum


class Habit(enum.Enum):
    """What one gets used to, and what it looks like."""

    NONE = "none at all"
    # Loading.
    LOADS_IN_LOOP = "LLM(...) in a coroutine"
    LORA_DIR = "LoraConfig(lora_dir=[adapter])"
    NO_BACKEND = "LLM(...) without guided_decoding_backend"
    NO_STATISTICS = "LLM(...) without enable_iter_perf_stats"
    NO_EVENT_BUFFER = "KvCacheConfig() without event_buffer_max_size"
    NO_WARM_UP = "statistics from the start"
    UNSALTED_CANARY = "generate_async([1], max_tokens=1) as a health check"
    # The call.
    BY_PLACE = "generate_async(prompt, params, None, None, True)"
    NEWEST = "priority=..., as the newest documentation has it"
    SHARED_PARAMS = "one SamplingParams for all requests"
    NUMPY = "token ids in a numpy array"
    TEXT = "the prompt as text"
    LOOP_EACH = "asyncio.run for each request"
    CALL_IN_THREAD = "asyncio.to_thread(llm.generate_async, ...)"
    NO_SALT = "no cache_salt"
    # SamplingParams.
    NO_LENGTH = "max_tokens left out"
    NO_LIMIT = "max_tokens=None for as long as it fits"
    ONLY_WHAT_DIFFERS = "temperature and top_p only where they are not 1"
    NO_SEED = "seed left out"
    ALL_IS_MINUS_ONE = "top_k=-1 for all tokens"
    END_ID = "end_id=tokenizer.eos_token_id"
    ENGINE_KNOWS_ENDS = "the end left to the engine"
    # What comes back.
    TEXT_OF_IDS = "all token_ids, as they come"
    LAST_IS_END = "token_ids[:-1] after 'stop'"
    QUEUES_RESULTS = "queue.put(result), read later"
    N_OUTPUTS = "SamplingParams(n=n) and token_ids_diff"
    ABORTS_STOPS = "looks for stops itself, and aborts"
    # Ends.
    READS_ON = "while not result.finished: read, whatever was raised"
    CATCHES_ALL = "except Exception: this request has failed"
    ENDS_AT_ABORT = "abort() and done"
    # Measurements.
    QUEUE_ENDS = "async for entry in llm.get_stats_async(timeout)"
    ACTIVE_IS_RUNNING = "running = numActiveRequests of the last statistics"
    SILENCE_IS_DEATH = "no statistics: dead"
    ENGINE_HASHES = "block_hash for a name"
    SIGNED = "block_hash in 64 bits with a sign"
    PLAIN_TOKENS = "block['tokens'] for token ids"
    PART_BLOCKS = "every block, full or not"
    NO_GAPS = "event_id not looked at"
    ALL_WINDOWS = "window_size not looked at"
    # Adapters.
    ONE_ADAPTER = "lora_int_id=1"
    PATH_ONCE = "lora_path the first time only"
