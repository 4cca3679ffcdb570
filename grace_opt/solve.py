"""The front end: validate, run, recompute, bound and stamp. No solver's own figure is shown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from grace_opt.engines.local import outcomes
from grace_opt.engines.outcome import Engine, failed, run_one
from grace_opt.errors import InputError
from grace_opt.problem import SubsetProblem
from grace_opt.registry import create
from grace_opt.solution import (
    OBJECTIVE_SLACK,
    BoundKind,
    Limit,
    Limits,
    RawResult,
    Solution,
    Solver,
    Status,
    ignored_limits,
    relative_gap,
    rounding_slack,
)
from grace_opt.versions import version_of_class, versions_of


def solve(
    problem: SubsetProblem,
    solver: str | Solver = "auto",
    *,
    options: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    warm_start: ArrayLike | None = None,
) -> Solution:
    """Solve one problem.

    Args:
        solver: a registered name, or a solver object (then ``options`` must be empty).
        options: the solver's own options; an unknown one is an error.
        limits: time, node and iteration limits, gap tolerances, seed, threads.
        warm_start: a feasible selection (0/1 vector or indices) to start from.

    Returns:
        A `Solution` whose objective and feasibility were recomputed from its selection. A failure inside the
        solver is a solution of status ``error``, not an exception.

    Raises:
        InputError: for an unknown solver or option, or a problem or warm start that the solver does not take.
    """
    solver = _solver(solver, options)
    limits = _checked_limits(limits)
    start = None
    if warm_start is not None:
        if not solver.capabilities.warm_start:
            raise InputError(f"solver {solver.name!r} takes no warm start; leave it out or choose another solver")
        if not problem.is_feasible(warm_start):
            raise InputError(f"{problem.name}: the warm start is not a feasible selection")
        start = np.zeros(problem.n, bool)
        start[problem.indices(warm_start)] = True
    _require_support(solver, problem)
    return checked(problem, solver, limits, *run_one(solver, problem, limits, start))


def solve_many(
    problems: Sequence[SubsetProblem],
    solver: str | Solver = "auto",
    *,
    options: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    workers: int = 1,
    isolate: bool = False,
    engine: Engine | None = None,
    progress: Callable[[Solution], None] | None = None,
) -> list[Solution]:
    """Solve many problems with one solver, in their order; a batched solver gets them all at once.

    Args:
        problems: what to solve; an empty list gives an empty list.
        solver: as in `solve`.
        options: as in `solve`.
        limits: as in `solve`, for each problem.
        workers: how many problems are solved at a time, by threads, or by processes with ``isolate``.
        isolate: run the solver in processes of its own. One that crashes makes a solution of status ``error``; one that
            does not return is killed when it is past its time limit by a fifth and two seconds, and makes one of
            status ``no_solution`` and limit ``time``. The other problems go on. Starting a process takes seconds.
        engine: in place of ``workers`` and ``isolate``: where to solve, e.g. `grace_opt.engines.dask.Cluster.outcomes`.
        progress: called with each solution as it is finished, in this thread; their order is not that of the problems
            when there are several workers.

    Returns:
        Solutions in the order of the problems. In a batch the time of a problem is the batch's divided by their number.

    Raises:
        InputError: as `solve` does, before anything is solved.
        KeyboardInterrupt: after the problems that threads are at work on are finished; ``progress`` has had them.
    """
    solver = _solver(solver, options)
    limits = _checked_limits(limits)
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")
    for problem in problems:
        _require_support(solver, problem)
    if not problems:
        return []
    solutions: dict[int, Solution] = {}
    engine = engine or partial(outcomes, workers=workers, isolate=isolate)
    with closing(engine(solver, problems, limits)) as finished:
        for index, raw, elapsed in finished:
            solutions[index] = checked(problems[index], solver, limits, raw, elapsed)
            if progress is not None:
                progress(solutions[index])
            if solutions[index].limit is Limit.INTERRUPTED:
                raise KeyboardInterrupt
    return [solutions[index] for index in range(len(problems))]


def _solver(solver: str | Solver, options: Mapping[str, Any] | None) -> Solver:
    if isinstance(solver, str):
        return create(solver, options)
    if options:
        raise InputError(f"options go with a solver's name; set them on the {type(solver).__name__} object instead")
    return solver


def _checked_limits(limits: Limits | None) -> Limits:
    limits = limits or Limits()
    for name in ("time_limit", "gap_rel", "gap_abs", "node_limit", "iteration_limit"):
        value = getattr(limits, name)
        if value is not None and not 0 <= value < math.inf:  # also refuses NaN
            raise InputError(f"{name} must be a finite number that is not negative, got {value}")
    if limits.threads < 1:
        raise InputError(f"threads must be at least 1, got {limits.threads}")
    if limits.seed < 0:
        raise InputError(f"seed must not be negative, got {limits.seed}")
    return limits


def _require_support(solver: Solver, problem: SubsetProblem) -> None:
    try:
        answer = solver.supports(problem)
    except Exception as error:  # a third party's
        raise InputError(f"solver {solver.name!r} failed to say whether it takes {problem.name}: {error!r}") from error
    if answer is not True:
        raise InputError(f"solver {solver.name!r} does not take {problem.name}: {answer or 'it says no'}")


def checked(problem: SubsetProblem, solver: Solver, limits: Limits, raw: RawResult, elapsed: int) -> Solution:
    """A solution from what the solver said, with everything that can be recomputed recomputed."""
    try:
        return _recomputed(problem, solver, limits, raw, elapsed)
    except Exception as error:  # a third party's result may hold anything
        return _recomputed(problem, solver, limits, failed(TypeError(f"its result cannot be read: {error!r}")), elapsed)


def _recomputed(problem: SubsetProblem, solver: Solver, limits: Limits, raw: RawResult, elapsed: int) -> Solution:
    warnings = [*ignored_limits(solver, limits), *map(str, raw.warnings)]
    objective, pruned = math.nan, None
    lower_bound, bound_kind = float(raw.lower_bound), BoundKind(raw.bound_kind)
    if math.isnan(lower_bound) or bound_kind is BoundKind.NONE:
        lower_bound, bound_kind = -math.inf, BoundKind.NONE
    status: Status
    if raw.pruned is None:
        status = Status(raw.status)
        if status in (Status.OPTIMAL, Status.FEASIBLE):
            status = Status.NO_SOLUTION
    elif not problem.is_feasible(raw.pruned):
        status = Status.ERROR
        warnings.append("the solver returned a selection that is not feasible; it was thrown away")
    else:
        status = Status.FEASIBLE
        chosen = problem.indices(raw.pruned)
        pruned = tuple(chosen.tolist())
        block = problem.weights[np.ix_(chosen, chosen)]
        objective = float(block.sum())
        above = lower_bound - objective
        if abs(above) <= rounding_slack(block) or 0 < above <= OBJECTIVE_SLACK * abs(objective):
            lower_bound = objective  # they differ by rounding
        elif lower_bound > objective:
            status = Status.NUMERICAL_ERROR
            warnings.append(f"the solver's bound {lower_bound!r} lies above its own selection's {objective!r}")
            lower_bound, bound_kind = -math.inf, BoundKind.NONE
        within = relative_gap(objective, lower_bound) <= limits.gap_rel or objective - lower_bound <= limits.gap_abs
        if within and bound_kind is BoundKind.PROVEN:
            status = Status.OPTIMAL
        elif solver.capabilities.exact and raw.limit is Limit.NONE and not warnings and math.isfinite(lower_bound):
            warnings.append(f"no limit was reached, and rounding keeps the bound at {lower_bound!r}")
    return Solution(
        problem=problem.name,
        digest=problem.digest(),
        n=problem.n,
        prune=problem.prune,
        pruned=pruned,
        objective=objective,
        lower_bound=lower_bound,
        bound_kind=bound_kind,
        status=status,
        limit=Limit(raw.limit),
        raw_status=str(raw.raw_status),
        nodes=int(raw.nodes),
        iterations=int(raw.iterations),
        timing=dataclasses.replace(raw.timing, total=elapsed),
        solver=solver.name,
        solver_version=version_of_class(type(solver)),
        seed=limits.seed,
        threads=limits.threads,
        options=options_of(solver),
        warnings=tuple(warnings),
        versions=versions_of(solver.capabilities.requires),
        trace=tuple((float(seconds), float(value), float(bound)) for seconds, value, bound in raw.trace),
    )


def options_of(solver: Solver) -> dict[str, Any]:
    """The resolved options of a solver, as its records show them."""
    if not dataclasses.is_dataclass(solver):
        return {}
    return {f.name: getattr(solver, f.name) for f in dataclasses.fields(solver) if f.init}
