"""The front end: validate, run, recompute, bound and stamp. No solver's own figure is shown."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from grace_opt.errors import InputError
from grace_opt.problem import SubsetProblem
from grace_opt.registry import create
from grace_opt.solution import (
    BatchSolver,
    BoundKind,
    Limits,
    RawResult,
    Solution,
    Solver,
    Status,
    relative_gap,
)

ROUNDING_SLACK = 1e-12


def solve(
    problem: SubsetProblem,
    solver: str | Solver = "greedy",
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
    runner = _runner(solver, options)
    limits = _checked_limits(limits)
    start = None
    if warm_start is not None:
        if not runner.capabilities.warm_start:
            raise InputError(f"solver {runner.name!r} takes no warm start; leave it out or choose another solver")
        if not problem.is_feasible(warm_start):
            raise InputError(f"{problem.name}: the warm start is not a feasible selection")
        start = np.zeros(problem.n, bool)
        start[problem.indices(warm_start)] = True
    _require_support(runner, problem)
    began = time.perf_counter_ns()
    try:
        raw = runner.solve(problem, limits, start, np.random.default_rng(limits.seed))
    except Exception as error:  # a native or third-party solver may fail in any way; one head must not end a run
        raw = _failed(error)
    return _checked(problem, runner, limits, raw, time.perf_counter_ns() - began)


def solve_many(
    problems: Sequence[SubsetProblem],
    solver: str | Solver = "greedy",
    *,
    options: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    progress: Callable[[Solution], None] | None = None,
) -> list[Solution]:
    """Solve many problems with one solver, in their order; a batched solver gets them all at once.

    ``progress`` is called with each solution as it is finished. In a batch the time of a problem is the batch's
    time divided by their number. Raises as `solve` does, before anything is solved.
    """
    runner = _runner(solver, options)
    limits = _checked_limits(limits)
    for problem in problems:
        _require_support(runner, problem)
    if not (problems and runner.capabilities.batched and isinstance(runner, BatchSolver)):
        solutions = []
        for problem in problems:
            solutions.append(solve(problem, runner, limits=limits))
            if progress is not None:
                progress(solutions[-1])
        return solutions
    began = time.perf_counter_ns()
    try:
        raws = runner.solve_batch(problems, limits)
    except Exception as error:  # as in solve()
        raws = [_failed(error)] * len(problems)
    share = (time.perf_counter_ns() - began) // len(problems)
    solutions = [_checked(p, runner, limits, raw, share) for p, raw in zip(problems, raws, strict=True)]
    if progress is not None:
        for solution in solutions:
            progress(solution)
    return solutions


def _runner(solver: str | Solver, options: Mapping[str, Any] | None) -> Solver:
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


def _require_support(runner: Solver, problem: SubsetProblem) -> None:
    answer = runner.supports(problem)
    if answer is not True:
        raise InputError(f"solver {runner.name!r} does not take {problem.name}: {answer or 'it says no'}")


def _failed(error: Exception) -> RawResult:
    return RawResult(None, status=Status.ERROR, raw_status=repr(error), warnings=(f"the solver failed: {error!r}",))


def _checked(problem: SubsetProblem, runner: Solver, limits: Limits, raw: RawResult, elapsed: int) -> Solution:
    """A solution from what the solver said, with everything that can be recomputed recomputed."""
    warnings = list(raw.warnings)
    objective, pruned = math.nan, None
    lower_bound, bound_kind = raw.lower_bound, raw.bound_kind
    if math.isnan(lower_bound) or bound_kind is BoundKind.NONE:
        lower_bound, bound_kind = -math.inf, BoundKind.NONE
    status: Status
    if raw.pruned is None:
        status = Status.NO_SOLUTION if raw.status in (Status.OPTIMAL, Status.FEASIBLE) else raw.status
    elif not problem.is_feasible(raw.pruned):
        status = Status.ERROR
        warnings.append("the solver returned a selection that is not feasible; it was thrown away")
    else:
        status = Status.FEASIBLE
        chosen = problem.indices(raw.pruned)
        pruned = tuple(chosen.tolist())
        block = problem.weights[np.ix_(chosen, chosen)]
        objective = float(block.sum())
        if lower_bound > objective:
            slack = ROUNDING_SLACK * float(np.abs(block).sum())
            if lower_bound - objective <= slack + 1e-9 * abs(objective):
                lower_bound = objective
            else:
                status = Status.NUMERICAL_ERROR
                warnings.append(f"the solver's bound {lower_bound!r} lies above its own selection's {objective!r}")
                lower_bound, bound_kind = -math.inf, BoundKind.NONE
        within = relative_gap(objective, lower_bound) <= limits.gap_rel or objective - lower_bound <= limits.gap_abs
        if within and bound_kind is BoundKind.PROVEN:
            status = Status.OPTIMAL
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
        limit=raw.limit,
        raw_status=raw.raw_status,
        nodes=raw.nodes,
        iterations=raw.iterations,
        timing=dataclasses.replace(raw.timing, total=elapsed),
        solver=runner.name,
        solver_version=_version_of(type(runner)),
        seed=limits.seed,
        threads=limits.threads,
        options=_options(runner),
        warnings=tuple(warnings),
        versions=_versions(runner.capabilities.requires),
    )


def _options(runner: Solver) -> dict[str, Any]:
    if not dataclasses.is_dataclass(runner):
        return {}
    return {f.name: getattr(runner, f.name) for f in dataclasses.fields(runner) if f.init}


@cache
def _version_of(solver_class: type) -> str:
    """The version of the distribution that a solver comes from."""
    package = solver_class.__module__.partition(".")[0]
    if package in ("grace_opt", "grace_solvers"):
        return _distribution_version("grace-opt")
    names = importlib.metadata.packages_distributions().get(package, [])
    return _distribution_version(names[0]) if names else "unknown"


@cache
def _distribution_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@cache
def _versions(requires: tuple[str, ...]) -> dict[str, str]:
    """Versions of Python, grace-opt and what the solver stands on."""
    versions = {"python": platform.python_version()}
    for name in ("grace-opt", "numpy", *requires):
        versions[name] = _distribution_version(name)
    return versions
