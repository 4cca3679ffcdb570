"""The loops of `grace_opt.compression.integers` over large float32 tensors on a CPU, compiled by numba.

Bit for bit what torch's operations give: multiplications and additions are not contracted, divisions are divisions.
"""

from __future__ import annotations

from typing import Any

import numba as _numba
import numpy as np

numba: Any = _numba  # typed in part
_BEYOND = np.int32(0x477FE000)  # the bits of 65504.0


_ROUND = np.float32(
    3 << 22
)  # added to a float32 from 0 to 2^22, its low bits are the nearest whole number, even on ties


def _compiled(function: Any, fastmath: Any = False) -> Any:
    options = {"nogil": True, "error_model": "numpy", "fastmath": fastmath}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # numba found no folder for its cache
        return numba.njit(function, **options)


def _extremes(function: Any) -> Any:
    """Compiled as if there were no NaN, so that LLVM finds vectors; those there are count as bad by their bits."""
    return _compiled(function, {"nnan", "nsz", "reassoc"})


@_extremes
def channel_extremes(x: Any, group: int, low: Any, high: Any) -> int:
    """Least and largest of each channel in groups of tokens: x [N, T, d] -> low, high [N, d, G].

    Returns how many elements are not finite or beyond 65504; the extremes mean nothing if there are any.
    """
    blocks, tokens, width = x.shape
    bits = x.view(np.int32)
    least, most = np.empty(width, np.float32), np.empty(width, np.float32)
    bad = 0
    for n in range(blocks):
        for g in range(low.shape[2]):
            begin, end = g * group, min(tokens, g * group + group)
            least[:], most[:] = x[n, begin], x[n, begin]
            for t in range(begin, end):
                row, held, wrong = x[n, t], bits[n, t], 0
                for c in range(width):
                    value = row[c]
                    least[c] = value if value < least[c] else least[c]
                    most[c] = value if value > most[c] else most[c]
                    wrong += (held[c] & 0x7FFFFFFF) > _BEYOND
                bad += wrong
            for c in range(width):
                low[n, c, g], high[n, c, g] = least[c], most[c]
    return bad


@_extremes
def token_extremes(x: Any, group: int, low: Any, high: Any) -> int:
    """The same in groups of channels of a token: low, high [N, T, G]."""
    blocks, tokens, width = x.shape
    bits = x.view(np.int32)
    bad = 0
    for n in range(blocks):
        for t in range(tokens):
            for g in range(low.shape[2]):
                begin, end = g * group, min(width, g * group + group)
                least, most = x[n, t, begin], x[n, t, begin]
                for c in range(begin, end):
                    value = x[n, t, c]
                    least = value if value < least else least
                    most = value if value > most else most
                    bad += (bits[n, t, c] & 0x7FFFFFFF) > _BEYOND
                low[n, t, g], high[n, t, g] = least, most
    return bad


@_compiled
def channel_codes(x: Any, zero: Any, scale: Any, bits: int, group: int, codes: Any) -> None:
    """Codes of x [N, T, d] by zero and scale [N, d, G], packed along tokens: uint8 [N, d, ceil(T bits / 8)]."""
    blocks, tokens, width = x.shape
    top = np.float32(2**bits - 1)
    held = np.zeros((width, tokens + 8), np.uint8)
    bottom, step = np.empty(width, np.float32), np.empty(width, np.float32)
    line = np.empty(width, np.float32)
    rounded = line.view(np.int32)
    for n in range(blocks):
        for g in range(zero.shape[2]):
            for c in range(width):
                bottom[c] = zero[n, c, g]
                step[c] = scale[n, c, g] if scale[n, c, g] > 0 else np.float32(1)
            for t in range(g * group, min(tokens, g * group + group)):
                row = x[n, t]
                for c in range(width):
                    code = (row[c] - bottom[c]) / step[c]
                    code = code if code > 0 else np.float32(0)
                    line[c] = (code if code < top else top) + _ROUND
                for c in range(width):
                    held[c, t] = np.uint8(rounded[c] & 255)
        for c in range(width):
            _pack(held[c], tokens, bits, codes[n, c])


@_compiled
def token_codes(x: Any, zero: Any, scale: Any, bits: int, group: int, codes: Any) -> None:
    """The same by zero and scale [N, T, G], packed along channels: uint8 [N, T, ceil(d bits / 8)]."""
    blocks, tokens, width = x.shape
    top = np.float32(2**bits - 1)
    held = np.zeros(width + 8, np.uint8)
    line = np.empty(width, np.float32)
    rounded = line.view(np.int32)
    for n in range(blocks):
        for t in range(tokens):
            row = x[n, t]
            for g in range(zero.shape[2]):
                bottom, step = zero[n, t, g], scale[n, t, g]
                step = step if step > 0 else np.float32(1)
                for c in range(g * group, min(width, g * group + group)):
                    code = (row[c] - bottom) / step
                    code = code if code > 0 else np.float32(0)
                    line[c] = (code if code < top else top) + _ROUND
            for c in range(width):
                held[c] = np.uint8(rounded[c] & 255)
            _pack(held, width, bits, codes[n, t])


@_compiled
def channel_values(codes: Any, zero: Any, scale: Any, bits: int, group: int, limit: float, x: Any) -> None:
    """x [N, T, d] of what `channel_codes` made, clamped to +-limit."""
    blocks, tokens, width = x.shape
    held = np.empty((width, tokens + 8), np.uint8)
    bottom, step = np.empty(width, np.float32), np.empty(width, np.float32)
    line = np.empty(width, np.float32)
    most = np.float32(limit)
    for n in range(blocks):
        for c in range(width):
            _unpack(codes[n, c], tokens, bits, held[c])
        for g in range(zero.shape[2]):
            for c in range(width):
                bottom[c], step[c] = zero[n, c, g], scale[n, c, g]
            for t in range(g * group, min(tokens, g * group + group)):
                row = x[n, t]
                for c in range(width):
                    line[c] = np.float32(held[c, t])
                for c in range(width):
                    value = line[c] * step[c] + bottom[c]
                    value = value if value < most else most
                    row[c] = value if value > -most else -most


@_compiled
def token_values(codes: Any, zero: Any, scale: Any, bits: int, group: int, limit: float, x: Any) -> None:
    """x [N, T, d] of what `token_codes` made, clamped to +-limit."""
    blocks, tokens, width = x.shape
    held = np.empty(width + 8, np.uint8)
    most = np.float32(limit)
    for n in range(blocks):
        for t in range(tokens):
            _unpack(codes[n, t], width, bits, held)
            for g in range(zero.shape[2]):
                bottom, step = zero[n, t, g], scale[n, t, g]
                for c in range(g * group, min(width, g * group + group)):
                    value = np.float32(held[c]) * step + bottom
                    value = value if value < most else most
                    x[n, t, c] = value if value > -most else -most


@_compiled
def _pack(held: Any, length: int, bits: int, out: Any) -> None:
    """Codes uint8 [length + 8] into bytes [ceil(length bits / 8)]."""
    held[length : length + 8] = 0
    if bits == 8:
        out[:] = held[:length]
    elif bits == 4:
        for i in range(len(out)):
            out[i] = held[2 * i] | held[2 * i + 1] << 4
    elif bits == 2:
        for i in range(len(out)):
            out[i] = held[4 * i] | held[4 * i + 1] << 2 | held[4 * i + 2] << 4 | held[4 * i + 3] << 6
    else:
        for i in range(0, len(out), 3):
            word, at = np.int32(0), 8 * (i // 3)
            for k in range(8):
                word |= np.int32(held[at + k]) << (3 * k)
            for k in range(min(3, len(out) - i)):
                out[i + k] = np.uint8(word >> (8 * k) & 255)


@_compiled
def _unpack(packed: Any, length: int, bits: int, held: Any) -> None:
    """The inverse; what lies beyond ``length`` is undefined."""
    if bits == 8:
        held[:length] = packed
    elif bits == 4:
        for i in range(len(packed)):
            held[2 * i], held[2 * i + 1] = packed[i] & 15, packed[i] >> 4
    elif bits == 2:
        for i in range(len(packed)):
            byte = packed[i]
            held[4 * i], held[4 * i + 1], held[4 * i + 2], held[4 * i + 3] = (
                byte & 3,
                byte >> 2 & 3,
                byte >> 4 & 3,
                byte >> 6,
            )
    else:
        for i in range(0, len(packed), 3):
            word, at = np.int32(0), 8 * (i // 3)
            for k in range(min(3, len(packed) - i)):
                word |= np.int32(packed[i + k]) << (8 * k)
            for k in range(8):
                held[at + k] = np.uint8(word >> (3 * k) & 7)
