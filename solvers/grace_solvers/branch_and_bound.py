"""Exact selection by branch and bound on a convex reformulation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from grace_opt.problem import BoolArray, SubsetProblem
from grace_opt.solution import BoundKind, Capabilities, Limit, Limits, RawResult, Timing
from grace_solvers.parts.dual import Root, root
from grace_solvers.parts.exchange import iterated_tabu, nearest
from grace_solvers.parts.incumbent import CUT_AT, opening
from grace_solvers.parts.tree import CLOSED, EMPTY, NODES, OPEN, VALUE, Pool, branch, grown, new_pool, push

_CHUNK = 1 << 20  # entries of W between two looks at the clock: 64 nodes of 128 channels, some 5 ms
_MOST_BYTES = 1 << 30  # of open nodes; beyond, the search goes depth first


@dataclass(frozen=True)
class BranchAndBoundSolver:
    """The optimum, proven; cut short by a limit, the incumbent and the best bound so far.

    Greedy and tabu search give the incumbent. The root (`grace_solvers.parts.dual`) shifts the diagonal so that the
    objective is convex and its minimum over the box as high as possible (QCR: Billionnet, Elloumi and Plateau, DAM
    157, 2009), and decides all nodes that reduced costs decide. The tree is searched best bound first: pairwise
    Frank-Wolfe bounds that start from the parent's point, reduced costs at every node, branching on the largest
    x_i (1 - x_i) Q_ii, which is what rounding x_i costs. A node is pruned at 1e-3 of the gap tolerance.

    Exact for every symmetric W, definite or not, with protected channels and tied groups of any sizes. The bound is
    proven, up to rounding of at most 1e-12 times the sum of |W_ij| over the prunable channels. O(k^3) for the root,
    O(k^2) for a node of k undecided channels; the number of nodes is exponential at worst. With one seed the search is
    deterministic, unless a time limit ends it.
    """

    name: ClassVar[str] = "branch-and-bound"
    capabilities: ClassVar[Capabilities] = Capabilities(
        exact=True,
        bounds=True,
        time_limit=True,
        node_limit=True,
        warm_start=True,
        groups=True,
        largest_n=256,
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
        """Incumbent, root, tree."""
        known = opening(problem, limits, warm_start)
        core, cutoff, deadline = known.core, known.cutoff, known.deadline
        if core.k == 0:
            return known.decided()
        incumbent, value = known.incumbent, known.value
        top = root(core, cutoff, deadline)
        if top.core.equal:
            found = iterated_tabu(top.core, [nearest(top.core, top.x)], seed=limits.seed, deadline=deadline)
            if found.value < value:
                incumbent, value = top.core.expand(found.y), found.value
        rooted = time.perf_counter_ns()

        pool = _pool_of(top, value, cutoff)
        trace: list[tuple[float, float, float]] = []

        def note(lower_bound: float) -> None:
            now = (core.scale * float(pool.values[VALUE]), core.scale * lower_bound)
            if not trace or now != trace[-1][1:]:
                trace.append((time.monotonic() - known.began, *now))

        note(min(top.lower_bound, value))
        relative, absolute = CUT_AT * limits.gap_rel, CUT_AT * limits.gap_abs / core.scale
        pool, limit = _take_apart(top, pool, relative, absolute, limits, deadline, note)
        if pool.values[VALUE] < value:
            incumbent = top.core.expand(pool.incumbent == 1)
        return RawResult(
            incumbent,
            trace[-1][2],
            BoundKind.PROVEN,
            limit=limit,
            nodes=int(pool.counts[NODES]),
            iterations=top.iterations,
            timing=Timing(build=rooted - known.clock, solve=time.perf_counter_ns() - rooted),
            trace=tuple(trace),
        )


def _take_apart(
    top: Root,
    pool: Pool,
    relative: float,
    absolute: float,
    limits: Limits,
    deadline: float,
    note: Callable[[float], None],
) -> tuple[Pool, Limit]:
    """Nodes in chunks until none is open or a limit is reached; ``note`` hears of each better bound."""
    core, depth_first, lower_bound = top.core, False, top.lower_bound
    while pool.counts[OPEN]:
        if time.monotonic() > deadline:
            return pool, Limit.TIME
        if limits.node_limit is not None and pool.counts[NODES] >= limits.node_limit:
            return pool, Limit.NODE
        if pool.counts[EMPTY] > len(pool.empty) // 4:
            depth_first = False
        elif pool.counts[EMPTY] < 2 * core.k and pool.state.nbytes + pool.point.nbytes < _MOST_BYTES:
            pool = grown(pool)
        elif pool.counts[EMPTY] < 2 * core.k:
            depth_first = True  # needs no more slots than it is deep
        try:
            branch(
                core.weights,
                top.Q,
                top.linear,
                core.constant,
                core.sizes,
                core.count,
                pool,
                max(2, _CHUNK // core.k**2),
                relative,
                absolute,
                depth_first,
                limits.seed,
            )
        except KeyboardInterrupt:
            return pool, Limit.INTERRUPTED
        still_open = pool.bound[pool.heap[: pool.counts[OPEN]]].min(initial=np.inf)
        lower_bound = max(lower_bound, min(still_open, pool.values[CLOSED], pool.values[VALUE]))
        note(lower_bound)
    note(max(lower_bound, min(pool.values[CLOSED], pool.values[VALUE])))
    return pool, Limit.NONE


def _pool_of(top: Root, value: float, cutoff: float) -> Pool:
    """The root as the only open node, if there is anything to decide; what it decided is closed at the cutoff."""
    k = top.core.k
    pool = new_pool(max(1024, 4 * k), k, value, min(cutoff, value))
    if k:
        push(pool, np.full(k, -1, np.int8), top.x, top.lower_bound, top.lower_bound)
    return pool
