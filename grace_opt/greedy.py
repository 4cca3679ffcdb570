"""Forward greedy of many problems at once: one rule, on numpy arrays and on torch tensors alike."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast, overload

import numpy as np

from grace_opt.problem import BoolArray, FloatArray, IntArray

if TYPE_CHECKING:
    from torch import Tensor


@overload
def forward(weights: FloatArray, steps: int, free: BoolArray | None = None) -> tuple[IntArray, FloatArray]: ...
@overload
def forward(weights: Tensor, steps: int, free: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
def forward(
    weights: FloatArray | Tensor, steps: int, free: BoolArray | Tensor | None = None
) -> tuple[IntArray, FloatArray] | tuple[Tensor, Tensor]:
    """Minimum Incremental Error Selection (GRACE, arXiv 2604.16983, algorithm 1): s_j = W_jj; pick the j of smallest
    s_j, then s_k += 2 W_kj.

    The selections are nested: the first m picks are what is pruned when m are.

    Args:
        weights: float64[H, n, n], of numpy or torch; on a GPU nothing waits for the device.
        steps: how many are picked of each, at most n.
        free: bool[H, n], what may be picked; None: all.

    Returns:
        int64[H, steps], the picks in their order (ties: the lowest first), and float64[H, steps], what each adds to the
        objective. Where nothing free is left the cost is infinite and the pick means nothing. O(H steps n), in a few
        operations a step.
    """
    if isinstance(weights, np.ndarray):
        return _on_arrays(weights, steps, cast(BoolArray | None, free))
    allowed = cast("Tensor | None", free)
    if weights.device.type != "cpu":
        return _on_tensors(weights, steps, allowed)
    import torch

    # A step takes numpy a quarter of torch's time.
    found = _on_arrays(weights.detach().numpy(), steps, None if allowed is None else allowed.numpy())
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _on_arrays(weights: FloatArray, steps: int, free: BoolArray | None) -> tuple[IntArray, FloatArray]:
    heads, n = weights.shape[:2]
    first = n * np.arange(heads)  # of each head, among the rows of all W and among the scores
    scores = weights.diagonal(0, 1, 2).copy()
    if free is not None:
        scores[~free] = np.inf
    rows, flat, row = weights.reshape(-1, n), scores.reshape(-1), np.empty((heads, n))
    picks, costs = np.empty((heads, steps), np.int64), np.empty((heads, steps))
    for step in range(steps):
        pick = picks[:, step] = scores.argmin(1)
        at = first + pick
        costs[:, step] = flat[at]
        rows.take(at, 0, out=row, mode="clip")  # mode: else numpy copies once more
        row *= 2
        scores += row
        flat[at] = np.inf
    return picks, costs


def _on_tensors(weights: Tensor, steps: int, free: Tensor | None) -> tuple[Tensor, Tensor]:
    # gather and scatter_: indexing by tensors and assigning a number waits for the device.
    scores = weights.diagonal(0, 1, 2).clone()
    if free is not None:
        scores = scores.masked_fill(~free, math.inf)
    picks = scores.new_empty(len(scores), steps, dtype=scores.argmin().dtype)
    costs = scores.new_empty(len(scores), steps)
    for step in range(steps):
        cost, pick = scores.min(1, keepdim=True)
        picks[:, step : step + 1], costs[:, step : step + 1] = pick, cost
        row = weights.gather(1, pick[..., None].expand(-1, -1, weights.shape[2]))[:, 0]
        scores.add_(row, alpha=2).scatter_(1, pick, math.inf)
    return picks, costs
