"""Tabu search over exchanges."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from grace_opt.problem import BoolArray, SubsetProblem
from grace_opt.solution import Capabilities, Limit, Limits, RawResult
from grace_solvers.parts.convex import convex_bound, convexified
from grace_solvers.parts.dual import diagonal_shift
from grace_solvers.parts.exchange import iterated_tabu, nearest, starts
from grace_solvers.parts.undecided import core_of
from grace_solvers.parts.warmup import ready


@dataclass(frozen=True)
class LocalSearchSolver:
    """Iterated tabu search: exchange a pruned node with a kept one, best move first, and shake the best choice.

    It starts from greedy forward, greedy backward, the rounded minimum of a convex relaxation and the warm start,
    makes ``iterations`` moves from each, and then ``rounds`` times as many from the best choice with a tenth of it
    exchanged at random (Palubeckis, Appl. Math. Comput. 189, 2007). A heuristic without a bound, never worse than the
    warm start or greedy in either direction. O(m (n - m)) a move; O(n^3) once for the relaxation. Deterministic for a
    seed, unless a time limit ends it. A batch is worked on by ``limits.threads`` threads. With tied groups of several
    sizes it starts from the choice of least diagonal and exchanges groups of the same size only.
    """

    iterations: int = 40
    rounds: int = 8

    name: ClassVar[str] = "local-search"
    capabilities: ClassVar[Capabilities] = Capabilities(
        time_limit=True, iteration_limit=True, warm_start=True, groups=True, batched=True, requires=("numba", "scipy")
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
        """Starts, then moves."""
        ready()
        deadline = np.inf if limits.time_limit is None else time.monotonic() + limits.time_limit
        core = core_of(problem)
        if core.k == 0:
            return RawResult(core.expand(np.zeros(0, bool)))
        first = [] if warm_start is None else [core.contract(warm_start)]
        first += starts(core)
        if core.equal and time.monotonic() < deadline:
            Q, linear = convexified(core, diagonal_shift(core))
            first.append(nearest(core, convex_bound(core, Q, linear, precision=0.1).x))
        found = iterated_tabu(
            core,
            first,
            iterations=self.iterations,
            rounds=self.rounds,
            seed=limits.seed,
            deadline=deadline,
            iteration_limit=limits.iteration_limit,
        )
        limit = Limit.NONE
        if time.monotonic() > deadline:
            limit = Limit.TIME
        elif found.iterations == limits.iteration_limit:
            limit = Limit.ITERATION
        return RawResult(core.expand(found.y), limit=limit, iterations=found.iterations)

    def solve_batch(self, problems: Sequence[SubsetProblem], limits: Limits) -> list[RawResult]:
        """One by one on each of ``limits.threads`` threads; the compiled parts run side by side."""
        with ThreadPoolExecutor(limits.threads) as pool:
            return list(pool.map(lambda problem: self.solve(problem, limits), problems))
