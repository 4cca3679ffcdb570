"""What comes before attention, in one launch: the token is stored, and the queries are put as rows are."""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl

from grace_opt.runtime.kernels.triton_products import channels, product, tokens

_PER_ROW = ("new", "store", "order", "matrix", "constant")
_CHANGING = [
    *(f"{kind}_{what}{i}" for kind in "kv" for what in _PER_ROW for i in range(2)),
    *("q_stride0", "q_stride1", "heads", "length", "first_slot", "k_base", "k_size", "v_base", "v_size"),
]


@triton.jit(do_not_specialize=_CHANGING)
def prepare(
    query,
    q_stride0: tl.int64,
    q_stride1: tl.int64,
    asked,
    k_new,
    k_new0: tl.int64,
    k_new1: tl.int64,
    k,
    k_store0: tl.int64,
    k_store1: tl.int64,
    k_ring,
    k_base,
    k_size,
    k_order,
    k_order0,
    k_order1,
    k_matrix,
    k_matrix0,
    k_matrix1,
    k_constant,
    k_constant0,
    k_constant1,
    v_new,
    v_new0: tl.int64,
    v_new1: tl.int64,
    v,
    v_store0: tl.int64,
    v_store1: tl.int64,
    v_ring,
    v_base,
    v_size,
    v_order,
    v_order0,
    v_order1,
    v_matrix,
    v_matrix0,
    v_matrix1,
    v_constant,
    v_constant0,
    v_constant1,
    length,
    first_slot,
    heads,
    ON_DEVICE: tl.constexpr,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    ASKED: tl.constexpr,
    K_KEPT: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_PITCH: tl.constexpr,
    K_REST: tl.constexpr,
    V_KEPT: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_PITCH: tl.constexpr,
    V_REST: tl.constexpr,
    DK: tl.constexpr,
    EK: tl.constexpr,
    DV: tl.constexpr,
    EV: tl.constexpr,
):
    """Of one KV head: program 0 of axis 1 takes keys and queries, program 1 values.

    A token's kept channels go to its slot (of rows that are ``PITCH`` apart, filled up with zeros to ``WIDTH``), the
    residual of the others to the ring. A query meets rows as q_A + B'q_P, and residuals as q_P: asked [B H, ASKED, G],
    the first K_WIDTH for rows. Nothing is stored where ``new`` is None.
    """
    program = tl.program_id(0)
    b = (program // heads).to(tl.int64)
    h = (program % heads).to(tl.int64)
    slot = tokens(length, ON_DEVICE) - 1
    if tl.program_id(1) == 0:
        if k_order is not None:
            k_order += b * k_order0 + h * k_order1
        if k_matrix is not None:
            k_matrix += b * k_matrix0 + h * k_matrix1
        query += b * q_stride0 + h * GROUP * q_stride1
        asked += program.to(tl.int64) * (ASKED * G)
        _ask(query, q_stride1, asked, k_order, k_matrix, GROUP, G, K_KEPT, K_WIDTH, K_REST, DK, EK)
        if k_new is not None:
            k_new += b * k_new0 + h * k_new1
            k += b * k_store0 + h * k_store1 + (slot - first_slot).to(tl.int64) * K_PITCH
            if EK > 0:
                k_ring += ((b * heads + h) * k_size + (slot - k_base) % k_size) * K_REST
            if k_constant is not None:
                k_constant += b * k_constant0 + h * k_constant1
            _store(k_new, k, k_ring, k_order, k_matrix, k_constant, K_KEPT, K_WIDTH, K_REST, DK, EK)
    elif v_new is not None:
        if v_order is not None:
            v_order += b * v_order0 + h * v_order1
        if v_matrix is not None:
            v_matrix += b * v_matrix0 + h * v_matrix1
        v_new += b * v_new0 + h * v_new1
        v += b * v_store0 + h * v_store1 + (slot - first_slot).to(tl.int64) * V_PITCH
        if EV > 0:
            v_ring += ((b * heads + h) * v_size + (slot - v_base) % v_size) * V_REST
        if v_constant is not None:
            v_constant += b * v_constant0 + h * v_constant1
        _store(v_new, v, v_ring, v_order, v_matrix, v_constant, V_KEPT, V_WIDTH, V_REST, DV, EV)


@triton.jit
def _ask(
    query,
    stride,
    asked,
    order,
    matrix,
    GROUP: tl.constexpr,
    G: tl.constexpr,
    KEPT: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
):
    """The queries of a head as columns; those beyond GROUP are zeros."""
    g = tl.arange(0, G)[None, :]
    c = tl.arange(0, D)
    given = (c < KEPT)[:, None] & (g < GROUP)
    q = tl.load(query + g * stride + channels(order, c, KEPT)[:, None], mask=given, other=0.0)
    if E > 0:
        e = tl.arange(0, E)
        given = (e < REST)[:, None] & (g < GROUP)
        rest = tl.load(query + g * stride + channels(order, KEPT + e, KEPT + REST)[:, None], mask=given, other=0.0)
        tl.store(asked + (WIDTH + e)[:, None] * G + g, rest, mask=(e < REST)[:, None])
        if matrix is not None:
            at = matrix + e[None, :] * KEPT + c[:, None]
            readout = tl.load(at, mask=(e < REST)[None, :] & (c < KEPT)[:, None], other=0.0)
            q = product(readout.to(rest.dtype), rest, q.to(tl.float32))
    tl.store(asked + c[:, None] * G + g, q.to(asked.dtype.element_ty), mask=(c < WIDTH)[:, None])


@triton.jit
def _store(
    new,
    row,
    ring,
    order,
    matrix,
    constant,
    KEPT: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
):
    """One token of a head: its row, and its residual."""
    c = tl.arange(0, D)
    kept = tl.load(new + channels(order, c, KEPT), mask=c < KEPT, other=0.0)
    tl.store(row + c, kept, mask=c < WIDTH)
    if E > 0:
        e = tl.arange(0, E)
        rest = tl.load(new + channels(order, KEPT + e, KEPT + REST), mask=e < REST, other=0.0).to(tl.float32)
        if constant is not None:  # there is no matrix without it
            rest -= tl.load(constant + e, mask=e < REST, other=0.0).to(tl.float32)
            if matrix is not None:
                given = (e < REST)[:, None] & (c < KEPT)[None, :]
                readout = tl.load(matrix + e[:, None] * KEPT + c[None, :], mask=given, other=0.0)
                rest -= tl.sum(readout.to(tl.float32) * kept.to(tl.float32)[None, :], 1)
        tl.store(ring + e, rest.to(ring.dtype.element_ty), mask=e < REST)
