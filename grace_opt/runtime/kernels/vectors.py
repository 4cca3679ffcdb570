"""Loops over vectors of eight floats, written as LLVM code for numba, whose own vectoriser does not find them.

Over 400 lines: the loops, and the small language that they are written in.

Each function here returns a numba intrinsic, which takes int64 only: addresses, strides in elements, counts. So one
compiled loop reads any layout whose last dimension is dense. LLVM makes of eight floats what the CPU has: one register
with AVX, two with NEON. NaN goes through every loop.

What is stored is ``float32``, ``float16`` or ``bfloat16``, or packed integers of 2, 4 or 8 bits
(`compression.integers`); scores, weights and sums are float32. Nothing is read beyond the last element.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types as _types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic

LANES = 8
FORMATS = {"float32": 4, "float16": 2, "bfloat16": 2}  #: bytes of an element

_WIDE = bool(get_host_cpu_features().get("avx512vl"))  # then there are 32 registers, of 16
_REGISTERS = 12  # vectors that are summed into at a time, where there are 16 registers
_CODES_IN_A_PASS = (
    {1: 8, 2: 8, 3: 8, 4: 4} if _WIDE else {1: 8, 2: 4, 3: 3, 4: 2}
)  # by queries: no sum leaves its register
_FLOAT, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
cgutils: Any = _cgutils  # untyped
types: Any = _types
_PAIR = types.UniTuple(types.float32, 2)
_STORED = {"float32": _FLOAT, "float16": ir.HalfType(), "bfloat16": _I16}  # bfloat16 by its bits
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)
_ZEROS = ir.Constant(_FLOATS, [0.0] * LANES)
# 2^f for f in [-1/2, 1/2], its Taylor series: what is left out is below 1.3e-7.
_EXP2 = [
    *(1.0, 0.6931471805599453, 0.2402265069591007, 0.05550410866482158),
    *(0.009618129107628477, 0.0013333558146428443, 0.00015403530393381608),
]


@cache
def scores(queries: int, form: str, add: bool) -> Any:
    """``(q, q_stride, rows, row_stride, width, count, out, out_stride)``: out[g, t] = q[g] . rows[t]; += with ``add``.

    ``out`` has room for ``count`` rounded up to eight; what lies beyond ``count`` is undefined.
    """

    def emit(
        c: _Code, q: Any, q_stride: Any, rows: Any, row_stride: Any, width: Any, count: Any, out: Any, out_stride: Any
    ) -> None:
        b, last = c.b, c.b.sub(count, _I64(1))
        whole, rest = c.split(width)
        with c.times(b.sdiv(b.add(count, _I64(LANES - 1)), _I64(LANES))) as tile:
            first = b.mul(tile, _I64(LANES))
            # A row is read again in place of one that is not there.
            tokens = [c.least(b.add(first, _I64(lane)), last) for lane in range(LANES)]
            starts = [b.mul(token, row_stride) for token in tokens]
            for g in range(queries):
                asked, held = b.mul(_I64(g), q_stride), c.sums(LANES)
                with c.times(whole) as step:
                    at = b.mul(step, _I64(LANES))
                    x = c.load(q, b.add(asked, at))
                    for start, each in zip(starts, held, strict=True):
                        c.add_product(x, c.load(rows, b.add(start, at), form), each)
                with b.if_then(b.icmp_signed(">", rest, _I64(0))):
                    at = b.mul(whole, _I64(LANES))
                    x = c.load(q, b.add(asked, at), lanes=rest)
                    for start, each in zip(starts, held, strict=True):
                        c.add_product(x, c.load(rows, b.add(start, at), form, rest), each)
                total, to = c.lane_sums([b.load(each) for each in held]), b.add(b.mul(_I64(g), out_stride), first)
                c.store(b.fadd(total, c.load(out, to)) if add else total, out, to)

    return _intrinsic(8, emit)


@cache
def mix(queries: int, form: str) -> Any:
    """``(p, p_stride, rows, row_stride, width, count, out, out_stride)``: out[g] += sum_t p[g, t] rows[t].

    ``out`` has room for ``width`` rounded up to eight.
    """
    vectors = max(1, _REGISTERS // queries)

    def emit(
        c: _Code, p: Any, p_stride: Any, rows: Any, row_stride: Any, width: Any, count: Any, out: Any, out_stride: Any
    ) -> None:
        b = c.b

        def columns(at: Any, lanes: Sequence[Any]) -> None:
            """The columns from ``at`` on, a vector for each of ``lanes``."""
            places = [
                [b.add(b.mul(_I64(g), out_stride), b.add(at, _I64(LANES * v))) for v in range(len(lanes))]
                for g in range(queries)
            ]
            held = [[c.sums(1, c.load(out, place))[0] for place in row] for row in places]
            with c.times(count) as token:
                start = b.add(b.mul(token, row_stride), at)
                xs = [c.load(rows, b.add(start, _I64(LANES * v)), form, each) for v, each in enumerate(lanes)]
                for g in range(queries):
                    weight = c.one(p, b.add(b.mul(_I64(g), p_stride), token))
                    for x, each in zip(xs, held[g], strict=True):
                        c.add_product(weight, x, each)
            for row, to in zip(held, places, strict=True):
                for each, place in zip(row, to, strict=True):
                    c.store(b.load(each), out, place)

        chunk = _I64(LANES * vectors)
        chunks = b.sdiv(width, chunk)
        with c.times(chunks) as step:
            columns(b.mul(step, chunk), [None] * vectors)
        at = b.mul(chunks, chunk)
        left = b.sub(width, at)
        for v in range(vectors):
            whole, last = _I64(LANES * v), b.sub(left, _I64(LANES * v))
            here = b.and_(b.icmp_signed(">", last, _I64(0)), b.icmp_signed("<=", left, b.add(whole, _I64(LANES))))
            with b.if_then(here):
                columns(at, [None] * v + [last])

    return _intrinsic(8, emit)


@cache
def packed_mix(queries: int, bits: int) -> Any:
    """``(p, p_stride, scale, zero, codes, row_stride, rows, row_bytes, out, out_stride, spare)``:
    out[g, i] += sum_r p[g, r] (zero[r] + scale[r] codes[r, i]), for 32 codes of each row.

    A code c becomes the float 1 + c / 2^bits, whose bits are the code's behind those of 1: no conversion is needed, and
    scales and zeros are changed to match.

    ``codes``: rows of packed integers, ``row_stride`` bytes apart, each with ``row_bytes`` bytes of them, 4 ``bits`` if
    all 32 are there; codes that are not there are undefined. ``scale`` and ``zero`` are float32, and so is ``spare``
    [queries, rows rounded up to eight, bits], which is written.
    """
    by_word, at_once = 32 // bits, LANES // bits  # codes of 32 bits, rows of a vector
    in_a_pass = _CODES_IN_A_PASS[queries]

    def emit(
        c: _Code,
        p: Any,
        p_stride: Any,
        scale: Any,
        zero: Any,
        codes: Any,
        row_stride: Any,
        rows: Any,
        row_bytes: Any,
        out: Any,
        out_stride: Any,
        spare: Any,
    ) -> None:
        b = c.b
        room, last = b.mul(c.vectors(rows), _I64(LANES * bits)), b.sub(rows, _I64(1))
        starts = c.scaled_rows(queries, bits, p, p_stride, scale, zero, rows, spare, room)
        steps = b.sdiv(b.add(rows, _I64(at_once - 1)), _I64(at_once))
        # Where a row has fewer codes, its load ends in rows behind it, but for the last ones.
        short = b.icmp_signed("<", row_bytes, _I64(4 * bits))
        over = b.sdiv(b.add(row_stride, _I64(4 * bits - 1)), row_stride)
        safe = b.select(short, c.greatest(b.sdiv(b.sub(rows, over), _I64(at_once)), _I64(0)), steps)
        sums = [c.sums(by_word) for _ in range(queries)]
        for first in range(0, by_word, in_a_pass):

            def add(step: Any, words: Any, first: int = first) -> None:
                weights = [c.load(spare, b.add(b.mul(_I64(g), room), b.mul(step, _I64(LANES)))) for g in range(queries)]
                for j in range(first, min(first + in_a_pass, by_word)):
                    x = c.code(words, bits, j)
                    for g in range(queries):
                        c.add_product(weights[g], x, sums[g][j])

            with c.times(safe) as step:
                add(step, c.words(codes, row_stride, b.mul(step, _I64(at_once)), last, bits))
            with c.times(b.sub(steps, safe)) as more:
                step = b.add(safe, more)
                add(step, c.words(codes, row_stride, b.mul(step, _I64(at_once)), last, bits, row_bytes))
        for g in range(queries):
            for k, vector in enumerate(c.in_order([b.load(held) for held in sums[g]], bits)):
                to = b.add(b.mul(_I64(g), out_stride), _I64(LANES * k))
                c.store(b.fadd(c.load(out, to), b.fadd(vector, starts[g])), out, to)

    return _intrinsic(11, emit)


@cache
def softmax() -> Any:
    """``(row, count, largest) -> (largest, sum)``: row[t] becomes exp(row[t] - largest), of the row and ``largest``.

    ``count`` is a multiple of eight. The result's ``sum`` is that of the row.
    """

    def emit(c: _Code, row: Any, count: Any, largest: Any) -> Any:
        b = c.b
        steps = b.sdiv(count, _I64(LANES))
        (top,) = c.sums(1, c.splat(largest))
        with c.times(steps) as step:
            b.store(c.greater(c.load(row, b.mul(step, _I64(LANES))), b.load(top)), top)
        most = c.across(b.load(top), c.greater)
        (held,) = c.sums(1)
        with c.times(steps) as step:
            at = b.mul(step, _I64(LANES))
            weight = c.exp(b.fsub(c.load(row, at), most))
            c.store(weight, row, at)
            b.store(b.fadd(weight, b.load(held)), held)
        total = c.across(b.load(held), b.fadd)
        return [b.extract_element(each, _I32(0)) for each in (most, total)]

    return _intrinsic(3, emit, _PAIR, (types.int64, types.int64, types.float32))


@cache
def widen(form: str) -> Any:
    """``(source, target, count)``: stored numbers as float32; ``target`` has room for ``count`` rounded up to eight."""

    def emit(c: _Code, source: Any, target: Any, count: Any) -> None:
        whole, rest = c.split(count)
        with c.times(whole) as step:
            at = c.b.mul(step, _I64(LANES))
            c.store(c.load(source, at, form), target, at)
        with c.b.if_then(c.b.icmp_signed(">", rest, _I64(0))):
            at = c.b.mul(whole, _I64(LANES))
            c.store(c.load(source, at, form, rest), target, at)

    return _intrinsic(3, emit)


@cache
def narrow(form: str) -> Any:
    """``(source, target, count)``: float32 as stored numbers, rounded to nearest."""

    def emit(c: _Code, source: Any, target: Any, count: Any) -> None:
        with c.times(count) as at:
            value = c.b.load(c.pointer(source, at, _FLOAT))
            c.b.store(c.narrowed(value, form), c.pointer(target, at, _STORED[form]))

    return _intrinsic(3, emit)


@cache
def fetch_add() -> Any:
    """``(address, n) -> what was there``: an atomic addition to an int64, before which all writes are seen."""

    def emit(c: _Code, address: Any, n: Any) -> Any:
        return c.b.atomic_rmw("add", c.b.inttoptr(address, _I64.as_pointer()), n, "acq_rel")

    return _intrinsic(2, emit, types.int64)


@cache
def pointer() -> Any:
    """``(address) -> void pointer``, for `numba.carray`."""

    def emit(c: _Code, address: Any) -> Any:
        return c.b.inttoptr(address, _I8.as_pointer())

    return _intrinsic(1, emit, types.voidptr)


class _Code:
    """What the loops are made of. An address is the int64 of an array's first element, an index counts elements."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def times(self, count: Any) -> Any:
        """A loop whose index runs from 0 to ``count`` - 1."""
        return _Times(cgutils.for_range(self.b, count))

    def split(self, count: Any) -> tuple[Any, Any]:
        """How many whole vectors, and how many elements beyond them."""
        return self.b.sdiv(count, _I64(LANES)), self.b.srem(count, _I64(LANES))

    def least(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.icmp_signed("<", x, y), x, y)

    def greatest(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.icmp_signed(">", x, y), x, y)

    def pointer(self, array: Any, index: Any, kind: Any) -> Any:
        return self.b.gep(self.b.inttoptr(array, kind.as_pointer()), [index])

    def splat(self, x: Any, kind: Any = _FLOATS) -> Any:
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), x, _I32(0))
        return self.shuffle(one, one, [0] * LANES)

    def shuffle(self, x: Any, y: Any, lanes: Sequence[int]) -> Any:
        return self.b.shuffle_vector(x, y, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [each.type for each in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        return self.call("llvm.fma.v8f32", _FLOATS, x, y, z)

    def greater(self, x: Any, y: Any) -> Any:
        """The greater of two; NaN if x is."""
        return self.b.select(self.b.fcmp_unordered(">", x, y), x, y)

    def load(self, array: Any, index: Any, form: str = "float32", lanes: Any = None) -> Any:
        """Eight numbers as floats; where ``lanes`` is given, zeros beyond so many, whose memory is not touched."""
        kind = _STORED[form]
        if lanes is not None and form != "float32":
            return self._widened(self._one_by_one(array, index, kind, lanes), form)
        vector = self.b.bitcast(self.pointer(array, index, kind), ir.VectorType(kind, LANES).as_pointer())
        if lanes is None:
            return self._widened(self.b.load(vector, align=FORMATS[form]), form)
        lane = ir.Constant(_INTS, list(range(LANES)))
        there = self.b.icmp_signed("<", lane, self.splat(self.b.trunc(lanes, _I32), _INTS))
        return self.call("llvm.masked.load.v8f32.p0", _FLOATS, vector, _I32(4), there, _ZEROS)

    def _one_by_one(self, array: Any, index: Any, kind: Any, lanes: Any) -> Any:
        """As CPUs mask loads of four bytes only."""
        vector = ir.VectorType(kind, LANES)
        held = cgutils.alloca_once(self.b, vector)
        self.b.store(ir.Constant(vector, None), held)
        with self.times(lanes) as lane:
            one = self.b.load(self.pointer(array, self.b.add(index, lane), kind))
            self.b.store(self.b.insert_element(self.b.load(held), one, self.b.trunc(lane, _I32)), held)
        return self.b.load(held)

    def _widened(self, x: Any, form: str) -> Any:
        if form == "float32":
            return x
        if form == "float16":
            return self.b.fpext(x, _FLOATS)
        return self.b.bitcast(self.b.shl(self.b.zext(x, _INTS), self.splat(_I32(16), _INTS)), _FLOATS)

    def narrowed(self, x: Any, form: str) -> Any:
        """A float as it is stored."""
        if form == "float32":
            return x
        if form == "float16":
            return self.b.fptrunc(x, _STORED[form])
        bits = self.b.bitcast(x, _I32)  # to nearest, ties to even; NaN stays NaN
        odd = self.b.and_(self.b.lshr(bits, _I32(16)), _I32(1))
        near = self.b.lshr(self.b.add(bits, self.b.add(odd, _I32(0x7FFF))), _I32(16))
        nan = self.b.or_(self.b.lshr(bits, _I32(16)), _I32(0x40))
        return self.b.trunc(self.b.select(self.b.fcmp_unordered("uno", x, x), nan, near), _I16)

    def one(self, array: Any, index: Any) -> Any:
        """A float, in all lanes."""
        return self.splat(self.b.load(self.pointer(array, index, _FLOAT)))

    def store(self, x: Any, array: Any, index: Any) -> None:
        to = self.b.bitcast(self.pointer(array, index, _FLOAT), _FLOATS.as_pointer())
        self.b.store(x, to, align=4)

    def sums(self, count: int, start: Any = _ZEROS) -> list[Any]:
        """Vectors to sum into, which LLVM holds in registers."""
        held = [cgutils.alloca_once(self.b, _FLOATS) for _ in range(count)]
        for each in held:
            self.b.store(start, each)
        return held

    def add_product(self, x: Any, y: Any, held: Any) -> None:
        self.b.store(self.fma(x, y, self.b.load(held)), held)

    def across(self, x: Any, join: Callable[[Any, Any], Any]) -> Any:
        """All lanes joined, in every lane."""
        for lanes in ([4, 5, 6, 7, 0, 1, 2, 3], [2, 3, 0, 1, 6, 7, 4, 5], [1, 0, 3, 2, 5, 4, 7, 6]):
            x = join(x, self.shuffle(x, x, lanes))
        return x

    def lane_sums(self, vectors: Sequence[Any]) -> Any:
        """Lane i: the sum over the lanes of vector i, of eight."""
        steps = (
            ([0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
            ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
            ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
        )
        for low, high in steps:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self.b.fadd(self.shuffle(x, y, low), self.shuffle(x, y, high)) for x, y in pairs]
        return vectors[0]

    def vectors(self, count: Any) -> Any:
        """How many vectors hold so many elements."""
        return self.b.sdiv(self.b.add(count, _I64(LANES - 1)), _I64(LANES))

    def scaled_rows(
        self,
        queries: int,
        bits: int,
        p: Any,
        p_stride: Any,
        scale: Any,
        zero: Any,
        rows: Any,
        spare: Any,
        room: Any,
    ) -> list[Any]:
        """Write p[g, r] scale[r] 2^bits, each ``bits`` times, and zeros beyond the last row; returns
        sum_r p[g, r] (zero[r] - scale[r] 2^bits), in all lanes."""
        b, span = self.b, self.splat(_FLOAT(2.0**bits))
        held = [self.sums(1)[0] for _ in range(queries)]

        def write(at: Any, lanes: Any = None) -> None:
            by = b.fmul(self.load(scale, at, lanes=lanes), span)
            plus = b.fsub(self.load(zero, at, lanes=lanes), by)
            for g in range(queries):
                x = self.load(p, b.add(b.mul(_I64(g), p_stride), at), lanes=lanes)
                self.add_product(x, plus, held[g])
                product, to = b.fmul(x, by), b.add(b.mul(_I64(g), room), b.mul(at, _I64(bits)))
                for k in range(bits):
                    each = self.shuffle(product, product, [(LANES * k + lane) // bits for lane in range(LANES)])
                    self.store(each, spare, b.add(to, _I64(LANES * k)))

        whole, rest = self.split(rows)
        with self.times(whole) as step:
            write(b.mul(step, _I64(LANES)))
        with b.if_then(b.icmp_signed(">", rest, _I64(0))):
            write(b.mul(whole, _I64(LANES)), rest)
        return [self.across(b.load(each), b.fadd) for each in held]

    def words(self, codes: Any, row_stride: Any, row: Any, last: Any, bits: int, row_bytes: Any = None) -> Any:
        """The codes of as many rows as fill a vector of 32-bit words, from ``row`` on; no row lies beyond ``last``."""
        b, kind, parts = self.b, ir.VectorType(_I32, bits), []
        for k in range(LANES // bits):
            at = b.mul(self.least(b.add(row, _I64(k)), last), row_stride)
            if row_bytes is None:
                vector = b.bitcast(self.pointer(codes, at, _I8), kind.as_pointer())
                parts.append(b.load(vector, align=1))
                continue
            held = cgutils.alloca_once(b, kind)
            b.store(ir.Constant(kind, None), held)
            to = b.bitcast(held, _I8.as_pointer())
            with self.times(row_bytes) as byte:
                b.store(b.load(self.pointer(codes, b.add(at, byte), _I8)), b.gep(to, [byte]))
            parts.append(b.load(held))
        while len(parts) > 1:
            lanes = list(range(2 * parts[0].type.count))
            parts = [self.shuffle(x, y, lanes) for x, y in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def code(self, words: Any, bits: int, j: int) -> Any:
        """1 + c / 2^bits for code j of each word, c."""
        up = 23 - bits - j * bits  # to the top of the mantissa
        code = (
            self.b.shl(words, self.splat(_I32(up), _INTS))
            if up >= 0
            else self.b.lshr(words, self.splat(_I32(-up), _INTS))
        )
        code = self.b.and_(code, self.splat(_I32((2**bits - 1) << (23 - bits)), _INTS))
        return self.b.bitcast(self.b.or_(code, self.splat(_I32(0x3F800000), _INTS)), _FLOATS)

    def in_order(self, sums: Sequence[Any], bits: int) -> list[Any]:
        """Sums over the rows of a vector of 32 codes each, in their order: four vectors.

        Lane ``bits k + d`` of sums[j] is the sum of code j of word d of the rows that came k-th.
        """
        low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        found = list(sums)
        if bits < 8:  # two halves of rows: j and j + half side by side
            half = len(found) // 2
            pairs = zip(found[:half], found[half:], strict=True)
            found = [self.b.fadd(self.shuffle(x, y, low), self.shuffle(x, y, high)) for x, y in pairs]
        if bits == 2:  # two rows within each half
            pairs = zip(found[:4], found[4:], strict=True)
            first, second = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
            found = [self.b.fadd(self.shuffle(x, y, first), self.shuffle(x, y, second)) for x, y in pairs]
        w, x, y, z = found
        near = [self.shuffle(w, x, [0, 8, 1, 9, 4, 12, 5, 13]), self.shuffle(y, z, [0, 8, 1, 9, 4, 12, 5, 13])]
        far = [self.shuffle(w, x, [2, 10, 3, 11, 6, 14, 7, 15]), self.shuffle(y, z, [2, 10, 3, 11, 6, 14, 7, 15])]
        t = [
            self.shuffle(one, other, lanes)  # lane i of w, x, y, z, in both halves
            for one, other in (near, far)
            for lanes in ([0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15])
        ]
        if bits == 4:
            return t
        order = [(t[0], t[1], low), (t[2], t[3], low), (t[0], t[1], high), (t[2], t[3], high)]
        if bits == 2:
            order = [(t[0], t[2], low), (t[0], t[2], high), (t[1], t[3], low), (t[1], t[3], high)]
        return [self.shuffle(*each) for each in order]

    def exp(self, x: Any) -> Any:
        """e^x for x <= 0: relative error below 3e-7, 0 below e^-87."""
        lowest = self.splat(_FLOAT(-126.0))
        t = self.greater(self.b.fmul(x, self.splat(_FLOAT(1.4426950408889634))), lowest)
        whole = self.call("llvm.rint.v8f32", _FLOATS, t)
        part, y = self.b.fsub(t, whole), self.splat(_FLOAT(_EXP2[-1]))
        for coefficient in _EXP2[-2::-1]:
            y = self.fma(y, part, self.splat(_FLOAT(coefficient)))
        power = self.b.add(self.b.fptosi(whole, _INTS), self.splat(_I32(127), _INTS))
        y = self.b.fmul(y, self.b.bitcast(self.b.shl(power, self.splat(_I32(23), _INTS)), _FLOATS))
        return self.b.select(self.b.fcmp_ordered("<=", t, lowest), _ZEROS, y)


class _Times:
    """`cgutils.for_range` that gives the index alone."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def __enter__(self) -> Any:
        return self._loop.__enter__().index

    def __exit__(self, *about: Any) -> Any:
        return self._loop.__exit__(*about)


def _intrinsic(arguments: int, emit: Callable[..., Any], result: Any = types.void, kinds: Sequence[Any] = ()) -> Any:
    """An intrinsic of so many int64, or of ``kinds``, whose code ``emit`` writes."""
    signature = result(*(kinds or [types.int64] * arguments))

    def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        made = emit(_Code(builder), *values)
        if result is types.void:
            return context.get_dummy_value()
        return context.make_tuple(builder, result, made) if isinstance(made, list) else made

    def loop(typing: Any, *arguments: Any) -> Any:
        return signature, codegen

    # numba fits a call to what inspect says of the function.
    names = ["typing", *(f"argument_{i}" for i in range(len(signature.args)))]
    places = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
    loop.__signature__ = inspect.Signature(places)  # type: ignore[attr-defined]
    return intrinsic(loop)
