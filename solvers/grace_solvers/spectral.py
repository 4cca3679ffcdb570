"""Selection from the eigenvalue relaxation on a sphere, with a proven lower bound."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
from scipy.linalg import eigh
from scipy.optimize import OptimizeResult, brentq, minimize

from grace_opt.problem import BoolArray, FloatArray, SubsetProblem
from grace_opt.solution import BoundKind, Capabilities, Limit, Limits, RawResult, Timing
from grace_solvers.parts.convex import EPSILON, complement_basis, compress
from grace_solvers.parts.dual import root, scaling
from grace_solvers.parts.exchange import iterated_tabu, nearest
from grace_solvers.parts.incumbent import TABU_ROUNDS, opening
from grace_solvers.parts.undecided import Core


@dataclass(frozen=True)
class SpectralSolver:
    """The relaxation on a sphere in a hyperplane, its multipliers improved; rounded, then exchange moves.

    Feasible points x satisfy sum_i d_i (x_i - 1/2)^2 = sum_i d_i / 4 for every positive d, and the count. The minimum
    of the objective over these two equations, a sphere in the coordinates D^1/2 (x - 1/2), takes one eigendecomposition
    and a secular equation (Gander, Golub and von Matt, Linear Algebra Appl. 114, 1989), and so does its multiplier.
    For every shift u, W - Diag(u) with the linear term u is the same objective on 0/1 points: the minimum as a function
    of u is concave, and its supremum the bound of the semidefinite relaxation {X >= xx', diag X = x, X1 = m x} (Poljak
    and Rendl, SIAM J. Optim. 5, 1995). L-BFGS makes ``iterations`` steps upwards from u = 0. Nodes that reduced costs
    decide are decided before, by the cheap diagonal shift, and after.

    A heuristic with a proven bound: u plus the multiplier times d is made a safe shift, and the minimum of the convex
    quadratic over the box, never below that over the sphere, is bounded from below in floating point
    (`parts.convex`; rounding of at most 1e-12 times the sum of |W_ij| over the prunable channels). The bound is
    never below that of the diagonal shift. For every symmetric W, with protected channels and tied groups of any sizes.
    O(k^3) an iteration. Deterministic for a seed, unless a time limit ends it.
    """

    iterations: int = 50

    name: ClassVar[str] = "spectral"
    capabilities: ClassVar[Capabilities] = Capabilities(
        bounds=True,
        time_limit=True,
        iteration_limit=True,
        warm_start=True,
        groups=True,
        largest_n=512,
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
        """Incumbent, ascent, rounding."""
        known = opening(problem, limits, warm_start)
        core, cutoff, deadline = known.core, known.cutoff, known.deadline
        if core.k == 0:
            return known.decided()
        incumbent, value = known.incumbent, known.value
        rooted = time.perf_counter_ns()

        most = self.iterations
        if limits.iteration_limit is not None:
            most = min(most, limits.iteration_limit)
        top = root(core, cutoff, deadline, partial(sphere_shift, iterations=most))
        if top.core.equal:
            found = iterated_tabu(
                top.core, [nearest(top.core, top.x)], rounds=TABU_ROUNDS, seed=limits.seed, deadline=deadline
            )
            if found.value < value:
                incumbent, value = top.core.expand(found.y), found.value
        lower_bound = min(top.lower_bound if top.core.k else cutoff, value)
        limit = Limit.NONE
        if time.monotonic() > deadline:
            limit = Limit.TIME
        elif most < self.iterations and top.iterations >= most:
            limit = Limit.ITERATION
        return RawResult(
            incumbent,
            core.scale * lower_bound,
            BoundKind.PROVEN,
            limit=limit,
            iterations=top.iterations,
            timing=Timing(build=rooted - known.clock, solve=time.perf_counter_ns() - rooted),
            trace=((time.monotonic() - known.began, core.scale * value, core.scale * lower_bound),),
        )


def sphere_shift(core: Core, cutoff: float, deadline: float, iterations: int) -> tuple[FloatArray, int]:
    """The best shift met, float64[k], in ``iterations`` steps of L-BFGS on the minimum over the sphere."""
    sphere = _Sphere(core)
    unit = abs(cutoff - core.constant) or 1.0

    def descend(z: FloatArray) -> tuple[float, FloatArray]:
        value, gradient = sphere.minimum(z)
        return -value / unit, -gradient / unit

    def watch(intermediate_result: OptimizeResult) -> None:
        if time.monotonic() > deadline:
            raise StopIteration

    # ftol ends a search whose steps have stopped paying; the kinks of eigenvalues that meet would else waste the rest.
    options = {"maxiter": iterations, "maxcor": 20, "ftol": 1e-9}
    done = minimize(descend, np.zeros(core.k), jac=True, method="L-BFGS-B", callback=watch, options=options)
    return sphere.shift, int(done.nit)


class _Sphere:
    """minimise y'Ay over sizes.y = count and sum of d_i (y_i - 1/2)^2 = sum of d_i / 4, with A shifted by u = d z.

    In p = D^1/2 (y - 1/2) both are round: p = p0 + V xi, with p0 the least point of the hyperplane, V a basis of its
    directions (`complement_basis`) and |xi| = radius.
    """

    def __init__(self, core: Core) -> None:
        d = scaling(core)
        self.d, self.root = d, np.sqrt(d)
        self.weights = core.weights / np.outer(self.root, self.root)
        normal = core.sizes / self.root
        self.w = complement_basis(normal)
        self.p0: FloatArray = normal * ((core.count - core.sizes.sum() / 2) / (normal @ normal))
        self.linear = core.weights.sum(1) / self.root  # of p; the shift adds nothing to it
        self.radius = float(np.sqrt(max(d.sum() / 4 - self.p0 @ self.p0, EPSILON * d.sum())))
        self.total = float(core.weights.sum())
        self.best = -np.inf
        self.shift = np.zeros(core.k)  # of the highest minimum so far, float64[k]

    def minimum(self, z: FloatArray) -> tuple[float, FloatArray]:
        """The least value on the sphere and its gradient by z. O(k^3); not a safe bound, see `convexified`."""
        B = self.weights - np.diag(z)
        eigenvalues, vectors = eigh(compress(B, self.w), driver="evd")
        h = vectors.T @ self._reflect(B @ self.p0 + self.linear / 2)[1:]
        xi, t = _secular(eigenvalues, h, self.radius)
        p = self.p0 + self._reflect(np.concatenate([[0.0], vectors @ xi]))
        y = 0.5 + p / self.root
        value = self.total / 4 + float(self.d @ z) / 4 + p @ B @ p + self.linear @ p
        if value > self.best:
            self.best, self.shift = value, self.d * (z + t)
        return value, self.d * (y - y * y)

    def _reflect(self, v: FloatArray) -> FloatArray:
        return v - 2 * self.w * (self.w @ v)


def _secular(eigenvalues: FloatArray, h: FloatArray, radius: float) -> tuple[FloatArray, float]:
    """The least xi' Diag(eigenvalues) xi + 2 h'xi on |xi| = radius, and its multiplier t. Eigenvalues ascend.

    xi_i = -h_i / (eigenvalue_i - t) with t at most the least eigenvalue and |xi(t)| = radius. 1 / |xi(t)| is nearly
    linear in t. If |xi(t)| stays below the radius (the hard case), the first eigenvector makes up for the rest.
    """
    first = float(eigenvalues[0])
    margin = 4 * EPSILON * float(np.abs(eigenvalues).max()) or 1.0

    def excess(t: float) -> float:
        return 1 / float(np.linalg.norm(h / (eigenvalues - t))) - 1 / radius

    t, shortest = first - margin, float(np.linalg.norm(h))
    if shortest > 0 and excess(t) < 0:
        t = float(brentq(excess, first - 1.01 * shortest / radius - margin, t, xtol=EPSILON * margin, rtol=4 * EPSILON))
        return -h / (eigenvalues - t), t
    xi: FloatArray = -h / (eigenvalues - t)
    xi[0] = np.copysign(np.sqrt(max(radius**2 - float(xi[1:] @ xi[1:]), 0.0)), xi[0])
    return xi, t
