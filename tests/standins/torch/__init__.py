"""A strict stand-in for torch: tensors of numbers in the processor's memory, and nothing else."""

from __future__ import annotations

from typing import Literal, cast

import numpy as np
import numpy.typing as npt
from typing_extensions import override

Numbers = list[float] | list[int] | float | int
Array = npt.NDArray[np.float32] | npt.NDArray[np.float64] | npt.NDArray[np.int64]


class dtype:  # noqa: N801 - its name there
    """What a tensor's numbers are."""

    def __init__(self, name: Literal["float32", "float64", "int64"]) -> None:
        self.name = name

    @override
    def __repr__(self) -> str:
        return f"torch.{self.name}"


float32, float64, int64 = dtype("float32"), dtype("float64"), dtype("int64")
long = int64
_BY_NAME: dict[str, dtype] = {one.name: one for one in (float32, float64, int64)}
__version__ = "2.9.1"


class Tensor:
    """Numbers of one type. What is put in has to be of that type already."""

    def __init__(self, array: Array) -> None:
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dimensions."""
        return self._array.shape

    @property
    def dtype(self) -> dtype:
        """Type of its numbers."""
        return _BY_NAME[self._array.dtype.name]

    def dim(self) -> int:
        """How many dimensions it has."""
        return self._array.ndim

    def numel(self) -> int:
        """How many numbers it has."""
        return self._array.size

    def numpy(self) -> Array:
        """The same numbers, in the same memory."""
        return self._array

    def tolist(self) -> list[float]:
        """Its numbers."""
        found: list[float] = self._array.tolist()
        return found

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, at: int | slice | Tensor) -> Tensor:
        return Tensor(cast("Array", np.asarray(self._array[_index(at)])))

    def __setitem__(self, at: int | slice | Tensor | list[int], value: Tensor | float) -> None:
        if isinstance(value, Tensor) and value.dtype is not self.dtype:
            message = (
                f"Index put requires the source and destination dtypes match, got {self.dtype}"
            )
            raise RuntimeError(f"{message} and {value.dtype}")
        self._array[_index(at)] = value._array if isinstance(value, Tensor) else value


def _index(at: int | slice | Tensor | list[int]) -> int | slice | list[int] | Array:
    if isinstance(at, Tensor):
        if at.dtype is not int64:
            raise IndexError("tensors used as indices must be long, int, byte or bool tensors")
        return at._array
    return at


def tensor(data: Numbers, *, dtype: dtype | None = None) -> Tensor:
    """Makes a tensor of numbers: float32 for floats and int64 for ints, unless told otherwise."""
    if isinstance(data, np.ndarray | Tensor):
        raise TypeError("give lists of numbers, or use from_numpy")
    first = data[0] if isinstance(data, list) and data else data
    guessed = int64 if isinstance(first, int) else float32
    return Tensor(np.array(data, dtype=(dtype or guessed).name))


def zeros(*size: int, dtype: dtype = float32) -> Tensor:
    """Makes a tensor of nothing but 0."""
    return Tensor(np.zeros(size, dtype=dtype.name))


def full(size: tuple[int, ...], value: float, *, dtype: dtype = float32) -> Tensor:
    """Makes a tensor of one number."""
    return Tensor(np.full(size, value, dtype=dtype.name))


def from_numpy(array: Array) -> Tensor:
    """Makes a tensor in the memory of an array."""
    if array.dtype.name not in _BY_NAME:
        raise TypeError(f"the stand-in has no tensors of {array.dtype.name}")
    return Tensor(array)
