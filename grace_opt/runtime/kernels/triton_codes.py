"""The far tokens of a decoded token where they are packed integers (`grace_opt.compression.tiles`).

Each warp reads a block of 64 tokens at a time and keeps an online softmax of its own: a block's scales stay within a
warp, and no warp waits for another but for what is loaded. Codes become elements in registers. In
bfloat16 a mask and a shift make 16 + code of 4 bits, and one multiplication and addition the element,

    scale code + zero = scale (16 + code) + (zero - 16 scale).

Other codes are made exact first.
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from grace_opt.runtime.kernels.triton_products import INTERPRETED, LOG2_E, product

_INTERPRETED = tl.constexpr(INTERPRETED)  # the interpreter knows no PTX


def _nibbles_of(shifts: tuple[str, ...], mask: int, sixteen: int, minus: str) -> tl.constexpr:
    """PTX: of four bytes $4, 16 + the low halves in $0 and $1, 16 + the high halves in $2 and $3, less ``minus``.

    Bytes lie as 0, 2, 1, 3: those of a register's two elements are 16 bits apart.
    """
    lines = [
        ".reg .b32 a, m, s, o;",
        f"mov.b32 m, {mask:#x};",
        f"mov.b32 s, {sixteen:#x};",
        f"mov.b32 o, {sixteen:#x};",
    ]
    for i, shift in enumerate(shifts):
        operation, amount = shift.split()
        lines += [f"{operation} a, $4, {amount};", f"lop3.b32 ${i}, a, m, s, 0xEA;"]
        if minus:
            lines.append(f"{minus} ${i}, ${i}, o;")
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


_BFLOAT_NIBBLES = _nibbles_of(("shl.b32 3", "shr.u32 5", "shr.u32 1", "shr.u32 9"), 0x00780078, 0x41804180, "")
_HALF_NIBBLES = _nibbles_of(
    ("shl.b32 6", "shr.u32 2", "shl.b32 2", "shr.u32 6"), 0x03C003C0, 0x4C004C00, "sub.rn.f16x2"
)
# Four bytes $2, in the same order, as elements: by way of 2^23 + byte in float32, or 1024 + byte in float16.
_BFLOAT_BYTES = tl.constexpr("""{
.reg .b32 a, b, m;
.reg .f32 c, d;
mov.b32 m, 0x4b000000;
prmt.b32 a, $2, m, 0x7440;
prmt.b32 b, $2, m, 0x7442;
sub.rn.f32 c, a, 0f4B000000;
sub.rn.f32 d, b, 0f4B000000;
cvt.rn.bf16x2.f32 $0, d, c;
prmt.b32 a, $2, m, 0x7441;
prmt.b32 b, $2, m, 0x7443;
sub.rn.f32 c, a, 0f4B000000;
sub.rn.f32 d, b, 0f4B000000;
cvt.rn.bf16x2.f32 $1, d, c;
}""")
_HALF_BYTES = tl.constexpr("""{
.reg .b32 a, m, o;
mov.b32 m, 0x64646464;
mov.b32 o, 0x64006400;
prmt.b32 a, $2, m, 0x4240;
sub.rn.f16x2 $0, a, o;
prmt.b32 a, $2, m, 0x4341;
sub.rn.f16x2 $1, a, o;
}""")
# Two words $2 and $3 of a scale and a zero: the scales in $0, the zeros in $1, or zero - 16 scale.
_PAIRS = tl.constexpr("{\nprmt.b32 $0, $2, $3, 0x5410;\nprmt.b32 $1, $2, $3, 0x7632;\n}")
_LESS_SIXTEEN = tl.constexpr("""{
.reg .b32 z, m;
mov.b32 m, 0xC180C180;
prmt.b32 $0, $2, $3, 0x5410;
prmt.b32 z, $2, $3, 0x7632;
fma.rn.bf16x2 $1, $0, m, z;
}""")

_CHANGING = ["mask_stride", "heads", "sinks", "capacity"]


@triton.jit(do_not_specialize=_CHANGING)
def attend_codes(  # noqa: PLR0912, PLR0915
    asked,
    k_codes,
    k_scales,
    v_codes,
    v_scales,
    capacity,
    counts,
    first,
    mask,
    mask_stride: tl.int64,
    stats,
    partial,
    scaling,
    heads,
    sinks,
    MASK: tl.constexpr,
    ASKED: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    E: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split of one KV head, for all of its query heads, as `triton_splits.attend_far`.

    Codes and scales [B, H, capacity, ..] as `tiles` describes them, dense, of D0 + D1 and E channels; counts int32[B]:
    how many blocks a row has, which begin behind its sinks.
    """
    program = tl.program_id(0)
    splits = tl.num_programs(1)
    b = (program // heads).to(tl.int64)  # offsets of a large cache may pass 2^31
    D: tl.constexpr = D0 + D1
    E0: tl.constexpr = 32 if E >= 32 else 16
    E1: tl.constexpr = 32 if E >= 64 else (16 if E == 48 else 0)
    E2: tl.constexpr = 32 if E >= 96 else (16 if E == 80 else 0)
    E3: tl.constexpr = 32 if E >= 128 else (16 if E == 112 else 0)
    K_BYTES: tl.constexpr = 8 * K_BITS * D  # of a block
    V_BYTES: tl.constexpr = 8 * V_BITS * E
    V_SCALES: tl.constexpr = (E + 31) // 32 * 64
    dtype: tl.constexpr = asked.dtype.element_ty

    blocks = tl.load(counts + b)
    share = tl.cdiv(tl.cdiv(blocks, W), splits) * W
    begin = tl.minimum(tl.program_id(1) * share, blocks)
    end = tl.minimum(begin + share, blocks)

    g = tl.arange(0, G)
    warp = tl.arange(0, W)
    w = warp[:, None, None]
    j = tl.arange(0, 32)
    at = program.to(tl.int64) * capacity + begin
    asked += program.to(tl.int64) * (ASKED * G)
    c0 = tl.arange(0, D0)
    q0 = _queries(asked, c0, g, K_WIDTH, W, D0, G)
    # The batch of a product is spread over the warps (`W` of them).
    k0 = k_codes + at * K_BYTES + w * K_BYTES + j[None, :, None] * D + _place(c0)[None, None, :]
    k_scale = k_scales + at * (2 * D) + w * (2 * D)
    s0 = k_scale + c0[None, None, :]
    if D1 > 0:
        c1 = D0 + tl.arange(0, D1)
        q1 = _queries(asked, c1, g, K_WIDTH, W, D1, G)
        k1 = k_codes + at * K_BYTES + w * K_BYTES + j[None, :, None] * D + _place(c1)[None, None, :]
        s1 = k_scale + c1[None, None, :]
    v_at = v_codes + at * V_BYTES + w * V_BYTES + _place(j)[None, None, :]
    v0 = v_at + tl.arange(0, E0)[None, :, None] * 32
    t = v_scales + at * V_SCALES + w * V_SCALES + j[None, None, :]
    a0 = tl.zeros([W, E0, G], tl.float32)
    if E1 > 0:
        v1 = v_at + (32 + tl.arange(0, E1))[None, :, None] * 32
        a1 = tl.zeros([W, E1, G], tl.float32)
    if E2 > 0:
        v2 = v_at + (64 + tl.arange(0, E2))[None, :, None] * 32
        a2 = tl.zeros([W, E2, G], tl.float32)
    if E3 > 0:
        v3 = v_at + (96 + tl.arange(0, E3))[None, :, None] * 32
        a3 = tl.zeros([W, E3, G], tl.float32)
    if MASK > 0:
        slot = tl.load(first + b).to(tl.int32) + sinks + (begin + warp[:, None]) * 64 + j[None, :]
        mask += b * mask_stride + slot

    top = tl.full([W, G], float("-inf"), tl.float32)
    weight = tl.zeros([W, 32, G], tl.float32)
    for block in tl.range(begin, end, W, num_stages=STAGES):
        inside = block + warp < end
        there = inside[:, None, None]
        low = tl.zeros([W, 32, G], tl.float32)
        low, high = _scores(k0, s0, there, q0, low, low, D, K_BITS, dtype)
        if D1 > 0:
            low, high = _scores(k1, s1, there, q1, low, high, D, K_BITS, dtype)
        scale = scaling
        if MASK > 0:
            low = _under(low * scaling, mask, inside, MASK)
            high = _under(high * scaling, mask + 32, inside, MASK)
            mask += W * 64
            scale = 1.0
        limit = tl.where(inside, 0.0, float("-inf"))[:, None]
        new = tl.maximum(top, tl.maximum(tl.max(low, 1), tl.max(high, 1)) * scale + limit)
        base = tl.where(new == float("-inf"), 0.0, new)
        low = tl.exp2(low * scale - (base - limit)[:, None, :])
        high = tl.exp2(high * scale - (base - limit)[:, None, :])
        decay = tl.exp2(top - base)[:, None, :]
        top = new
        weight = weight * decay + (low + high)
        low = low.to(dtype)
        high = high.to(dtype)
        a0 = _sums(v0, t, there, low, high, a0 * decay, E, V_BITS, dtype)
        if E1 > 0:
            a1 = _sums(v1, t + 64, there, low, high, a1 * decay, E, V_BITS, dtype)
            v1 += W * V_BYTES
        if E2 > 0:
            a2 = _sums(v2, t + 128, there, low, high, a2 * decay, E, V_BITS, dtype)
            v2 += W * V_BYTES
        if E3 > 0:
            a3 = _sums(v3, t + 192, there, low, high, a3 * decay, E, V_BITS, dtype)
            v3 += W * V_BYTES
        k0 += W * K_BYTES
        s0 += W * 2 * D
        if D1 > 0:
            k1 += W * K_BYTES
            s1 += W * 2 * D
        v0 += W * V_BYTES
        t += W * V_SCALES

    # The warps' own results as one.
    best = tl.max(top, 0)
    base = tl.where(best == float("-inf"), 0.0, best)
    factor = tl.exp2(top - base[None, :])
    at = program.to(tl.int64) * splits + tl.program_id(1)
    tl.store(stats + at * (2 * G) + g, best)
    tl.store(stats + at * (2 * G) + G + g, tl.sum(tl.sum(weight, 1) * factor, 0))
    partial += at * (E * G) + g[None, :]
    tl.store(partial + tl.arange(0, E0)[:, None] * G, tl.sum(a0 * factor[:, None, :], 0))
    if E1 > 0:
        tl.store(partial + (32 + tl.arange(0, E1))[:, None] * G, tl.sum(a1 * factor[:, None, :], 0))
    if E2 > 0:
        tl.store(partial + (64 + tl.arange(0, E2))[:, None] * G, tl.sum(a2 * factor[:, None, :], 0))
    if E3 > 0:
        tl.store(partial + (96 + tl.arange(0, E3))[:, None] * G, tl.sum(a3 * factor[:, None, :], 0))


@triton.jit
def _queries(asked, c, g, WIDTH: tl.constexpr, W: tl.constexpr, D: tl.constexpr, G: tl.constexpr):
    """[W, D, G]: the same for each warp."""
    q = tl.load(asked + c[:, None] * G + g[None, :], mask=(c < WIDTH)[:, None], other=0.0)
    return tl.broadcast_to(q[None], [W, D, G])


@triton.jit
def _scores(codes, scales, there, q, low, high, D: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Products of the queries with some channels of both halves of a block, added to ``low`` and ``high``."""
    a, b = _pair(codes, there, 32 * D, BITS, dtype)
    scale, zero = _affine(tl.load(scales, mask=there, other=0), BITS, dtype)
    low = product(_elements(a, scale, zero, dtype), q, low)
    scale, zero = _affine(tl.load(scales + D, mask=there, other=0), BITS, dtype)
    return low, product(_elements(b, scale, zero, dtype), q, high)


@triton.jit
def _sums(codes, scales, there, low, high, acc, E: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """The weighted sums of 32 channels of both halves of a block, added to ``acc``."""
    a, b = _pair(codes, there, 32 * E, BITS, dtype)
    scale, zero = _affine(tl.load(scales, mask=there, other=0), BITS, dtype)
    acc = product(_elements(a, scale, zero, dtype), low, acc)
    scale, zero = _affine(tl.load(scales + 32, mask=there, other=0), BITS, dtype)
    return product(_elements(b, scale, zero, dtype), high, acc)


@triton.jit
def _under(scores, mask, inside, MASK: tl.constexpr):
    """Scores [W, 32, G] in base 2 under a mask at [W, 32] (1: bool, 2: added)."""
    if MASK == 2:
        return scores + tl.load(mask, mask=inside[:, None], other=0).to(tl.float32)[:, :, None] * LOG2_E
    seen = tl.load(mask, mask=inside[:, None], other=0) != 0
    return tl.where(seen[:, :, None], scores, float("-inf"))


@triton.jit
def _place(c):
    """Where the code of a channel lies. PTX takes four at a time as they lie and puts them in order."""
    if _INTERPRETED:
        return c // 4 * 4 + c % 2 * 2 + c % 4 // 2
    return c


@triton.jit
def _pair(codes, there, STEP: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Codes of a block's halves, plus 16 if they have 4 bits and are bfloat16."""
    x = tl.load(codes, mask=there, other=0)
    if BITS == 8:
        y = tl.load(codes + STEP, mask=there, other=0)
        low, high = _bytes(x, dtype), _bytes(y, dtype)
    else:
        low, high = _nibbles(x, dtype)
    return low, high


@triton.jit
def _bytes(x, dtype: tl.constexpr):
    if _INTERPRETED:
        found = x.to(tl.float32)
    elif dtype == tl.bfloat16:
        found = tl.inline_asm_elementwise(_BFLOAT_BYTES, "=r,=r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=4)
    else:
        found = tl.inline_asm_elementwise(_HALF_BYTES, "=r,=r,r", [x], dtype=tl.float16, is_pure=True, pack=4)
    return found


@triton.jit
def _nibbles(x, dtype: tl.constexpr):
    if _INTERPRETED:
        plus = 16.0 if dtype == tl.bfloat16 else 0.0
        low, high = (x & 15).to(tl.float32) + plus, (x >> 4).to(tl.float32) + plus
    elif dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            _BFLOAT_NIBBLES, "=r,=r,=r,=r,r", [x], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low, high = tl.inline_asm_elementwise(
            _HALF_NIBBLES, "=r,=r,=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def _affine(words, BITS: tl.constexpr, dtype: tl.constexpr):
    """What to multiply what `_pair` gives by, and what to add."""
    if _INTERPRETED:
        scale = words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        zero = (words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        if BITS == 4 and dtype == tl.bfloat16:
            zero -= 16 * scale
    elif dtype == tl.bfloat16:
        code: tl.constexpr = _LESS_SIXTEEN if BITS == 4 else _PAIRS
        scale, zero = tl.inline_asm_elementwise(
            code, "=r,=r,r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    else:
        scale, zero = tl.inline_asm_elementwise(
            _PAIRS, "=r,=r,r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    return scale, zero


@triton.jit
def _elements(x, scale, zero, dtype: tl.constexpr):
    x = x * scale + zero
    if dtype == tl.float16:  # a topmost code may lie just above the largest float16
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)
