"""What the compiled CPU kernel (`decode`) is told: of a layer, and of one token of each row."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from operator import is_
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from grace_opt.compression.channels import Channels
from grace_opt.compression.codec import Codec, Whole
from grace_opt.compression.integers import GROUP, Integers
from grace_opt.runtime.fixed_packed import FixedPacked
from grace_opt.runtime.packed import Packed

if TYPE_CHECKING:
    from grace_opt.runtime.layer import PrunedLayer
    from grace_opt.runtime.side import Side

FORMATS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_NONE = ((0, 0, 0), (0, 0, 0))  # no residuals


class Place(NamedTuple):
    """Where rows [B, H, _, n] lie: the first one's address; bytes from row to row of the batch and from head to head,
    elements from token to token; bytes of an element."""

    address: int
    batch: int
    head: int
    row: int
    element: int

    @classmethod
    def of(cls, rows: Tensor) -> Place:
        element, (batch, head, row, _) = rows.element_size(), rows.stride()
        return cls(rows.data_ptr(), batch * element, head * element, row, element)

    def at(self, b: int, index: int) -> tuple[int, int, int]:
        """Of row b and one of its tokens: address, bytes between heads, elements between tokens."""
        return self.address + b * self.batch + index * self.row * self.element, self.head, self.row


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
        codec = given.inner if isinstance(given, Integers) else given
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


class HeldSide:
    """Where the keys or values of a layer lie, as long as ``tensors`` are the ones that hold them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        whole, window, rows, *packed = tensors
        self.rows = Place.of(rows)
        self.whole, self.window = (Place.of(each) if each.shape[3] else None for each in (whole, window))
        self.head = Place.of(packed[0]) if packed else None
        self.blocks = [  # codes, scales, zeros
            (each.data_ptr(), each.element_size() * each.stride(0), each.element_size() * each.stride(1))
            for each in packed[1:4]
        ]

    @staticmethod
    def tensors_of(side: Side) -> list[Tensor]:
        """Of residuals outside the window and in it, of rows as they came, and of packed ones."""
        return [side.whole, *side.window.tensors(), *side.buffer.tensors()]


class LayerTask:
    """A layer, as the kernel knows it from token to token."""

    def __init__(self, layer: PrunedLayer, query_heads: int) -> None:
        from grace_opt.runtime.kernels import decode  # numba, which is not loaded before it is needed

        self.sides = tuple(AskedSide.of(side.codec) for side in layer.sides)
        self.batch, self.heads = layer.batch, layer.key_side.whole.shape[1]
        self.group = query_heads // self.heads
        self.queries = decode.padded_queries(self.group)
        self.scratch_floats = decode.scratch_floats(self.group, *(side.width + side.residual for side in self.sides))
        self.row_bytes = sum(side.codec.nbytes(GROUP, layer.dtype.itemsize) for side in layer.sides) // GROUP
        bits = (side.bits for side in layer.sides)
        self.work = decode.compiled(decode.queries_at_a_time(self.group), FORMATS[layer.dtype], *bits)
        self._held = [HeldSide(HeldSide.tensors_of(side)) for side in layer.sides]

    def describes(self, layer: PrunedLayer) -> bool:
        """Whether the layer's rows and codecs are still the same."""
        pairs = zip(self.sides, layer.sides, strict=True)
        return self.batch == layer.batch and all(known.given is side.codec for known, side in pairs)

    def held(self, layer: PrunedLayer) -> list[HeldSide]:
        """Where keys and values lie now."""
        for i, side in enumerate(layer.sides):
            tensors, known = HeldSide.tensors_of(side), self._held[i].tensors
            if len(tensors) != len(known) or not all(map(is_, tensors, known)):
                self._held[i] = HeldSide(tensors)
        return self._held


@cache
def bits_of(number: float) -> int:
    """A float64's bits as an int64."""
    return ctypes.c_int64.from_buffer(ctypes.c_double(number)).value


def new_token(side: Side, held: HeldSide, states: Tensor | None, index: int, length: int) -> tuple[int, ...]:
    """The other fields of a `decode.SIDE`: the new token as it came, and where its row and residual go.

    ``index``: of the residual in the window.
    """
    if states is None:
        return (0,) * 9
    element, (batch, head, *_) = held.rows.element, states.stride()
    rest = (0, 0, 0) if held.window is None else (held.window.at(0, index)[0], *held.window[1:3])
    ((_, _, at),) = side.buffer.runs(length - 1, length)
    row = held.rows.at(0, at)[0], *held.rows[1:3]
    return states.data_ptr(), batch * element, head * element, *row, *rest


def all_segments(layer: PrunedLayer, held: Sequence[HeldSide], length: int) -> tuple[array[int], int]:
    """Records of `decode.SEGMENT` for each row of the batch, as many for one as for another, and how many."""
    firsts = layer.first.tolist() if layer.is_static else layer.firsts
    rows = [list(segments(layer, held, b, first, length)) for b, first in enumerate(firsts)]
    count, records = max(map(len, rows)), array("q")
    for each in rows:
        for record in each:
            records.extend(record)
        records.extend((0,) * (len(each[0]) * (count - len(each))))
    return records, count


def segments(
    layer: PrunedLayer, held: Sequence[HeldSide], b: int, first: int, length: int
) -> Iterator[tuple[int, ...]]:
    """Records of a `decode.SEGMENT` for the tokens of a row of the batch, in order of their slots."""
    buffers = [side.buffer for side in layer.sides]
    near = layer.key_side.window.runs(length)
    window = min((begin for begin, _, _ in near), default=length)
    packed = next((each for each in buffers if isinstance(each, Packed | FixedPacked)), None)
    begin, count = (0, 0) if packed is None else packed.blocks_of(b)
    sinks = min(first + layer.sink_count, window)

    def plain(low: int, high: int, rests: Sequence[tuple[int, int, int]] = _NONE) -> Iterator[tuple[int, ...]]:
        """Tokens that are held as they came, as many at a time as lie side by side on both sides."""
        runs = [each.runs(low, high) for each in buffers] if low < high else []
        for start in sorted({run[0] for each in runs for run in each}):
            places, ends = [], []
            for side, each in zip(held, runs, strict=True):
                begins, ends_at, index = next(run for run in each if run[0] <= start < run[1])
                places.append(side.rows.at(b, index + start - begins))
                ends.append(ends_at)
            beside = (number for address, head, row in rests for number in (address + (start - low) * row, head))
            yield min(ends) - start, 0, start, *places[0], *places[1], *(0,) * 6, *beside

    if not count:  # padding, where it is held
        yield from plain(0 if packed is None else min(packed.held_from, first), first)
    if first < sinks:
        rests = [_beside(side.whole, b, 0) for side in held]
        if count:
            rows = [side.rows.at(b, first) if side.head is None else side.head.at(b, 0) for side in held]
            beside = (number for rest in rests for number in rest[:2])
            yield sinks - first, 0, first, *rows[0], *rows[1], *(0,) * 6, *beside
        else:
            yield from plain(first, sinks, rests)
    if count:
        yield _packed(held, b, begin, GROUP * count)
    yield from plain(max(sinks, begin + GROUP * count), window)
    for low, high, index in near:
        yield from plain(low, high, [_beside(side.window, b, index) for side in held])


def _beside(place: Place | None, b: int, index: int) -> tuple[int, int, int]:
    """Where residuals lie: address, bytes between heads, bytes between tokens."""
    if place is None:
        return 0, 0, 0
    address, head, row = place.at(b, index)
    return address, head, row * place.element


def _packed(held: Sequence[HeldSide], b: int, begin: int, tokens: int) -> tuple[int, ...]:
    """Of the packed blocks of a row; the other side may hold them as rows."""
    rows: list[int] = []
    scales: list[int] = []
    for side in held:
        if side.head is None:
            rows += side.rows.at(b, begin)
            scales += (0, 0, 0)
            continue
        codes, *scaling = side.blocks
        rows += (codes[0] + b * codes[1], codes[2], 0)
        scales += (*(address + b * batch for address, batch, _ in scaling), scaling[0][2])
    return tokens, 1, begin, *rows, *scales, 0, 0, 0, 0
