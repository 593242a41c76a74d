"""A GGUF model loaded for decoding through llama.cpp: weights, KV cache and batch columns.

Everything here has to happen on one thread: loading on one and decoding on another gives the
process two OpenMP pools, and then libgomp no longer spins, up to 3.5 times slower. For the same
reason a process loads one model.

Never: schedules or samples.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from services.worker.engine.base import EngineStartError
from services.worker.engine.llamacpp_api import (
    FLASH_ATTENTION_ON,
    GGML_TYPES,
    Batch,
    Handle,
    Llama,
    open_library,
)
from services.worker.engine.llamacpp_inflight import DecodeFailedError

Logits = npt.NDArray[np.float32]

CONTEXT_LENGTH_DEFAULT_MAX: Final = 8192
"""Most context taken from a model's trained length when none was asked for: the KV cache is
allocated whole at start, and 128 thousand tokens for each slot would be tens of gigabytes."""

_CAPACITY_MAX: Final = 256  # LLAMA_MAX_SEQ of this build.
_UBATCH_MAX: Final = 512
_GGUF_MAGIC: Final = b"GGUF"
_EXACT_KV_DTYPE_K: Final = "q8_0"
_PROBE_TOKENS: Final = 8
_PROBE_TOKENS_APART: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """What to load and how; see LlamaCppEngine.

    Attributes:
        path: of the GGUF file.
        capacity: sequences in the KV cache.
        context_length: tokens of each; None for the model's trained length, at most 8192.
        threads: that compute, the caller's included.
        kv_dtype_k: number type of the cached keys.
        kv_dtype_v: number type of the cached values.
        prefill_tokens: most prompt tokens in one step.
    """

    path: Path
    capacity: int
    context_length: int | None
    threads: int
    kv_dtype_k: str
    kv_dtype_v: str
    prefill_tokens: int


class LlamaModel:
    """The decoder of llamacpp_inflight.InflightBatch over a loaded GGUF file.

    Loads for as long as it takes and releases the GIL meanwhile. Never freed: its process ends.

    Args:
        settings: what to load.

    Attributes:
        context_length: tokens of each sequence.
        vocabulary_size: length of a row of logits.
        is_deterministic: see _probe.

    Raises:
        EngineStartError: the file or the settings do not do.
    """

    def __init__(self, settings: ModelSettings) -> None:
        _check_settings(settings)
        _check_file(settings.path)
        self._llama = open_library()
        self._model = _load(self._llama, settings.path)
        self.context_length = _choose_context_length(
            settings.context_length, self._llama.model_n_ctx_train(self._model)
        )
        self._rows = settings.capacity + settings.prefill_tokens
        self._context = self._make_context(settings)
        memory = self._llama.get_memory(self._context)
        if memory is None:
            raise EngineStartError(f"{settings.path.name} is not a model that generates text")
        self._memory = memory
        vocabulary = self._llama.model_get_vocab(self._model)
        self.vocabulary_size = self._llama.vocab_n_tokens(vocabulary)
        self.is_end = np.array(
            [
                self._llama.vocab_is_eog(vocabulary, token_id)
                for token_id in range(self.vocabulary_size)
            ]
        )
        self._logits_address: Handle | None = None
        self._logits = np.zeros((0, self.vocabulary_size), np.float32)
        self._capacity = settings.capacity
        self._make_columns()
        self.is_deterministic = self._probe() and settings.kv_dtype_k == _EXACT_KV_DTYPE_K

    def decode(self, rows: int) -> Logits:
        """Computes the first rows of the columns; see llamacpp_inflight.Decoder.

        Returns:
            float32, shape (wanted rows, vocabulary); the library's own memory.
        """
        self._batch.n_tokens = rows
        code = self._llama.decode(self._context, self._batch)
        if code != 0:
            # The library names token ids in some of its errors; they must not get into a log.
            reason = re.sub(r"\d+", "#", self._llama.take_errors()) or "no reason given"
            raise DecodeFailedError(f"llama_decode answered {code}: {reason}")
        return self._view_logits(int(np.count_nonzero(self.wanted[:rows])))

    def forget(self, slot: int, start: int) -> bool:
        """Drops the tokens of a slot from a position on; see llamacpp_inflight.Decoder."""
        return self._llama.memory_seq_rm(self._memory, slot, start or -1, -1)

    def _view_logits(self, count: int) -> Logits:
        if count == 0:
            return self._logits[:0]
        address = self._llama.get_logits(self._context)
        if address is None:
            raise DecodeFailedError("llama.cpp computed no logits")
        if address != self._logits_address:
            # The library moves the buffer when it grows. Making a view costs more than a look.
            floats = ctypes.c_float * (self._capacity * self.vocabulary_size)
            memory = memoryview(floats.from_address(address))
            self._logits = np.frombuffer(memory, np.float32).reshape(
                self._capacity, self.vocabulary_size
            )
            self._logits_address = address
        return self._logits[:count]

    def _make_context(self, settings: ModelSettings) -> Handle:
        llama = self._llama
        parameters = llama.context_default_params()
        parameters.n_ctx = self.context_length * settings.capacity
        parameters.n_batch = self._rows
        parameters.n_ubatch = min(self._rows, _UBATCH_MAX)
        parameters.n_seq_max = settings.capacity
        parameters.n_outputs_max = settings.capacity
        parameters.n_threads = parameters.n_threads_batch = settings.threads
        # One sequence in each of the cache's streams: a unified cache costs 2 to 4 times the
        # time at 64 sequences.
        parameters.kv_unified = False
        parameters.flash_attn_type = FLASH_ATTENTION_ON
        parameters.type_k = GGML_TYPES[settings.kv_dtype_k]
        parameters.type_v = GGML_TYPES[settings.kv_dtype_v]
        context = llama.init_from_model(self._model, parameters)
        if context is None:
            raise EngineStartError(
                f"no KV cache of {settings.capacity} x {self.context_length} tokens "
                f"({settings.kv_dtype_k} keys, {settings.kv_dtype_v} values) can be made for "
                f"{settings.path.name}: {llama.take_errors() or 'out of memory?'}; "
                "a smaller capacity or context, or f16 keys and values, may do"
            )
        return context

    def _make_columns(self) -> None:
        self.tokens = np.zeros(self._rows, np.int32)
        self.positions = np.zeros(self._rows, np.int32)
        self.slots = np.zeros(self._rows, np.int32)
        self.wanted = np.zeros(self._rows, np.int8)
        # Every row is in one sequence, whose id is the row's entry in slots.
        self._sequence_counts = np.ones(self._rows, np.int32)
        self._sequence_addresses = self.slots.ctypes.data + self.slots.itemsize * np.arange(
            self._rows, dtype=np.uintp
        )
        self._batch = Batch(
            n_tokens=0,
            token=self.tokens.ctypes.data,
            embd=None,
            pos=self.positions.ctypes.data,
            n_seq_id=self._sequence_counts.ctypes.data,
            seq_id=self._sequence_addresses.ctypes.data,
            logits=self.wanted.ctypes.data,
        )

    def _probe(self) -> bool:
        """Warms up, and measures whether the company in a batch changes a lane's logits.

        Computes a sequence in one piece, and its last tokens also alone and beside 1 to 3 others,
        and compares the bits: some ten passes over the weights. Their number type decides: with
        Q8_0 and Q4_0 every row is computed alike wherever it stands, while F16, F32 and the K types
        take other kernels for one row than for several.

        A short sequence cannot show what attention does, but that is known: with keys and values
        in f16 or f32 llama.cpp splits long sequences by the shape of the batch; with quantised
        keys it has a single way.
        """
        count = min(_PROBE_TOKENS, self.context_length, self._rows)
        ids = (np.arange(1, count + 1) * 7919 % self.vocabulary_size).tolist()
        rows = [(token_id, position, 0) for position, token_id in enumerate(ids)]
        whole = self._decode_rows(rows)
        start = max(count - _PROBE_TOKENS_APART, 0)
        is_exact = True
        for others in range(min(self._capacity, 4)):
            company = [(ids[0], 0, slot) for slot in range(1, others + 1)]
            if not self.forget(0, start):
                is_exact = False
                break
            pieces = whole
            for row in rows[start:]:
                pieces = self._decode_rows([row, *company])
                for _, _, slot in company:
                    self.forget(slot, 0)
            is_exact = is_exact and pieces.tobytes() == whole.tobytes()
        self.forget(0, 0)
        return is_exact

    def _decode_rows(self, rows: Sequence[tuple[int, int, int]]) -> Logits:
        """Computes (token, position, slot) rows; the logits of slot 0's last row, copied."""
        count = len(rows)
        columns = np.array(rows, np.int32)
        self.tokens[:count], self.positions[:count], self.slots[:count] = columns.T
        self.wanted[:count] = 0
        self.wanted[np.flatnonzero(columns[:, 2] == 0)[-1]] = 1
        try:
            return self.decode(count).copy()
        except DecodeFailedError as error:
            raise EngineStartError(f"the model cannot be computed: {error}") from error


def _check_settings(settings: ModelSettings) -> None:
    if not 1 <= settings.capacity <= _CAPACITY_MAX:
        raise EngineStartError(f"capacity is {settings.capacity}, not 1 to {_CAPACITY_MAX}")
    if settings.threads < 1:
        raise EngineStartError(f"threads is {settings.threads}, not at least 1")
    if settings.prefill_tokens < 1:
        raise EngineStartError(f"prefill_tokens is {settings.prefill_tokens}, not at least 1")
    for dtype in (settings.kv_dtype_k, settings.kv_dtype_v):
        if dtype not in GGML_TYPES:
            raise EngineStartError(f"KV type {dtype!r} is none of {', '.join(GGML_TYPES)}")


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
    except OSError as error:
        raise EngineStartError(f"the model file cannot be read: {error}") from error
    if magic != _GGUF_MAGIC:
        raise EngineStartError(f"{path} is not a GGUF file: convert the model to GGUF first")


def _load(llama: Llama, path: Path) -> Handle:
    parameters = llama.model_default_params()
    parameters.n_gpu_layers = 0
    model = llama.model_load_from_file(str(path).encode(), parameters)
    if model is None:
        raise EngineStartError(
            f"llama.cpp cannot load {path}: {llama.take_errors() or 'no reason given'}"
        )
    if llama.model_has_encoder(model) or not llama.model_has_decoder(model):
        raise EngineStartError(f"{path.name} is not a decoder-only model")
    return model


def _choose_context_length(asked: int | None, trained: int) -> int:
    if asked is None:
        return min(trained, CONTEXT_LENGTH_DEFAULT_MAX)
    if not 1 <= asked <= trained:
        raise EngineStartError(
            f"context_length is {asked}; the model was trained for 1 to {trained} tokens"
        )
    return asked
