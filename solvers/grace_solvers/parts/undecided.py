"""What a solver works on: the nodes still to be decided, in units near one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from grace_opt.problem import BoolArray, FloatArray, IntArray, SubsetProblem
from grace_solvers.parts.jit import kernel

#: -1 undecided, 0 kept, 1 pruned
StateArray = NDArray[np.int8]


@dataclass(frozen=True, eq=False)
class Core:
    """minimise constant + y'Ay subject to sizes.y = count, y in {0,1}^k; times ``scale`` it is the problem's objective.

    Protected nodes are gone, tied groups are single nodes, decided nodes are folded in: a node that is pruned for
    certain adds twice its row to the diagonal, because y_i^2 = y_i. ``scale`` is a power of two, so that a problem
    and its multiple by a power of two give the same numbers. Either k = 0, or 0 < count < sum of sizes.
    """

    weights: FloatArray  #: A, float64[k, k], symmetric, C order
    sizes: FloatArray  #: float64[k]: channels in a node; all ones when all are equal
    count: int
    constant: float
    scale: float
    nodes: IntArray  #: int64[k]: the node of `problem.contraction`
    chosen: IntArray  #: nodes of `problem.contraction` that are pruned for certain
    problem: SubsetProblem

    @property
    def k(self) -> int:
        """Number of undecided nodes."""
        return len(self.sizes)

    @property
    def equal(self) -> bool:
        """Whether all nodes count the same (then as one), so that any two can be exchanged."""
        return bool((self.sizes == 1).all())

    def value(self, y: BoolArray) -> float:
        """constant + y'Ay. O(k^2)."""
        return self.constant + float(self.weights[np.ix_(y, y)].sum())

    def expand(self, y: BoolArray) -> BoolArray:
        """The pruned channels, bool[n], of a choice y, bool[k]."""
        graph = self.problem.contraction
        nodes = np.zeros(len(graph.sizes), bool)
        nodes[self.chosen] = True
        nodes[self.nodes[y]] = True
        return graph.expand(nodes)

    def contract(self, pruned: BoolArray) -> BoolArray:
        """The choice y, bool[k], of a feasible selection, bool[n], that agrees with what is decided."""
        nodes = np.zeros(len(self.problem.contraction.sizes), bool)
        nodes[self.problem.contraction.node_of[pruned]] = True
        return nodes[self.nodes]

    def completed(self, state: StateArray) -> StateArray | None:
        """``state`` with what follows from it at once decided too; None if no choice agrees with it. O(k count)."""
        state = state.copy()
        left = self.count - int(self.sizes[state == 1].sum())
        state[(state < 0) & (self.sizes > left)] = 0
        undecided = state < 0
        if not 0 <= left <= self.sizes[undecided].sum():
            return None
        if not self.equal and not reachable(self.sizes, state, left):
            return None
        if left in (0, self.sizes[undecided].sum()):
            state[undecided] = left > 0
        return state

    def restrict(self, state: StateArray) -> Core:
        """The core with the nodes of ``state`` >= 0 decided. O(k^2)."""
        ones, free = np.flatnonzero(state == 1), np.flatnonzero(state < 0)
        weights = self.weights[np.ix_(free, free)]
        weights[np.arange(len(free)), np.arange(len(free))] += 2 * self.weights[np.ix_(free, ones)].sum(1)
        sizes, count = self.sizes[free], round(self.count - self.sizes[ones].sum())
        if len(free) and (sizes == sizes[0]).all():
            sizes, count = np.ones(len(free)), count // int(sizes[0])
        return replace(
            self,
            weights=weights,
            sizes=sizes,
            count=count,
            constant=self.constant + float(self.weights[np.ix_(ones, ones)].sum()),
            nodes=self.nodes[free],
            chosen=np.concatenate([self.chosen, self.nodes[ones]]),
        )


def core_of(problem: SubsetProblem) -> Core:
    """The problem without its protected nodes. O(n^2)."""
    graph = problem.contraction
    nodes = np.flatnonzero(graph.free)
    weights = graph.weights[np.ix_(nodes, nodes)]
    scale = float(2.0 ** np.frexp(np.abs(weights).max(initial=0.0))[1])
    core = Core(
        weights=weights / scale,
        sizes=graph.sizes[nodes].astype(np.float64),
        count=problem.prune,
        constant=0.0,
        scale=scale,
        nodes=nodes,
        chosen=np.empty(0, np.int64),
        problem=problem,
    )
    state = core.completed(np.full(len(nodes), -1, np.int8))
    assert state is not None  # SubsetProblem has checked that the count can be reached
    return core.restrict(state)


@kernel
def reachable(sizes: FloatArray, state: StateArray, left: int) -> bool:
    """Whether some choice of the undecided nodes (state < 0) has exactly ``left`` channels. O(k left)."""
    sums = np.zeros(left + 1, np.bool_)
    sums[0] = True
    for i in range(len(state)):
        if state[i] < 0:
            size = int(sizes[i])
            for total in range(left, size - 1, -1):
                sums[total] |= sums[total - size]
    return bool(sums[left])
