"""Prune the channels that matter least on their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from grace_opt.problem import BoolArray, SubsetProblem
from grace_opt.solution import Capabilities, Limits, RawResult

#: why a solver that adds node after node does not take a problem
SEVERAL_SIZES = "its tied groups are of several sizes, and filling an exact count from them needs a search"


@dataclass(frozen=True)
class IndependentSolver:
    """The m nodes of smallest weight W_ii; with tied groups, of smallest sum of W_ii in the group.

    W_ii = |q_i|^2 |k_i|^2 is the square of ThinK's score (arXiv 2407.21018, eq. 5). Optimal when W is diagonal,
    otherwise a heuristic without a bound: it does not look at edges. O(n log n). Ties: the lowest channel first.
    """

    name: ClassVar[str] = "independent"
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
        """One pass; no limit can cut it short."""
        nodes = problem.contraction
        scores = np.bincount(nodes.node_of, weights=np.diagonal(problem.weights))
        scores[~nodes.free] = np.inf
        count = problem.prune // (nodes.equal_size() or 1)
        chosen = np.zeros(len(scores), bool)
        chosen[np.argsort(scores, kind="stable")[:count]] = True
        return RawResult(nodes.expand(chosen))

    def solve_batch(self, problems: Sequence[SubsetProblem], limits: Limits) -> list[RawResult]:
        """The same as one by one: a sort a head is already fast."""
        return [self.solve(problem, limits) for problem in problems]
