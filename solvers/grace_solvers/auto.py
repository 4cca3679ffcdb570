"""The solver to take when nobody wants to choose one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from grace_opt.problem import BoolArray, SubsetProblem
from grace_opt.solution import Capabilities, Limits, RawResult, ignored_limits
from grace_solvers.branch_and_bound import BranchAndBoundSolver
from grace_solvers.local_search import LocalSearchSolver

LARGEST_PROVABLE = 512  # beyond, one root relaxation takes longer than tabu search takes to be nearly optimal
_SURELY_PROVABLE = 160  # up to here the tree ends by itself within seconds, as measured on real heads
_NODES = 50_000
_SHORTEST = 0.05


@dataclass(frozen=True)
class AutoSolver:
    """`branch-and-bound` where it can prove something, `local-search` elsewhere; ``raw_status`` says which and why.

    By the number of nodes to decide (channels that are not protected, tied groups as one) and the limits: up to 160,
    branch and bound; up to 512, branch and bound within the limits, or 50,000 nodes where neither time nor nodes are
    limited; local search beyond, or when the time limit is shorter than 0.05 s. What it returns is that solver's, with
    that solver's guarantee.
    """

    name: ClassVar[str] = "auto"
    capabilities: ClassVar[Capabilities] = Capabilities(
        exact=True,
        bounds=True,
        time_limit=True,
        node_limit=True,
        iteration_limit=True,
        warm_start=True,
        groups=True,
        largest_n=LARGEST_PROVABLE,
        requires=("numba", "scipy"),
    )

    def supports(self, problem: SubsetProblem) -> bool | str:
        """True."""
        return True

    def solve(
        self,
        problem: SubsetProblem,
        limits: Limits,
        warm_start: BoolArray | None = None,
        rng: np.random.Generator | None = None,
    ) -> RawResult:
        """Choose, and hand over."""
        nodes = int(problem.contraction.free.sum())
        solver: BranchAndBoundSolver | LocalSearchSolver = BranchAndBoundSolver()
        reason = f"{nodes} nodes to decide"
        if nodes > LARGEST_PROVABLE:
            solver, reason = LocalSearchSolver(), f"{reason}, more than {LARGEST_PROVABLE}"
        elif limits.time_limit is not None and limits.time_limit < _SHORTEST:
            solver, reason = LocalSearchSolver(), f"{limits.time_limit} s are too short for a proof"
        elif nodes > _SURELY_PROVABLE and limits.time_limit is None and limits.node_limit is None:
            limits = replace(limits, node_limit=_NODES)
            reason = f"{reason}, so within {_NODES} nodes of the tree"
        ignored = ignored_limits(solver, limits)
        raw = solver.solve(problem, limits, warm_start, rng)
        return replace(raw, warnings=(*raw.warnings, *ignored), raw_status=f"chose {solver.name}: {reason}")
