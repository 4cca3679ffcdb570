"""Selection by somebody else's solver: OR-Tools' SCIP on a convex reformulation, or its CP-SAT on products."""

from __future__ import annotations

import datetime
import importlib
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from grace_opt.problem import BoolArray, FloatArray, SubsetProblem
from grace_opt.solution import BoundKind, Capabilities, Limit, Limits, RawResult, Timing, relative_gap
from grace_solvers.parts.convex import EPSILON, convex_bound, convexified, knapsack
from grace_solvers.parts.dual import Root, root
from grace_solvers.parts.exchange import iterated_tabu, nearest
from grace_solvers.parts.incumbent import opening

_TABU_ROUNDS = 10
_MOST_NODES_CP_SAT = 40  # CP-SAT proves what it says, and needs 0.3 s at most up to here; beyond, SCIP is much faster
_CP_SAT_BITS = 50  # of the largest possible objective: far from the end of int64, and exact in float64


class _Answer(NamedTuple):
    """What a back end says, in core values."""

    y: BoolArray | None  #: bool[k]
    lower_bound: float
    limit: Limit
    raw_status: str
    nodes: int


@dataclass(frozen=True)
class MIQPSolver:
    """The optimum by OR-Tools' solvers: an independent check of ours.

    Greedy and tabu search give the incumbent, the root (`parts.dual`) a convex form (QCR: Billionnet, Elloumi
    and Plateau, DAM 157, 2009), a proven bound, and the nodes that reduced costs decide. The k nodes that are left go
    to a back end, with the incumbent as a hint:

    - ``gscip``: SCIP through MathOpt. The quadratic is a sum of squares of k linear forms, zero at the relaxation's
      minimum, in units of what is left between the incumbent and the bound there. SCIP works in floating point with
      tolerances of about 1e-6 of that unit, so its bound is ``numerical`` and the front end does not call the result
      optimal. If our own bound is higher, as under a short limit, that is returned, and it is proven.
    - ``cp-sat``: products of two nodes as Booleans, tied to the count by sum_j size_j y_ij = (count - size_i) x_i
      (Adams and Sherali, Management Science 32, 1986), weights rounded to whole numbers. CP-SAT reasons in whole
      numbers; what rounding may have changed, 1e-13 of the sum of |A| or so, is subtracted, so its bound is proven.
    - ``auto``: CP-SAT up to k = 40, SCIP beyond. ``raw_status`` says which, and in its own words how it ended.

    For every symmetric W, definite or not, with protected channels and tied groups of any sizes. If the root decides
    everything, no back end runs and the bound is proven. O(k^3) for root and model; the search is
    exponential at worst. A node limit counts SCIP's nodes or CP-SAT's conflicts. SCIP uses one thread.
    """

    backend: Literal["auto", "gscip", "cp-sat"] = "auto"

    name: ClassVar[str] = "miqp"
    capabilities: ClassVar[Capabilities] = Capabilities(
        exact=False,  # finds the optimum, but SCIP's claim is no proof
        bounds=True,
        time_limit=True,
        node_limit=True,
        warm_start=True,
        groups=True,
        largest_n=128,
        requires=("ortools", "numba", "scipy"),
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
        """Incumbent, root, back end. Raises ImportError if OR-Tools is needed and cannot be imported."""
        known = opening(problem, limits, warm_start, rounds=_TABU_ROUNDS)
        core, cutoff, deadline = known.core, known.cutoff, known.deadline
        if core.k == 0:
            return known.decided("nothing to decide")
        incumbent, value = known.incumbent, known.value
        top = root(core, cutoff, deadline)
        hint = _hint(top, incumbent, limits.seed, deadline)
        if hint is not None and top.core.value(hint) < value:
            incumbent, value = top.core.expand(hint), top.core.value(hint)
        proven = min(top.lower_bound if top.core.k else cutoff, value)
        points = [(time.monotonic() - known.began, value, proven)]
        rooted = time.perf_counter_ns()

        backend = self.backend
        if backend == "auto":
            backend = "cp-sat" if top.core.k <= _MOST_NODES_CP_SAT else "gscip"
        warnings: tuple[str, ...] = ()
        if top.core.k == 0:
            answer = _Answer(None, proven, Limit.NONE, "closed at the root by our own bound", 0)
        elif time.monotonic() >= deadline:
            answer = _Answer(None, proven, Limit.TIME, "no time left after the root", 0)
        else:
            run = _cp_sat if backend == "cp-sat" else _gscip
            try:
                answer = run(top, hint, value, known.tolerance, deadline, limits)
            except ImportError:
                raise
            except Exception as error:  # what is known without the back end is worth returning
                warnings = (f"{backend} failed: {cause(error)}",)
                answer = _Answer(None, proven, Limit.NONE, warnings[0], 0)
        if answer.y is not None and top.core.value(answer.y) < value:
            incumbent, value = top.core.expand(answer.y), top.core.value(answer.y)
        lower_bound, kind, raw_status = proven, BoundKind.PROVEN, answer.raw_status
        claimed = min(answer.lower_bound, cutoff, value)  # the root left out what is not below the cutoff
        if claimed > proven:
            lower_bound = claimed
            if backend == "gscip":
                kind = BoundKind.NUMERICAL
                raw_status += f"; the root's proven bound is {core.scale * proven!r}"
        points.append((time.monotonic() - known.began, value, lower_bound))
        if answer.limit is Limit.NONE and not warnings and value - lower_bound > known.tolerance:
            gap = relative_gap(value, lower_bound)
            warnings = (
                f"{backend} reached no limit and leaves a gap of {gap:.1e}, the least that it can tell on weights of "
                "such different sizes; branch-and-bound can tell less",
            )
        return RawResult(
            incumbent,
            core.scale * lower_bound,
            kind,
            limit=answer.limit,
            raw_status=raw_status,
            nodes=answer.nodes,
            iterations=top.iterations,
            timing=Timing(build=rooted - known.clock, solve=time.perf_counter_ns() - rooted),
            warnings=warnings,
            trace=tuple((seconds, core.scale * v, core.scale * bound) for seconds, v, bound in points),
        )


def cause(error: BaseException) -> str:
    """What went wrong, in the back end's words. MathOpt 9.15 fails while it translates its errors: see the context."""
    broken = isinstance(error, AttributeError) and error.__context__ is not None
    return str(error.__context__ if broken else error) or repr(error)


def _hint(top: Root, incumbent: BoolArray, seed: int, deadline: float) -> BoolArray | None:
    """The best known choice of the core that is left; the incumbent may not be in it, as nothing better may be."""
    core = top.core
    same = core.contract(incumbent)
    known = [same] if (core.expand(same) == incumbent).all() else []
    if core.equal:
        known.append(nearest(core, top.x))
    return iterated_tabu(core, known, seed=seed, deadline=deadline).y if known else None


def _gscip(
    top: Root, hint: BoolArray | None, value: float, tolerance: float, deadline: float, limits: Limits
) -> _Answer:
    """SCIP on lower + reduced costs + sum of w_i^2, where the w_i are linear forms that vanish at the minimum x.

    With z = x* and q convex, q(y) = q(z) + grad q(z)'(y - z) + |w|^2, w = L'(y - z), LL' the matrix of q on the
    complement of ``sizes``; the first two terms are at least the bound at z, so |w|^2 <= value - bound for every y
    worth finding. Against sum of (L'y)^2 as it is, this starts SCIP from the convex bound instead of far below it.
    """
    mathopt = _imported("ortools.math_opt.python.mathopt")
    core = top.core
    Q, linear = convexified(core, top.linear)
    lower, z, _ = convex_bound(core, Q, linear, precision=1e-6)
    gradient = linear + 2 * Q @ z
    reduced = gradient - knapsack(gradient, core.sizes, float(core.count))[1] * core.sizes
    unit = max(value - lower, tolerance, 1e-12 * float(np.abs(core.weights).sum())) or 1.0
    forms = _linear_forms(Q / unit, core.sizes)
    radius = 1.001  # of w, in this unit; the rest is for SCIP's tolerances

    model = mathopt.Model()
    x = [model.add_binary_variable() for _ in range(core.k)]
    model.add_linear_constraint(_dot(mathopt, core.sizes, x) == core.count)
    w = [model.add_variable(lb=-radius, ub=radius) for _ in forms]
    for form, w_i, start in zip(forms, w, forms @ z, strict=True):
        model.add_linear_constraint(_dot(mathopt, form, x) - w_i == float(start))
    squares = model.add_variable(lb=0.0, ub=radius**2)
    model.add_quadratic_constraint(mathopt.fast_sum([w_i * w_i for w_i in w]) - squares <= 0.0)
    offset = core.constant + z @ (linear + Q @ z) - lower - reduced @ z
    model.minimize(_dot(mathopt, reduced / unit, x) + squares + float(offset / unit))

    # The relaxation is tight and its linear programs are dense: cuts for its one convex constraint pay, others do not.
    params = mathopt.SolveParameters(
        time_limit=None if deadline == np.inf else datetime.timedelta(seconds=max(deadline - time.monotonic(), 0.0)),
        node_limit=limits.node_limit,
        random_seed=limits.seed % 2**31,
        threads=1,
        absolute_gap_tolerance=0.5 * tolerance / unit,
        relative_gap_tolerance=0.0,  # it would be of what is left, not of the objective
        heuristics=mathopt.Emphasis.OFF,
        cuts=mathopt.Emphasis.OFF,
        presolve=mathopt.Emphasis.OFF,
    )
    params.gscip.int_params["constraints/nonlinear/sepafreq"] = 1
    params.gscip.int_params["separating/maxrounds"] = 2
    params.gscip.bool_params["misc/catchctrlc"] = False
    model_params = mathopt.ModelSolveParameters()
    if hint is not None:
        at = forms @ (hint - z)
        values = dict(zip([*x, *w], [*hint.astype(float).tolist(), *at.tolist()], strict=True))
        model_params.solution_hints.append(mathopt.SolutionHint(variable_values={**values, squares: float(at @ at)}))
    result = mathopt.solve(model, mathopt.SolverType.GSCIP, params=params, model_params=model_params)

    y = None
    if result.has_primal_feasible_solution():
        y = np.array(result.variable_values(x)) > 0.5
        y = y if core.sizes @ y == core.count else None
    ended = result.termination
    limit = ended.limit.name.lower() if ended.limit is not None else "none"
    return _Answer(
        y,
        lower + unit * ended.objective_bounds.dual_bound,
        Limit(limit) if limit in ("time", "node", "interrupted") else Limit.NONE,
        f"gscip (k = {core.k}): " + ", ".join(filter(None, (ended.reason.name, ended.detail))),
        result.solve_stats.node_count,
    )


def _cp_sat(
    top: Root, hint: BoolArray | None, value: float, tolerance: float, deadline: float, limits: Limits
) -> _Answer:
    """CP-SAT on A, rounded to whole multiples of a power of two, with a Boolean for each product."""
    cp_model = _imported("ortools.sat.python.cp_model")
    core = top.core
    first, second = np.triu_indices(core.k, 1)
    costs = np.concatenate([np.diagonal(core.weights), 2 * core.weights[first, second]])
    unit = 2.0 ** (float(np.frexp(np.abs(costs).sum())[1]) - _CP_SAT_BITS)
    whole = np.rint(costs / unit)
    rounding = float(np.abs(costs - whole * unit).sum())  # both differences are exact
    sizes = core.sizes.astype(np.int64).tolist()

    model = cp_model.CpModel()
    x = [model.new_bool_var("") for _ in range(core.k)]
    model.add(cp_model.LinearExpr.weighted_sum(x, sizes) == core.count)
    row: list[list[Any]] = [[] for _ in x]
    row_sizes: list[list[int]] = [[] for _ in x]
    products = []
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        both = model.new_bool_var("")
        model.add_implication(both, x[i])
        model.add_implication(both, x[j])
        model.add_bool_or(~x[i], ~x[j], both)
        products.append(both)
        for one, other in ((i, j), (j, i)):
            row[one].append(both)
            row_sizes[one].append(sizes[other])
    for i, x_i in enumerate(x):
        model.add(cp_model.LinearExpr.weighted_sum(row[i], row_sizes[i]) == (core.count - sizes[i]) * x_i)
    model.minimize(cp_model.LinearExpr.weighted_sum([*x, *products], whole.astype(np.int64).tolist()))
    if hint is not None:
        for variable, bit in zip([*x, *products], [*hint, *(hint[first] & hint[second])], strict=True):
            model.add_hint(variable, bool(bit))

    solver = cp_model.CpSolver()
    parameters = solver.parameters
    parameters.num_workers = limits.threads
    parameters.random_seed = limits.seed % 2**31
    parameters.catch_sigint_signal = False  # it would leave Ctrl-C to the system, which ends the process without a word
    parameters.linearization_level = 2  # the rows of products are worth nothing outside a linear program
    parameters.relative_gap_limit = 0.0
    parameters.absolute_gap_limit = float(np.floor(0.5 * tolerance / unit))
    if deadline < np.inf:
        parameters.max_time_in_seconds = max(deadline - time.monotonic(), 0.0)
    if limits.node_limit is not None:
        parameters.max_number_of_conflicts = limits.node_limit
    status = solver.solve(model)

    y, limit = None, Limit.NONE
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        y = np.array([solver.boolean_value(x_i) for x_i in x])
    if status in (cp_model.FEASIBLE, cp_model.UNKNOWN):
        if limits.node_limit is not None and solver.num_conflicts >= limits.node_limit:
            limit = Limit.NODE
        else:  # at its time limit CP-SAT stops as soon as its next step might end after it, early on a busy machine
            limit = Limit.TIME if deadline < np.inf else Limit.INTERRUPTED
    lower_bound = core.constant + unit * solver.best_objective_bound - rounding
    return _Answer(
        y,
        lower_bound if status in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.UNKNOWN) else -np.inf,
        limit,
        f"cp-sat (k = {core.k}): {solver.status_name(status)}",
        solver.num_conflicts,
    )


def _linear_forms(Q: FloatArray, sizes: FloatArray) -> FloatArray:
    """L', float64[rank, k]: |L'd|^2 = d'Qd for every d orthogonal to ``sizes``. O(k^3).

    Q is in units of what is left to find: a form counts by what it adds there, however small it is beside others. What
    is left out is below rounding, or adds less than 1e-9.
    """
    normal = sizes / np.linalg.norm(sizes)
    part = Q - np.outer(normal, normal @ Q)
    values, vectors = np.linalg.eigh(part - np.outer(part @ normal, normal))
    kept = values > max(1e-9 / len(values), len(values) * EPSILON * values[-1])
    forms: FloatArray = (vectors[:, kept] * np.sqrt(values[kept])).T
    return forms


def _dot(mathopt: Any, coefficients: FloatArray, x: list[Any]) -> Any:
    return mathopt.fast_sum([c * x_i for c, x_i in zip(coefficients.tolist(), x, strict=True)])


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"solver 'miqp' needs OR-Tools, which cannot be imported ({error}); pip install 'ortools>=9.15' "
            "'highspy<1.15'"
        ) from error
