"""What the Triton kernels share: products in float32, and where things lie."""

# Triton is untyped, and allows no annotations of its kernels but its own.
# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")  # as Triton reads it
LOG2_E = tl.constexpr(1.4426950408889634)
_WIDEN = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bits of bfloat16 as integers


@triton.jit
def product(a, b, c):
    """a b + c in float32: on tensor cores in 16 bits, and never in tf32."""
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def tokens(length, ON_DEVICE: tl.constexpr):
    """T, of a number or of a tensor of one."""
    return tl.load(length).to(tl.int32) if ON_DEVICE else length


@triton.jit
def far_tiles(total, first, sinks, recent, begins, N: tl.constexpr):
    """(first slot behind a row's sinks, first slot of the window, full tiles of N slots in between)."""
    low = first + sinks
    window = tl.maximum(begins, total - recent)
    return low, window, tl.maximum(window - low, 0) // N


@triton.jit
def more(top, scores):
    """Of an online softmax in base 2 whose largest score so far was ``top`` [G]: the largest with scores [N, G], the
    weights [N, G], and what to scale older ones by. Scores of -inf weigh nothing, also where there are no others."""
    new = tl.maximum(top, tl.max(scores, 0))
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, tl.exp2(scores - base[None, :]), tl.exp2(top - base)


@triton.jit
def masked(scores, mask, slot, there, MASK: tl.constexpr):
    """Scores [N, G] in base 2 under a mask (1: bool, 2: added, 0: none) at slots [N]; -inf where not ``there`` [N]."""
    if MASK == 2:
        scores += tl.load(mask + slot, mask=there, other=0).to(tl.float32)[:, None] * LOG2_E
    if MASK == 1:
        there = there & (tl.load(mask + slot, mask=there, other=0) != 0)
    return tl.where(there[:, None], scores, float("-inf"))


@triton.jit
def channels(order, at, END: tl.constexpr):
    """Which channels lie at these places of an order; None: they lie as they are."""
    if order is not None:
        return tl.load(order + at, mask=at < END, other=0).to(tl.int32)
    return at
