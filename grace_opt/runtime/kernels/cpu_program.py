"""The compiled CPU kernel (`decode`) for keys and values of given codecs, wherever they lie."""

from __future__ import annotations

import ctypes
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Codec, Whole
from grace_opt.compression.integers import GROUP, Integers, without_integers

FORMATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
STORED = (0,) * 9  #: of a new token that lies where it belongs already
_SHARE = 512  # tokens of a KV head that are worth a thread's while
_SMALL = 1 << 17  # bytes that one thread reads before others would have begun
_SCRATCH = threading.local()  # threads may run models side by side


@dataclass(frozen=True, eq=False)
class AskedSide:
    """Of keys or values, how a token's channels become a row and a residual.

    ``native``: whether the kernel gathers channels and applies read-outs itself. ``constants``: the first fields of a
    `decode.SIDE`; the tensors that they point into are ``held``.
    """

    given: Codec
    codec: Codec
    native: bool
    width: int
    residual: int
    constants: tuple[int, ...]
    held: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, given: Codec) -> AskedSide:
        codec = without_integers(given)
        native = isinstance(codec, Channels | Whole)
        held: tuple[Tensor | None, ...] = (None, None, None)
        if isinstance(codec, Channels):
            held = codec.order.contiguous(), _dense(codec.matrix), _dense(codec.constant)
        own, fitted = (any(each is not None and len(each) > 1 for each in some) for some in (held[:1], held[1:]))
        order, *readout = (0 if each is None or not each.numel() else each.data_ptr() for each in held)
        width, residual = codec.width, codec.residual_width
        return cls(given, codec, native, width, residual, (width, residual, own, order, fitted, *readout), held)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class Program:
    """What does not change from token to token.

    Args:
        codecs: of keys and of values, [1 or B, heads, ..].
        heads, group: KV heads, and query heads for each of them.
        dtype: of what is held as it came.
    """

    def __init__(self, codecs: Sequence[Codec], heads: int, group: int, dtype: torch.dtype) -> None:
        from grace_opt.runtime.kernels import decode  # numba, which is not loaded before it is needed

        self.keys, self.values = map(AskedSide.of, codecs)
        self.heads, self.group, self.queries = heads, group, decode.padded_queries(group)
        self._floats = decode.scratch_floats(group, *(side.width + side.residual for side in self.sides))
        self._row_bytes = sum(codec.nbytes(GROUP, dtype.itemsize) for codec in codecs) // GROUP
        bits = (codec.bits if isinstance(codec, Integers) else 0 for codec in codecs)
        self._work = decode.compiled(decode.queries_at_a_time(group), FORMATS[dtype], *bits)

    @property
    def sides(self) -> tuple[AskedSide, AskedSide]:
        """Keys and values."""
        return self.keys, self.values

    def attend(
        self,
        query: Tensor,
        segments: tuple[int, int],
        tokens: int,
        scaling: float,
        new: Sequence[tuple[int, ...]] = (STORED, STORED),
        bias: Tensor | None = None,
    ) -> Tensor:
        """Outputs [B, Hq, 1, Dv] of one query [B, Hq, 1, D] a row.

        Args:
            segments: the address of `decode.SEGMENT` [B, _], where the tokens of each row lie, and how many a row has.
            tokens: of the longest row.
            new: the last fields of `decode.SIDE` for keys and for values: a token that is yet to be stored.
            bias: float32 [B or 1, slots], to be added to scores.
        """
        keys, values, batch, heads, group = self.keys, self.values, len(query), self.heads, self.group
        if not keys.native:
            both = keys.codec.asked(query.reshape(batch, heads, group, query.shape[-1]))
            query = torch.cat(both, dim=-1).view(batch, heads * group, 1, -1)
        query, element = query if query.stride(3) == 1 else query.contiguous(), query.element_size()
        out = query.new_empty(batch, 1, heads * group, values.width + values.residual)
        threads, pieces = _shares(batch * heads, tokens, self._row_bytes)
        items = batch * heads * pieces
        scratch, done = _room(items * self._floats, batch * heads)
        fields = (
            *(0, items, pieces, heads, group, self.queries),
            *(*segments, scratch, self._floats, done),
            *(query.data_ptr(), query.stride(0) * element, query.stride(1) * element),
            *(out.data_ptr(), out.stride(0) * element, out.stride(2) * element),
            *((0, 0) if bias is None else (bias.data_ptr(), 4 * bias.stride(0) if len(bias) > 1 else 0)),
            *(_bits_of(scaling), *keys.constants, *new[0], *values.constants, *new[1]),
        )
        task = array("q", fields)
        _run(self._work, task.buffer_info()[0], threads)
        out = out.transpose(1, 2)
        if values.native:
            return out
        sums = out.reshape(batch, heads, group, -1)
        whole = sums[..., values.width :] if values.residual else None
        return values.codec.read(sums[..., : values.width], whole).view(batch, heads * group, 1, -1)


def _room(floats: int, heads: int) -> tuple[int, int]:
    """Addresses of this thread's memory: at least so many float32, and a zero for each head."""
    held = getattr(_SCRATCH, "held", None)
    if held is None or held[0].size < floats or held[1].size < heads:
        held = _SCRATCH.held = np.empty(floats, np.float32), np.zeros(heads, np.int64)
        _SCRATCH.addresses = held[0].ctypes.data, held[1].ctypes.data
    addresses: tuple[int, int] = _SCRATCH.addresses
    return addresses


@cache
def _bits_of(number: float) -> int:
    """A float64's bits as an int64."""
    return ctypes.c_int64.from_buffer(ctypes.c_double(number)).value


def _shares(heads: int, tokens: int, row_bytes: int) -> tuple[int, int]:
    """Threads, and pieces that the tokens of a head are cut into."""
    threads = torch.get_num_threads()
    if threads == 1 or heads * tokens * row_bytes < _SMALL:
        return 1, 1
    return threads, max(1, min(-(-4 * threads // heads), tokens // _SHARE))


@cache
def _team() -> Callable[..., None] | None:
    """libgomp's way to run a function by torch's own threads; None where torch brings another library."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("*torch_cpu*")):
        try:
            function = ctypes.CDLL(str(path)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes, function.restype = [ctypes.c_void_p] * 2 + [ctypes.c_uint] * 2, None
        found: Callable[..., None] = function
        return found
    return None


@cache
def _alone(work: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_int64)(work)


def _run(work: int, task: int, threads: int) -> None:
    team = _team() if threads > 1 else None
    if team is None:
        _alone(work)(task)
    else:
        team(work, task, threads, 0)
