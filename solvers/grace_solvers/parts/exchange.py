"""Selections by exchange: starting points, and tabu search over exchanges of a pruned node with a kept one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from grace_opt.problem import BoolArray, FloatArray, IntArray
from grace_solvers.parts.jit import fast_kernel, kernel
from grace_solvers.parts.undecided import Core

ROUNDING = 1e-12  # a change smaller than this part of the value is no improvement
_LOOKS = 20_000_000  # exchanges looked at between two looks at the clock: some 10 ms


class Found(NamedTuple):
    """The best choice met, bool[k], its core value, and the iterations made."""

    y: BoolArray
    value: float
    iterations: int


def iterated_tabu(
    core: Core,
    starts: Sequence[BoolArray],
    *,
    iterations: int = 40,
    rounds: int = 0,
    seed: int = 0,
    deadline: float = np.inf,
    iteration_limit: int | None = None,
) -> Found:
    """Tabu search from each start, then in rounds from the best choice with a tenth of it exchanged at random.

    Each search makes ``iterations`` moves of O(count (k - count)); only nodes of the same size are exchanged
    (iterated tabu search: Palubeckis, Appl. Math. Comput. 189, 2007). Ends early at ``deadline``, a time.monotonic(),
    or when ``iteration_limit`` moves are made. The result is never worse than the first start. Without starts: raises
    IndexError.
    """
    doubled = 2 * core.weights
    if not core.equal:
        doubled[core.sizes[:, None] != core.sizes] = -np.inf  # such an exchange costs more than any other
    rng = np.random.default_rng(seed)
    random = rng.integers(1, 2**62, 1, np.uint64)
    portion = max(1, _LOOKS // max(1, core.k * core.k))
    best, best_value, made = starts[0], core.value(starts[0]), 0
    for turn in range(len(starts) + rounds):
        y = starts[turn].copy() if turn < len(starts) else _shaken(core, best, rng)
        met, until = y.copy(), np.zeros(core.k, np.int64)
        most = iterations if iteration_limit is None else min(iterations, iteration_limit - made)
        for done in range(0, most, portion):
            moves = min(portion, most - done)
            made += moves
            stuck = tabu(core.weights, doubled, y, until, met, done, moves, random)
            if stuck or time.monotonic() > deadline:
                break
        value = core.value(met)
        if value < best_value - ROUNDING * abs(best_value):
            best, best_value = met, value
        if time.monotonic() > deadline or made == iteration_limit:
            break
    return Found(best, best_value, made)


def _shaken(core: Core, y: BoolArray, rng: np.random.Generator) -> BoolArray:
    """A tenth of the pruned nodes, or of the kept ones if they are fewer, exchanged at random within their size."""
    shaken = y.copy()
    for size in np.unique(core.sizes):
        inside, outside = np.flatnonzero(y & (core.sizes == size)), np.flatnonzero(~y & (core.sizes == size))
        exchanged = min(len(inside), len(outside), max(2, min(len(inside), len(outside)) // 10))
        shaken[rng.choice(inside, exchanged, replace=False)] = False
        shaken[rng.choice(outside, exchanged, replace=False)] = True
    return shaken


def starts(core: Core) -> list[BoolArray]:
    """Greedy forward and backward; where sizes differ, the choice of least sum of A_ii, by dynamic programming."""
    if not core.equal:
        return [_knapsack(core)]
    # Backward greedy is forward greedy for z = 1 - y: (1 - z)'A(1 - z) = const + z'Az - 2 (A1)'z.
    complement = core.weights.copy()
    complement[np.arange(core.k), np.arange(core.k)] -= 2 * core.weights.sum(1)
    return [forward(core.weights, core.count), ~forward(complement, core.k - core.count)]


def nearest(core: Core, x: FloatArray) -> BoolArray:
    """A relaxation's point x, float64[k], rounded to a choice: the largest entries; needs nodes of equal size."""
    y = np.zeros(core.k, bool)
    y[np.argsort(-x, kind="stable")[: core.count]] = True
    return y


def _knapsack(core: Core) -> BoolArray:
    """The choice of least sum of A_ii among those of the right total size. O(k count)."""
    cost = np.full((core.k + 1, core.count + 1), np.inf)
    cost[0, 0] = 0.0
    sizes = core.sizes.astype(np.int64)
    for i, (size, weight) in enumerate(zip(sizes, np.diagonal(core.weights), strict=True)):
        cost[i + 1] = cost[i]
        if size <= core.count:
            cost[i + 1, size:] = np.minimum(cost[i, size:], cost[i, : core.count + 1 - size] + weight)
    y, left = np.zeros(core.k, bool), core.count
    for i in range(core.k - 1, -1, -1):
        if cost[i + 1, left] != cost[i, left]:
            y[i], left = True, left - sizes[i]
    return y


@kernel
def forward(A: FloatArray, count: int) -> BoolArray:
    """Choose ``count`` nodes, each time the one that adds least (MIES, as in `greedy`). O(count k)."""
    k = len(A)
    chosen = np.zeros(k, np.bool_)
    scores = np.empty(k)
    for i in range(k):
        scores[i] = A[i, i]
    for _ in range(count):
        pick = np.argmin(scores)
        chosen[pick] = True
        for i in range(k):
            scores[i] = np.inf if chosen[i] else scores[i] + 2 * A[pick, i]
    return chosen


@fast_kernel
def tabu(  # noqa: PLR0912 (one compiled loop)
    A: FloatArray,
    doubled: FloatArray,
    y: BoolArray,
    until: IntArray,
    best: BoolArray,
    done: int,
    iterations: int,
    random: NDArray[np.uint64],
) -> bool:
    """Go on from the choice y and the best choice so far, both bool[k], changed in place; True if nothing can move.

    Each iteration makes the best exchange that is not tabu (``until``: the last iteration in which a node may not
    move), or that gives a new best (Glover, ORSA J. Comput. 1, 1989; the exchange neighbourhood as in Palubeckis, Appl.
    Math. Comput. 189, 2007). Exchanging i, pruned, with j, kept, changes y'Ay by (A_ii - 2 g_i) + (A_jj + 2 g_j) -
    2 A_ij with g = Ay: all are looked at, row by row of ``doubled`` = 2A, and g is updated in O(k).
    """
    k = len(y)
    g, enter, enter_free = np.zeros(k), np.empty(k), np.empty(k)
    value, best_value = 0.0, 0.0
    for i in range(k):
        if y[i]:
            for j in range(k):
                g[j] += A[i, j]
        if best[i]:
            for j in range(k):
                if best[j]:
                    best_value += A[i, j]
    for i in range(k):
        if y[i]:
            value += g[i]
    for iteration in range(done + 1, done + iterations + 1):
        for j in range(k):
            enter[j] = np.inf if y[j] else A[j, j] + 2 * g[j]
            enter_free[j] = np.inf if until[j] >= iteration else enter[j]
        allowed, out_allowed, least, out_least = np.inf, -1, np.inf, -1
        for i in range(k):
            if y[i]:
                row = doubled[i]
                any_j, free_j = np.inf, np.inf
                for j in range(k):
                    any_j = min(any_j, enter[j] - row[j])
                    free_j = min(free_j, enter_free[j] - row[j])
                leave = A[i, i] - 2 * g[i]
                if leave + any_j < least:
                    least, out_least = leave + any_j, i
                if until[i] < iteration and leave + free_j < allowed:
                    allowed, out_allowed = leave + free_j, i
        aspires = value + least < best_value - ROUNDING * abs(best_value)
        i, change, entering = (out_least, least, enter) if aspires else (out_allowed, allowed, enter_free)
        if i < 0:
            if not (until >= iteration).any():
                return True
            continue
        j = int(np.argmin(entering - doubled[i]))
        y[i], y[j] = False, True
        for p in range(k):
            g[p] += A[j, p] - A[i, p]
        value += change
        random[0] ^= random[0] << np.uint64(13)
        random[0] ^= random[0] >> np.uint64(7)
        random[0] ^= random[0] << np.uint64(17)
        until[i] = iteration + 10 + np.int64(random[0] & np.uint64(3))
        until[j] = iteration + 5 + np.int64((random[0] >> np.uint64(2)) & np.uint64(3))
        if value < best_value - ROUNDING * abs(best_value):
            best[:] = y
            best_value = value
    return False
