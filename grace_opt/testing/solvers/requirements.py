"""What a solution must be, in sentences."""

from __future__ import annotations

import math

import numpy as np

from grace_opt.problem import BoolArray, SubsetProblem
from grace_opt.solution import BoundKind, Limit, Limits, Solution, Status
from grace_opt.testing.solvers.cases import Case, free_magnitude


def require(condition: bool, sentence: str) -> None:
    if not condition:  # not an assert statement: python -O would drop it
        raise AssertionError(sentence)


def require_sound(case: Case, solution: Solution, cut_short: bool = False) -> None:
    """Feasible, bounded from below by its bound, and optimal if it says so."""
    nothing_yet = solution.status is Status.NO_SOLUTION and solution.limit is not Limit.NONE
    if not (cut_short and nothing_yet):
        require_selection(case, solution)
    require_bound(case, solution)
    require_optimal_if_it_says_so(case, solution)


def require_selection(case: Case, solution: Solution) -> None:
    if solution.pruned is None:
        raise AssertionError(f"{case.name}: no selection: {said(solution)}")
    problem, chosen = case.problem, np.array(solution.pruned, int)
    x = np.zeros(problem.n, bool)
    x[chosen] = True
    require(len(chosen) == problem.prune == x.sum(), f"{case.name}: prunes {chosen}, and should {problem.prune}")
    if problem.protected is not None:
        require(not (x & problem.protected).any(), f"{case.name}: prunes protected channels")
    for label in np.unique(problem.groups[problem.groups >= 0]) if problem.groups is not None else ():
        tied = x[problem.groups == label]
        require(bool(tied.all() == tied.any()), f"{case.name}: splits the tied group {label}")
    objective = math.fsum(problem.weights[np.ix_(chosen, chosen)].ravel())
    require(
        abs(objective - solution.objective) <= case.slack + 1e-9 * abs(objective),
        f"{case.name}: the objective of its selection is {objective}, the record says {solution.objective}",
    )


def require_bound(case: Case, solution: Solution) -> None:
    require(solution.status is not Status.NUMERICAL_ERROR, f"{case.name}: {said(solution)}")
    require(
        solution.lower_bound <= case.optimum + bound_slack(case, solution.bound_kind),
        f"{case.name}: the {solution.bound_kind} bound {solution.lower_bound!r} is above the optimum {case.optimum!r}",
    )


def bound_slack(case: Case, kind: BoundKind) -> float:
    if kind is BoundKind.NUMERICAL:  # as a library reported it, within its usual tolerances
        return 1e-6 * abs(case.optimum) + 1e-9 * free_magnitude(case.problem)
    return case.slack


def require_optimal_if_it_says_so(case: Case, solution: Solution) -> None:
    if solution.status is Status.OPTIMAL:
        allowed = case.slack + Limits().gap_rel * abs(solution.objective)
        require(
            solution.objective <= case.optimum + allowed,
            f"{case.name}: {solution.objective!r} is called optimal, and the optimum is {case.optimum!r}",
        )


def require_same(first: dict[str, list[int] | None], second: dict[str, list[int] | None], otherwise: str) -> None:
    for name, pruned in first.items():
        require(second.get(name) == pruned, f"{name}: {otherwise}: {pruned}, then {second.get(name)}")


def require_unchanged(case: Case, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    changed = [name for name, value in before.items() if after[name] != value]
    require(not changed, f"{case.name}: the solver wrote into {', '.join(changed)}")


def said(solution: Solution) -> str:
    """What a run said, for a failure's sentence."""
    words = [f"status {solution.status}", f"limit {solution.limit}", f"gap {solution.gap:.3g}", *solution.warnings]
    return "; ".join(words)


def bytes_of(problem: SubsetProblem, start: BoolArray | None) -> dict[str, bytes]:
    nodes = problem.contraction
    arrays = {
        "problem.weights": problem.weights,
        "problem.protected": problem.protected,
        "problem.groups": problem.groups,
        "problem.contraction.weights": nodes.weights,
        "problem.contraction.sizes": nodes.sizes,
        "problem.contraction.free": nodes.free,
        "problem.contraction.node_of": nodes.node_of,
        "the warm start": start,
    }
    return {name: array.tobytes() for name, array in arrays.items() if array is not None}
