"""The llama.h C interface inside the pinned xllamacpp wheel, seen through ctypes.

Structures and signatures are those of llama.cpp build 11549. Python code cannot see when a later
build changes them, so open_library() refuses any other version and then compares the library's own
default parameters with the ones known here (the canary): a field that moved shows at once.

Functions that take microseconds keep the GIL (PYFUNCTYPE): handing it over would cost more than
the call. Functions that load, compute or read long texts release it (CFUNCTYPE).

Never: schedules, samples, or keeps state beside the library handle.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from ctypes import CFUNCTYPE, PYFUNCTYPE
from ctypes import c_bool as boolean
from ctypes import c_char_p as text
from ctypes import c_float as f32
from ctypes import c_int32 as i32
from ctypes import c_size_t as size
from ctypes import c_uint32 as u32
from ctypes import c_void_p as pointer
from typing import Final

from services.worker.engine.base import EngineStartError

PACKAGE: Final = "xllamacpp"
VERSION: Final = "2026.10.11549"

Handle = int
"""Address of an object of the library; it owns what is behind."""

GGML_TYPES: Final = {"f32": 0, "f16": 1, "q8_0": 8}
"""Number types of the KV cache, by the names that llama.cpp's own options use."""

FLASH_ATTENTION_ON: Final = 1
POOLING_NONE: Final = 0
NO_TOKEN: Final = -1
"""What the vocabulary answers when it has no such special token."""

ATTRIBUTE_UNKNOWN: Final = 1 << 0
ATTRIBUTE_CONTROL: Final = 1 << 3
ATTRIBUTE_USER_DEFINED: Final = 1 << 4
ATTRIBUTE_STRIPS_LEFT: Final = 1 << 7
"""Bits of enum llama_token_attr."""


class ModelParameters(ctypes.Structure):
    """struct llama_model_params."""

    _fields_ = (
        ("devices", pointer),
        ("tensor_buft_overrides", pointer),
        ("n_gpu_layers", i32),
        ("split_mode", i32),
        ("load_mode", i32),
        ("lazy_mode", i32),
        ("main_gpu", i32),
        ("tensor_split", pointer),
        ("progress_callback", pointer),
        ("progress_callback_user_data", pointer),
        ("kv_overrides", pointer),
        ("vocab_only", boolean),
        ("check_tensors", boolean),
        ("use_extra_bufts", boolean),
        ("no_host", boolean),
        ("no_alloc", boolean),
        ("load_mtp", boolean),
    )


class ContextParameters(ctypes.Structure):
    """struct llama_context_params."""

    _fields_ = (
        ("n_ctx", u32),
        ("n_batch", u32),
        ("n_ubatch", u32),
        ("n_seq_max", u32),
        ("n_rs_seq", u32),
        ("n_outputs_max", u32),
        ("n_outputs_max_per_seq", u32),
        ("n_threads", i32),
        ("n_threads_batch", i32),
        ("ctx_type", i32),
        ("rope_scaling_type", i32),
        ("pooling_type", i32),
        ("attention_type", i32),
        ("flash_attn_type", i32),
        ("rope_freq_base", f32),
        ("rope_freq_scale", f32),
        ("yarn_ext_factor", f32),
        ("yarn_attn_factor", f32),
        ("yarn_beta_fast", f32),
        ("yarn_beta_slow", f32),
        ("yarn_orig_ctx", u32),
        ("defrag_thold", f32),
        ("cb_eval", pointer),
        ("cb_eval_user_data", pointer),
        ("type_k", i32),
        ("type_v", i32),
        ("moe_cache_size", size),
        ("abort_callback", pointer),
        ("abort_callback_data", pointer),
        ("embeddings", boolean),
        ("offload_kqv", boolean),
        ("no_perf", boolean),
        ("op_offload", boolean),
        ("swa_full", boolean),
        ("kv_unified", boolean),
        ("samplers", pointer),
        ("n_samplers", size),
        ("ctx_other", pointer),
    )


class Batch(ctypes.Structure):
    """struct llama_batch: columns by address; whoever fills it keeps the columns alive."""

    _fields_ = (
        ("n_tokens", i32),
        ("token", pointer),
        ("embd", pointer),
        ("pos", pointer),
        ("n_seq_id", pointer),
        ("seq_id", pointer),
        ("logits", pointer),
    )


_PIECE_BYTES_FIRST: Final = 256
_LOG_LEVEL_ERROR: Final = 4
_ERROR_LINES_MAX: Final = 4
_LogHook = CFUNCTYPE(None, i32, text, pointer)
_AbortHook = CFUNCTYPE(None, text)


class Llama:
    """The functions of one opened library. Handles go in and out as plain addresses.

    Args:
        library: the wheel's extension module, opened as a plain shared library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        # Loading and computing: the GIL is released.
        self.backend_init: Callable[[], None] = CFUNCTYPE(None)(("llama_backend_init", library))
        self.model_load_from_file: Callable[[bytes, ModelParameters], Handle | None] = CFUNCTYPE(
            pointer, text, ModelParameters
        )(("llama_model_load_from_file", library))
        self.init_from_model: Callable[[Handle, ContextParameters], Handle | None] = CFUNCTYPE(
            pointer, pointer, ContextParameters
        )(("llama_init_from_model", library))
        self.decode: Callable[[Handle, Batch], int] = CFUNCTYPE(i32, pointer, Batch)(
            ("llama_decode", library)
        )
        self.adapter_init: Callable[[Handle, bytes], Handle | None] = CFUNCTYPE(
            pointer, pointer, text
        )(("llama_adapter_lora_init", library))
        self.adapter_free: Callable[[Handle], None] = CFUNCTYPE(None, pointer)(
            ("llama_adapter_lora_free", library)
        )
        # The addresses of count adapters, and the weight of each.
        self.set_adapters: Callable[[Handle, Handle | None, int, Handle | None], int] = CFUNCTYPE(
            i32, pointer, pointer, size, pointer
        )(("llama_set_adapters_lora", library))
        self.memory_seq_cp: Callable[[Handle, int, int, int, int], None] = CFUNCTYPE(
            None, pointer, i32, i32, i32, i32
        )(("llama_memory_seq_cp", library))
        self.tokenize: Callable[[Handle, bytes, int, ctypes.Array[i32], int, bool, bool], int] = (
            CFUNCTYPE(i32, pointer, text, i32, pointer, i32, boolean, boolean)(
                ("llama_tokenize", library)
            )
        )
        self.free: Callable[[Handle], None] = CFUNCTYPE(None, pointer)(("llama_free", library))
        self.model_free: Callable[[Handle], None] = CFUNCTYPE(None, pointer)(
            ("llama_model_free", library)
        )

        self._log_set: Callable[[object, None], None] = CFUNCTYPE(None, _LogHook, pointer)(
            ("llama_log_set", library)
        )
        self._set_abort_callback: Callable[[object], Handle | None] = CFUNCTYPE(
            pointer, _AbortHook
        )(("ggml_set_abort_callback", library))
        self._hooks: list[object] = []
        self._errors: collections.deque[str] = collections.deque(maxlen=_ERROR_LINES_MAX)

        # Microseconds: the GIL is kept.
        self.model_default_params: Callable[[], ModelParameters] = PYFUNCTYPE(ModelParameters)(
            ("llama_model_default_params", library)
        )
        self.context_default_params: Callable[[], ContextParameters] = PYFUNCTYPE(
            ContextParameters
        )(("llama_context_default_params", library))
        self.model_get_vocab: Callable[[Handle], Handle] = PYFUNCTYPE(pointer, pointer)(
            ("llama_model_get_vocab", library)
        )
        self.model_n_ctx_train: Callable[[Handle], int] = PYFUNCTYPE(i32, pointer)(
            ("llama_model_n_ctx_train", library)
        )
        self.model_has_encoder: Callable[[Handle], bool] = PYFUNCTYPE(boolean, pointer)(
            ("llama_model_has_encoder", library)
        )
        self.model_has_decoder: Callable[[Handle], bool] = PYFUNCTYPE(boolean, pointer)(
            ("llama_model_has_decoder", library)
        )
        self.model_chat_template: Callable[[Handle, None], bytes | None] = PYFUNCTYPE(
            text, pointer, text
        )(("llama_model_chat_template", library))
        self.get_memory: Callable[[Handle], Handle | None] = PYFUNCTYPE(pointer, pointer)(
            ("llama_get_memory", library)
        )
        self.memory_seq_rm: Callable[[Handle, int, int, int], bool] = PYFUNCTYPE(
            boolean, pointer, i32, i32, i32
        )(("llama_memory_seq_rm", library))
        self.get_logits: Callable[[Handle], Handle | None] = PYFUNCTYPE(pointer, pointer)(
            ("llama_get_logits", library)
        )
        self.get_embeddings: Callable[[Handle], Handle | None] = PYFUNCTYPE(pointer, pointer)(
            ("llama_get_embeddings", library)
        )
        self.model_n_embd: Callable[[Handle], int] = PYFUNCTYPE(i32, pointer)(
            ("llama_model_n_embd_out", library)
        )
        self.vocab_n_tokens: Callable[[Handle], int] = PYFUNCTYPE(i32, pointer)(
            ("llama_vocab_n_tokens", library)
        )
        self.vocab_is_eog: Callable[[Handle, int], bool] = PYFUNCTYPE(boolean, pointer, i32)(
            ("llama_vocab_is_eog", library)
        )
        self.vocab_bos: Callable[[Handle], int] = PYFUNCTYPE(i32, pointer)(
            ("llama_vocab_bos", library)
        )
        self.vocab_eos: Callable[[Handle], int] = PYFUNCTYPE(i32, pointer)(
            ("llama_vocab_eos", library)
        )
        self.vocab_get_text: Callable[[Handle, int], bytes | None] = PYFUNCTYPE(text, pointer, i32)(
            ("llama_vocab_get_text", library)
        )
        self.vocab_get_attr: Callable[[Handle, int], int] = PYFUNCTYPE(i32, pointer, i32)(
            ("llama_vocab_get_attr", library)
        )
        self.vocab_get_add_bos: Callable[[Handle], bool] = PYFUNCTYPE(boolean, pointer)(
            ("llama_vocab_get_add_bos", library)
        )
        self.token_to_piece: Callable[
            [Handle, int, ctypes.Array[ctypes.c_char], int, int, bool], int
        ] = PYFUNCTYPE(i32, pointer, i32, pointer, i32, i32, boolean)(
            ("llama_token_to_piece", library)
        )

    def keep_log(self) -> None:
        """Keeps the library's last error lines for take_errors, and silences all others."""
        hook = _LogHook(self._keep_line)
        self._log_set(hook, None)
        self._hooks.append(hook)

    def take_errors(self) -> str:
        """The error lines that the library logged since the last call, as one line."""
        lines = [self._errors.popleft() for _ in range(len(self._errors))]
        return "; ".join(lines)

    def hook_abort(self, handle_message: Callable[[bytes], None]) -> None:
        """Calls a function with the reason when an assertion fails, right before abort()."""
        hook = _AbortHook(handle_message)
        self._set_abort_callback(hook)
        self._hooks.append(hook)

    def _keep_line(self, level: int, line: bytes, _user_data: None) -> None:
        # May run on any thread of the library. Continuation lines only carry progress dots.
        if level == _LOG_LEVEL_ERROR:
            self._errors.append(" ".join(line.decode("utf-8", "replace").split()))


@functools.cache
def open_library() -> Llama:
    """Opens the wheel's library once in a process, checks it and initialises its backend.

    Takes some tens of milliseconds the first time. May be called from any thread.

    Raises:
        EngineStartError: the wheel or a system library is missing, or it is another build.
    """
    path = _find_library()
    try:
        llama = Llama(ctypes.CDLL(path))
    except OSError as error:
        raise EngineStartError(explain_load_error(str(error))) from error
    except AttributeError as error:
        raise EngineStartError(f"{path} lacks a function of llama.h: {error}") from error
    check_layout(llama.model_default_params(), llama.context_default_params())
    llama.keep_log()
    llama.backend_init()
    return llama


def read_piece(
    llama: Llama, vocabulary: Handle, token_id: int, *, is_control_shown: bool = False
) -> bytes:
    """Bytes of one token of a vocabulary; empty for control tokens unless they are shown.

    Raises:
        EngineStartError: the token has no text.
    """
    buffer = ctypes.create_string_buffer(_PIECE_BYTES_FIRST)
    for _ in range(2):
        length = llama.token_to_piece(
            vocabulary, token_id, buffer, len(buffer), 0, is_control_shown
        )
        if length >= 0:
            return buffer.raw[:length]
        buffer = ctypes.create_string_buffer(-length)
    raise EngineStartError(f"token {token_id} of the vocabulary has no text")


def explain_load_error(error: str) -> str:
    """Turns the dynamic loader's words into what an operator has to do."""
    if "libgomp" in error:
        return (
            "libgomp is missing: install it with your system's package manager, "
            f"e.g. apt-get install libgomp1 ({error})"
        )
    return f"the library of {PACKAGE} {VERSION} cannot be loaded on this system: {error}"


def check_layout(model: ModelParameters, context: ContextParameters) -> None:
    """The canary: the library's defaults, read through our structures, are those we know.

    Raises:
        EngineStartError: a field has another value, so the layout is not that of this build.
    """
    known: tuple[tuple[ctypes.Structure, Mapping[str, float]], ...] = (
        (model, _MODEL_DEFAULTS),
        (context, _CONTEXT_DEFAULTS),
    )
    for parameters, defaults in known:
        for name, expected in defaults.items():
            found = getattr(parameters, name)
            if found != expected:
                raise EngineStartError(
                    f"the library of {PACKAGE} is not the build this engine was written for "
                    f"({name} is {found}, not {expected}): pip install {PACKAGE}=={VERSION}"
                )


def _find_library() -> str:
    """Path of the wheel's extension module, found without importing it: we need only its C side."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.submodule_search_locations is None:
        raise EngineStartError(f"{PACKAGE} is not installed: pip install {PACKAGE}=={VERSION}")
    installed = importlib.metadata.version(PACKAGE)
    if installed != VERSION:
        raise EngineStartError(
            f"{PACKAGE} {installed} is installed, this engine needs {VERSION}: "
            f"pip install {PACKAGE}=={VERSION}"
        )
    extension = importlib.machinery.PathFinder.find_spec(
        f"{PACKAGE}.{PACKAGE}", package.submodule_search_locations
    )
    if extension is None or extension.origin is None:
        raise EngineStartError(f"{PACKAGE} has no library for this Python: install it again")
    return extension.origin


_MODEL_DEFAULTS: Final[Mapping[str, float]] = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}
_CONTEXT_DEFAULTS: Final[Mapping[str, float]] = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "rope_freq_base": 0.0,
    "yarn_ext_factor": -1.0,
    "yarn_beta_slow": -1.0,
    "yarn_orig_ctx": 0,
    "defrag_thold": -1.0,
    "type_k": GGML_TYPES["f16"],
    "type_v": GGML_TYPES["f16"],
    "moe_cache_size": 0,
    "embeddings": False,
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
    "kv_unified": False,
    "n_samplers": 0,
}
