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

from services.worker.engine.base import Adapter, AdapterUnusable, EngineStartError
from services.worker.engine.gguf import Description, NotGgufError, describe
from services.worker.engine.llamacpp_adapter_file import check_adapter_file
from services.worker.engine.llamacpp_api import (
    ATTRIBUTE_CONTROL,
    ATTRIBUTE_UNKNOWN,
    FLASH_ATTENTION_ON,
    GGML_TYPES,
    POOLING_NONE,
    ContextParameters,
    Handle,
    Llama,
    open_library,
    read_piece,
)
from services.worker.engine.llamacpp_columns import Columns
from services.worker.engine.llamacpp_decoder import SCORED_ROWS_MAX, DecodeFailedError

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
    """The Decoder and the AdapterLoader of the batch in flight, over a loaded GGUF file.

    Loads for as long as it takes and releases the GIL meanwhile. Never freed: its process ends.

    Args:
        settings: what to load.

    Attributes:
        context_length: tokens of each sequence.
        vocabulary_size: length of a row of logits.
        is_deterministic: see _probe.
        keeps_prefixes: the end of a sequence can be dropped; a recurrent memory cannot do that.
        embedding_dimensions: numbers of a hidden state.

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
        self._settings = settings
        self._rows = settings.capacity + settings.prefill_tokens
        self._context = self._make_context(settings)
        memory = self._llama.get_memory(self._context)
        if memory is None:
            raise EngineStartError(f"{settings.path.name} is not a model that generates text")
        self._memory = memory
        vocabulary = self._llama.model_get_vocab(self._model)
        self._vocabulary = vocabulary
        self.vocabulary_size = self._llama.vocab_n_tokens(vocabulary)
        self.embedding_dimensions = self._llama.model_n_embd(self._model)
        self.is_end = np.array(
            [
                self._llama.vocab_is_eog(vocabulary, token_id)
                for token_id in range(self.vocabulary_size)
            ]
        )
        self._logits_address: Handle | None = None
        self._logits = np.zeros((0, self.vocabulary_size), np.float32)
        self._capacity = settings.capacity
        self._columns = Columns(self._rows)
        self.tokens, self.positions = self._columns.tokens, self._columns.positions
        self.slots, self.wanted = self._columns.slots, self._columns.wanted
        self._adapter: Handle | None = None
        self._description: Description | None = None
        self.keeps_prefixes = True
        self.is_deterministic = self._probe() and settings.kv_dtype_k == _EXACT_KV_DTYPE_K

    def decode(self, rows: int) -> Logits:
        """Computes the first rows of the columns; see llamacpp_inflight.Decoder.

        Returns:
            float32, shape (wanted rows, vocabulary); the library's own memory.
        """
        decode_rows(self._llama, self._context, self._columns, rows)
        return self._view_logits(int(np.count_nonzero(self.wanted[:rows])))

    def forget(self, slot: int, start: int) -> bool:
        """Drops the tokens of a slot from a position on; see llamacpp_inflight.Decoder."""
        return self._llama.memory_seq_rm(self._memory, slot, start or -1, -1)

    def copy(self, source: int, target: int) -> None:
        """Copies all tokens of a slot into an empty one; see llamacpp_decoder.Decoder."""
        self._llama.memory_seq_cp(self._memory, source, target, -1, -1)

    def use_adapter(self, handle: int | None) -> None:
        """Has the next calls of decode apply an adapter; see llamacpp_decoder.Decoder.

        A change costs about a millisecond: the library plans its computation anew.
        """
        if handle == self._adapter:
            return
        handles, weights = (ctypes.c_void_p * 1)(handle), (ctypes.c_float * 1)(1.0)
        count = 0 if handle is None else 1
        code = self._llama.set_adapters(
            self._context, ctypes.addressof(handles), count, ctypes.addressof(weights)
        )
        if code != 0:
            raise DecodeFailedError(f"llama.cpp cannot apply an adapter: {code}")
        self._adapter = handle

    def check_adapter(self, adapter: Adapter) -> None:
        """Compares an adapter's file with the model; see llamacpp_adapters.AdapterLoader."""
        if adapter.path is None:
            raise AdapterUnusable(f"{adapter.name} has no file")
        if self._description is None:
            try:
                self._description = describe(self._settings.path)
            except NotGgufError as error:
                raise AdapterUnusable(f"the model's file takes no adapters: {error}") from error
        check_adapter_file(adapter.path, self._description)

    def load_adapter(self, adapter: Adapter) -> int:
        """Loads an adapter that was checked; see llamacpp_adapters.AdapterLoader."""
        handle = self._llama.adapter_init(self._model, str(adapter.path).encode())
        if handle is None:
            # Of its words some name the file, which is no tenant's business.
            self._llama.take_errors()
            raise AdapterUnusable(f"llama.cpp cannot load {adapter.name} for this model")
        return handle

    def free_adapter(self, handle: int) -> None:
        """Frees an adapter; see llamacpp_adapters.AdapterLoader."""
        if handle == self._adapter:
            # Else another one at the same address would count as the same.
            self.use_adapter(None)
        self._llama.adapter_free(handle)

    def pieces(self) -> tuple[list[bytes], list[int]]:
        """The bytes of each token, and the ids of those that are no text."""
        llama, vocabulary = self._llama, self._vocabulary
        no_text = ATTRIBUTE_CONTROL | ATTRIBUTE_UNKNOWN
        pieces = [read_piece(llama, vocabulary, token) for token in range(self.vocabulary_size)]
        specials = [
            token
            for token, piece in enumerate(pieces)
            if not piece or llama.vocab_get_attr(vocabulary, token) & no_text
        ]
        return pieces, specials

    def make_state_context(self, slots: int, rows: int) -> Handle | None:
        """Makes a second context over the same weights, which gives hidden states.

        Args:
            slots: sequences.
            rows: most of them in a step.

        Returns:
            its handle; None when there is no memory for it.
        """
        parameters = self._parameters(slots, rows, outputs=rows)
        parameters.embeddings = True
        parameters.pooling_type = POOLING_NONE
        return self._llama.init_from_model(self._model, parameters)

    def _view_logits(self, count: int) -> Logits:
        if count == 0:
            return self._logits[:0]
        address = self._llama.get_logits(self._context)
        if address is None:
            raise DecodeFailedError("llama.cpp computed no logits")
        if address != self._logits_address or count > len(self._logits):
            # The library moves the buffer when it grows. Making a view costs more than a look.
            rows = max(count, self._capacity)
            self._logits = view_floats(address, rows, self.vocabulary_size)
            self._logits_address = address
        return self._logits[:count]

    def _parameters(self, slots: int, rows: int, *, outputs: int) -> ContextParameters:
        parameters = self._llama.context_default_params()
        parameters.n_ctx = self.context_length * slots
        parameters.n_batch = rows
        parameters.n_ubatch = min(rows, _UBATCH_MAX)
        parameters.n_seq_max = slots
        # More outputs than this abort the process.
        parameters.n_outputs_max = outputs
        parameters.n_threads = parameters.n_threads_batch = self._settings.threads
        # One sequence in each of the cache's streams: a unified cache costs 2 to 4 times the
        # time at 64 sequences.
        parameters.kv_unified = False
        parameters.flash_attn_type = FLASH_ATTENTION_ON
        parameters.type_k = GGML_TYPES[self._settings.kv_dtype_k]
        parameters.type_v = GGML_TYPES[self._settings.kv_dtype_v]
        return parameters

    def _make_context(self, settings: ModelSettings) -> Handle:
        llama = self._llama
        outputs = settings.capacity + SCORED_ROWS_MAX
        parameters = self._parameters(settings.capacity, self._rows, outputs=outputs)
        context = llama.init_from_model(self._model, parameters)
        if context is None:
            raise EngineStartError(
                f"no KV cache of {settings.capacity} x {self.context_length} tokens "
                f"({settings.kv_dtype_k} keys, {settings.kv_dtype_v} values) can be made for "
                f"{settings.path.name}: {llama.take_errors() or 'out of memory?'}; "
                "a smaller capacity or context, or f16 keys and values, may do"
            )
        return context

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
                is_exact = self.keeps_prefixes = False
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


def decode_rows(llama: Llama, context: Handle, columns: Columns, rows: int) -> None:
    """Computes the first rows of some columns.

    Raises:
        DecodeFailedError: the KV cache may hold part of the rows.
    """
    columns.batch.n_tokens = rows
    code = llama.decode(context, columns.batch)
    if code != 0:
        # The library names token ids in some of its errors; they must not get into a log.
        reason = re.sub(r"\d+", "#", llama.take_errors()) or "no reason given"
        raise DecodeFailedError(f"llama_decode answered {code}: {reason}")


def view_floats(address: Handle, rows: int, columns: int) -> Logits:
    """The library's memory as a matrix that can be written, without a copy."""
    floats = ctypes.c_float * (rows * columns)
    memory = memoryview(floats.from_address(address))
    return np.frombuffer(memory, np.float32).reshape(rows, columns)


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
