"""Selection from the semidefinite relaxation, solved by CVXPY, with a proven lower bound."""

from __future__ import annotations

import importlib
import time
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from scipy.linalg import eigh

from grace_opt.problem import BoolArray, FloatArray, IntArray, SubsetProblem
from grace_opt.solution import BoundKind, Capabilities, Limit, Limits, RawResult, Timing
from grace_solvers.parts.convex import complement_basis, compress, convex_bound, convexified, expand
from grace_solvers.parts.dual import diagonal_shift, root, scaling
from grace_solvers.parts.exchange import iterated_tabu, nearest
from grace_solvers.parts.incumbent import TABU_ROUNDS, opening
from grace_solvers.parts.undecided import Core

_SAMPLES = 32
_PRECISION = 1e-4
_VIOLATED = 1e-3
_PATTERNS = np.array([[1.0, 1.0, 1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])


@dataclass(frozen=True)
class SDPSolver:
    """The semidefinite relaxation {X >= xx', diag X = x, X1 = m x}, rounded, then exchange moves.

    Nodes that a cheap diagonal shift decides are decided first (`parts.dual.root`), so that badly scaled heads
    become well scaled. The dual of the rest, in the coordinates D^-1/2 and reduced to the face {Y : Y (-t, sizes) = 0},
    y = 2x - 1, is a linear matrix inequality in k + 1 variables and has interior points: CVXPY gives it to SCS
    (O'Donoghue, Chu, Parikh and Boyd, JOTA 169, 2016) or Clarabel, and its matrix multiplier is Y. ``cuts`` adds
    X_ij >= 0, or that and then the triangle inequalities (Padberg, Math. Programming 45, 1989), the 2 k most violated
    ones in each of ``rounds`` rounds. Rounding: the largest entries of x, and random hyperplanes (Goemans and
    Williamson, J. ACM 42, 1995) cut to the count.

    A heuristic with a proven bound. No figure of the conic solver is used: its multipliers are made a safe shift and
    the minimum of the convex quadratic is bounded from below in floating point (`parts.convex`; rounding of at
    most 1e-12 times the sum of |W_ij| over the prunable channels). If the conic solver fails, what the cheap shift
    proves comes back, with a warning. For every symmetric W, with protected channels and tied groups of any sizes.
    O(k^3) an iteration with SCS, O(k^6) with Clarabel. Deterministic for a seed, unless a time limit ends it.
    """

    backend: Literal["scs", "clarabel"] = "scs"
    cuts: Literal["none", "nonnegative", "triangles"] = "none"
    rounds: int = 5

    name: ClassVar[str] = "sdp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        bounds=True,
        time_limit=True,
        iteration_limit=True,
        warm_start=True,
        groups=True,
        largest_n=128,
        requires=("cvxpy", "numba", "scipy"),
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
        """Incumbent, relaxation, cuts, rounding."""
        known = opening(problem, limits, warm_start)
        core, cutoff, deadline = known.core, known.cutoff, known.deadline
        if core.k == 0:
            return known.decided()
        incumbent, value = known.incumbent, known.value
        started = time.perf_counter_ns()

        relaxation = _Relaxation(self.backend, limits.iteration_limit)
        top = root(core, cutoff, deadline, relaxation.shift)
        lower_bound = top.lower_bound if top.core.k else cutoff
        if top.core.k and relaxation.core is not None and self.cuts != "none":
            lower_bound = max(lower_bound, relaxation.cut(top.core, cutoff, deadline, self.cuts, self.rounds))
        rounding = time.perf_counter_ns()
        last = relaxation.core
        if last is not None and last.equal:
            choices = _rounded(last, relaxation.Y, limits.seed)
            found = iterated_tabu(last, choices, rounds=TABU_ROUNDS, seed=limits.seed, deadline=deadline)
            if found.value < value:
                incumbent, value = last.expand(found.y), found.value
        lower_bound = min(lower_bound, cutoff, value)
        limit = relaxation.limit
        if time.monotonic() > deadline:
            limit = Limit.TIME
        done = time.perf_counter_ns()
        return RawResult(
            incumbent,
            core.scale * lower_bound,
            BoundKind.PROVEN,
            limit=limit,
            raw_status=f"{self.backend}: {relaxation.words}",
            iterations=relaxation.iterations,
            timing=Timing(build=started - known.clock, solve=rounding - started, round=done - rounding),
            warnings=tuple(relaxation.warnings),
            trace=((time.monotonic() - known.began, core.scale * value, core.scale * lower_bound),),
        )


@dataclass
class _Relaxation:
    """The relaxation of one core after the other, and what the conic solver said last."""

    backend: str
    iteration_limit: int | None
    core: Core | None = None  #: the last one that was solved
    Y: FloatArray = field(default_factory=lambda: np.empty((0, 0)))  #: its solution, float64[k + 1, k + 1]
    words: str = "not needed"
    iterations: int = 0
    limit: Limit = Limit.NONE
    warnings: list[str] = field(default_factory=list)

    def shift(self, core: Core, cutoff: float, deadline: float) -> tuple[FloatArray, int]:
        """For `root`: the best shift u of a core, float64[k], and the iterations; a cheap one if all fails."""
        before = self.iterations
        u, _ = self.solve(core, deadline, _Triangles.none())
        return (diagonal_shift(core) if u is None else u), self.iterations - before

    def cut(self, core: Core, cutoff: float, deadline: float, kind: str, rounds: int) -> float:
        """The best bound, a core value, of ``rounds`` rounds of cuts; each keeps those that were tight."""
        if self.core is None or self.core.k != core.k:
            self.solve(core, deadline, _Triangles.none())
        best, cuts = -np.inf, _Triangles.none()
        for _ in range(rounds):
            if self.core is None or self.core.k != core.k or time.monotonic() > deadline or best >= cutoff:
                break
            cuts = cuts.joined(violated(self.Y, nonnegative_only=kind == "nonnegative"))
            u, t = self.solve(core, deadline, cuts) if len(cuts.signs) else (None, np.empty(0))
            if u is None:
                break
            weights, constant = cuts.moved(core.weights, t)
            Q, linear = convexified(core, u, weights)
            best = max(best, convex_bound(core, Q, linear, constant=constant, cutoff=cutoff).value)
            cuts = cuts.those(t > 1e-6 * t.max(initial=0.0))
        return best

    def solve(self, core: Core, deadline: float, cuts: _Triangles) -> tuple[FloatArray | None, FloatArray]:
        """The shift u, float64[k], or None, and the multipliers of ``cuts``, from the dual

        maximise sum(d z) - sum(t)  subject to  V'D^-1/2 (C - sum(t N) - Diag(d z)) D^-1/2 V >= 0,  t >= 0.
        """
        cvxpy: Any = importlib.import_module("cvxpy")  # late: it takes a second
        d = scaling(core)
        d = np.concatenate([[d.mean()], d])
        h = 1 / np.sqrt(d)
        w = complement_basis(h * np.concatenate([[core.sizes.sum() - 2.0 * core.count], core.sizes]))
        V = np.eye(core.k + 1)[:, 1:] - 2 * np.outer(w, w[1:])
        C = np.empty((core.k + 1, core.k + 1))  # y'Ay = (1, 2y - 1)'C(1, 2y - 1)
        C[1:, 1:] = core.weights
        C[0, 1:] = C[1:, 0] = core.weights.sum(1)
        C[0, 0] = core.weights.sum()
        z, t = cvxpy.Variable(core.k + 1), cvxpy.Variable(max(1, len(cuts.signs)), nonneg=True)
        diagonals = np.einsum("ia,ib->abi", V, V).reshape(core.k**2, -1)
        slack = compress(C / 4 * np.outer(h, h), w) - cvxpy.reshape(diagonals @ z, (core.k, core.k), order="C")
        total = (d / d.mean()) @ z
        if len(cuts.signs):
            faces = cuts.faces(V * h[:, None])
            sizes = np.abs(faces).max(0)
            slack -= cvxpy.reshape(faces / sizes @ t, (core.k, core.k), order="C")
            total -= cvxpy.sum(cvxpy.multiply(t, 1 / sizes / d.mean()))
        matrix = slack >> 0
        if not self._run(cvxpy.Problem(cvxpy.Maximize(total), [matrix]), deadline):
            return None, np.empty(0)
        multipliers = np.maximum(t.value, 0) / sizes if len(cuts.signs) and t.value is not None else np.empty(0)
        if z.value is None or not np.isfinite(z.value).all() or not np.isfinite(multipliers).all():
            self.warnings.append(f"{self.backend} gave no multipliers ({self.words}); the bound is a cheap one")
            return None, np.empty(0)
        if matrix.dual_value is not None and np.isfinite(matrix.dual_value).all():
            Y = expand((matrix.dual_value + matrix.dual_value.T) / 2, w) * np.outer(h, h)
            norms = np.sqrt(np.maximum(np.diagonal(Y), 1e-300 + 1e-12 * Y.max()))
            self.core, self.Y = core, Y / np.outer(norms, norms)
        return 4 * (d * z.value)[1:], multipliers

    def _run(self, problem: Any, deadline: float) -> bool:
        """Whether the conic solver came back with something; what it said is in ``words``."""
        scs = self.backend == "scs"
        options: dict[str, Any] = {"eps": _PRECISION, "use_indirect": True} if scs else {}
        if self.iteration_limit is not None:
            options["max_iters" if scs else "max_iter"] = self.iteration_limit
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of inaccuracy: no figure of it is trusted
                data, chain, inverse = problem.get_problem_data(
                    self.backend.upper(), solver_opts={"accept_unknown": True}
                )
                left = deadline - time.monotonic()  # making the data takes most of a second at k = 128
                if left <= 0:
                    self.words = "no time left"
                    return False
                if left < np.inf:
                    options["time_limit_secs" if scs else "time_limit"] = left
                problem.unpack_results(chain.solve_via_data(problem, data, solver_opts=options), chain, inverse)
        except Exception as error:  # native solvers fail in many ways, and what is known without them is worth having
            self.words = f"failed: {error}"
            self.warnings.append(f"{self.backend} failed ({error}); the bound is a cheap one")
            return False
        made = int(problem.solver_stats.num_iters or 0)
        self.iterations += made
        self.words = f"{problem.status}, {made} iterations"
        if made == self.iteration_limit:
            self.limit = Limit.ITERATION
        return True


class _Triangles(NamedTuple):
    """The sum of signs z_a z_b over a triangle's three pairs is at least -1, for z = (1, 2y - 1) and every choice y."""

    pairs: IntArray  #: int64[c, 3, 2]
    signs: FloatArray  #: float64[c, 3]: an even number of them is negative

    @staticmethod
    def none() -> _Triangles:
        return _Triangles(np.empty((0, 3, 2), np.int64), np.empty((0, 3)))

    def joined(self, more: _Triangles) -> _Triangles:
        return _Triangles(np.concatenate([self.pairs, more.pairs]), np.concatenate([self.signs, more.signs]))

    def those(self, which: BoolArray | IntArray) -> _Triangles:
        return _Triangles(self.pairs[which], self.signs[which])

    def faces(self, V: FloatArray) -> FloatArray:
        """V'NV of each cut as a column, float64[k^2, c], where z'Nz is its left side. O(k^2 c)."""
        first, second = V[self.pairs[..., 0]], V[self.pairs[..., 1]]
        half = np.einsum("cp,cpa,cpb->abc", self.signs / 2, first, second)
        return np.asarray((half + half.transpose(1, 0, 2)).reshape(V.shape[1] ** 2, -1))

    def moved(self, weights: FloatArray, t: FloatArray) -> tuple[FloatArray, float]:
        """A and a constant with t (sum of signs z_a z_b + 1) taken off: lower or equal for every choice, if t >= 0."""
        T = np.zeros((len(weights) + 1, len(weights) + 1))
        np.add.at(T, (self.pairs[..., 0], self.pairs[..., 1]), self.signs / 2 * t[:, None])
        T += T.T
        S, row = T[1:, 1:], T[0, 1:]
        moved: FloatArray = weights - 4 * S + np.diag(4 * S.sum(1) - 4 * row)
        return moved, 2 * float(row.sum()) - float(S.sum()) - float(t.sum())


def violated(Y: FloatArray, nonnegative_only: bool) -> _Triangles:
    """The 2 k most violated of the inequalities X_ij >= 0, which are the triangles with the first node and positive
    signs; if there is none, the 2 k most violated of all triangles. Y is float64[k + 1, k + 1]. O(k^3).
    """
    k = len(Y) - 1
    found = _most_violated(Y, range(1), _PATTERNS[:1], 2 * k)
    if nonnegative_only or len(found.signs):
        return found
    return _most_violated(Y, range(k - 1), _PATTERNS, 2 * k)


def _most_violated(Y: FloatArray, corners: range, patterns: FloatArray, count: int) -> _Triangles:
    found, by = _Triangles.none(), np.empty(0)
    for a in corners:
        b, c = a + 1 + np.stack(np.triu_indices(len(Y) - a - 1, 1))
        for pattern in patterns:
            short = -1 - (pattern[0] * Y[a, b] + pattern[1] * Y[a, c] + pattern[2] * Y[b, c])
            at = np.flatnonzero(short > _VIOLATED)
            pairs = np.stack([np.full(len(at), a), b[at], np.full(len(at), a), c[at], b[at], c[at]], 1)
            found = found.joined(_Triangles(pairs.reshape(-1, 3, 2), np.tile(pattern, (len(at), 1))))
            by = np.concatenate([by, short[at]])
        most = np.argsort(-by, kind="stable")[:count]
        found, by = found.those(most), by[most]
    return found


def _rounded(core: Core, Y: FloatArray, seed: int) -> list[BoolArray]:
    """The largest entries of x, and the best two of ``_SAMPLES`` random hyperplanes, each cut to the count."""
    values, vectors = eigh(Y)
    root_of_Y = vectors * np.sqrt(np.maximum(values, 0))
    sides = root_of_Y @ np.random.default_rng(seed).normal(size=(len(Y), _SAMPLES))
    samples = [nearest(core, side[1:] * np.sign(side[0])) for side in sides.T]
    return [nearest(core, Y[0, 1:]), *sorted(samples, key=core.value)[:2]]
