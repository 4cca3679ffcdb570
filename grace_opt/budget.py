"""Budgets: how many channels each head prunes when they share a total."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from grace_opt.errors import InputError
from grace_opt.problem import FloatArray, SubsetProblem


def shared(
    curves: Sequence[FloatArray],
    total: float,
    *,
    floor: int = 0,
    align: int = 1,
    costs: Sequence[float] | None = None,
) -> list[int]:
    """How many channels each head prunes so that ``total`` are saved in all, at little error.

    ``curves[h][m]`` is the error of head h with m channels pruned, m = 0 .. the most it can prune; only the lower
    convex hull of a curve matters. Each head keeps at least ``floor`` channels and prunes a multiple of ``align``.
    ``costs`` are what pruning one channel of each head saves (1 if left out), in the unit of ``total``.

    Channels are pruned, ``align`` at a time, where the marginal error for what is saved is least: exact for convex
    curves and equal costs (Fox, Operations Research 14, 1966). At least ``total`` is saved, and less than one step
    more. O(heads n log heads). Raises InputError if the floors leave too little to prune, and says how much.
    """
    each = [1.0] * len(curves) if costs is None else list(costs)
    most = [align * max(0, (len(curve) - 1 - floor) // align) for curve in curves]
    possible = sum(cost * limit for cost, limit in zip(each, most, strict=True))
    if total > possible * (1 + 1e-12):
        raise InputError(
            f"{total:g} cannot be saved: {len(curves)} heads that keep at least {floor} channels each, in multiples of "
            f"{align}, leave {possible:g} to save; prune less or lower the floor"
        )
    pruned = [0] * len(curves)
    slopes = [_hull_slopes(curve[: limit + 1 : align]) for curve, limit in zip(curves, most, strict=True)]
    heap = [(float(slope[0]) / each[head], head) for head, slope in enumerate(slopes) if len(slope)]
    heapq.heapify(heap)
    saved = 0.0
    while saved < total * (1 - 1e-12) and heap:
        _, head = heapq.heappop(heap)
        pruned[head] += align
        saved += align * each[head]
        step = pruned[head] // align
        if step < len(slopes[head]):
            heapq.heappush(heap, (float(slopes[head][step]) / each[head], head))
    return pruned


def error_curves(problems: Sequence[SubsetProblem]) -> list[FloatArray]:
    """For each head the objective with its 0, 1, ... channels of forward greedy pruned, all heads at once.

    The heads must have one n and no tied groups. Protected channels are never pruned: a curve ends where they begin.
    O(heads n^2).
    """
    weights = np.stack([problem.weights for problem in problems])
    heads, n = weights.shape[:2]
    scores = np.diagonal(weights, axis1=1, axis2=2).copy()
    for row, problem in zip(scores, problems, strict=True):
        if problem.protected is not None:
            row[problem.protected] = np.inf
    rows, steps = np.arange(heads), np.zeros((heads, n + 1))
    for step in range(1, n + 1):
        picks = scores.argmin(1)
        steps[:, step] = scores[rows, picks]
        scores += 2 * weights[rows, picks]
        scores[rows, picks] = np.inf
    return [curve[: 1 + problem.prunable] for curve, problem in zip(steps.cumsum(1), problems, strict=True)]


def _hull_slopes(curve: FloatArray) -> FloatArray:
    """The steps of the lower convex hull of a curve, one for each step of the curve, ascending. O(n)."""
    corners = [0]
    for i in range(1, len(curve)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (curve[b] - curve[a]) * (i - b) < (curve[i] - curve[b]) * (b - a):
                break
            corners.pop()
        corners.append(i)
    steps = [np.full(b - a, (curve[b] - curve[a]) / (b - a)) for a, b in pairwise(corners)]
    return np.concatenate(steps) if steps else np.empty(0)
