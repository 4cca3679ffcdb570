"""Proven lower bounds from convex quadratics over {0 <= x <= 1, sizes.x = count}."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from grace_opt.problem import FloatArray
from grace_solvers.parts.jit import fast_kernel, kernel
from grace_solvers.parts.undecided import Core, StateArray

EPSILON = float(np.finfo(np.float64).eps)


def complement_basis(normal: FloatArray) -> FloatArray:
    """w, such that the last columns of I - 2ww' are an orthonormal basis of the complement of ``normal``."""
    w = normal / np.linalg.norm(normal)
    w[0] += 1.0 if w[0] >= 0 else -1.0
    unit: FloatArray = w / np.linalg.norm(w)
    return unit


def compress(M: FloatArray, w: FloatArray) -> FloatArray:
    """V'MV for the basis V of `complement_basis`, [k, k] -> [k - 1, k - 1]. O(k^2)."""
    Mw = M @ w
    half = Mw - (w @ Mw) * w
    projected: FloatArray = (M - np.outer(2 * w, half) - np.outer(half, 2 * w))[1:, 1:]
    return projected


def expand(S: FloatArray, w: FloatArray) -> FloatArray:
    """VSV', [k - 1, k - 1] -> [k, k]. O(k^2)."""
    M = np.zeros((len(w), len(w)))
    M[1:, 1:] = S
    Mw = M @ w
    half = Mw - (w @ Mw) * w
    M -= np.outer(2 * w, half)
    M -= np.outer(half, 2 * w)
    return M


def convexified(core: Core, u: FloatArray, weights: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
    """Q = A - Diag(u - d) and the linear term u - d, with the least d >= 0 that makes Q safely convex where it matters.

    On 0/1 points x'Qx + (u - d)'x = x'Ax, whatever u and d are, because x_i^2 = x_i (QCR: Billionnet, Elloumi and
    Plateau, DAM 157, 2009). Q is positive semidefinite on the complement of ``sizes``, the only directions in which
    points of sizes.x = count differ: its smallest eigenvalue there is computed and d is that, if negative, plus
    k eps |Q|_F for the error of the eigenvalue. O(k^3). ``weights`` takes the place of A.
    """
    Q = (core.weights if weights is None else weights).copy()
    diagonal = np.arange(core.k)
    Q[diagonal, diagonal] -= u
    smallest = np.linalg.eigvalsh(compress(Q, complement_basis(core.sizes)))[0]
    d = max(0.0, core.k * EPSILON * float(np.linalg.norm(Q)) - float(smallest))
    Q[diagonal, diagonal] += d
    return Q, u - d


class Bound(NamedTuple):
    """A proven lower bound, in core values, and the point that gave it."""

    value: float
    x: FloatArray  #: float64[k], minimises the quadratic nearly
    state: StateArray  #: int8[k]: what every choice better than the cutoff has in common


def convex_bound(
    core: Core,
    Q: FloatArray,
    linear: FloatArray,
    *,
    constant: float = 0.0,
    cutoff: float = np.inf,
    precision: float = 1e-3,
) -> Bound:
    """The minimum of the convex constant + linear'x + x'Qx over the box, from below.

    Pairwise Frank-Wolfe steps (Lacoste-Julien and Jaggi, 2015), O(k) each, from the centre, until the bound is above
    the cutoff or within ``precision`` of the way from it to the point's value, or of the value without a cutoff. The
    bound is q(x) + min over y of grad q(x)'(y - x), which holds for every convex q, less its rounding error. A node
    whose reduced cost lifts the bound over the cutoff is decided (``state``).
    """
    x = np.full(core.k, core.count / core.sizes.sum())
    g, state = np.empty(core.k), np.full(core.k, -1, np.int8)
    value, _, multiplier, lower = frank_wolfe(
        Q, linear, constant + core.constant, core.sizes, float(core.count), x, g, cutoff, 100 * core.k, precision
    )
    if lower < cutoff < np.inf:
        fix(g, core.sizes, x, float(core.count), value, multiplier, cutoff, state)
    return Bound(lower, x, state)


@kernel
def knapsack(g: FloatArray, sizes: FloatArray, count: float) -> tuple[float, float]:
    """min g'y over 0 <= y <= 1, sizes.y = count, and the multiplier of the equation. O(k log k)."""
    ratio = g / sizes
    left, value, multiplier = count, 0.0, 0.0
    for i in np.argsort(ratio):
        multiplier = ratio[i]
        if sizes[i] >= left:
            return value + g[i] * left / sizes[i], multiplier
        value += g[i]
        left -= sizes[i]
    return value, multiplier


@fast_kernel
def frank_wolfe(  # noqa: PLR0912 (one compiled loop)
    Q: FloatArray,
    linear: FloatArray,
    constant: float,
    sizes: FloatArray,
    count: float,
    x: FloatArray,
    g: FloatArray,
    cutoff: float,
    most_steps: int,
    precision: float,
) -> tuple[float, int, float, float]:
    """Move x towards the minimum of constant + linear'x + x'Qx; returns (value, steps, multiplier, lower bound).

    A step moves mass between two nodes: out of the i of largest gradient for its size, into the j that promises the
    largest decrease (second-order working set: Fan, Chen and Lin, JMLR 6, 2005). On return g is the gradient at x.
    Value and bound are evaluated afresh, since updates drift, and lowered by what rounding can have added to the bound.
    """
    k = len(x)
    steps = 0
    size = np.empty(k)
    while True:
        value = constant
        inner = 0.0
        for i in range(k):
            Qx, magnitude = 0.0, 0.0
            for j in range(k):
                Qx += Q[i, j] * x[j]
                magnitude += abs(Q[i, j]) * x[j]
            g[i] = linear[i] + 2 * Qx
            size[i] = abs(linear[i]) + 2 * magnitude
            value += x[i] * (linear[i] + Qx)
            inner += g[i] * x[i]
        least, multiplier = knapsack(g, sizes, count)
        # Sums of k products, each exact to k eps of the sum of magnitudes, of what x or the knapsack's point holds.
        total = abs(constant)
        for i in range(k):
            total += size[i] * (1.0 if g[i] <= multiplier * sizes[i] else x[i])
        value -= 2 * (k + 8) * EPSILON * total
        gap = inner - least
        lower = value - gap
        enough = precision * (abs(value) if cutoff == np.inf else cutoff - value)
        if lower >= cutoff or gap <= max(enough, 1e-12 * abs(value)) or steps >= most_steps:
            return value, steps, multiplier, lower
        before = steps
        for _ in range(k // 2 + 4):
            i, highest = -1, -np.inf
            for p in range(k):
                if x[p] > 0 and g[p] / sizes[p] > highest:
                    i, highest = p, g[p] / sizes[p]
            j, promise = -1, 0.0
            Q_ii = Q[i, i] / (sizes[i] * sizes[i])
            for p in range(k):
                slope = highest - g[p] / sizes[p]
                if x[p] < 1 and slope > 0:
                    curvature = max(
                        Q_ii + Q[p, p] / (sizes[p] * sizes[p]) - 2 * Q[i, p] / (sizes[i] * sizes[p]), 1e-300
                    )
                    if slope * slope > promise * curvature:
                        j, promise = p, slope * slope / curvature
            if j < 0:
                break
            slope = highest - g[j] / sizes[j]
            curvature = Q_ii + Q[j, j] / (sizes[j] * sizes[j]) - 2 * Q[i, j] / (sizes[i] * sizes[j])
            out_of, into = sizes[i] * x[i], sizes[j] * (1 - x[j])
            move = min(out_of, into)
            if curvature > 0:
                move = min(move, slope / (2 * curvature))
            x[i] = 0.0 if move == out_of else x[i] - move / sizes[i]
            x[j] = 1.0 if move == into else x[j] + move / sizes[j]
            for p in range(k):
                g[p] += 2 * move * (Q[j, p] / sizes[j] - Q[i, p] / sizes[i])
            steps += 1
        if steps == before:
            return value, steps, multiplier, lower


@kernel
def fix(
    g: FloatArray,
    sizes: FloatArray,
    x: FloatArray,
    count: float,
    value: float,
    multiplier: float,
    cutoff: float,
    state: StateArray,
) -> float:
    """Decide in ``state`` what the reduced costs g - multiplier sizes decide; returns the least bound that did so.

    Lagrange: q(y) >= q(x) - g'x + multiplier count + sum of min(0, reduced cost), and a node on the wrong side of its
    reduced cost adds its size.
    """
    base = value + multiplier * count
    for p in range(len(x)):
        base += min(g[p] - multiplier * sizes[p], 0.0) - g[p] * x[p]
    least = np.inf
    for p in range(len(x)):
        reduced = g[p] - multiplier * sizes[p]
        if base + abs(reduced) >= cutoff and reduced != 0:
            state[p] = 0 if reduced > 0 else 1
            least = min(least, base + abs(reduced))
    return least
