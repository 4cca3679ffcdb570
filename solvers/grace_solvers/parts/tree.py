"""The compiled part of branch and bound: a pool of open nodes, and the loop that takes them apart."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from grace_opt.problem import FloatArray, IntArray
from grace_solvers.parts.convex import fix, frank_wolfe
from grace_solvers.parts.exchange import tabu
from grace_solvers.parts.jit import kernel
from grace_solvers.parts.undecided import StateArray, reachable

OPEN, EMPTY, NODES, ROUNDED = range(4)  # entries of Pool.counts
VALUE, CLOSED = range(2)  # entries of Pool.values
_ROUND_EVERY = 32
_STEPS = 20  # Frank-Wolfe steps for each undecided node at most
_PRECISION = 0.1  # of a bound that cannot prune: part of its distance to the cutoff


class Pool(NamedTuple):
    """Open nodes in slots, and a heap of slots ordered by key."""

    state: NDArray[np.int8]  #: [slots, k]
    point: NDArray[np.float32]  #: [slots, k], where the children's bounds start
    bound: FloatArray  #: [slots]
    key: FloatArray  #: [slots]: the bound, or for depth first something lower with every node
    heap: IntArray  #: [slots], the first counts[OPEN] entries
    empty: IntArray  #: [slots], the first counts[EMPTY] entries
    counts: IntArray
    values: FloatArray  #: the incumbent's value, and the least bound of all that is closed
    incumbent: StateArray  #: [k], filled when an incumbent is found here


def new_pool(slots: int, k: int, value: float, closed: float) -> Pool:
    """An empty pool; ``closed`` bounds all that was closed before."""
    return Pool(
        state=np.empty((slots, k), np.int8),
        point=np.empty((slots, k), np.float32),
        bound=np.empty(slots),
        key=np.empty(slots),
        heap=np.empty(slots, np.int64),
        empty=np.arange(slots),
        counts=np.array([0, slots, 0, 0]),
        values=np.array([value, closed]),
        incumbent=np.full(k, -1, np.int8),
    )


def grown(pool: Pool) -> Pool:
    """The same pool with twice as many slots."""
    slots, k = pool.state.shape
    larger = new_pool(2 * slots, k, 0.0, 0.0)
    for name in ("state", "point", "bound", "key", "heap"):
        getattr(larger, name)[:slots] = getattr(pool, name)
    spare = pool.empty[: pool.counts[EMPTY]]
    larger.empty[: len(spare) + slots] = np.concatenate([spare, np.arange(slots, 2 * slots)])
    pool.counts[EMPTY] = len(spare) + slots
    return larger._replace(counts=pool.counts, values=pool.values, incumbent=pool.incumbent)


@kernel
def push(pool: Pool, state: StateArray, x: FloatArray, bound: float, key: float) -> None:
    """Put a node into an empty slot and into the heap."""
    counts, heap = pool.counts, pool.heap
    counts[EMPTY] -= 1
    slot = pool.empty[counts[EMPTY]]
    pool.state[slot] = state
    pool.point[slot] = x
    pool.bound[slot], pool.key[slot] = bound, key
    i = counts[OPEN]
    counts[OPEN] += 1
    while i > 0 and pool.key[heap[(i - 1) // 2]] > key:
        heap[i] = heap[(i - 1) // 2]
        i = (i - 1) // 2
    heap[i] = slot


@kernel
def pop(pool: Pool) -> int:
    """Take the slot of lowest key out of the heap; the caller gives the slot back."""
    counts, heap, key = pool.counts, pool.heap, pool.key
    top = heap[0]
    counts[OPEN] -= 1
    n = counts[OPEN]
    last = heap[n]
    i = 0
    while 2 * i + 1 < n:
        child = 2 * i + 1
        if child + 1 < n and key[heap[child + 1]] < key[heap[child]]:
            child += 1
        if key[heap[child]] >= key[last]:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = last
    return int(top)


@kernel
def branch(  # noqa: PLR0912, PLR0915 (one compiled loop)
    A: FloatArray,
    Q: FloatArray,
    linear: FloatArray,
    constant: float,
    sizes: FloatArray,
    count: int,
    pool: Pool,
    most_nodes: int,
    relative: float,
    absolute: float,
    depth_first: bool,
    seed: int,
) -> None:
    """Take open nodes apart until ``most_nodes`` children were bounded, none is open, or slots run short.

    A child is closed when its bound is not below the incumbent's value by more than the tolerances.
    """
    k = len(sizes)
    counts, values = pool.counts, pool.values
    equal = sizes.min() == sizes.max()
    state = np.empty(k, np.int8)
    x = np.zeros(k)
    done = 0
    while counts[OPEN] > 0 and counts[EMPTY] >= 2 and done < most_nodes:
        slot = pop(pool)
        cutoff = values[VALUE] - max(relative * abs(values[VALUE]), absolute)
        parent = pool.bound[slot]
        if parent >= cutoff:
            values[CLOSED] = min(values[CLOSED], parent)
            counts[EMPTY] += 1
            pool.empty[counts[EMPTY] - 1] = slot
            continue
        chosen, most = -1, -1.0
        for i in range(k):
            if pool.state[slot, i] < 0:
                xi = float(pool.point[slot, i])
                score = xi * (1 - xi) * Q[i, i]
                if chosen < 0 or score > most:
                    chosen, most = i, score
        for decision in range(2):
            done += 1
            counts[NODES] += 1
            state[:] = pool.state[slot]
            state[chosen] = decision
            left, undecided = float(count), 0.0
            for i in range(k):
                if state[i] == 1:
                    left -= sizes[i]
                elif state[i] < 0:
                    undecided += sizes[i]
            if left < 0 or left > undecided or not (equal or reachable(sizes, state, int(left))):
                continue
            free, ones = np.flatnonzero(state < 0), np.flatnonzero(state == 1)
            if left in (0.0, undecided):
                _leaf(A, constant, state, 0 if left == 0 else 1, pool)
                continue
            sub, sub_linear, sub_sizes, y = _child(Q, linear, sizes, free, ones, pool.point[slot], left)
            fixed = constant
            for one in ones:
                fixed += linear[one] + Q[one, ones].sum()
            g = np.empty(len(free))
            value, _, multiplier, lower = frank_wolfe(
                sub, sub_linear, fixed, sub_sizes, left, y, g, cutoff, _STEPS * len(free), _PRECISION
            )
            if lower >= cutoff:
                values[CLOSED] = min(values[CLOSED], lower)
                continue
            lower = max(lower, parent)
            decided = np.full(len(free), -1, np.int8)
            values[CLOSED] = min(values[CLOSED], fix(g, sub_sizes, y, left, value, multiplier, cutoff, decided))
            x[:] = 0.0
            for p in range(len(free)):
                x[free[p]] = y[p]
                state[free[p]] = decided[p]
                if decided[p] == 1:
                    left -= sub_sizes[p]
                if decided[p] >= 0:
                    undecided -= sub_sizes[p]
            if left < 0 or left > undecided or not (equal or reachable(sizes, state, int(left))):
                continue  # no choice better than the cutoff is left
            if left in (0.0, undecided):
                _leaf(A, constant, state, 0 if left == 0 else 1, pool)
                continue
            push(pool, state, x, lower, -1e30 - counts[NODES] if depth_first else lower)
            if equal and counts[NODES] // _ROUND_EVERY > counts[ROUNDED]:
                counts[ROUNDED] = counts[NODES] // _ROUND_EVERY
                _round(A, constant, state, x, count, seed, pool)
        counts[EMPTY] += 1
        pool.empty[counts[EMPTY] - 1] = slot


@kernel
def _child(
    Q: FloatArray,
    linear: FloatArray,
    sizes: FloatArray,
    free: IntArray,
    ones: IntArray,
    point: NDArray[np.float32],
    left: float,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """The quadratic over the undecided nodes, and the parent's point moved to where sizes.x = left."""
    f = len(free)
    sub, sub_linear, sub_sizes, y = np.empty((f, f)), np.empty(f), np.empty(f), np.empty(f)
    held, total = 0.0, 0.0
    for p in range(f):
        i = free[p]
        for q in range(f):
            sub[p, q] = Q[i, free[q]]
        slope = 0.0
        for j in ones:
            slope += Q[i, j]
        sub_linear[p] = linear[i] + 2 * slope
        sub_sizes[p] = sizes[i]
        y[p] = min(max(float(point[i]), 0.0), 1.0)
        held += sizes[i] * y[p]
        total += sizes[i]
    for p in range(f):
        y[p] = y[p] * left / held if held > left else y[p] + (1 - y[p]) * (left - held) / (total - held)
    return sub, sub_linear, sub_sizes, y


@kernel
def _leaf(A: FloatArray, constant: float, state: StateArray, rest: int, pool: Pool) -> None:
    """All that is undecided is ``rest``: compare with the incumbent."""
    y = state == 1
    for i in range(len(state)):
        if state[i] < 0:
            y[i] = rest == 1
    value = _take(A, constant, y, pool)
    pool.values[CLOSED] = min(pool.values[CLOSED], value)


@kernel
def _round(A: FloatArray, constant: float, state: StateArray, x: FloatArray, count: int, seed: int, pool: Pool) -> None:
    """A short tabu search from the largest entries of the point."""
    order = np.argsort(-(x + (state == 1)))
    y = np.zeros(len(x), np.bool_)
    y[order[:count]] = True
    best = y.copy()
    tabu(A, 2 * A, y, np.zeros(len(x), np.int64), best, 0, 20, np.array([seed + 1], np.uint64))
    _take(A, constant, best, pool)


@kernel
def _take(A: FloatArray, constant: float, y: NDArray[np.bool_], pool: Pool) -> float:
    """The value of a choice, which becomes the incumbent if it is better."""
    value = constant
    for i in range(len(y)):
        if y[i]:
            for j in range(len(y)):
                if y[j]:
                    value += A[i, j]
    if value < pool.values[VALUE]:
        pool.values[VALUE] = value
        for i in range(len(y)):
            pool.incumbent[i] = y[i]
    return value
