"""Whether a LoRA file fits a model, read from both files' descriptions before llama.cpp sees it.

llama.cpp refuses most of what does not fit, but what it does not foresee ends in an assertion, and
that ends the process and every lane in it. So all that can be known from the descriptions is
checked here first: kind, architecture, pairs, names, shapes, number types, and places in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from services.worker.engine.base import AdapterUnusable
from services.worker.engine.gguf import Description, NotGgufError, Tensor, describe

# Values in a block, bytes of a block, of the number types that adapters are made of.
_TYPES: Final = {0: (1, 4), 1: (1, 2), 8: (32, 34), 30: (1, 2)}
_RANK_MAX: Final = 4096
_PARTS: Final = (".lora_a", ".lora_b")
_INVOCATION: Final = "adapter.alora.invocation_tokens"


def check_adapter_file(path: Path, model: Description) -> None:
    """Compares an adapter's file with the model it should fit.

    Raises:
        AdapterUnusable: it is no adapter, or not one of this model. Names no path.
    """
    try:
        adapter = describe(path)
    except NotGgufError as error:
        raise AdapterUnusable(f"the file is no LoRA adapter in GGUF: {error}") from error
    for name, expected in (
        ("general.type", "adapter"),
        ("adapter.type", "lora"),
        ("general.architecture", model.fields.get("general.architecture")),
    ):
        if adapter.fields.get(name) != expected:
            raise AdapterUnusable(f"the file's {name} is not {expected!r}")
    if not isinstance(adapter.fields.get("adapter.lora.alpha"), float):
        # llama.cpp ends the process when it is a double.
        raise AdapterUnusable("the file has no adapter.lora.alpha in 32 bits")
    if _INVOCATION in adapter.names:
        raise AdapterUnusable("the adapter acts only behind an invocation, which is not supported")
    if not adapter.tensors:
        raise AdapterUnusable("the adapter has no tensors")
    bases = {_base_of(name) for name in adapter.tensors}
    for base in sorted(bases):
        _check_pair(base, adapter, model)


def _base_of(name: str) -> str:
    for part in _PARTS:
        if name.endswith(part):
            return name.removesuffix(part)
    raise AdapterUnusable(f"the adapter's tensor {name!r} is no part of a LoRA")


def _check_pair(base: str, adapter: Description, model: Description) -> None:
    target = model.tensors.get(base)
    if target is None:
        raise AdapterUnusable(f"the model has no tensor {base!r}")
    pair = [adapter.tensors.get(base + part) for part in _PARTS]
    down, up = pair
    if down is None or up is None:
        raise AdapterUnusable(f"the adapter has only half of {base!r}")
    for tensor in (down, up):
        if len(tensor.shape) != len(_PARTS) or len(target.shape) != len(_PARTS):
            raise AdapterUnusable(f"the adapter's {base!r} is no pair of matrices")
        _check_data(base, tensor, adapter.data_size)
    columns, rows = target.shape
    if base == "token_embd.weight":
        # Rows are looked up in it instead of multiplied: its parts are turned around.
        is_fitting = (
            down.shape[1] == rows
            and up.shape[1] == columns
            and down.shape[0] == up.shape[0] <= _RANK_MAX
        )
    else:
        is_fitting = (
            down.shape[0] == columns
            and up.shape[1] == rows
            and down.shape[1] == up.shape[0] <= _RANK_MAX
        )
    if not is_fitting:
        raise AdapterUnusable(f"the adapter's {base!r} does not have the model's shape")


def _check_data(base: str, tensor: Tensor, data_size: int) -> None:
    block = _TYPES.get(tensor.type_code)
    if block is None:
        raise AdapterUnusable(f"the adapter's {base!r} is in none of F32, F16, BF16 and Q8_0")
    values, size = block
    columns, rows = tensor.shape
    if columns < 1 or rows < 1 or columns % values:
        raise AdapterUnusable(f"the adapter's {base!r} has an impossible shape")
    if tensor.offset + columns // values * size * rows > data_size:
        raise AdapterUnusable(f"the adapter's {base!r} is not within the file")
