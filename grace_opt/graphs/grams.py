"""Gram matrices of many tokens under weights."""

from __future__ import annotations

from torch import Tensor

_BLOCK = 1 << 18  # elements of a block: what the second-level cache of a core holds


def weighted_grams(x: Tensor, weights: Tensor) -> Tensor:
    """Of rows x [H, T, n] under several weights each, [H, A, T], none negative: sums over t of w_at x_ti x_tj,
    [H, A, n, n], symmetric to rounding. O(H A T n^2).

    Products of rows times the square roots of their weights, which are written a block of tokens at a time.
    """
    roots, total = weights.sqrt()[..., None], x.new_zeros(*weights.shape[:2], x.shape[2], x.shape[2])
    block = max(64, _BLOCK // max(1, weights.shape[1] * x.shape[2]))
    for head, rows in enumerate(x):
        for low in range(0, len(rows), block):
            scaled = rows[low : low + block] * roots[head, :, low : low + block]
            total[head].baddbmm_(scaled.mT, scaled)
    return total
