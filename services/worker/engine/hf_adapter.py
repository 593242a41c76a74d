"""Whether a LoRA adapter in PEFT's form fits a model, before the engine sees it.

An engine believes what it reads: a tensor that it does not expect may end the engine and all that
it runs, and what it does not know in adapter_config.json it leaves out, so that the adapter works,
but not as it was trained. So all that can be known from the two files and the model's own is
checked here, and what an engine would quietly do otherwise is refused:

    adapter_config.json            what PEFT was asked for
    adapter_model.safetensors      base_model.model.<matrix of the model>.lora_{A,B}.weight

Only layers of the part that writes text may be changed, and only matrices of attention and of dense
projections: not the embedding, nor single experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.worker.engine.base import AdapterUnusable
from services.worker.engine.hf_digest import digest_of_files
from services.worker.engine.hf_files import (
    HfFileError,
    find_file,
    int_in,
    require_file,
    require_json,
    text_in,
)
from services.worker.engine.hf_model import HfModel
from services.worker.engine.hf_safetensors import Tensor, read_tensors
from services.worker.engine.hf_weights import matrix_name

if TYPE_CHECKING:
    # The engine's own Python has no libs.
    from libs.chat_rules import JsonObject, JsonValue

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
MODULES: Final = frozenset(
    {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "gate_up_proj",
    }
)
"""Matrices that engines can adapt, as Hugging Face names them."""

_PICKLES: Final = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_CONFIG_BYTES_MAX: Final = 1 << 20
_TENSOR: Final = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_TYPES: Final = frozenset({"F32", "F16", "BF16"})
_MATRIX: Final = 2
_NAME_CHARACTERS_MAX: Final = 200
_ALPHA_MAX: Final = 1e6
_READS_HIDDEN: Final = frozenset(
    {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate_up_proj"}
)
_WRITES_HIDDEN: Final = frozenset({"o_proj", "down_proj"})
# What no engine does that is asked to apply a LoRA; each is off where it is missing, null or empty.
_UNSUPPORTED: Final = (
    "modules_to_save",
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
# They have changed the model's own weights too.
_CHANGING_STARTS: Final = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """What the engine was started for.

    Attributes:
        max_rank: highest rank of an adapter.
        target_modules: matrices that may be adapted, of MODULES.
    """

    max_rank: int
    target_modules: frozenset[str] = MODULES


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedAdapter:
    """An adapter that fits its model.

    Attributes:
        directory: where it is.
        rank: the highest of its matrices.
        modules: matrices that it changes.
        weight_bytes: of its file of weights.
    """

    directory: Path
    rank: int
    modules: frozenset[str]
    weight_bytes: int


def check_adapter(directory: Path, model: HfModel, limits: AdapterLimits) -> CheckedAdapter:
    """Compares an adapter with the model that it should fit. Reads no weights.

    Raises:
        AdapterUnusable: it cannot be used, and why. Names no path.
    """
    try:
        for name in _PICKLES:
            if find_file(directory, name) is not None:
                raise AdapterUnusable(f"{name} may run code when it is loaded: remove it")
        config = require_json(directory, CONFIG_FILE, _CONFIG_BYTES_MAX)
        path = require_file(directory, WEIGHTS_FILE)
        tensors = read_tensors(path, WEIGHTS_FILE)
        size = path.stat().st_size
    except HfFileError as error:
        raise AdapterUnusable(f"it is no LoRA adapter in PEFT's form: {error}") from None
    rank = _check_config(config, limits)
    pairs = _pairs_of(tensors, model, limits)
    ranks = {_check_pair(name, pair, model, limits.max_rank) for name, pair in pairs.items()}
    # Where the configuration has ranks by name, the tensors say which is whose.
    if ranks != {rank} and not config.get("rank_pattern"):
        raise AdapterUnusable(f"its weights have another rank than {rank}, its configuration's")
    return CheckedAdapter(
        directory=directory,
        rank=max(ranks),
        modules=frozenset(map(_module_of, pairs)),
        weight_bytes=size,
    )


def adapter_digest(directory: Path) -> str:
    """Returns "sha256:<hex>" of an adapter's two files; see hf_digest.py. Reads all of them.

    Raises:
        AdapterUnusable: one is missing, or cannot be read.
    """
    try:
        return digest_of_files(directory, (CONFIG_FILE, WEIGHTS_FILE), lambda _: None)
    except HfFileError as error:
        raise AdapterUnusable(f"it is no LoRA adapter in PEFT's form: {error}") from None


def _check_config(config: JsonObject, limits: AdapterLimits) -> int:
    """Checks what PEFT was asked for; returns the rank."""
    kind = text_in(config.get("peft_type"))
    if kind != "LORA":
        raise AdapterUnusable(f"its peft_type is {_cut(kind)!r}, and only LORA is supported")
    rank = int_in(config.get("r"))
    if rank is None or not 1 <= rank <= limits.max_rank:
        raise AdapterUnusable(f"its rank r is not within 1..{limits.max_rank}")
    for name in _UNSUPPORTED:
        if config.get(name):
            raise AdapterUnusable(f"its {name} is not supported")
    if config.get("bias") not in (None, "none"):
        raise AdapterUnusable("its bias is not 'none', and others are not supported")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGING_STARTS):
        raise AdapterUnusable(
            f"it was begun with {_cut(start)!r}, which changes the model too: convert it to a "
            "plain LoRA"
        )
    if not _is_positive(config.get("lora_alpha")):
        raise AdapterUnusable("its lora_alpha is no positive number")
    _check_targets(config.get("target_modules"), limits)
    return rank


def _is_positive(value: JsonValue | None) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _ALPHA_MAX


def _check_targets(value: JsonValue | None, limits: AdapterLimits) -> None:
    # A text is a pattern: the tensors say what it has found.
    for target in value if isinstance(value, list) else []:
        module = text_in(target).rpartition(".")[2]
        if module not in limits.target_modules:
            raise _foreign(module, limits)


def _foreign(module: str, limits: AdapterLimits) -> AdapterUnusable:
    allowed = ", ".join(sorted(limits.target_modules))
    return AdapterUnusable(f"it changes {_cut(module)!r}; here it may change {allowed}")


def _pairs_of(
    tensors: Mapping[str, Tensor], model: HfModel, limits: AdapterLimits
) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors A and B of each matrix that the adapter changes; at least one matrix."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _TENSOR.fullmatch(name)
        matrix = matrix_name(f"{found[1]}.weight") if found is not None else None
        if found is None or matrix is None:
            raise AdapterUnusable(f"its tensor {_cut(name)!r} is no LoRA of a layer's matrix")
        if _module_of(matrix) not in limits.target_modules:
            raise _foreign(_module_of(matrix), limits)
        if matrix not in model.matrices:
            raise AdapterUnusable(f"the model has no {_cut(matrix)}")
        if tensor.dtype not in _TYPES or len(tensor.shape) != _MATRIX:
            raise AdapterUnusable(f"its tensor {_cut(name)!r} is no matrix in F32, F16 or BF16")
        pair = pairs.setdefault(matrix, {})
        if found[2] in pair:
            raise AdapterUnusable(f"it has two tensors for the same half of {matrix}")
        pair[found[2]] = tensor
    if not pairs:
        raise AdapterUnusable("it has no weights")
    return pairs


def _cut(name: str) -> str:
    return name[:_NAME_CHARACTERS_MAX]


def _module_of(matrix: str) -> str:
    return matrix.rpartition(".")[2]


def _check_pair(name: str, pair: Mapping[str, Tensor], model: HfModel, rank_max: int) -> int:
    """Compares a pair with the model's matrix; returns its rank."""
    if len(pair) != _MATRIX:
        raise AdapterUnusable(f"it has only half of {name}")
    (rank, inputs), (outputs, rank_of_b) = pair["A"].shape, pair["B"].shape
    if rank != rank_of_b or not 1 <= rank <= rank_max:
        raise AdapterUnusable(f"the rank of its {name} is not within 1..{rank_max}")
    known = model.matrices[name]
    if known is None:
        fits = _fits_hidden(_module_of(name), outputs, inputs, model.hidden_size)
    else:
        fits = known == (outputs, inputs)
    if not fits:
        raise AdapterUnusable(f"its {name} does not have the shape of the model's")
    return rank


def _fits_hidden(module: str, outputs: int, inputs: int, hidden_size: int) -> bool:
    """Compares what is known of a matrix that is packed: how it meets the rest of the model."""
    if module in _READS_HIDDEN:
        return inputs == hidden_size
    return module not in _WRITES_HIDDEN or outputs == hidden_size
