"""What the CPU kernel is told of a layer of our cache: where its tokens lie, and where a new one goes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from grace_opt.compression.integers import GROUP
from grace_opt.runtime.fixed_packed import FixedPacked
from grace_opt.runtime.kernels.cpu_program import STORED, Program
from grace_opt.runtime.packed import Packed

if TYPE_CHECKING:
    from grace_opt.runtime.buffers import Buffer
    from grace_opt.runtime.layer import PrunedLayer
    from grace_opt.runtime.side import Side

Rest = tuple[int, int, int]
_NONE = (0, 0, 0)  # no residuals
_PACKED = Packed, FixedPacked


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
        heads = layer.key_side.whole.shape[1]
        self.program = Program([side.codec for side in layer.sides], heads, query_heads // heads, layer.dtype)
        self._batch = layer.batch
        self._held = [HeldSide(HeldSide.tensors_of(side)) for side in layer.sides]

    def describes(self, layer: PrunedLayer) -> bool:
        """Whether the layer's rows and codecs are still the same."""
        pairs = zip(self.program.sides, layer.sides, strict=True)
        return self._batch == layer.batch and all(known.given is side.codec for known, side in pairs)

    def held(self, layer: PrunedLayer) -> list[HeldSide]:
        """Where keys and values lie now."""
        for i, side in enumerate(layer.sides):
            tensors, known = HeldSide.tensors_of(side), self._held[i].tensors
            if len(tensors) != len(known) or not all(map(is_, tensors, known)):
                self._held[i] = HeldSide(tensors)
        return self._held


def new_token(side: Side, held: HeldSide, states: Tensor | None, index: int, length: int) -> tuple[int, ...]:
    """The other fields of a `decode.SIDE`: the new token as it came, and where its row and residual go.

    ``index``: of the residual in the window.
    """
    if states is None:
        return STORED
    element, (batch, head, *_) = held.rows.element, states.stride()
    rest = (0, 0, 0) if held.window is None else (held.window.at(0, index)[0], *held.window[1:3])
    ((_, _, at),) = side.buffer.runs(length - 1, length)
    row = held.rows.at(0, at)[0], *held.rows[1:3]
    return states.data_ptr(), batch * element, head * element, *row, *rest


def all_segments(layer: PrunedLayer, held: Sequence[HeldSide], length: int) -> tuple[array[int], int]:
    """Records of `decode.SEGMENT` for each row of the batch, as many for one as for another, and how many."""
    firsts = layer.first.tolist() if layer.is_static else layer.firsts
    rows = [_segments(layer, held, b, first, length) for b, first in enumerate(firsts)]
    count, records = max(map(len, rows)), array("q")
    for each in rows:
        for record in each:
            records.extend(record)
        records.extend((0,) * (len(each[0]) * (count - len(each))))
    return records, count


def _segments(layer: PrunedLayer, held: Sequence[HeldSide], b: int, first: int, length: int) -> list[tuple[int, ...]]:
    """Records of a `decode.SEGMENT` for the tokens of a row of the batch, in order of their slots."""
    keys, values = held
    buffers = [side.buffer for side in layer.sides]
    near = layer.key_side.window.span(length).runs(length)
    window = near[0][0] if near else length
    packed = next((each for each in buffers if isinstance(each, _PACKED)), None)
    begin, count = (0, 0) if packed is None else packed.blocks_of(b)
    sinks = min(first + layer.sink_count, window)
    found: list[tuple[int, ...]] = []

    def plain(low: int, high: int, key_rest: Rest = _NONE, value_rest: Rest = _NONE) -> None:
        """Tokens that are held as they came, as many at a time as lie side by side on both sides."""
        for start, end, key_at, value_at in _common(buffers, low, high):
            rows = (*keys.rows.at(b, key_at), *values.rows.at(b, value_at))
            beside = (*_from(key_rest, start - low), *_from(value_rest, start - low))
            found.append((end - start, 0, start, *rows, 0, 0, 0, 0, 0, 0, *beside))

    if not count:  # padding, where it is held
        plain(0 if packed is None else min(packed.held_from, first), first)
    if first < sinks:
        rests = _beside(keys.whole, b, 0), _beside(values.whole, b, 0)
        if count:
            rows = [side.rows.at(b, first) if side.head is None else side.head.at(b, 0) for side in held]
            beside = (*_from(rests[0], 0), *_from(rests[1], 0))
            found.append((sinks - first, 0, first, *rows[0], *rows[1], 0, 0, 0, 0, 0, 0, *beside))
        else:
            plain(first, sinks, *rests)
    if count:
        found.append(_packed(held, b, begin, GROUP * count))
    plain(max(sinks, begin + GROUP * count), window)
    for low, high, index in near:
        plain(low, high, _beside(keys.window, b, index), _beside(values.window, b, index))
    return found


def _common(buffers: Sequence[Buffer], low: int, high: int) -> list[tuple[int, int, int, int]]:
    """What lies side by side on both sides: first slot, last + 1, index in keys and in values."""
    if low >= high:
        return []
    keys, values = (each.runs(low, high) for each in buffers)
    if len(keys) == len(values) == 1:  # nearly always
        return [(low, high, keys[0][2], values[0][2])]
    found = []
    for start in sorted({run[0] for run in (*keys, *values)}):
        (key, value) = (next(run for run in each if run[0] <= start < run[1]) for each in (keys, values))
        found.append((start, min(key[1], value[1]), key[2] + start - key[0], value[2] + start - value[0]))
    return found


def _beside(place: Place | None, b: int, index: int) -> Rest:
    """Where residuals lie: address, bytes between heads, bytes between tokens."""
    if place is None:
        return _NONE
    address, head, row = place.at(b, index)
    return address, head, row * place.element


def _from(rest: Rest, tokens: int) -> tuple[int, int]:
    """Where residuals lie from one of the tokens on."""
    return rest[0] + tokens * rest[2], rest[1]


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
