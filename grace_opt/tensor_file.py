"""Reading safetensors files: the header is checked against what the file holds, a tensor is read when it is asked for.

Not by the library, which maps the file into memory: where another process shortens a mapped file, this one dies.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from grace_opt.errors import InputError, shown
from grace_opt.reading import opened, parsed

HEADER_LIMIT = 16 << 20  #: bytes: some 130,000 tensors, which 126 layers of 8 heads fill to a sixth
EMPTY_LIMIT = 1 << 16  #: the longest dimension of a tensor without elements, which no byte of the file bears out

_NATIVE: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    "C64": np.dtype("<c8"),
}
_WIDENED: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E4M3": np.dtype("u1"),
}  # no types of numpy


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile(Mapping[str, np.ndarray]):
    """The tensors of an open safetensors file by name, and its ``metadata``.

    Each is read when it is asked for, as a new array of its own dtype; bfloat16 and float8 (E4M3, E5M2) come as
    float32, exactly. Raises InputError for another dtype, and where the file is shorter by then.
    """

    def __init__(self, file: BufferedReader, name: str | Path) -> None:
        self._file, self.name = file, name
        try:
            self._start, header = _header(file)
            self.metadata = _metadata(header.pop("__metadata__", {}))
            self._entries = {each: _entry(each, about) for each, about in header.items()}
            _check_extents(self._entries, os.fstat(file.fileno()).st_size - self._start)
        except InputError as error:
            raise self._damaged(str(error)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def dtype(self, name: str) -> str:
        """As safetensors calls it: F64, BF16, BOOL."""
        return self._entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._entries[name].shape

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        held = _NATIVE.get(entry.dtype) or _WIDENED.get(entry.dtype)
        if held is None:
            raise InputError(
                f"{self.name}: the tensor {shown(name, 200)} is of type {shown(entry.dtype, 40)}, which cannot be read "
                "here; save it as F32"
            )
        array: np.ndarray = np.empty(entry.shape, held)
        if array.size:
            self._file.seek(self._start + entry.begin)
            if self._file.readinto(array.data.cast("B")) != array.nbytes:
                raise self._damaged("it became shorter while it was read")
        return array if entry.dtype in _NATIVE else _widened(array, entry.dtype)

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"{self.name} is truncated or not a safetensors file ({reason}); make or fetch it again")


@contextmanager
def tensor_file(path: str | Path) -> Iterator[TensorFile]:
    """The tensors of a safetensors file, while it is open. Raises InputError if it is missing or damaged."""
    with opened(path) as file:
        yield TensorFile(file, path)


def _header(file: BufferedReader) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes begin, and the header's object."""
    size, start = os.fstat(file.fileno()).st_size, file.read(8)
    if len(start) < 8:
        raise InputError("it has no header")
    (length,) = struct.unpack("<Q", start)
    if length > size - 8:
        raise InputError(f"it says that its header has {length} bytes, of {size} in all")
    if length > HEADER_LIMIT:
        raise InputError(f"its header has {length} bytes, of {HEADER_LIMIT} allowed")
    header = parsed(file.read(length))
    if not isinstance(header, dict):
        raise InputError("its header is not an object")
    return 8 + length, header


def _metadata(about: Any) -> dict[str, str]:
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise InputError("its metadata is not a map of strings")
    return dict(sorted(about.items()))


def _entry(name: str, about: Any) -> _Entry:
    try:
        entry = _Entry(str(about["dtype"]), tuple(about["shape"]), *about["data_offsets"])
    except (TypeError, KeyError):
        entry = _Entry("", (-1,), 0, 0)
    numbers = (*entry.shape, entry.begin, entry.end)
    if len(entry.shape) > 8 or not all(type(each) is int and each >= 0 for each in numbers):
        raise InputError(f"its tensor {shown(name, 200)} is not described as one")
    return entry


def _check_extents(entries: Mapping[str, _Entry], held: int) -> None:
    """Raise InputError unless the tensors lie one after the other, each as long as its shape, up to the file's end."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        count, item = math.prod(entry.shape), _NATIVE.get(entry.dtype) or _WIDENED.get(entry.dtype)
        wrong = item is not None and entry.end - entry.begin != count * item.itemsize
        if wrong or entry.begin != at or entry.end < entry.begin or (not count and max(entry.shape) > EMPTY_LIMIT):
            raise InputError(f"its tensor {shown(name, 200)} is not where and as long as the header says")
        at = entry.end
    if at != held:
        raise InputError(f"its tensors have {at} bytes, and the file holds {held}")


def _widened(codes: np.ndarray, dtype: str) -> np.ndarray:
    """float32 from the bits of a narrower floating-point type."""
    if dtype == "BF16":  # the upper half of a float32
        return (codes.astype("<u4") << 16).view("<f4")
    if dtype == "F8_E5M2":  # the upper half of a float16
        return (codes.astype("<u2") << 8).view("<f2").astype("<f4")
    # A sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, and the largest magnitude is NaN.
    code = np.arange(128)
    exponent, mantissa = code >> 3, (code & 7) / 8
    magnitude = np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - 7.0), mantissa * 2.0**-6)
    magnitude[127] = np.nan
    values: np.ndarray = np.concatenate([magnitude, -magnitude]).astype("<f4")
    return np.asarray(values[codes])
