"""The near tokens of a decoded token, and all of it put together: splits merged, read-outs applied, channels in order.

Near are a row's sinks, the recent window, and what is left between full tiles and the window. They are as many whatever
the length, so one program reads those of a KV head, for all of its query heads.
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from grace_opt.runtime.kernels.triton_products import channels, far_tiles, masked, more, product, tokens

_CHANGING = [
    *(f"{kind}_stride{i}" for kind in "kv" for i in range(2)),
    *(f"v_{what}{i}" for what in ("order", "matrix", "constant") for i in range(2)),
    *("first_slot", "k_base", "k_size", "v_base", "v_size", "mask_stride", "length", "splits"),
    *("heads", "sinks", "recent", "begins"),
]


@triton.jit(do_not_specialize=_CHANGING)
def merge(  # noqa: PLR0912, PLR0915
    stats,
    partial,
    splits,
    asked,
    k,
    k_stride0: tl.int64,
    k_stride1: tl.int64,
    k_ring,
    k_base,
    k_size,
    k_whole,
    v,
    v_stride0: tl.int64,
    v_stride1: tl.int64,
    v_ring,
    v_base,
    v_size,
    v_whole,
    v_order,
    v_order0,
    v_order1,
    v_matrix,
    v_matrix0,
    v_matrix1,
    v_constant,
    v_constant0,
    v_constant1,
    k_head,
    v_head,
    counts,
    first,
    mask,
    mask_stride: tl.int64,
    length,
    out,
    scaling,
    first_slot,
    heads,
    sinks,
    recent,
    begins,
    ON_DEVICE: tl.constexpr,
    MASK: tl.constexpr,
    SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    ASKED: tl.constexpr,
    K_KEPT: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_PITCH: tl.constexpr,
    K_UNIT: tl.constexpr,
    K_REST: tl.constexpr,
    V_KEPT: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_PITCH: tl.constexpr,
    V_UNIT: tl.constexpr,
    V_REST: tl.constexpr,
    P_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    DK: tl.constexpr,
    EK: tl.constexpr,
    DV: tl.constexpr,
    EV: tl.constexpr,
):
    """Of one KV head: out [B H GROUP, V_KEPT + V_REST], channels as the model has them. ``stats`` and ``partial`` as
    `attend_far` leaves them, with tiles of TILE slots, or `attend_codes`, with ``counts`` blocks; P_WIDTH channels.
    Whole: sink i of a row at ``whole[b, h, i]``, slot t of the window at ``ring[b, h, (t - base) % size]``. Rows of
    slot t: ``k[b, h, t - first_slot]``, but those of sinks of a row that has blocks: ``k_head[b, h, i]``."""
    program = tl.program_id(0)
    b = (program // heads).to(tl.int64)
    h = (program % heads).to(tl.int64)
    total = tokens(length, ON_DEVICE)
    start = tl.load(first + b).to(tl.int32)
    low, window, tiles = far_tiles(total, start, sinks, recent, begins, TILE)
    far = tiles * TILE
    headed = 0  # sinks whose rows lie apart
    if counts is not None:
        far = tl.load(counts + b) * 64
        headed = tl.where(far > 0, sinks, 0)
    behind = low + far - sinks  # slot of near token i, from the sinks on, less i
    near = tl.maximum(total - behind, tl.minimum(sinks, total - start))

    g = tl.arange(0, G)
    n = tl.arange(0, N)
    ck = tl.arange(0, DK)
    cv = tl.arange(0, DV)
    asked += program.to(tl.int64) * (ASKED * G)
    q = tl.load(asked + ck[:, None] * G + g[None, :], mask=(ck < K_WIDTH)[:, None], other=0.0)
    k += (b * k_stride0 + h * k_stride1) * K_UNIT
    v += (b * v_stride0 + h * v_stride1) * V_UNIT
    if EK > 0:
        ek = tl.arange(0, EK)
        asked += K_WIDTH * G
        q_rest = tl.load(asked + ek[:, None] * G + g[None, :], mask=(ek < K_REST)[:, None], other=0.0)
        k_ring += (b * heads + h) * k_size * K_REST
        k_whole += (b * heads + h) * sinks * K_REST
    if EV > 0:
        v_ring += (b * heads + h) * v_size * V_REST
        v_whole += (b * heads + h) * sinks * V_REST
        rest = tl.zeros([EV, G], tl.float32)
    if k_head is not None:
        k_head += (b * heads + h) * sinks * K_KEPT
        v_head += (b * heads + h) * sinks * V_KEPT
    if MASK > 0:
        mask += b * mask_stride

    top = tl.full([G], float("-inf"), tl.float32)
    weight = tl.zeros([G], tl.float32)
    acc = tl.zeros([DV, G], tl.float32)
    for begin in range(0, near, N):
        i = begin + n
        slot = tl.where(i < sinks, start, behind) + i
        there = slot < total
        in_head = there & (i < headed)
        held = there & (i >= headed)
        row = (slot - first_slot).to(tl.int64)[:, None]
        keys = tl.load(k + row * K_PITCH + ck[None, :], mask=held[:, None] & (ck < K_WIDTH)[None, :], other=0.0)
        if k_head is not None:
            given = in_head[:, None] & (ck < K_KEPT)[None, :]
            keys = tl.where(given, tl.load(k_head + i[:, None] * K_KEPT + ck[None, :], mask=given, other=0.0), keys)
        scores = product(keys, q, tl.zeros([N, G], tl.float32))
        if EK > 0:
            rests = _residuals(k_ring, k_base, k_size, k_whole, i, sinks, slot, window, there, SINKS, K_REST, EK)
            scores = product(rests, q_rest, scores)
        top, p, decay = more(top, masked(scores * scaling, mask, slot, there, MASK))
        weight = weight * decay + tl.sum(p, 0)
        p = p.to(v.dtype.element_ty)
        values = tl.load(v + row * V_PITCH + cv[None, :], mask=held[:, None] & (cv < V_WIDTH)[None, :], other=0.0)
        if v_head is not None:
            given = in_head[:, None] & (cv < V_KEPT)[None, :]
            values = tl.where(given, tl.load(v_head + i[:, None] * V_KEPT + cv[None, :], mask=given, other=0.0), values)
        acc = product(values.trans(), p, acc * decay[None, :])
        if EV > 0:
            rests = _residuals(v_ring, v_base, v_size, v_whole, i, sinks, slot, window, there, SINKS, V_REST, EV)
            rest = product(rests.trans(), p, rest * decay[None, :])

    s = tl.arange(0, CHUNK)
    for begin in range(0, splits, CHUNK):
        at = program.to(tl.int64) * splits + begin + s
        given = (begin + s < splits)[:, None]
        tops = tl.load(stats + at[:, None] * (2 * G) + g[None, :], mask=given, other=float("-inf"))
        weights = tl.load(stats + at[:, None] * (2 * G) + G + g[None, :], mask=given, other=0.0)
        sums = tl.load(
            partial + at[:, None, None] * (P_WIDTH * G) + cv[None, :, None] * G + g[None, None, :],
            mask=given[:, :, None] & (cv < V_WIDTH)[None, :, None],
            other=0.0,
        )
        top, factor, decay = more(top, tops)
        weight = weight * decay + tl.sum(factor * weights, 0)
        acc = acc * decay[None, :] + tl.sum(factor[:, None, :] * sums, 0)
        if EV > 0:
            rest = rest * decay[None, :]

    seen = weight > 0
    scale = 1 / tl.where(seen, weight, 1.0)
    acc = acc * scale[None, :]
    out += (program.to(tl.int64) * GROUP + g[None, :]) * (V_KEPT + V_REST)
    if v_order is not None:
        v_order += b * v_order0 + h * v_order1
    given = (g < GROUP)[None, :]
    channel = channels(v_order, cv, V_KEPT)[:, None]
    tl.store(out + channel, acc.to(out.dtype.element_ty), mask=given & (cv < V_KEPT)[:, None])
    if EV > 0:
        ev = tl.arange(0, EV)
        rest = rest * scale[None, :]
        if v_matrix is not None:
            v_matrix += b * v_matrix0 + h * v_matrix1
            inside = (ev < V_REST)[:, None] & (cv < V_KEPT)[None, :]
            readout = tl.load(v_matrix + ev[:, None] * V_KEPT + cv[None, :], mask=inside, other=0.0)
            rest = product(readout.to(v.dtype.element_ty), acc.to(v.dtype.element_ty), rest)
        if v_constant is not None:
            v_constant += b * v_constant0 + h * v_constant1
            constant = tl.load(v_constant + ev, mask=ev < V_REST, other=0.0).to(tl.float32)
            rest += tl.where(seen[None, :], constant[:, None], 0.0)
        channel = channels(v_order, V_KEPT + ev, V_KEPT + V_REST)[:, None]
        tl.store(out + channel, rest.to(out.dtype.element_ty), mask=given & (ev < V_REST)[:, None])


@triton.jit
def _residuals(
    ring,
    base,
    size,
    whole,
    i,
    sinks,
    slot,
    window,
    there,
    SINKS: tl.constexpr,
    REST: tl.constexpr,
    E: tl.constexpr,
):
    """[N, E] of near tokens i; zeros where they are not whole."""
    e = tl.arange(0, E)
    near = there & (slot >= window) & (i >= sinks)
    rows = ring + ((slot - base) % size).to(tl.int64)[:, None] * REST + e[None, :]
    found = tl.load(rows, mask=near[:, None] & (e < REST)[None, :], other=0.0)
    if SINKS:
        given = (there & (i < sinks))[:, None] & (e < REST)[None, :]
        found = tl.where(given, tl.load(whole + i[:, None] * REST + e[None, :], mask=given, other=0.0), found)
    return found
