"""Sums over many tokens under several weights at once."""

from __future__ import annotations

from torch import Tensor

_BLOCK = 1 << 17  # elements of a block: what the second-level cache of a core holds several of


def weighted_sums(x: Tensor, weights: Tensor, about: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the rows y = x - about under weights [H, A, T], none negative, in one pass over the tokens.

    For x [H, T, n] and about [H, 1, n] of one dtype: sum w_at y_t, [H, A, n], and sum w_at y_t y_t', [H, A, n, n],
    symmetric to rounding. The latter of rows times the roots of their weights, so that it is positive semidefinite.
    A block of tokens at a time, so that what is written in between never leaves the processor's cache. O(H A T n^2).
    """
    roots = weights.sqrt()[..., None]
    first = x.new_zeros(*weights.shape[:2], x.shape[2])
    second = x.new_zeros(*weights.shape[:2], x.shape[2], x.shape[2])
    block = max(64, _BLOCK // max(1, weights.shape[1] * x.shape[2]))
    for head, rows in enumerate(x):
        for low in range(0, len(rows), block):
            part = slice(low, low + block)
            y = rows[part] - about[head]
            first[head].addmm_(weights[head, :, part], y)
            scaled = y * roots[head, :, part]
            second[head].baddbmm_(scaled.mT, scaled)
    return first, second
