"""The bytes of a stored cache: a header, then a frame for each layer, each with a checksum of all that came before.

    8 bytes     GRACE-KV
    4 bytes     length of the header, little-endian
    header      JSON: format, version, mask, model, dtypes, rows, tokens
    32 bytes    sha256 of all of the above
    for each layer: its arrays one after another, each filled up with zeros to a multiple of 8 bytes, and
    32 bytes    sha256 of the checksum before it and of this frame

How long a frame is follows from the mask, the rows and the tokens: nothing in the file is a size that is not checked
against them. Arrays are little-endian, as every CPU that torch runs on.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor

from grace_opt.compression.codec import bytes_of
from grace_opt.errors import InputError
from grace_opt.export.store.layer import Array
from grace_opt.files import json_text
from grace_opt.reading import parsed

MAGIC = b"GRACE-KV"
HEADER_LIMIT = 1 << 16  #: bytes
_DIGEST = 32
_PIECE = 1 << 20  # bytes that are asked of a stream at a time: memory grows with what comes, not with what is promised
AGAIN = "store the prompt again"


class Writer:
    """Bytes of one stored cache, as they become known."""

    def __init__(self) -> None:
        self._digest = b""

    def header(self, about: dict[str, Any]) -> bytes:
        """The first bytes."""
        text = json_text(about).encode()
        start = MAGIC + struct.pack("<I", len(text)) + text
        self._digest = hashlib.sha256(start).digest()
        return start + self._digest

    def frame(self, arrays: Sequence[Array], tensors: Iterator[Tensor]) -> bytearray:
        """A layer's bytes."""
        size = sum(each.nbytes for each in arrays)
        out = bytearray(size + _DIGEST)
        at = 0
        for array, tensor in zip(arrays, tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (array.shape, array.dtype), (tensor.shape, array)
            to = torch.frombuffer(out, dtype=torch.uint8, offset=at, count=array.nbytes) if array.nbytes else None
            if to is not None:
                flat = bytes_of(tensor)
                to[: len(flat)] = flat
            at += array.nbytes
        with memoryview(out) as whole:
            self._digest = _chained(self._digest, whole[:size])
        out[size:] = self._digest
        return out


class Reader:
    """A stored cache read from bytes or a stream. Raises InputError with what is wrong and where."""

    def __init__(self, source: bytes | bytearray | memoryview | BinaryIO, name: str) -> None:
        self._file = io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
        self.name = name
        self._digest = b""

    def header(self) -> dict[str, Any]:
        """The header's object, of this format and version."""
        start = self._read(len(MAGIC) + 4, "its header")
        if bytes(start[: len(MAGIC)]) != MAGIC:
            raise InputError(f"{self.name} is no stored cache (it does not begin with {MAGIC.decode()}); {AGAIN}")
        (length,) = struct.unpack("<I", start[len(MAGIC) :])
        if length > HEADER_LIMIT:
            raise InputError(f"{self.name} has a header of {length} bytes, of {HEADER_LIMIT} allowed; {AGAIN}")
        text = self._read(length, "its header")
        self._digest = hashlib.sha256(bytes(start) + bytes(text)).digest()
        self._check("header")
        try:
            about = parsed(bytes(text))
        except InputError as error:
            raise InputError(f"{self.name} has a header that is not JSON ({error}); {AGAIN}") from None
        if not isinstance(about, dict):
            raise InputError(f"{self.name} has a header that is no object; {AGAIN}")
        return about

    def frame(self, arrays: Sequence[Array], what: str) -> Iterator[Tensor]:
        """The tensors of a layer's frame; they share its memory."""
        data = self._read(sum(each.nbytes for each in arrays), what)
        self._digest = _chained(self._digest, data)
        self._check(what)
        return _tensors(data, arrays)

    def end(self) -> None:
        """Nothing may follow."""
        if self._file.read(1):
            raise InputError(f"{self.name} goes on after its last layer; {AGAIN}")

    def _check(self, what: str) -> None:
        if bytes(self._read(_DIGEST, what)) != self._digest:
            raise InputError(f"{self.name} was altered or damaged in {what} (sha256 differs); {AGAIN}")

    def _read(self, count: int, what: str) -> bytearray:
        data = bytearray()
        while len(data) < count:
            piece = self._file.read(min(_PIECE, count - len(data)))
            if not piece:
                raise InputError(f"{self.name} is truncated: it ends in {what}; {AGAIN}")
            data += piece
        return data


def _chained(before: bytes, data: bytearray | memoryview) -> bytes:
    digest = hashlib.sha256(before)
    digest.update(data)
    return digest.digest()


def _tensors(data: bytearray, arrays: Sequence[Array]) -> Iterator[Tensor]:
    at = 0
    for array in arrays:
        count = array.nbytes
        if count:
            flat = torch.frombuffer(data, dtype=torch.uint8, offset=at, count=count)
            used = torch.Size(array.shape).numel() * array.dtype.itemsize
            yield flat[:used].view(array.dtype).view(array.shape)
        else:
            yield torch.empty(array.shape, dtype=array.dtype)
        at += count
