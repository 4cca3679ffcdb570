"""Attention of one decoded token on a CPU: one pass over the cache by all threads, appending the token on the way.

The host's side: whether it can run here, and a task (`decode`) for each layer and token.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Codec, Whole
from grace_opt.compression.integers import GROUP, Integers
from grace_opt.problem import IntArray
from grace_opt.runtime.kernels.contract import Request, one_token
from grace_opt.runtime.packed import Packed

if TYPE_CHECKING:
    from grace_opt.runtime.layer import PrunedLayer
    from grace_opt.runtime.side import Side

SHORTEST = 256  # tokens; a shorter cache is read by torch before this kernel would be loaded
FORMATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_SHARE = 512  # tokens of a KV head that are worth a thread's while
_SMALL = 1 << 17  # bytes that one thread reads before others would have begun
_NEEDED = ("avx2", "fma", "f16c")


@cache
def missing() -> str | None:
    """Why the kernel cannot run on this machine; None if it can."""
    if find_spec("numba") is None:
        return "it is compiled by numba, which is not installed"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"it was tried on x86-64 only, and this is {platform.machine()}"
    import llvmlite.binding

    has = llvmlite.binding.get_host_cpu_features()
    lacking = [each for each in _NEEDED if not has.get(each)]
    return f"it needs a CPU with {', '.join(_NEEDED)}, and this one lacks {', '.join(lacking)}" if lacking else None


class CpuKernel:
    """Channels, whole rows, or what any codec makes of them; floating point or integers of 2, 4 or 8 bits."""

    name = "cpu"

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[PrunedLayer, _Layer] = WeakKeyDictionary()

    def __deepcopy__(self, memo: object) -> CpuKernel:
        return self  # a copy of a layer is read by the same kernel

    def reads(self, layer: PrunedLayer) -> bool | str:
        """True on a CPU with AVX2 and FMA, for what the kernel can decode."""
        bits = [side.bits for side in layer.sides]
        if layer.first.device.type != "cpu" or layer.offloading:
            return "it reads what lies in the memory of a CPU"
        if layer.dtype not in FORMATS:
            return f"it reads {', '.join(FORMATS.values())}, not {str(layer.dtype).removeprefix('torch.')}"
        if 3 in bits or any(side.codec.block and not isinstance(side.codec, Integers) for side in layer.sides):
            return "it unpacks integers of 2, 4 or 8 bits only"
        if layer.extra is not None:
            return "it knows no whole tokens but sinks and the recent window"
        return missing() or True

    def takes(self, request: Request) -> bool | str:
        """True for one token of each row, outside of training, if the model did not change the values."""
        if (answer := one_token(request)) is not True:
            return answer
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return "it has no gradient, and is not compiled into a graph"
        if request.handle.layer.columns < SHORTEST:
            return f"a cache of fewer than {SHORTEST} tokens is read by torch"
        return True

    def attend(self, request: Request) -> Tensor:
        """Outputs [B, Hq, 1, Dv]; stores the new token if it was not stored yet."""
        from grace_opt.runtime.kernels import decode

        layer, query = request.handle.layer, request.query
        known = self._layers.get(layer)
        if known is None or not known.describes(layer):
            known = self._layers[layer] = _Layer.of(layer, query.shape[1])
        for i, side in enumerate(known.sides):
            if not side.native:
                request.handle.store(i)
        length, element = int(layer.length), query.element_size()
        states = [each if each is None or each.stride(3) == 1 else each.contiguous() for each in request.handle.pending]
        new = [_new(side, each, length, element) for side, each in zip(layer.sides, states, strict=True)]
        rows = [list(_segments(layer, b, first, length, element)) for b, first in enumerate(layer.first.tolist())]
        segments = np.zeros((layer.batch, max(map(len, rows))), decode.SEGMENT)
        for b, each in enumerate(rows):
            segments[b, : len(each)] = each
        out = known.program.attend(query, segments, request.scaling, new, _bias(request.mask))
        request.handle.pending = [None, None]
        return out


@dataclass(frozen=True, eq=False)
class _Side:
    """Of keys or values, what does not change from token to token.

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
    def of(cls, given: Codec) -> _Side:
        codec = given.inner if isinstance(given, Integers) else given
        native = isinstance(codec, Channels | Whole)
        held: tuple[Tensor | None, ...] = (None, None, None)
        if isinstance(codec, Channels):
            held = codec.order.contiguous(), _dense(codec.matrix), _dense(codec.constant)
        own, fitted = (any(each is not None and len(each) > 1 for each in some) for some in (held[:1], held[1:]))
        order, *readout = (0 if each is None or not each.numel() else each.data_ptr() for each in held)
        width, residual = codec.width, codec.residual_width
        return cls(given, codec, native, width, residual, (width, residual, own, order, fitted, *readout), held)


@dataclass(frozen=True, eq=False)
class Program:
    """What does not change from token to token where keys and values are stored by these codecs, wherever they lie."""

    sides: tuple[_Side, _Side]
    heads: int
    group: int
    queries: int
    scratch_floats: int
    row_bytes: int
    work: int

    @classmethod
    def of(cls, codecs: Sequence[Codec], heads: int, group: int, dtype: torch.dtype) -> Program:
        """For the codecs of keys and of values [1 or B, heads, ..], and ``group`` query heads for each KV head."""
        from grace_opt.runtime.kernels import decode

        keys, values = sides = tuple(map(_Side.of, codecs))
        floats = decode.scratch_floats(group, *(side.width + side.residual for side in sides))
        bits = [codec.bits if isinstance(codec, Integers) else 0 for codec in codecs]
        work = decode.compiled(decode.queries_at_a_time(group), FORMATS[dtype], *bits)
        row_bytes = sum(codec.nbytes(GROUP, dtype.itemsize) for codec in codecs) // GROUP
        return cls((keys, values), heads, group, decode.padded_queries(group), floats, row_bytes, work)

    def attend(
        self,
        query: Tensor,
        segments: np.ndarray,
        scaling: float,
        new: Sequence[tuple[int, ...]] = ((0,) * 9, (0,) * 9),
        bias: Tensor | None = None,
    ) -> Tensor:
        """Outputs [B, Hq, 1, Dv] of one query [B, Hq, 1, D] a row.

        ``segments``: `decode.SEGMENT` [B, _], where the tokens of each row lie; ``new``: where the new token goes, if
        it is not stored yet; ``bias``: [B or 1, slots], to be added to scores.
        """
        from grace_opt.runtime.kernels import decode

        (keys, values), (batch, count), heads, group = self.sides, segments.shape, self.heads, self.group
        if not keys.native:
            both = keys.codec.asked(query.reshape(batch, heads, group, query.shape[-1]))
            query = torch.cat(both, dim=-1).view(batch, heads * group, 1, -1)
        query, element = query if query.stride(3) == 1 else query.contiguous(), query.element_size()
        out = query.new_empty(batch, 1, heads * group, values.width + values.residual)
        threads, pieces = _shares(batch * heads, int(segments["tokens"].sum(1).max()), self.row_bytes)
        items, floats = batch * heads * pieces, self.scratch_floats
        scratch, left = _room(items * floats, batch * heads)
        left[: batch * heads] = pieces
        task = np.zeros(1, decode.TASK)
        task[0] = (
            *(0, items, pieces, heads, group, self.queries),
            *(segments.ctypes.data, count, scratch.ctypes.data, floats, left.ctypes.data),
            *(query.data_ptr(), query.stride(0) * element, query.stride(1) * element),
            *(out.data_ptr(), out.stride(0) * element, out.stride(2) * element),
            *((0, 0) if bias is None else (bias.data_ptr(), 4 * bias.stride(0) if len(bias) > 1 else 0)),
            scaling,
            *((*side.constants, *each) for side, each in zip(self.sides, new, strict=True)),
        )
        _run(self.work, task.ctypes.data, threads)
        out = out.transpose(1, 2)
        if values.native:
            return out
        sums = out.reshape(batch, heads, group, -1)
        whole = sums[..., values.width :] if values.residual else None
        return values.codec.read(sums[..., : values.width], whole).view(batch, heads * group, 1, -1)


_SCRATCH = threading.local()  # threads may run models side by side


def _room(floats: int, heads: int) -> tuple[Any, IntArray]:
    """This thread's memory, at least so much of it."""
    held = getattr(_SCRATCH, "held", None)
    if held is None or len(held[0]) < floats or len(held[1]) < heads:
        held = _SCRATCH.held = np.empty(floats, np.float32), np.empty(heads, np.int64)
    return held


@dataclass(frozen=True, eq=False)
class _Layer:
    """The program of a layer of our cache."""

    program: Program
    batch: int

    @classmethod
    def of(cls, layer: PrunedLayer, query_heads: int) -> _Layer:
        heads = layer.key_side.whole.shape[1]
        codecs = [side.codec for side in layer.sides]
        return cls(Program.of(codecs, heads, query_heads // heads, layer.dtype), layer.batch)

    @property
    def sides(self) -> tuple[_Side, _Side]:
        return self.program.sides

    def describes(self, layer: PrunedLayer) -> bool:
        pairs = zip(self.sides, layer.sides, strict=True)
        return self.batch == layer.batch and all(known.given is side.codec for known, side in pairs)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _bias(mask: Tensor | None) -> Tensor | None:
    """float32 [B or 1, slots], to be added to scores; finite, so that a row of padding alone is no NaN."""
    if mask is None:
        return None
    row, lowest = mask[:, 0, 0], torch.finfo(torch.float32).min
    if row.dtype == torch.bool:
        return torch.zeros(row.shape).masked_fill_(~row, lowest)
    return row.float().clamp(min=lowest).contiguous()


def _new(side: Side, states: Tensor | None, length: int, element: int) -> tuple[int, ...]:
    """The other fields of a `decode.SIDE`: the new token as it came, and where its row and residual go."""
    if states is None:
        return (0,) * 9
    rest = side.window.place(length)
    return (
        *(states.data_ptr(), states.stride(0) * element, states.stride(1) * element),
        *_rows(side, 0, length - 1, element)[:1],
        *(each * element for each in _stored(side).stride()[:2]),
        *(rest.data_ptr(), rest.stride(0) * element, rest.stride(1) * element),
    )


def _segments(layer: PrunedLayer, b: int, first: int, length: int, element: int) -> Iterator[tuple[int, ...]]:
    """Records of a `decode.SEGMENT` for the tokens of a row of the batch, in order of their slots."""
    near = layer.key_side.window.runs(length)
    window = min((begin for begin, _, _ in near), default=length)
    packed = next((side.buffer for side in layer.sides if isinstance(side.buffer, Packed)), None)
    begin, count = (0, 0) if packed is None else packed.blocks_of(b)
    sinks = min(first + layer.sink_count, window)

    def plain(low: int, high: int, rests: Sequence[int] = (0, 0, 0, 0)) -> Iterator[tuple[int, ...]]:
        if low < high:
            found = (_rows(side, b, low, element) for side in layer.sides)
            yield high - low, 0, low, *next(found), *next(found), *(0,) * 6, *rests

    def whole(tensors: Sequence[Tensor], index: int) -> list[int]:
        """Addresses and strides of residuals [B, H, _, e]."""
        return [
            number for rows in tensors for number in (_row(rows, b, index, element)[:2] if rows.shape[3] else (0, 0))
        ]

    if not count:  # padding, where it is held
        yield from plain(0 if packed is None else packed.held_from, first)
    if first < sinks:
        rests = whole([side.whole for side in layer.sides], 0)
        if count:
            heads = ((side.buffer.head if isinstance(side.buffer, Packed) else None) for side in layer.sides)
            places = [
                _rows(side, b, first, element) if head is None else _row(head, b, 0, element)
                for side, head in zip(layer.sides, heads, strict=True)
            ]
            yield sinks - first, 0, first, *places[0], *places[1], *(0,) * 6, *rests
        else:
            yield from plain(first, sinks, rests)
    if count:
        yield _packed(layer, b, begin, GROUP * count, element)
    yield from plain(max(sinks, begin + GROUP * count), window)
    for low, high, index in near:
        yield from plain(low, high, whole([side.window.tensors()[0] for side in layer.sides], index))


def _packed(layer: PrunedLayer, b: int, begin: int, tokens: int, element: int) -> tuple[int, ...]:
    """Of the packed blocks of a row; the other side may hold them as rows."""
    rows: list[int] = []
    scales: list[int] = []
    for side in layer.sides:
        if not isinstance(side.buffer, Packed):
            rows += _rows(side, b, begin, element)
            scales += (0, 0, 0)
            continue
        codes, scale, zero = (each.buffer for each in side.buffer.blocks)
        rows += (codes.data_ptr() + b * codes.stride(0), codes.stride(1), 0)
        scales += (*(each.data_ptr() + 2 * b * each.stride(0) for each in (scale, zero)), 2 * scale.stride(1))
    return tokens, 1, begin, *rows, *scales, 0, 0, 0, 0


def _stored(side: Side) -> Tensor:
    """[B, H, _, width]: where rows are held as they came."""
    return side.buffer.last.buffer if isinstance(side.buffer, Packed) else side.buffer.tensors()[0]


def _rows(side: Side, b: int, slot: int, element: int) -> tuple[int, int, int]:
    """Of rows that are held as they came, from a slot on: address, bytes between heads, elements between rows."""
    held_from = side.buffer.held_from if isinstance(side.buffer, Packed) else 0
    return _row(_stored(side), b, slot - held_from, element)


def _row(rows: Tensor, b: int, index: int, element: int) -> tuple[int, int, int]:
    batch, head, row = rows.stride()[:3]
    return rows.data_ptr() + element * (b * batch + index * row), head * element, row


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


def _run(work: int, task: int, threads: int) -> None:
    team = _team() if threads > 1 else None
    if team is None:
        ctypes.CFUNCTYPE(None, ctypes.c_int64)(work)(task)
    else:
        team(work, task, threads, 0)
