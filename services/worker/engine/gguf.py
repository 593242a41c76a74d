"""What a GGUF file says about itself: its fields and the shapes of its tensors.

Every length read from the file is compared with what is left of it before it is believed. Source of
the format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_TEXT_BYTES_MAX: Final = 1 << 20
_NAME_MAX: Final = 128
_DEPTH_MAX: Final = 2
_STRING: Final = 8
_ARRAY: Final = 9
_DOUBLE: Final = 12
_FORMATS: Final = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_ALIGNMENT_DEFAULT: Final = 32
_DIMENSIONS_MAX: Final = 4
# Fields, texts in arrays and tensors together: who reads them computes nothing meanwhile.
# The largest vocabularies have some hundred thousand tokens, and as many merges.
_ITEMS_MAX: Final = 2_000_000

Scalar = str | int | float | bool


class NotGgufError(Exception):
    """A file is not what it should be; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as a GGUF file describes it.

    Attributes:
        shape: elements of each dimension, the innermost first.
        type_code: number type, as ggml counts them.
        offset: bytes from the beginning of the data.
    """

    shape: tuple[int, ...]
    type_code: int
    offset: int


@dataclass(frozen=True, slots=True)
class Description:
    """What a GGUF file says about itself.

    Attributes:
        fields: single values by name; arrays and doubles are left out.
        names: of all fields.
        tensors: by name.
        data_size: bytes behind the description.
    """

    fields: dict[str, Scalar]
    names: frozenset[str]
    tensors: dict[str, Tensor]
    data_size: int


def describe(path: Path) -> Description:
    """Reads the description of a GGUF file.

    Raises:
        NotGgufError: it cannot be read, or is none.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _Reader(file, size).read()
    except OSError as error:
        raise NotGgufError(f"the file cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise NotGgufError("a name in the file is not UTF-8") from None


class _Reader:
    """Reads the description from the beginning of a file.

    Args:
        file: at its beginning.
        size: of the file, bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self._items_left = _ITEMS_MAX

    def read(self) -> Description:
        if self._file.read(len(_MAGIC)) != _MAGIC:
            raise NotGgufError("it does not begin with GGUF")
        if self._number("<I") not in _VERSIONS:
            raise NotGgufError("it has an unknown version")
        tensor_count, field_count = self._items(), self._items()
        fields: dict[str, Scalar] = {}
        names: set[str] = set()
        for _ in range(field_count):
            name = self._text()
            names.add(name)
            value = self._value(int(self._number("<I")), 0)
            if value is not None:
                fields[name] = value
        tensors: dict[str, Tensor] = {}
        for _ in range(tensor_count):
            name = self._text()
            if len(name) > _NAME_MAX:
                raise NotGgufError("a tensor's name is too long")
            tensors[name] = self._tensor()
        alignment = fields.get("general.alignment", _ALIGNMENT_DEFAULT)
        if not isinstance(alignment, int) or alignment < 1:
            raise NotGgufError("it has an impossible alignment")
        start = -(-self._file.tell() // alignment) * alignment
        return Description(fields, frozenset(names), tensors, max(self._size - start, 0))

    def _tensor(self) -> Tensor:
        dimensions = int(self._number("<I"))
        if not 1 <= dimensions <= _DIMENSIONS_MAX:
            raise NotGgufError("a tensor has an impossible shape")
        shape = tuple(int(self._number("<Q")) for _ in range(dimensions))
        return Tensor(shape, int(self._number("<I")), int(self._number("<Q")))

    def _value(self, kind: int, depth: int) -> Scalar | None:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            self._skip_array(depth)
            return None
        layout = _FORMATS.get(kind)
        if layout is None:
            raise NotGgufError("a field has an unknown type")
        value = self._number(layout)
        return None if kind == _DOUBLE else value

    def _skip_array(self, depth: int) -> None:
        kind, count = int(self._number("<I")), self._count()
        layout = _FORMATS.get(kind)
        if layout is not None:
            self._skip(struct.calcsize(layout) * count)
        elif kind == _STRING:
            for _ in range(self._spend(count)):
                self._skip(self._count())
        elif depth < _DEPTH_MAX:
            for _ in range(self._spend(count)):
                self._value(kind, depth + 1)
        else:
            raise NotGgufError("a field is nested too deeply")

    def _count(self) -> int:
        """A number of things that each take at least a byte of what is left."""
        count = int(self._number("<Q"))
        if count > min(self._size - self._file.tell(), self._size):
            raise NotGgufError("it is not complete")
        return count

    def _items(self) -> int:
        return self._spend(self._count())

    def _spend(self, items: int) -> int:
        """Bounds the steps of all loops together."""
        self._items_left -= items
        if self._items_left < 0:
            raise NotGgufError("it has too many parts")
        return items

    def _text(self) -> str:
        length = self._count()
        if length > _TEXT_BYTES_MAX:
            raise NotGgufError("a text is too long")
        return self._bytes(length).decode()

    def _number(self, layout: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(layout, self._bytes(struct.calcsize(layout)))[0]
        return value

    def _bytes(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) != count:
            raise NotGgufError("it is not complete")
        return data

    def _skip(self, count: int) -> None:
        if self._file.tell() + count > self._size:
            raise NotGgufError("it is not complete")
        self._file.seek(count, 1)
