"""The far tokens of a decoded token: those behind the sinks and before the recent window, in full tiles.

They are most of a long cache, so this is the kernel that must keep up with the memory. Its loop has no residuals, no
ends of rows and no run-time widths. What it leaves, at most a tile, is read with the window (`triton_merge`).
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from grace_opt.runtime.kernels.triton_products import far_tiles, masked, more, product, tokens

_CHANGING = [  # numbers that change from step to step or from layer to layer: no kernel of their own
    *(f"{kind}_stride{i}" for kind in "kv" for i in range(2)),
    *("first_slot", "length", "mask_stride", "heads", "sinks", "recent", "begins"),
]


@triton.jit(do_not_specialize=_CHANGING)
def attend_far(
    asked,
    k,
    k_stride0: tl.int64,
    k_stride1: tl.int64,
    v,
    v_stride0: tl.int64,
    v_stride1: tl.int64,
    first,
    mask,
    mask_stride: tl.int64,
    length,
    stats,
    partial,
    scaling,
    first_slot,
    heads,
    sinks,
    recent,
    begins,
    ON_DEVICE: tl.constexpr,
    MASK: tl.constexpr,
    ASKED: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_PITCH: tl.constexpr,
    K_UNIT: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_PITCH: tl.constexpr,
    V_UNIT: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split of one KV head, for all of its query heads, which are the columns of all products.

    asked [B H, ASKED, G]; row of slot t: k[b, h, t - first_slot]; strides of the batch and the heads in units. Writes
    stats [B H, splits, 2, G], the largest score and the sum of weights, and partial [B H, splits, V_WIDTH, G], the
    weighted sum of values. Scores are in base 2; ``scaling`` has log2 e in it.
    """
    program = tl.program_id(0)
    splits = tl.num_programs(1)
    b = (program // heads).to(tl.int64)  # offsets of a large cache may pass 2^31
    h = (program % heads).to(tl.int64)
    low, _, tiles = far_tiles(tokens(length, ON_DEVICE), tl.load(first + b).to(tl.int32), sinks, recent, begins, N)
    share = tl.cdiv(tiles, splits)
    begin = tl.minimum(tl.program_id(1) * share, tiles)
    end = tl.minimum(begin + share, tiles)

    g = tl.arange(0, G)
    n = tl.arange(0, N)
    ck = tl.arange(0, DK)
    cv = tl.arange(0, DV)
    q = tl.load(
        asked + program.to(tl.int64) * (ASKED * G) + ck[:, None] * G + g[None, :],
        mask=(ck < K_WIDTH)[:, None],
        other=0.0,
    )
    at = (low - first_slot + begin * N).to(tl.int64)  # offsets of a long cache may pass 2^31
    k += (b * k_stride0 + h * k_stride1) * K_UNIT + at * K_PITCH + n[:, None] * K_PITCH + ck[None, :]
    v += (b * v_stride0 + h * v_stride1) * V_UNIT + at * V_PITCH + n[:, None] * V_PITCH + cv[None, :]
    if MASK > 0:
        mask += b * mask_stride

    top = tl.full([G], float("-inf"), tl.float32)
    weight = tl.zeros([N, G], tl.float32)  # summed once, at the end
    acc = tl.zeros([DV, G], tl.float32)
    for tile in tl.range(begin, end, num_stages=STAGES):
        keys = tl.load(k, mask=(ck < K_WIDTH)[None, :], other=0.0)
        scores = product(keys, q, tl.zeros([N, G], tl.float32))
        values = tl.load(v, mask=(cv < V_WIDTH)[None, :], other=0.0)
        if MASK > 0:
            scores = masked(scores * scaling, mask, low + tile * N + n, n >= 0, MASK)
            top, p, decay = more(top, scores)
        else:
            new = tl.maximum(top, tl.max(scores, 0) * scaling)
            p = tl.exp2(scores * scaling - new[None, :])
            decay = tl.exp2(top - new)
            top = new
        weight = weight * decay[None, :] + p
        acc = product(values.trans(), p.to(v.dtype.element_ty), acc * decay[None, :])
        k += N * K_PITCH
        v += N * V_PITCH

    at = program.to(tl.int64) * splits + tl.program_id(1)
    tl.store(stats + at * (2 * G) + g, top)
    tl.store(stats + at * (2 * G) + G + g, tl.sum(weight, 0))
    tl.store(partial + at * (V_WIDTH * G) + cv[:, None] * G + g[None, :], acc, mask=(cv < V_WIDTH)[:, None])
