"""The best diagonal shift u of QCR: the dual of a semidefinite relaxation, by an interior-point method of our own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh
from scipy.linalg.blas import dgemm
from scipy.linalg.lapack import dpotrf, dpotri, dpotrs

from grace_opt.problem import FloatArray
from grace_solvers.parts.convex import complement_basis, compress, convex_bound, convexified, expand
from grace_solvers.parts.undecided import Core

_MOST_ITERATIONS = 60
_WORTHWHILE = 0.1  # stop when the bound can still win less than this part of its distance to the cutoff


#: core, cutoff, deadline -> a shift u, float64[k], and the iterations made
Improve = Callable[[Core, float, float], tuple[FloatArray, int]]


class Root(NamedTuple):
    """What is known before branching: what is left to decide, its convex form, a proven bound and a point."""

    core: Core
    Q: FloatArray  #: float64[k, k]; the objective is core.constant + linear'x + x'Qx
    linear: FloatArray  #: float64[k], the shift u
    lower_bound: float  #: core value, proven
    x: FloatArray  #: float64[k], the minimum of the relaxation, nearly
    iterations: int  #: of the method that found u


def root(core: Core, cutoff: float, deadline: float = np.inf, improve: Improve | None = None) -> Root:
    """Decide nodes by a cheap shift, find a better shift for the rest, decide again, while that pays.

    ``improve`` finds it, by default `best_shift`; no figure of it is trusted (see `convexified`).

    Every choice of a core value below ``cutoff`` is still there afterwards. If there is none, the core that returns
    has k = 0, an infinite constant and lower_bound >= cutoff; if there is just one, k = 0 and the constant is its
    value. A badly scaled core comes out well scaled: the cheap shift is relative to the diagonal and decides the
    dominated nodes. O(k^3) an iteration. ``deadline`` is a time.monotonic().
    """
    improve = improve or best_shift
    shift, iterations = diagonal_shift(core), 0
    lower_bound, x = -np.inf, np.empty(0)
    improving = False
    while core.k:
        before = core.k
        if improving:
            shift, steps = improve(core, cutoff, deadline)
            iterations += steps
        Q, shift = convexified(core, shift)
        bound = convex_bound(core, Q, shift, cutoff=cutoff)
        lower_bound = max(lower_bound, bound.value)
        state = core.completed(bound.state)
        if lower_bound >= cutoff or state is None:
            core = replace(core.restrict(np.zeros(core.k, np.int8)), constant=np.inf)
            lower_bound = max(lower_bound, cutoff)
            break
        x = bound.x[state < 0]
        shift = (shift + 2 * core.weights[:, state == 1].sum(1))[state < 0]
        core = core.restrict(state)
        if (improving and core.k > 0.8 * before) or time.monotonic() > deadline:
            break
        improving = True
    if not core.k:
        return Root(core, np.empty((0, 0)), np.empty(0), lower_bound, np.empty(0), iterations)
    Q = core.weights.copy()
    Q[np.arange(core.k), np.arange(core.k)] -= shift
    return Root(core, Q, shift, lower_bound, x, iterations)


def scaling(core: Core) -> FloatArray:
    """D, float64[k], positive: the diagonal of A if A is semidefinite, and large enough to bear A's rows if not."""
    A, diagonal = np.abs(core.weights), np.abs(np.diagonal(core.weights))
    with np.errstate(invalid="ignore", divide="ignore"):
        needed = np.nan_to_num(A**2 / np.maximum(A, diagonal), posinf=0.0).max(1)
    D = np.maximum(diagonal, needed)
    floor: float = 1e-9 * D.max()
    return np.maximum(D, floor) if floor > 0 else np.ones(core.k)


def diagonal_shift(core: Core) -> FloatArray:
    """u = t D with the largest t that leaves A - Diag(u) convex where it matters. O(k^3), about 1 ms at k = 128."""
    D, w = scaling(core), complement_basis(core.sizes)
    t = eigh(compress(core.weights, w), compress(np.diag(D), w), eigvals_only=True, subset_by_index=[0, 0])[0]
    shift: FloatArray = t * D
    return shift


def best_shift(core: Core, cutoff: float, deadline: float = np.inf) -> tuple[FloatArray, int]:
    """The u, float64[k], that maximises the bound of QCR, nearly; and the iterations made.

    The bound is that of the relaxation {X >= xx', diag X = x, X sizes = count x} (Billionnet, Elloumi and Plateau,
    DAM 157, 2009). In y = 2x - 1 with y_0 = 1 it reads min <C, Y>, diag Y = 1, Y (-t, sizes) = 0, Y >= 0, where
    t = 2 count - sum of sizes; with Y = VRV', V a basis of the complement of (-t, sizes), it has the form of Max-Cut's
    relaxation, and so has its solution: a primal-dual interior-point method with the direction of Helmberg, Rendl,
    Vanderbei and Wolkowicz (SIAM J. Optim. 6, 1996) and Mehrotra's correction. Its system, X o VS^-1V', costs O(k^2)
    to form. O(k^3) an iteration, 10 to 20 of them. The dual slack S stays positive definite throughout, so that it can
    be cut short at any time; no figure of it is used as a bound (see `convexified`).
    """
    A, K = core.weights, core.k + 1
    C = np.empty((K, K))
    C[1:, 1:] = A
    C[0, 1:] = C[1:, 0] = A.sum(1)
    C[0, 0] = A.sum()
    C /= 4
    w = complement_basis(np.concatenate([[core.sizes.sum() - 2.0 * core.count], core.sizes]))
    D = scaling(core)
    D = np.concatenate([[D.mean()], D])
    slack, DV = compress(C, w), compress(np.diag(D), w)
    t = eigh(slack, DV, eigvals_only=True, subset_by_index=[0, 0])[0]
    dual = (min(t, 0.0) - 0.1 * max(abs(t), 1.0)) * D
    S = slack - compress(np.diag(dual), w)
    X = _start(core)
    R = compress(X, w)
    factor = _cholesky(S)
    offset = cutoff - core.constant
    for iteration in range(_MOST_ITERATIONS):
        if factor is None or time.monotonic() > deadline:
            break
        inverse = dpotri(factor, lower=1)[0]
        Z = expand(np.tril(inverse) + np.tril(inverse, -1).T, w)
        gap = float(np.vdot(R, S))
        feasible = np.abs(np.diagonal(X) - 1).max() < 1e-6  # else it is no gap
        missing = offset - dual.sum()
        if missing < 0 or (feasible and gap <= max(_WORTHWHILE * missing, 1e-9 * abs(offset))):
            return 4 * dual[1:], iteration
        system = _cholesky(X * Z)
        if system is None:
            break  # rounding has the last word: what there is stays valid
        # Predictor: straight to the solution. Corrector: to the central path, with the error of the predictor.
        step = dpotrs(system, np.ones(K), lower=1)[0]
        dX = _direction(X, Z, step, 0.0, None)
        dS, dR = -compress(np.diag(step), w), compress(dX, w)
        ahead = np.vdot(R + _step(R, dR)[0] * dR, S + _step(S, dS)[0] * dS)
        target = gap / core.k * min(max(float(ahead) / gap, 1e-2) ** 3, 1.0)
        error = dgemm(1.0, dX * step, Z)
        step = dpotrs(system, 1 - target * np.diagonal(Z) - np.diagonal(error), lower=1)[0]
        dX = _direction(X, Z, step, target, error)
        dS, dR = -compress(np.diag(step), w), compress(dX, w)
        primal_step, R, kept = _step(R, dR)
        dual_step, S, factor = _step(S, dS)
        X = X + primal_step * dX
        dual = dual + dual_step * step
        if kept is None or primal_step + dual_step < 1e-3:
            break
    shift: FloatArray = 4 * dual[1:]
    return shift, iteration + 1


def _start(core: Core) -> FloatArray:
    """Y of all choices with equal weight, which is in the middle; with sizes that differ the projection on V."""
    k, K = core.k, core.k + 1
    if not core.equal:
        normal = np.concatenate([[core.sizes.sum() - 2.0 * core.count], core.sizes])
        projection: FloatArray = np.eye(K) - np.outer(normal, normal) / (normal @ normal)
        return projection
    part = core.count / k
    pair = part * (core.count - 1) / (k - 1)
    Y = np.full((K, K), 4 * pair - 4 * part + 1)
    Y[0] = Y[:, 0] = 2 * part - 1
    Y[np.arange(K), np.arange(K)] = 1.0
    return Y


def _direction(X: FloatArray, Z: FloatArray, step: FloatArray, target: float, error: FloatArray | None) -> FloatArray:
    """dX = target S^-1 - X + X Diag(step) S^-1, made symmetric, in the coordinates of Y."""
    product = dgemm(1.0, X * step, Z)
    if error is not None:
        product += error
    direction: FloatArray = target * Z - X + 0.5 * (product + product.T)
    return direction


def _cholesky(M: FloatArray) -> FloatArray | None:
    factor, info = dpotrf(M, lower=1, clean=1)
    return factor if info == 0 else None


def _step(M: FloatArray, direction: FloatArray) -> tuple[float, FloatArray, FloatArray | None]:
    """A step that keeps M positive definite, the new M and its Cholesky factor: 1, or 0.95 of the first that does."""
    length = 1.0
    while length > 1e-6:
        moved = M + length * direction
        factor = _cholesky(moved)
        if factor is not None:
            if length == 1.0:
                return length, moved, factor
            length *= 0.95
            moved = M + length * direction
            return length, moved, _cholesky(moved)
        length *= 0.7
    return 0.0, M, _cholesky(M)
