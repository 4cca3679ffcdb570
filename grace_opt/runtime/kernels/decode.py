"""One decoded token on a CPU: what a thread does for a task, compiled by numba (`cpu_program` describes the task).

A task has an item for each row of the batch, KV head and *piece*, a share of the tokens. Threads take items from a
counter until none is left, so a thread that is held up delays its own item only. An item asks its tokens, takes their
softmax and sums their values, tile by tile; whoever ends the last item of a head joins its pieces (split-KV), reads the
dropped channels out and writes the output. The item of the last piece also stores the new token.

Over 400 lines: the parts of one compiled function are read together.

The functions from `_work` on use names that `compiled` binds: the loops of `vectors` for one format, and how many
queries these take at a time.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba as _numba
import numpy as np
from numba.core import caching as _caching

from grace_opt.runtime.kernels import vectors

_LOG = logging.getLogger("grace_opt")
_COMPILED: list[Any] = []
numba: Any = _numba  # typed in part
caching: Any = _caching
_FASTMATH = {"reassoc", "contract", "nsz"}  # sums in any order; NaN and infinity as they are
TILE = 128  # tokens that are asked at a time: their scores stay in the first-level cache

# All are int64; an address is that of row 0 and head 0, strides over rows and heads are bytes.
SIDE = np.dtype([(name, np.int64) for name in (
    *("width", "residual"),  # numbers of a row, and of what a whole token has beside it
    *("own", "order"),  # own: 1 where each row of the batch has one
    *("fitted", "matrix", "constant"),  # fitted: the same
    *("new", "new_batch", "new_head"),  # the new token as it came; 0: it is stored already
    *("row", "row_batch", "row_head", "rest", "rest_batch", "rest_head"),  # where it goes
)])  # fmt: skip
SEGMENT = np.dtype([(name, np.int64) for name in (  # tokens in a row, of one row of the batch; packed ones in blocks
    *("tokens", "packed", "column"),  # column: of the first one in `bias`
    *("keys", "keys_head", "keys_row", "values", "values_head", "values_row"),  # rows or codes; _row: in elements
    *("key_scale", "key_zero", "key_scale_head", "value_scale", "value_zero", "value_scale_head"),
    *("key_rest", "key_rest_head", "value_rest", "value_rest_head"),  # residuals, dense; 0: none
)])  # fmt: skip
TASK = np.dtype([
    *((name, np.int64) for name in (
        *("next", "items", "pieces", "heads", "group", "queries"),  # queries: of a group, up to whole passes
        *("segments", "segment_count", "scratch", "scratch_floats", "done"),
        *("query", "query_batch", "query_head", "out", "out_batch", "out_head", "bias", "bias_batch"),
    )),
    ("scaling", np.float64), ("key", SIDE), ("value", SIDE),
])  # fmt: skip


def queries_at_a_time(group: int) -> int:
    """Of the queries of a KV head: few passes, each of them short."""
    return min((1, 2, 3, 4), key=lambda many: -(-group // many) * (many + 1))


def padded_queries(group: int) -> int:
    """Queries of a KV head, up to whole passes."""
    return _up(group, queries_at_a_time(group))


def _up(count: int, multiple: int) -> int:
    return (count + multiple - 1) // multiple * multiple


def _partial_floats(queries: int, width: int, residual: int) -> int:
    """float32 that an item leaves for `_join`: largest scores, sums of weights, sums of rows and residuals."""
    return queries * (2 + (width + 31) // 32 * 32 + (residual + 7) // 8 * 8)


up: Any = numba.njit(_up)
partial_floats: Any = numba.njit(_partial_floats)


def scratch_floats(group: int, key: int, value: int) -> int:
    """float32 of memory that an item needs, for keys and values of so many channels."""
    queries, n = padded_queries(group), _up(max(key, value), 32) + 40  # whatever is kept of them
    spare = 4 * n + 64 + 8 * 4 * n  # of a packed block
    return queries * (2 + n) + queries * (TILE + 4 * n) + 8 * n + spare


@cache
def compiled(many: int, form: str, key_bits: int, value_bits: int) -> int:
    """The address of a C function ``void(int64)`` of a task's address; compiled once and cached on disk by numba."""
    names: dict[str, Any] = {
        "MANY": many,
        "ELEMENT": vectors.FORMATS[form],
        "KEY_BITS": key_bits,
        "VALUE_BITS": value_bits,
        "scores": vectors.scores(many, form, False),
        "add_scores": vectors.scores(many, form, True),
        "mix": vectors.mix(many, form),
        "key_mix": vectors.packed_mix(many, key_bits or 8),
        "value_mix": vectors.packed_mix(many, value_bits or 8),
        "softmax": vectors.softmax(),
        "widen": vectors.widen(form),
        "widen_scale": vectors.widen("bfloat16" if form == "bfloat16" else "float16"),
        "narrow": vectors.narrow(form),
        "fetch_add": vectors.fetch_add(),
        "pointer": vectors.pointer(),
    }
    # numba's cache knows a function by its name, its code and its file's time; nothing of what it calls. And whatever
    # has one name in one process is linked as one function, from whichever file of the cache it came first.
    sources = b"".join(Path(each).read_bytes() for each in (__file__, vectors.__file__))
    suffix = f"{many}_{form}_{key_bits}_{value_bits}_{hashlib.sha256(sources).hexdigest()[:12]}"
    parts = (
        _floats,
        _clear,
        _shrink,
        _add,
        _every,
        _gather,
        _scatter,
        _store,
        _ask,
        _ask_block,
        _mix_block,
        _score,
        _weigh,
        _sum,
        _tile,
        _attend,
        _join,
    )
    for part in parts:
        bound = numba.njit(error_model="numpy", fastmath=_FASTMATH, no_cpython_wrapper=True, no_cfunc_wrapper=True)(
            _bound(part, f"{part.__name__}_{suffix}", names)
        )
        names[part.__name__.replace("_floats", "floats")] = bound
    function = _bound(_work, f"work_{suffix}", names)
    folder: str | None = None
    with suppress(RuntimeError):  # none can be written
        folder = str(caching.FunctionCache(function).cache_path)
    if folder is None or not any(Path(folder).glob(f"*{suffix}*.nbi")):
        kept = f"kept in {folder}" if folder else "and again in every process: numba finds no folder to keep it in"
        bits = f", packed bits of keys and values {key_bits} and {value_bits}" if key_bits or value_bits else ""
        _LOG.warning("compiling the CPU kernel for %s%s, once for this machine, %s", form, bits, kept)
    compiled = numba.cfunc("void(int64)", cache=folder is not None)(function)
    _COMPILED.append(compiled)  # what is let go of is unloaded
    return int(compiled.address)


def _bound(function: Any, name: str, names: dict[str, Any]) -> Any:
    """The function under another name, with these names beside those of this module."""
    bound = FunctionType(function.__code__, {**globals(), **names}, name)
    bound.__qualname__ = name
    return bound


# What `compiled` binds: numbers, and the loops of `vectors`.
MANY = ELEMENT = KEY_BITS = VALUE_BITS = 0
scores: Any = None
add_scores: Any = None
mix: Any = None
key_mix: Any = None
value_mix: Any = None
softmax: Any = None
widen: Any = None
widen_scale: Any = None
narrow: Any = None
fetch_add: Any = None
pointer: Any = None
floats: Any = None
carray: Any = numba.carray


def _work(address: int) -> None:
    task = carray(pointer(address), 1, TASK)[0]
    while True:
        item = fetch_add(address, 1)  # task.next
        if item >= task.items:
            return
        head = item // task.pieces
        b, h = head // task.heads, head % task.heads
        _attend(task, item, b, h)
        done = task.done + 8 * head
        if fetch_add(done, 1) == task.pieces - 1:
            fetch_add(done, -task.pieces)  # none are done of the next token
            _join(task, item, b, h)


def _attend(task: Any, item: int, b: int, h: int) -> None:
    """Attention over a share of a head's tokens; leaves what `_join` needs."""
    key, value, piece = task.key, task.value, item % task.pieces
    scratch = task.scratch + 4 * task.scratch_floats * item
    queries = task.queries
    partial = scratch  # largest scores, sums of weights, sums of rows, sums of residuals
    own = scratch + 4 * partial_floats(queries, value.width, value.residual)
    if piece == task.pieces - 1:
        _store(key, task.heads, b, h, own)
        _store(value, task.heads, b, h, own)
    for i, start in ((0, -np.inf), (1, 0.0)):
        _clear(partial + 4 * queries * i, queries, start)
    _clear(partial + 8 * queries, queries * (up(value.width, 32) + up(value.residual, 8)), 0.0)
    _ask(task, b, h, own)
    segments = carray(pointer(task.segments), (b + 1, task.segment_count), SEGMENT)[b]
    tokens = 0
    for s in range(task.segment_count):
        tokens += segments[s].tokens
    low, high, before = tokens * piece // task.pieces, tokens * (piece + 1) // task.pieces, 0
    for s in range(task.segment_count):
        segment = segments[s]
        at, end = max(low - before, 0), min(high - before, segment.tokens)
        if segment.packed:  # a block belongs to the piece in which it begins
            at, end = up(at, 32), up(max(end, 0), 32)
        while at < end:
            count = min(TILE, end - at)
            _tile(task, segment, b, h, at, count, partial, own)
            at += count
        before += segment.tokens


def _tile(task: Any, segment: Any, b: int, h: int, at: int, count: int, partial: int, own: int) -> None:
    """Some tokens of a segment, by online softmax."""
    key, queries = task.key, task.queries
    row = own + 4 * queries * (up(key.width, 8) + up(key.residual, 8))
    spare = row + 4 * queries * TILE
    _score(task, segment, b, h, at, count, own, row, spare)
    _weigh(task.value, queries, count, partial, row)
    _sum(task.value, queries, segment, h, at, count, partial + 8 * queries, row, spare)


def _score(task: Any, segment: Any, b: int, h: int, at: int, count: int, asked: int, row: int, spare: int) -> None:
    """The scores of a tile."""
    key, queries = task.key, task.queries
    wide, outer = up(key.width, 8), up(key.residual, 8)
    outside = asked + 4 * queries * wide
    if KEY_BITS and segment.packed:
        for t in range(0, count, 32):
            _ask_block(segment, h, at + t, key.width, queries, asked, row + 4 * t, spare)
    else:
        stride = segment.keys_row
        keys = segment.keys + h * segment.keys_head + at * stride * ELEMENT
        for g in range(0, queries, MANY):
            scores(asked + 4 * g * wide, wide, keys, stride, key.width, count, row + 4 * g * TILE, TILE)
    if segment.key_rest:
        keys = segment.key_rest + h * segment.key_rest_head + at * key.residual * ELEMENT
        for g in range(0, queries, MANY):
            add_scores(
                outside + 4 * g * outer, outer, keys, key.residual, key.residual, count, row + 4 * g * TILE, TILE
            )
    if task.bias:
        bias = floats(task.bias + b * task.bias_batch + 4 * (segment.column + at), count)
        for g in range(queries):
            each = floats(row + 4 * g * TILE, count)
            for t in range(count):
                each[t] += bias[t]


def _weigh(value: Any, queries: int, count: int, partial: int, row: int) -> None:
    """Weights in place of scores, less the largest one so far, to which all sums are scaled."""
    most, weight = floats(partial, queries), floats(partial + 4 * queries, queries)
    room, inner = up(value.width, 32), up(value.residual, 8)
    total = partial + 8 * queries
    rest = total + 4 * queries * room
    for g in range(queries):
        each = floats(row + 4 * g * TILE, TILE)
        for t in range(count, up(count, 8)):
            each[t] = -np.inf
        largest, added = softmax(row + 4 * g * TILE, up(count, 8), most[g])
        if largest > most[g]:
            shrink = np.float32(np.exp(most[g] - largest))
            weight[g] *= shrink
            _shrink(total + 4 * g * room, room, shrink)
            _shrink(rest + 4 * g * inner, inner, shrink)
            most[g] = largest
        weight[g] += added


def _sum(value: Any, queries: int, segment: Any, h: int, at: int, count: int, total: int, row: int, spare: int) -> None:
    """The sums of a tile's values."""
    room, inner = up(value.width, 32), up(value.residual, 8)
    rest = total + 4 * queries * room
    for g in range(0, queries, MANY):
        weights, to = row + 4 * g * TILE, total + 4 * g * room
        if VALUE_BITS and segment.packed:
            for t in range(0, count, 32):
                _mix_block(segment, h, at + t, value.width, weights + 4 * t, to, spare)
        else:
            stride = segment.values_row
            values = segment.values + h * segment.values_head + at * stride * ELEMENT
            mix(weights, TILE, values, stride, value.width, count, to, room)
        if segment.value_rest:
            values = segment.value_rest + h * segment.value_rest_head + at * value.residual * ELEMENT
            mix(weights, TILE, values, value.residual, value.residual, count, rest + 4 * g * inner, inner)


def _ask_block(segment: Any, h: int, at: int, width: int, queries: int, asked: int, row: int, spare: int) -> None:
    """Scores of a packed block: each channel has a scale."""
    block, wide = at // 32, up(width, 8)
    scales, zeros, scaled = spare, spare + 4 * wide, spare + 8 * wide
    of = h * segment.key_scale_head + block * width * 2
    widen_scale(segment.key_scale + of, scales, width)
    widen_scale(segment.key_zero + of, zeros, width)
    codes = segment.keys + h * segment.keys_head + block * width * 4 * KEY_BITS
    for g in range(0, queries, MANY):
        for i in range(MANY):
            _clear(row + 4 * TILE * (g + i), 32, 0.0)
        key_mix(
            asked + 4 * g * wide, wide, scales, zeros, codes, 4 * KEY_BITS, width, 4 * KEY_BITS,
            row + 4 * g * TILE, TILE, scaled,
        )  # fmt: skip


def _mix_block(segment: Any, h: int, at: int, width: int, weights: int, to: int, spare: int) -> None:
    """Sums of the values of a packed block: each token has a scale for 32 channels."""
    block, groups = at // 32, up(width, 32) // 32
    scales, zeros = spare, spare + 128 * groups
    of = h * segment.value_scale_head + block * groups * 64
    widen_scale(segment.value_scale + of, scales, 32 * groups)
    widen_scale(segment.value_zero + of, zeros, 32 * groups)
    stride = (width * VALUE_BITS + 7) // 8
    codes = segment.values + h * segment.values_head + block * 32 * stride
    scale, zero = zeros + 128 * groups, zeros + 128 * groups + 128
    for i in range(groups):
        if groups == 1:
            scale, zero = scales, zeros
        else:
            _every(scales + 4 * i, groups, scale)
            _every(zeros + 4 * i, groups, zero)
        first = 4 * VALUE_BITS * i
        value_mix(
            weights, TILE, scale, zero, codes + first, stride, 32, min(4 * VALUE_BITS, stride - first),
            to + 128 * i, 32 * groups, spare + 256 * (groups + 1),
        )  # fmt: skip


def _every(source: int, step: int, to: int) -> None:
    """Of 32 steps, one float each."""
    each, target = floats(source, 31 * step + 1), floats(to, 32)
    for t in range(32):
        target[t] = each[t * step]


def _ask(task: Any, b: int, h: int, own: int) -> None:
    """A head's queries as they meet rows and residuals, scaled, the read-out folded in."""
    key, queries = task.key, task.queries
    width, residual, n = key.width, key.residual, key.width + key.residual
    wide, outer = up(width, 8), up(residual, 8)
    outside = own + 4 * queries * wide
    raw = outside + 4 * queries * outer
    _clear(own, queries * (wide + outer), 0.0)
    of, scaling = b * key.own * task.heads + h, np.float32(task.scaling)
    for g in range(task.group):
        widen(task.query + b * task.query_batch + (h * task.group + g) * task.query_head, raw, n)
        _gather(key.order, of, raw, n, 0, own + 4 * g * wide, width, scaling)
        _gather(key.order, of, raw, n, width, outside + 4 * g * outer, residual, scaling)
    if key.matrix:
        matrix = key.matrix + (b * key.fitted * task.heads + h) * residual * width * ELEMENT
        for g in range(0, queries, MANY):
            mix(outside + 4 * g * outer, outer, matrix, width, width, residual, own + 4 * g * wide, wide)


def _store(side: Any, heads: int, b: int, h: int, own: int) -> None:
    """Store the row of the new token, and its residual."""
    if not side.new:
        return
    width, residual, n = side.width, side.residual, side.width + side.residual
    wide, outer, of = up(width, 8), up(residual, 8), b * side.own * heads + h
    raw, row, left = own, own + 4 * up(n, 8), own + 4 * (up(n, 8) + MANY * wide)
    estimates, fit = left + 4 * outer, b * side.fitted * heads + h
    widen(side.new + b * side.new_batch + h * side.new_head, raw, n)
    _clear(row, MANY * wide, 0.0)
    _gather(side.order, of, raw, n, 0, row, width, np.float32(1))
    narrow(row, side.row + b * side.row_batch + h * side.row_head, width)
    if not residual:
        return
    _gather(side.order, of, raw, n, width, left, residual, np.float32(1))
    if side.constant:
        widen(side.constant + fit * residual * ELEMENT, estimates, residual)
        if side.matrix:
            matrix = side.matrix + fit * residual * width * ELEMENT
            add_scores(row, wide, matrix, width, width, residual, estimates, outer)
        rest, estimate = floats(left, residual), floats(estimates, residual)
        for c in range(residual):
            rest[c] -= estimate[c]
    narrow(left, side.rest + b * side.rest_batch + h * side.rest_head, residual)


def _join(task: Any, item: int, b: int, h: int) -> None:
    """The outputs of a head, from its pieces."""
    value, queries = task.value, task.queries
    width, residual, n = value.width, value.residual, value.width + value.residual
    room, inner = up(width, 32), up(residual, 8)
    size = task.scratch_floats
    first = task.scratch + 4 * size * (b * task.heads + h) * task.pieces
    total = task.scratch + 4 * size * item + 4 * partial_floats(queries, width, residual)
    rest, estimates = total + 4 * queries * room, total + 4 * queries * (room + inner)
    full = estimates + 4 * inner
    _clear(total, queries * (room + inner), 0.0)
    pieces = carray(pointer(first), (task.pieces, size), np.float32)
    for g in range(task.group):
        most, weight = np.float32(-np.inf), np.float32(0)
        for p in range(task.pieces):
            most = max(most, pieces[p, g])
        for p in range(task.pieces):
            if pieces[p, queries + g] != 0:  # a piece may have had no tokens
                share = np.float32(np.exp(pieces[p, g] - most))
                weight += share * pieces[p, queries + g]
                _add(first + 4 * (size * p + 2 * queries + g * room), width, share, total + 4 * g * room)
                at = first + 4 * (size * p + 2 * queries + queries * room + g * inner)
                _add(at, residual, share, rest + 4 * g * inner)
        share = np.float32(1) / weight if weight > 0 else np.float32(0)  # padding alone
        _shrink(total + 4 * g * room, width, share)
        _shrink(rest + 4 * g * inner, residual, share)
    of, fit = b * value.own * task.heads + h, b * value.fitted * task.heads + h
    if value.matrix:
        matrix = value.matrix + fit * residual * width * ELEMENT
        for g in range(0, queries, MANY):
            add_scores(total + 4 * g * room, room, matrix, width, width, residual, rest + 4 * g * inner, inner)
    if value.constant:
        widen(value.constant + fit * residual * ELEMENT, estimates, residual)
    for g in range(task.group):
        if value.constant:
            _add(estimates, residual, np.float32(1), rest + 4 * g * inner)
        _scatter(value.order, of, total + 4 * g * room, width, rest + 4 * g * inner, residual, full)
        narrow(full, task.out + b * task.out_batch + (h * task.group + g) * task.out_head, n)


def _gather(order: int, of: int, raw: int, n: int, low: int, to: int, count: int, by: Any) -> None:
    """The channels order[low : low + count], times ``by``; without an order, as they come."""
    source, target = floats(raw, n), floats(to, count)
    if order:
        channels = carray(pointer(order + 8 * n * of), n, np.int64)
        for c in range(count):
            target[c] = source[channels[low + c]] * by
    else:
        for c in range(count):
            target[c] = source[low + c] * by


def _scatter(order: int, of: int, kept: int, width: int, rest: int, residual: int, to: int) -> None:
    """Channels where they belong."""
    first, last, target = floats(kept, width), floats(rest, residual), floats(to, width + residual)
    if order:
        channels = carray(pointer(order + 8 * (width + residual) * of), width + residual, np.int64)
        for c in range(width):
            target[channels[c]] = first[c]
        for c in range(residual):
            target[channels[width + c]] = last[c]
    else:
        for c in range(width):
            target[c] = first[c]
        for c in range(residual):
            target[width + c] = last[c]


def _clear(at: int, count: int, start: Any) -> None:
    each = floats(at, count)
    for c in range(count):
        each[c] = start


def _shrink(at: int, count: int, by: Any) -> None:
    each = floats(at, count)
    for c in range(count):
        each[c] *= by


def _add(source: int, count: int, by: Any, to: int) -> None:
    each, total = floats(source, count), floats(to, count)
    for c in range(count):
        total[c] += by * each[c]


def _floats(at: int, count: int) -> Any:
    return carray(pointer(at), count, np.float32)
