"""Greedy selection, forward (MIES of GRACE) and backward, for all heads of a model at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from grace_opt.greedy import forward
from grace_opt.problem import BoolArray, FloatArray, IntArray, SubsetProblem
from grace_opt.solution import Capabilities, Limits, RawResult
from grace_solvers.independent import SEVERAL_SIZES


@dataclass(frozen=True)
class GreedySolver:
    """Grow the pruned set by the cheapest node, or shrink it by the dearest one, until m are pruned.

    ``forward`` is Minimum Incremental Error Selection (GRACE, arXiv 2604.16983, algorithm 1): s_j = W_jj; prune
    the j of smallest s_j, then s_k += 2 W_kj. ``backward`` starts with everything prunable pruned and takes out
    the node whose weight plus edges within the set is largest. ``best`` runs both and keeps the better one,
    forward on a tie. Each step is exact for its own change; the result is a heuristic without a bound, optimal
    when W is diagonal. O(m n) forward and O((n - m) n) backward for each problem, vectorised over problems of
    the same size. Ties: the lowest channel first. With tied groups of one size, a node is a group.
    """

    direction: Literal["forward", "backward", "best"] = "forward"

    name: ClassVar[str] = "greedy"
    capabilities: ClassVar[Capabilities] = Capabilities(groups=True, batched=True)

    def supports(self, problem: SubsetProblem) -> bool | str:
        """True, unless tied groups are of several sizes."""
        return problem.contraction.equal_size() is not None or SEVERAL_SIZES

    def solve(
        self,
        problem: SubsetProblem,
        limits: Limits,
        warm_start: BoolArray | None = None,
        rng: np.random.Generator | None = None,
    ) -> RawResult:
        """A batch of one."""
        return self.solve_batch([problem], limits)[0]

    def solve_batch(self, problems: Sequence[SubsetProblem], limits: Limits) -> list[RawResult]:
        """All problems together, those with the same number of nodes in one array."""
        same_size: dict[int, list[int]] = defaultdict(list)
        for index, problem in enumerate(problems):
            same_size[len(problem.contraction.sizes)].append(index)
        results: dict[int, RawResult] = {}
        for members in same_size.values():
            graphs = [problems[i].contraction for i in members]
            weights = np.stack([g.weights for g in graphs])
            free = np.stack([g.free for g in graphs])
            counts = np.array(
                [problems[i].prune // (g.equal_size() or 1) for i, g in zip(members, graphs, strict=True)]
            )
            chosen, steps = self._select(weights, free, counts)
            for row, i in enumerate(members):
                results[i] = RawResult(graphs[row].expand(chosen[row]), iterations=int(steps[row]))
        return [results[i] for i in range(len(problems))]

    def _select(self, weights: FloatArray, free: BoolArray, counts: IntArray) -> tuple[BoolArray, IntArray]:
        surplus = free.sum(1) - counts
        if self.direction == "forward":
            return _forward(weights, free, counts), counts
        if self.direction == "backward":
            return _backward(weights, free, counts), surplus
        grown, shrunk = _forward(weights, free, counts), _backward(weights, free, counts)
        better = _objectives(weights, shrunk) < _objectives(weights, grown)
        return np.where(better[:, None], shrunk, grown), counts + surplus


def _forward(weights: FloatArray, free: BoolArray, counts: IntArray) -> BoolArray:
    """weights [h, n, n], free [h, n], counts [h] -> chosen [h, n], the first of nested picks."""
    picks, _ = forward(weights, int(counts.max(initial=0)), free)
    rows, steps = np.nonzero(np.arange(picks.shape[1]) < counts[:, None])
    chosen = np.zeros(free.shape, bool)
    chosen[rows, picks[rows, steps]] = True
    return chosen


def _backward(weights: FloatArray, free: BoolArray, counts: IntArray) -> BoolArray:
    """Scores hold what taking a node out of the pruned set saves."""
    diagonal = np.diagonal(weights, axis1=1, axis2=2)
    inside = np.einsum("hij,hj->hi", weights, free.astype(np.float64))
    scores = np.where(free, 2 * inside - diagonal, -np.inf)
    chosen = free.copy()
    surplus = free.sum(1) - counts
    for step in range(surplus.max(initial=0)):
        rows = np.flatnonzero(surplus > step)
        picks = scores[rows].argmax(1)
        chosen[rows, picks] = False
        scores[rows] -= 2 * weights[rows, picks]
        scores[rows, picks] = -np.inf
    return chosen


def _objectives(weights: FloatArray, chosen: BoolArray) -> FloatArray:
    x = chosen.astype(np.float64)
    values: FloatArray = np.einsum("hi,hij,hj->h", x, weights, x, optimize=True)
    return values
