"""The oracle: look at every selection."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from grace_opt.problem import BoolArray, SubsetProblem
from grace_opt.solution import BoundKind, Capabilities, Limit, Limits, RawResult

LARGEST = 20
_CHUNK = 1 << 15
_CANDIDATES = 1 << 12


@dataclass(frozen=True)
class ExhaustiveSolver:
    """The optimum, by enumeration of all 2^k subsets of the k prunable nodes, k <= 20. O(2^k k^2).

    The bound is proven: it is the smallest value met. The values of different subsets are compared in float64 with a
    rounding error of at most 2 k eps times the subset's own sum of |W_ij|; those that could be optimal within it are
    compared again by the same sum that the front end uses (the 4096 lowest; beyond, the bound is lowered by the error).
    Cut short by a time limit, it returns its incumbent and no bound. Takes any tied groups and any symmetric W,
    definite or not. Ties: the lowest channels first.
    """

    name: ClassVar[str] = "exhaustive"
    capabilities: ClassVar[Capabilities] = Capabilities(
        exact=True, bounds=True, time_limit=True, groups=True, largest_n=LARGEST
    )

    def supports(self, problem: SubsetProblem) -> bool | str:
        """True up to 20 prunable nodes."""
        nodes = int(problem.contraction.free.sum())
        return nodes <= LARGEST or f"it enumerates at most {LARGEST} prunable nodes, and there are {nodes}"

    def solve(
        self,
        problem: SubsetProblem,
        limits: Limits,
        warm_start: BoolArray | None = None,
        rng: np.random.Generator | None = None,
    ) -> RawResult:
        """Enumerate in chunks; the time limit is looked at after each."""
        began = time.monotonic()
        graph = problem.contraction
        free = np.flatnonzero(graph.free)
        weights, sizes = graph.weights[np.ix_(free, free)], graph.sizes[free]
        magnitudes = 2 * len(free) * np.finfo(np.float64).eps * np.abs(weights)
        ceiling = np.inf  # no optimum lies above it
        near: list[tuple[float, float, int]] = []  # (value, rounding error, subset) of what may be optimal
        limit = Limit.NONE
        bits = np.arange(len(free))
        visited = 0
        for start in range(0, 1 << len(free), _CHUNK):
            subsets = np.arange(start, min(start + _CHUNK, 1 << len(free)))
            x = (subsets[:, None] >> bits & 1).astype(np.float64)
            fits = x @ sizes == problem.prune
            x, subsets = x[fits], subsets[fits]
            values = np.einsum("si,si->s", x @ weights, x)
            errors = np.einsum("si,si->s", x @ magnitudes, x)  # entries outside the subset add exact zeros
            visited += len(subsets)
            ceiling = min(ceiling, (values + errors).min(initial=np.inf))
            close = values - errors <= ceiling
            near = [entry for entry in near if entry[0] - entry[1] <= ceiling]
            near += zip(values[close].tolist(), errors[close].tolist(), subsets[close].tolist(), strict=True)
            if limits.time_limit is not None and near and time.monotonic() - began > limits.time_limit:
                limit = Limit.TIME if start + _CHUNK < 1 << len(free) else Limit.NONE
                break

        def selection(subset: int) -> BoolArray:
            chosen = np.zeros(len(graph.sizes), bool)
            chosen[free[(subset >> bits & 1).astype(bool)]] = True
            return graph.expand(chosen)

        # Among ties the lowest channels; more ties than these would take long to tell apart, for nothing.
        candidates = [selection(subset) for _, _, subset in sorted(near, key=lambda e: (e[0], e[2]))[:_CANDIDATES]]
        pruned = min(candidates, key=lambda x: (problem.objective(x), tuple((~x).tolist())))
        if limit is not Limit.NONE:
            return RawResult(pruned, limit=limit, nodes=visited)
        bound = problem.objective(pruned)
        if len(near) > _CANDIDATES:  # what was not compared again is as high as its value says, up to its rounding
            bound = min(bound, *(value - error for value, error, _ in near))
        return RawResult(pruned, lower_bound=bound, bound_kind=BoundKind.PROVEN, nodes=visited)
