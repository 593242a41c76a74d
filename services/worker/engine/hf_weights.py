"""The files of weights in a Hugging Face model directory: which there are, and what is in them.

Never: reads their data, or unpickles anything. A file of weights in PyTorch's own format runs code
when it is loaded. Engines fall back on such files, so a directory that has one is refused, be there
safetensors or not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.worker.engine.hf_files import (
    INDEX_BYTES_MAX,
    HfFileError,
    list_names,
    object_in,
    require_file,
    require_json,
    text_in,
)
from services.worker.engine.hf_safetensors import Tensor, read_tensors

if TYPE_CHECKING:
    # The engine's own Python has no libs.
    from libs.chat_rules import JsonObject

_WEIGHTS: Final = ".safetensors"
_INDEX: Final = ".safetensors.index.json"
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Types whose shapes are those of the matrix that is multiplied with; others pack several values.
_UNPACKED: Final = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_TENSOR: Final = re.compile(
    r"(?:(?:language_model\.)?model|model\.language_model)\.(layers\.\d{1,6}\.\w+\.\w+)\.\w+"
)
_EMBEDDING: Final = re.compile(r"(?:\w+\.)*(?:embed_tokens|word_embeddings|wte)\.weight")
_MATRIX: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HfWeights:
    """All weights of a model, by their descriptions.

    Attributes:
        size: bytes of their files.
        matrices: of the layers that write text, by `matrix_name`: (outputs, inputs), or None where
            values are packed, so that the shape says something else.
        embedding: (rows of the vocabulary, numbers of each); None where it has another name.
    """

    size: int
    matrices: Mapping[str, tuple[int, int] | None] = field(repr=False)
    embedding: tuple[int, int] | None

    @property
    def layers(self) -> int:
        """Layers that write text; 0 where they have other names."""
        return 1 + max((int(name.split(".")[1]) for name in self.matrices), default=-1)


def read_weights(directory: Path) -> HfWeights:
    """Returns what the headers of all files say. Takes a second for the largest models.

    Raises:
        HfFileError: there are none, a file is not well formed, an index names what is not there,
            or there are pickles.
    """
    names = list_names(directory)
    _refuse_pickles(names)
    files = [name for name in names if name.endswith(_WEIGHTS)]
    if not files:
        raise HfFileError("there are no weights in safetensors")
    by_file: dict[str, dict[str, Tensor]] = {}
    size = 0
    for name in files:
        path = require_file(directory, name)
        by_file[name] = read_tensors(path, name)
        size += path.stat().st_size
    for name in names:
        if name.endswith(_INDEX):
            _check_index(require_json(directory, name, INDEX_BYTES_MAX), name, by_file)
    tensors: dict[str, Tensor] = {}
    for found in by_file.values():
        tensors |= found
    return HfWeights(size=size, matrices=_matrices_of(tensors), embedding=_embedding_of(tensors))


def matrix_name(tensor: str) -> str | None:
    """Returns how HfWeights calls a matrix, as "layers.0.self_attn.q_proj".

    Where models see and write, the part that writes has other names in older files than in newer
    ones; both lead to the same.

    Args:
        tensor: name of a tensor of it, as "model.layers.0.self_attn.q_proj.weight".

    Returns:
        None for what is none of a layer that writes, or of a single expert.
    """
    found = _TENSOR.fullmatch(tensor)
    return None if found is None else found[1]


def _refuse_pickles(names: Iterable[str]) -> None:
    found = [name for name in names if name.endswith(_PICKLES)]
    if found:
        raise HfFileError(
            f"{found[0]} may run code when it is loaded: remove it, and convert weights to "
            "safetensors if there are no others"
        )


def _check_index(index: JsonObject, name: str, by_file: Mapping[str, dict[str, Tensor]]) -> None:
    for tensor, file in object_in(index.get("weight_map")).items():
        found = by_file.get(text_in(file))
        if found is None:
            # A name with a path in it is no name of a file here.
            raise HfFileError(f"{name} names a file {text_in(file)!r} that is not there")
        if tensor not in found:
            raise HfFileError(f"{name} says of a tensor that it is in {file}, which has none such")


def _matrices_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int] | None]:
    matrices: dict[str, tuple[int, int] | None] = {}
    for name, tensor in tensors.items():
        matrix = matrix_name(name)
        if matrix is None:
            continue
        matrices.setdefault(matrix, None)
        is_plain = len(tensor.shape) == _MATRIX and tensor.dtype in _UNPACKED
        if is_plain and name.endswith(".weight"):
            matrices[matrix] = (tensor.shape[0], tensor.shape[1])
    return matrices


def _embedding_of(tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    shapes = [
        (tensor.shape[0], tensor.shape[1])
        for name, tensor in tensors.items()
        if len(tensor.shape) == _MATRIX and _EMBEDDING.fullmatch(name)
    ]
    return max(shapes, default=None)
