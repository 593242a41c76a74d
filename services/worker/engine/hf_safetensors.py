"""What a safetensors file says about itself: names, types and shapes of its tensors.

    8 bytes      length of the header, little-endian
    header       JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__"}
    data         all tensors, one behind the other, without gaps

Only the header is read. All that it says is compared with the file before it is believed, as
whoever maps the data would read elsewhere otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.worker.engine.hf_files import HfFileError, int_in, object_in, parse_object, text_in

if TYPE_CHECKING:
    # The engine's own Python has no libs.
    from libs.chat_rules import JsonObject, JsonValue

HEADER_BYTES_MAX: Final = 32 << 20
"""Longest header; the largest files have a tenth of it."""

_LENGTH_BYTES: Final = 8
_METADATA: Final = "__metadata__"
_DIMENSIONS_MAX: Final = 16
_SIZE_MAX: Final = 1 << 48
# Bits of a value.
_TYPES: Final = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a header describes it.

    Attributes:
        dtype: type of its values, as "BF16".
        shape: values of each dimension, the outermost first.
    """

    dtype: str
    shape: tuple[int, ...]


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """Returns the tensors of a file by their name.

    Args:
        path: where it is.
        name: what errors call it.

    Raises:
        HfFileError: it cannot be read, or its header is not well formed.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > min(HEADER_BYTES_MAX, size - _LENGTH_BYTES):
                raise HfFileError(f"{name} has no header of a safetensors file")
            header = parse_object(file.read(length), f"the header of {name}")
    except OSError as error:
        raise HfFileError(f"{name} cannot be read: {error.strerror}") from None
    header.pop(_METADATA, None)
    spans: list[tuple[int, int]] = []
    tensors: dict[str, Tensor] = {}
    for tensor_name, value in header.items():
        tensors[tensor_name], span = _tensor_of(object_in(value), name)
        spans.append(span)
    _check_spans(spans, size - _LENGTH_BYTES - length, name)
    return tensors


def _tensor_of(value: JsonObject, name: str) -> tuple[Tensor, tuple[int, int]]:
    """Returns a tensor, and where its data begins and ends."""
    dtype, shape = text_in(value.get("dtype")), _sizes_in(value.get("shape"))
    offsets = _sizes_in(value.get("data_offsets"))
    if dtype not in _TYPES or shape is None or len(shape) > _DIMENSIONS_MAX:
        raise HfFileError(f"{name} has a tensor without a known type and shape")
    bits = math.prod(shape) * _TYPES[dtype]
    match offsets:
        case (begin, end) if (end - begin) * 8 == bits:
            return Tensor(dtype, shape), (begin, end)
        case _:
            raise HfFileError(f"{name} has a tensor whose data is not as long as its shape says")


def _sizes_in(value: JsonValue | None) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    sizes = [int_in(item) for item in value]
    valid = tuple(size for size in sizes if size is not None and 0 <= size <= _SIZE_MAX)
    return valid if len(valid) == len(sizes) else None


def _check_spans(spans: list[tuple[int, int]], data_size: int, name: str) -> None:
    place = 0
    for begin, end in sorted(spans):
        if begin != place:
            raise HfFileError(f"{name} has tensors that overlap, or a gap between them")
        place = end
    if place != data_size:
        raise HfFileError(f"{name} does not end where its tensors do: copy it again")
