"""Attention of one decoded token over a compressed cache: a split-KV kernel in Triton.

One file over 400 lines: the kernels and the host code that fills their arguments are read together.

Importing this module needs Triton. The tokens are cut into splits, so that a small batch fills the device too
(Flash-Decoding, Dao et al., 2023). One program reads one split of one KV head for all of its query heads, so each key
and each value is read once. It writes a maximum, a sum and a weighted sum of values for each query head; a second
kernel merges them. Nothing here waits for the device, and nothing is recompiled as the cache grows.
"""

# Triton is untyped, and allows no annotations of its kernels but its own.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grace_opt.compression.integers import Packed
from grace_opt.errors import InputError

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
_GROUP = 32  # tokens of a block of packed integers, and elements that share a scale
_LOG2_E = tl.constexpr(1.4426950408889634)
_WIDEN = tl.constexpr(_INTERPRETED)  # the interpreter multiplies the bits of bfloat16 as integers


@dataclass(frozen=True, eq=False)
class Tokens:
    """How one kind (keys or values) of B x H heads of one width d is stored, for T tokens.

    Attributes:
        kept: [B, H, >= T - 32 N, d], floating-point, the last dimension contiguous: tokens from 32 N on.
        rows: [B, H, S + R, e], the dtype of ``kept``, the last dimension contiguous: residual rows of whole tokens,
            first the S sinks, then the last R tokens. e may be 0.
        packed: the first 32 N tokens: `quantise` of [B, H, N, 32, d] in groups of 32, axis ``channel`` for keys and
            ``token`` for values, 2, 4 or 8 bits. All dense but for dimensions 0 to 2. None: N = 0.

    The kernel loads 16 bytes at a time if d, e and the strides are multiples of 8 in half precision (4 in float32);
    other widths take narrower loads.
    """

    kept: Tensor
    rows: Tensor
    packed: Packed | None = None


def available(tensor: Tensor) -> bool:
    """Whether the kernel can run on this tensor's device: CUDA from compute capability 8.0 on, or interpreted."""
    return _INTERPRETED or (tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) >= (8, 0))


def decode(
    query: Tensor,
    query_rows: Tensor,
    keys: Tokens,
    values: Tokens,
    length: int | Tensor,
    sinks: int,
    first: Tensor | None,
    mask: Tensor | None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The softmax-weighted sums of the kept channels of all T values and of the residual rows of whole tokens.

    The query is at position T - 1. The score of token t is query . kept_t + query_rows . row(t) + mask_t, where row(t)
    is the residual row of a whole token and 0 for all others. Whole are the last R tokens and, where these do not
    reach, the S sinks first[b] to first[b] + S - 1.

    Args:
        query: [B, H, G, dk] for H KV heads of G query heads each, scaled already.
        query_rows: [B, H, G, ek], what meets the residual rows of keys.
        keys, values: on the query's device, with equal S + R, and in the dtype that the products are made in.
        length: T; or an integer tensor of one element on the device, for buffers of a fixed size. What lies beyond T
            is not read. If T < R in a tensor, the first R - T rows of the window are unused.
        sinks: S.
        first: int64[B], the position of each row's first sink; None if S = 0.
        mask: [B or 1, >= T]: bool, true for a token that is seen, or floating-point, added to the scores.
            None: all are seen.
        splits: how many parts the tokens are cut into, at least 1; None: as many as fill the device.

    Returns:
        [B, H, G, dv] and [B, H, G, ev] in the query's dtype, views of one tensor. Zeros where a query sees no token.
        All sums are in float32. The weight of a masked token is 0, but its value must be finite.

    Raises:
        InputError: for packed integers of 3 bits, of groups other than 32, or of another axis; for sinks without
            ``first``; for tensors whose last dimension is not contiguous; for residual rows of other tokens in keys
            than in values; for a mask or window that does not fit T, if T is an int.
    """
    batch, heads, group, dk = query.shape
    dv, ek, ev = values.kept.shape[3], keys.rows.shape[3], values.rows.shape[3]
    recent = keys.rows.shape[2] - sinks
    _check(keys, values, length, recent, sinks, first, mask)
    key_arguments, key_units, key_bits = _arguments(keys)
    value_arguments, value_units, value_bits = _arguments(values)
    # A block of packed values holds whole groups of 32 channels; tl.dot takes no dimension below 16.
    block_dk = max(16, triton.next_power_of_2(dk))
    block_dv = max(_GROUP if value_bits else 16, triton.next_power_of_2(dv))
    # For an H100: tiles of 16 to 32 KiB, num_stages - 1 of them on the way by cp.async. Registers and shared memory
    # hold two or three such programs a multiprocessor, so some 100 KiB are on the way there; the product of its
    # bandwidth and latency is about 20 KiB. Packed tiles are smaller, so there are more of them. 16 padded query heads
    # are one row of tensor-core tiles, which leaves no work to more than 4 warps. Longer tiles of 8 bits spill.
    small = (block_dk + block_dv) * keys.kept.element_size() <= 512 and 8 not in (key_bits, value_bits)
    block = 64 if small else 32
    programs = batch * heads
    if splits is None:
        capacity = _held(keys) if isinstance(length, Tensor) else length
        splits = _default_splits(programs, capacity, block, query.device)

    width = dv + ev
    stats = torch.empty(programs * group, splits, 2, dtype=torch.float32, device=query.device)
    partial = torch.empty(programs * group, splits, width, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, heads, group, width, dtype=query.dtype, device=query.device)
    if mask is not None:
        mask = mask if mask.stride(1) == 1 else mask.contiguous()
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        _attend[(programs, splits)](
            query.contiguous(),
            query_rows.contiguous(),
            *key_arguments,
            *value_arguments,
            first,
            mask,
            0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
            length,
            stats,
            partial,
            heads,
            group,
            sinks,
            recent,
            dk // key_units[0],
            ek // key_units[1],
            dv // value_units[0],
            ev // value_units[1],
            ON_DEVICE=isinstance(length, Tensor),
            ADDITIVE=mask is not None and mask.dtype != torch.uint8,
            K_BITS=key_bits,
            V_BITS=value_bits,
            K_UNIT=key_units[0],
            K_ROW_UNIT=key_units[1],
            K_CODE_UNIT=key_units[2],
            V_UNIT=value_units[0],
            V_ROW_UNIT=value_units[1],
            V_CODE_UNIT=value_units[2],
            G=max(16, triton.next_power_of_2(group)),
            N=block,
            DK=block_dk,
            EK=max(16, triton.next_power_of_2(ek)) if ek else 0,
            DV=block_dv,
            EV=max(16, triton.next_power_of_2(ev)) if ev else 0,
            num_warps=4,
            num_stages=4 if key_bits or value_bits else 3,
        )
        _merge[(programs * group,)](
            stats, partial, out, splits, width, CHUNK=16, WIDTH=triton.next_power_of_2(width), num_warps=4
        )
    return out[..., :dv], out[..., dv:]


@torch.library.custom_op("grace_opt::decode", mutates_args=())
def compiled_decode(
    query: Tensor,
    query_rows: Tensor,
    keys: Tensor,
    key_rows: Tensor,
    values: Tensor,
    value_rows: Tensor,
    length: Tensor,
    sinks: int,
    first: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`decode` over preallocated tokens, as one operation that torch.compile does not look into: [B, H, G, dv + ev]."""
    both = decode(query, query_rows, Tokens(keys, key_rows), Tokens(values, value_rows), length, sinks, first, mask)
    return torch.cat(both, dim=-1)


@compiled_decode.register_fake
def _(
    query: Tensor,
    query_rows: Tensor,
    keys: Tensor,
    key_rows: Tensor,
    values: Tensor,
    value_rows: Tensor,
    length: Tensor,
    sinks: int,
    first: Tensor,
    mask: Tensor | None,
) -> Tensor:
    return query.new_empty(*query.shape[:3], values.shape[3] + value_rows.shape[3])


def _check(
    keys: Tokens,
    values: Tokens,
    length: int | Tensor,
    recent: int,
    sinks: int,
    first: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Raise `InputError` for what the kernel would read wrongly, as far as the host knows without waiting."""
    for name, tokens, axis in (("keys", keys, "channel"), ("values", values, "token")):
        if any(each.shape[3] > 1 and each.stride(3) != 1 for each in (tokens.kept, tokens.rows)):
            raise InputError(f"the channels of one token of {name} must lie side by side in memory")
        if (packed := tokens.packed) is None:
            continue
        if (packed.bits, packed.group, packed.axis) not in ((bits, _GROUP, axis) for bits in (2, 4, 8)):
            raise InputError(
                f"the kernel reads {name} as integers of 2, 4 or 8 bits in groups of {_GROUP} along axis {axis!r}, got "
                f"{packed.bits} bits, groups of {packed.group}, {packed.axis!r}; unpack them"
            )
        if packed.scale.stride() != packed.zero.stride():
            raise InputError(f"scales and zeros of {name} must have equal strides")
    if keys.rows.shape[2] != values.rows.shape[2]:
        raise InputError(
            f"keys and values must have residual rows of the same tokens, got {keys.rows.shape[2]} and "
            f"{values.rows.shape[2]}"
        )
    if sinks and first is None:
        raise InputError("sinks need the position of each row's first one; give first")
    if isinstance(length, Tensor):
        return
    held = min(_held(keys), _held(values), length if mask is None else mask.shape[1])
    if length > held or recent > length:
        raise InputError(
            f"keys, values and mask must hold all {length} tokens and the window no more; they hold {held}, and the "
            f"window {recent}"
        )


def _packed_tokens(tokens: Tokens) -> int:
    return 0 if tokens.packed is None else _GROUP * tokens.packed.codes.shape[2]


def _held(tokens: Tokens) -> int:
    return _packed_tokens(tokens) + tokens.kept.shape[2]


def _arguments(tokens: Tokens) -> tuple[tuple[Any, ...], tuple[int, int, int], int]:
    """Tensors and strides for `_attend`, the unit of kept channels, rows and codes, and the bits.

    A stride that Triton may not specialise on could be odd for all it knows, and its loads would be of one element. So
    widths and strides are passed in a unit that is part of the kernel: the largest power of two that divides them all,
    16 bytes at most.
    """
    kept, rows, packed = tokens.kept, tokens.rows, tokens.packed
    arguments: list[Any] = []
    units = []
    for tensor in (kept, rows, packed.codes if packed else None):
        strides = _strides(tensor)
        unit = 1 if tensor is None else math.gcd(16 // tensor.element_size(), tensor.shape[-1], *strides)
        arguments += [tensor, *(stride // unit for stride in strides)]
        units.append(unit)
    scale, zero = (packed.scale, packed.zero) if packed else (None, None)
    arguments += [scale, zero, *_strides(scale), _packed_tokens(tokens)]
    return tuple(arguments), (units[0], units[1], units[2]), packed.bits if packed else 0


def _strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """Of dimensions 0 to 2; 0 for a dimension of one element, whose stride could be any number."""
    if tensor is None:
        return 0, 0, 0
    a, b, c = (tensor.stride(i) if tensor.shape[i] > 1 else 0 for i in range(3))
    return a, b, c


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _default_splits(programs: int, tokens: int, block: int, device: torch.device) -> int:
    """The fewest splits that keep the device busy: whole waves of two programs a multiprocessor, to within a tenth.

    No split is shorter than four tiles (which fill the pipeline), and there are at most 128.
    """
    most = max(1, min(128, tokens // (4 * block)))
    return _fewest_splits(programs, most, 2 * _multiprocessors(device))


@cache
def _fewest_splits(programs: int, most: int, slots: int) -> int:
    busy = [programs * n / (slots * math.ceil(programs * n / slots)) for n in range(1, most + 1)]
    return next(n for n, share in enumerate(busy, 1) if share >= 0.9 * max(busy))


_CHANGING = [  # numbers that change from step to step or from layer to layer: no kernel of their own
    *(f"{kind}{part}_stride{i}" for kind in "kv" for part in ("", "_row", "_code", "_scale") for i in range(3)),
    *("k_packed", "v_packed", "mask_stride", "length", "heads", "group", "sinks", "recent", "dk", "ek", "dv", "ev"),
]


@triton.jit(do_not_specialize=_CHANGING)
def _attend(  # noqa: PLR0912, PLR0915
    query,
    query_rows,
    k,
    k_stride0: tl.int64,
    k_stride1: tl.int64,
    k_stride2,
    k_rows,
    k_row_stride0: tl.int64,
    k_row_stride1: tl.int64,
    k_row_stride2,
    k_codes,
    k_code_stride0: tl.int64,
    k_code_stride1: tl.int64,
    k_code_stride2,
    k_scale,
    k_zero,
    k_scale_stride0: tl.int64,
    k_scale_stride1: tl.int64,
    k_scale_stride2,
    k_packed,
    v,
    v_stride0: tl.int64,
    v_stride1: tl.int64,
    v_stride2,
    v_rows,
    v_row_stride0: tl.int64,
    v_row_stride1: tl.int64,
    v_row_stride2,
    v_codes,
    v_code_stride0: tl.int64,
    v_code_stride1: tl.int64,
    v_code_stride2,
    v_scale,
    v_zero,
    v_scale_stride0: tl.int64,
    v_scale_stride1: tl.int64,
    v_scale_stride2,
    v_packed,
    first,
    mask,
    mask_stride: tl.int64,
    length,
    stats,
    partial,
    heads,
    group,
    sinks,
    recent,
    dk,
    ek,
    dv,
    ev,
    ON_DEVICE: tl.constexpr,
    ADDITIVE: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    K_UNIT: tl.constexpr,
    K_ROW_UNIT: tl.constexpr,
    K_CODE_UNIT: tl.constexpr,
    V_UNIT: tl.constexpr,
    V_ROW_UNIT: tl.constexpr,
    V_CODE_UNIT: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    DK: tl.constexpr,
    EK: tl.constexpr,
    DV: tl.constexpr,
    EV: tl.constexpr,
):
    """One split of one KV head. Writes stats [B H G, splits, 2] and partial [B H G, splits, dv + ev].

    Upper-case widths are padded to powers of two; lower-case ones are given in their unit. Scores are in base 2.
    """
    program = tl.program_id(0)
    splits = tl.num_programs(1)
    batch = program // heads
    head = program % heads
    dk = dk * K_UNIT
    dv = dv * V_UNIT
    total = tl.load(length).to(tl.int32) if ON_DEVICE else length
    share = tl.cdiv(tl.cdiv(total, splits), N) * N
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, total)

    g = tl.arange(0, G)
    n = tl.arange(0, N)
    ck = tl.arange(0, DK)
    cv = tl.arange(0, DV)
    row = program.to(tl.int64) * group + g
    q = tl.load(query + row[:, None] * dk + ck[None, :], mask=(g < group)[:, None] & (ck < dk)[None, :], other=0.0)
    q = q.to(k.dtype.element_ty)
    k += (batch * k_stride0 + head * k_stride1) * K_UNIT
    v += (batch * v_stride0 + head * v_stride1) * V_UNIT
    if K_BITS > 0:
        k_codes += (batch * k_code_stride0 + head * k_code_stride1) * K_CODE_UNIT
        k_scale += batch * k_scale_stride0 + head * k_scale_stride1
        k_zero += batch * k_scale_stride0 + head * k_scale_stride1
    if V_BITS > 0:
        v_codes += (batch * v_code_stride0 + head * v_code_stride1) * V_CODE_UNIT
        v_scale += batch * v_scale_stride0 + head * v_scale_stride1
        v_zero += batch * v_scale_stride0 + head * v_scale_stride1
    window = total - recent
    if first is not None:
        sink = tl.load(first + batch).to(tl.int32)
    if mask is not None:
        mask += batch * mask_stride
    if EK > 0:
        ek = ek * K_ROW_UNIT
        ce = tl.arange(0, EK)
        q_rows = tl.load(
            query_rows + row[:, None] * ek + ce[None, :], mask=(g < group)[:, None] & (ce < ek)[None, :], other=0.0
        ).to(k.dtype.element_ty)
        k_rows += (batch * k_row_stride0 + head * k_row_stride1) * K_ROW_UNIT
    if EV > 0:
        ev = ev * V_ROW_UNIT
        cf = tl.arange(0, EV)
        v_rows += (batch * v_row_stride0 + head * v_row_stride1) * V_ROW_UNIT
        acc_rows = tl.zeros([G, EV], dtype=tl.float32)
    top = tl.full([G], float("-inf"), dtype=tl.float32)
    weight = tl.zeros([G], dtype=tl.float32)
    acc = tl.zeros([G, DV], dtype=tl.float32)

    # A loop of its own for each way that keys and values are stored, so that its loads can be pipelined. Every loop
    # begins at a whole block of 32 tokens.
    for kind in tl.static_range(4):
        if (kind % 2 == 0 or K_BITS > 0) and (kind < 2 or V_BITS > 0):
            lo = begin
            hi = end
            if K_BITS > 0:
                if kind % 2 == 1:
                    hi = tl.minimum(hi, k_packed)
                else:
                    lo = tl.maximum(lo, k_packed)
            if V_BITS > 0:
                if kind >= 2:
                    hi = tl.minimum(hi, v_packed)
                else:
                    lo = tl.maximum(lo, v_packed)
            # What is too narrow for cp.async, scales and the mask, is loaded one tile ahead by hand.
            if kind % 2 == 1:
                k_scales, k_zeros = _key_scales(k_scale, k_zero, k_scale_stride2, lo, hi, dk, N, DK)
            if kind >= 2:
                v_scales, v_zeros = _value_scales(v_scale, v_zero, v_scale_stride2, lo, hi, dv, N, DV)
            if mask is not None:
                ahead = tl.load(mask + lo + n, mask=lo + n < hi, other=0)
            for start in range(lo, hi, N):
                far = tl.cast(start, tl.int64)  # offsets of a long cache may pass 2^31
                token = start + n
                seen = token < hi
                if kind % 2 == 1:
                    codes = k_codes + far // 32 * k_code_stride2 * K_CODE_UNIT
                    codes = _key_codes(codes, k_code_stride2 * K_CODE_UNIT, hi - start, dk, K_BITS, N, DK)
                    keys = _scaled(codes, k_scales, k_zeros, k.dtype.element_ty)
                    k_scales, k_zeros = _key_scales(k_scale, k_zero, k_scale_stride2, start + N, hi, dk, N, DK)
                else:
                    at = k + (far - k_packed) * k_stride2 * K_UNIT
                    keys = tl.load(
                        at + n[:, None] * (k_stride2 * K_UNIT) + ck[None, :],
                        mask=seen[:, None] & (ck < dk)[None, :],
                        other=0.0,
                    ).trans()
                if kind >= 2:
                    codes = v_codes + far // 32 * v_code_stride2 * V_CODE_UNIT
                    codes = _value_codes(
                        codes, v_code_stride2 * V_CODE_UNIT, hi - start, dv, V_BITS, V_CODE_UNIT, N, DV
                    )
                    values = _scaled(codes, v_scales, v_zeros, v.dtype.element_ty)
                    v_scales, v_zeros = _value_scales(v_scale, v_zero, v_scale_stride2, start + N, hi, dv, N, DV)
                else:
                    at = v + (far - v_packed) * v_stride2 * V_UNIT
                    values = tl.load(
                        at + n[:, None] * (v_stride2 * V_UNIT) + cv[None, :],
                        mask=seen[:, None] & (cv < dv)[None, :],
                        other=0.0,
                    )
                if EK > 0 or EV > 0:
                    index = token - window + sinks  # of the token's residual row
                    whole = token >= window
                    near = start + N > window
                    if first is not None:
                        is_sink = (token >= sink) & (token < sink + sinks) & (token < window)
                        index = tl.where(is_sink, token - sink, index)
                        whole = whole | is_sink
                        near = near | ((start < sink + sinks) & (start + N > sink))
                    whole = whole & seen

                scores = _dot(q, keys, tl.zeros([G, N], dtype=tl.float32))
                if EK > 0:  # noqa: SIM102  (known to the compiler, and near is not)
                    if near:
                        rows = tl.load(
                            k_rows + index.to(tl.int64)[:, None] * (k_row_stride2 * K_ROW_UNIT) + ce[None, :],
                            mask=whole[:, None] & (ce < ek)[None, :],
                            other=0.0,
                        )
                        scores = _dot(q_rows, rows.trans(), scores)
                scores = scores * _LOG2_E
                if mask is not None:
                    if ADDITIVE:
                        scores += ahead.to(tl.float32)[None, :] * _LOG2_E
                    else:
                        seen = seen & (ahead != 0)
                    ahead = tl.load(mask + token + N, mask=token + N < hi, other=0)
                scores = tl.where(seen[None, :], scores, float("-inf"))

                new_top = tl.maximum(top, tl.max(scores, 1))
                base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: no NaN from -inf + inf
                decay = tl.exp2(top - base)
                p = tl.exp2(scores - base[:, None])
                weight = weight * decay + tl.sum(p, 1)
                top = new_top
                p = p.to(v.dtype.element_ty)
                acc = _dot(p, values, acc * decay[:, None])
                if EV > 0:
                    acc_rows = acc_rows * decay[:, None]
                    if near:
                        rows = tl.load(
                            v_rows + index.to(tl.int64)[:, None] * (v_row_stride2 * V_ROW_UNIT) + cf[None, :],
                            mask=whole[:, None] & (cf < ev)[None, :],
                            other=0.0,
                        )
                        acc_rows = _dot(p, rows, acc_rows)

    # A split that begins beyond T comes here at once, with nothing seen.
    at = row * splits + tl.program_id(1)
    tl.store(stats + 2 * at, top, mask=g < group)
    tl.store(stats + 2 * at + 1, weight, mask=g < group)
    at = partial + at[:, None] * (dv + ev if EV > 0 else dv)
    tl.store(at + cv[None, :], acc, mask=(g < group)[:, None] & (cv < dv)[None, :])
    if EV > 0:
        tl.store(at + dv + cf[None, :], acc_rows, mask=(g < group)[:, None] & (cf < ev)[None, :])


@triton.jit
def _dot(a, b, c):
    """a b + c in float32: on tensor cores for half precision, and never in tf32."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _key_codes(codes, stride, tokens, dk, BITS: tl.constexpr, N: tl.constexpr, DK: tl.constexpr):
    """uint8 [DK, N] of N / 32 blocks of bytes [dk, 4 BITS]."""
    c = tl.arange(0, DK)[:, None]
    byte = tl.arange(0, N * BITS // 8)[None, :]
    block = byte // (4 * BITS)
    at = codes + block * stride + c * (4 * BITS) + byte % (4 * BITS)
    return _unpack(tl.load(at, mask=(c < dk) & (32 * block < tokens), other=0), BITS)


@triton.jit
def _key_scales(scale, zero, stride, start, end, dk, N: tl.constexpr, DK: tl.constexpr):
    """Scales and zeros [DK, N / 32, 1] of the tile at start: one of each for a block of a channel."""
    c = tl.arange(0, DK)[:, None]
    block = tl.arange(0, N // 32)[None, :]
    at = tl.cast(start // 32, tl.int64) * stride + block * stride + c
    given = (c < dk) & (start + 32 * block < end)
    return tl.load(scale + at, mask=given, other=0.0)[:, :, None], tl.load(zero + at, mask=given, other=0.0)[:, :, None]


@triton.jit
def _value_codes(codes, stride, tokens, dv, BITS: tl.constexpr, UNIT: tl.constexpr, N: tl.constexpr, DV: tl.constexpr):
    """uint8 [N, DV] of blocks of bytes [32, ceil(dv BITS / 8)]."""
    token = tl.arange(0, N)[:, None]
    byte = tl.arange(0, DV * BITS // 8)[None, :]
    size = (dv * BITS + 7) // 8 // UNIT * UNIT  # it is a multiple of the unit, which the compiler now knows
    at = codes + token // 32 * stride + token % 32 * size + byte
    return _unpack(tl.load(at, mask=(token < tokens) & (byte < size), other=0), BITS)


@triton.jit
def _value_scales(scale, zero, stride, start, end, dv, N: tl.constexpr, DV: tl.constexpr):
    """Scales and zeros [N, DV / 32, 1] of the tile at start: one of each for 32 channels of a token."""
    token = tl.arange(0, N)[:, None]
    part = tl.arange(0, DV // 32)[None, :]
    parts = (dv + 31) // 32
    at = tl.cast(start // 32, tl.int64) * stride + token // 32 * stride + token % 32 * parts + part
    given = (start + token < end) & (part < parts)
    return tl.load(scale + at, mask=given, other=0.0)[:, :, None], tl.load(zero + at, mask=given, other=0.0)[:, :, None]


@triton.jit
def _unpack(x, BITS: tl.constexpr):
    """uint8 [R, C] -> uint8 [R, 8 C / BITS], lowest bits first; a thread keeps the codes of its own bytes."""
    if BITS == 4:
        x = tl.interleave(x & 15, x >> 4)
    elif BITS == 2:
        x = tl.interleave(tl.interleave(x & 3, (x >> 4) & 3), tl.interleave((x >> 2) & 3, x >> 6))
    return x


@triton.jit
def _scaled(codes, scales, zeros, dtype: tl.constexpr):
    """zero + scale * code, [R, C], from scales and zeros [R, C / 32, 1]."""
    x = tl.reshape(codes, (codes.shape[0], codes.shape[1] // 32, 32)).to(tl.float32)
    x = zeros.to(tl.float32) + scales.to(tl.float32) * x
    if dtype == tl.float16:  # a topmost code may lie just above the largest float16
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return tl.reshape(x, codes.shape).to(dtype)


@triton.jit(do_not_specialize=["splits", "width"])
def _merge(stats, partial, out, splits, width, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """The output [width] of one query head from its splits, CHUNK of them at a time (log-sum-exp merge)."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, CHUNK)
    c = tl.arange(0, WIDTH)
    top = float("-inf")
    weight = 0.0
    acc = tl.zeros([WIDTH], dtype=tl.float32)
    for start in range(0, splits, CHUNK):
        at = row * splits + start + s
        given = start + s < splits
        tops = tl.load(stats + 2 * at, mask=given, other=float("-inf"))
        weights = tl.load(stats + 2 * at + 1, mask=given, other=0.0)
        sums = tl.load(
            partial + at[:, None] * width + c[None, :],
            mask=(tops > float("-inf"))[:, None] & (c < width)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        decay = tl.exp2(top - base)
        factor = tl.exp2(tops - base)
        weight = weight * decay + tl.sum(factor * weights, 0)
        acc = acc * decay + tl.sum(factor[:, None] * sums, 0)
        top = new_top
    result = acc / tl.where(weight > 0, weight, 1.0)
    tl.store(out + row * width + c, result.to(out.dtype.element_ty), mask=c < width)
