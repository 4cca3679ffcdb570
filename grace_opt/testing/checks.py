"""The checks. Each takes a solver and raises AssertionError with a sentence; each solves through the front end."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from grace_opt.errors import InputError
from grace_opt.problem import BoolArray, SubsetProblem
from grace_opt.solution import BatchSolver, BoundKind, Capabilities, Limit, Limits, Solution, Solver, Status
from grace_opt.solve import solve, solve_many
from grace_opt.testing.cases import Case, brute_force, copied, free_magnitude, hidden_optimum, permuted, problems
from grace_opt.testing.replay import selections, selections_in_new_process

TIME_LIMIT = 0.5
TIME_ALLOWED = 1.2 * TIME_LIMIT + 0.5  # 20 %, and half a second for what no solver can interrupt


@dataclass(frozen=True)
class Check:
    """A named check. Calling it with a solver raises AssertionError, and nothing else, if the solver fails.

    ``needs`` is the capability that the check looks at; without it there is nothing to check and a call does nothing.
    """

    name: str
    summary: str
    run: Callable[[Solver], None]
    needs: str | None

    def applies_to(self, solver: Solver) -> bool:
        """Whether the solver claims what the check looks at."""
        return self.needs is None or bool(getattr(getattr(solver, "capabilities", None), self.needs, False))

    def __call__(self, solver: Solver) -> None:
        if not self.applies_to(solver):
            return
        try:
            self.run(solver)
        except AssertionError:
            raise
        except Exception as error:  # a solver under test may fail in any way
            raise AssertionError(f"the solver raised {error!r}") from error

    def __str__(self) -> str:
        return self.name


_registered: list[Check] = []


def checks(solver: Solver | None = None) -> list[Check]:
    """All checks, or those that look at something which ``solver`` claims."""
    return [check for check in _registered if solver is None or check.applies_to(solver)]


def _check(needs: str | None = None) -> Callable[[Callable[[Solver], None]], Callable[[Solver], None]]:
    def register(function: Callable[[Solver], None]) -> Callable[[Solver], None]:
        name = function.__name__.strip("_").replace("_", "-")
        summary = (function.__doc__ or "").splitlines()[0]
        _registered.append(Check(name, summary, function, needs))
        return function

    return register


@_check()
def _description(solver: Solver) -> None:
    """The solver is a frozen dataclass with a name and capabilities that fit together."""
    _require(isinstance(solver, Solver), "a solver has name, capabilities, supports() and solve()")
    _require(
        isinstance(solver.name, str) and solver.name.replace("-", "_").isidentifier(),
        f"the name {solver.name!r} must be of letters, digits, '_' and '-'",
    )
    able = solver.capabilities
    _require(isinstance(able, Capabilities), f"capabilities must be a Capabilities, not {able!r}")
    parameters = getattr(type(solver), "__dataclass_params__", None)
    _require(
        parameters is not None and parameters.frozen, "a solver is a frozen dataclass whose fields are its options"
    )
    _require(able.bounds or not able.exact, "capabilities say exact but not bounds; an optimum is proven by a bound")
    _require(isinstance(solver, BatchSolver) or not able.batched, "capabilities say batched; solve_batch() is missing")


@_check()
def _supports(solver: Solver) -> None:
    """supports() says True or why not, as its capabilities do; plain problems are taken."""
    able = solver.capabilities
    taken = 0
    for case in problems():
        answer = solver.supports(case.problem)
        if answer is not True:
            _require(
                isinstance(answer, str) and bool(answer.strip()),
                f"{case.name}: supports() must answer True or a sentence, not {answer!r}",
            )
            try:
                solve(case.problem, solver)
            except InputError:
                pass
            else:
                raise AssertionError(f"{case.name}: refused once, taken the next time")
        if "plain" in case.tags and case.problem.n <= (able.largest_n or math.inf):
            _require(answer is True, f"{case.name}: every solver must take plain problems, this one says: {answer}")
            taken += 1
        if "groups" in case.tags and not able.groups:
            _require(answer is not True, f"{case.name}: taken, but capabilities say that it handles no tied groups")
        if "pairs" in case.tags and able.groups:
            _require(answer is True, f"{case.name}: capabilities say that it handles tied groups, supports(): {answer}")
    _require(taken > 0, f"largest_n = {able.largest_n} leaves no problem to check")


@_check()
def _selection(solver: Solver) -> None:
    """Every selection is feasible, and its objective is what the record says."""
    for case, solution in _solved(solver):
        _require_selection(case, solution)
        try:
            json.dumps(solution.record(), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"{case.name}: the record is not JSON: {error}") from None


@_check()
def _lower_bound(solver: Solver) -> None:
    """No bound lies above the optimum; there are bounds if the solver says so, else none."""
    able = solver.capabilities
    for case, solution in _solved(solver):
        _require_bound(case, solution)
        if not able.bounds:
            _require(
                solution.bound_kind is BoundKind.NONE,
                f"{case.name}: gives the bound {solution.lower_bound}, but capabilities say that it gives none",
            )
        elif "plain" in case.tags:
            _require(
                math.isfinite(solution.lower_bound),
                f"{case.name}: gives no bound, but capabilities say that it does ({_said(solution)})",
            )


@_check()
def _optimal_status(solver: Solver) -> None:
    """What is called optimal is the optimum."""
    for case, solution in _solved(solver):
        _require_optimal_if_it_says_so(case, solution)


@_check()
def _trace(solver: Solver) -> None:
    """A trace, if there is one, runs forward in time, only improves, and never crosses the optimum."""
    for case, solution in _solved(solver):
        slack = _bound_slack(case, solution.bound_kind)
        for seconds, objective, bound in solution.trace:
            _require(
                bound - slack <= case.optimum <= objective + case.slack,
                f"{case.name}: at {seconds} s its trace says {bound} to {objective}, the optimum is {case.optimum}",
            )
        for (t1, high1, low1), (t2, high2, low2) in pairwise(solution.trace):
            _require(t1 <= t2 and high1 >= high2 and low1 <= low2, f"{case.name}: its trace goes back at {t2} s")


@_check("exact")
def _exactness(solver: Solver) -> None:
    """An exact solver proves the optimum of every problem that it takes."""
    for case, first in _solved(solver):
        solution = first
        if solution.status is not Status.OPTIMAL:
            # An optimum of 0 has no relative gap: ask for no more than rounding lets anyone prove.
            solution = solve(case.problem, solver, limits=Limits(gap_abs=case.slack))
        _require(solution.status is Status.OPTIMAL, f"{case.name}: not proven optimal: {_said(solution)}")
        _require_optimal_if_it_says_so(case, solution)


@_check()
def _permutation(solver: Solver) -> None:
    """The order of the channels does not matter.

    An exact solver finds the optimum in any order. A heuristic may break ties, scan or start by channel number, and so
    end elsewhere; but where the weights are well separated and nearly diagonal it must prune the same channels.
    """
    rng = np.random.default_rng(0)
    for case in _taken(solver, "generic") + _taken(solver, "separated-pairs"):
        objectives = []
        for _ in range(2):
            order = rng.permutation(case.problem.n)
            problem = permuted(case.problem, order)
            shuffled = dataclasses.replace(case, problem=problem, best=case.best[order])
            solution = solve(problem, solver)
            _require_sound(shuffled, solution)
            objectives.append(solution.objective)
        if solver.capabilities.exact or "separated" in case.tags:
            objectives.append(solve(case.problem, solver).objective)
            spread = max(objectives) - min(objectives)
            _require(
                spread <= case.slack + 1e-6 * abs(case.optimum),
                f"{case.name}: with its channels in other orders the objective is {objectives}",
            )


@_check()
def _scale(solver: Solver) -> None:
    """Weights times a power of two, which changes no rounding, give the same selection."""
    for case in _taken(solver, "generic"):
        plain = solve(case.problem, solver)
        for factor in (2.0**-30, 2.0**30):
            problem = copied(case.problem, factor)
            solution = solve(problem, solver)
            _require_sound(dataclasses.replace(case, problem=problem, optimum=case.optimum * factor), solution)
            _require(
                solution.pruned == plain.pruned,
                f"{case.name}: with weights times {factor:g} it prunes {solution.pruned}, without {plain.pruned}",
            )


@_check()
def _repeatable(solver: Solver) -> None:
    """The same seed gives the same selection again, and in a new process with another hash seed."""
    seed = 7
    first = selections(solver, seed)
    _require(len(first) > 1, "it takes too few cases to tell")
    _require_same(first, selections(solver, seed), "the second run with the same seed differs")
    hash_seed = 2 if os.environ.get("PYTHONHASHSEED") == "1" else 1
    elsewhere = selections_in_new_process(solver, seed, hash_seed)
    _require_same(first, elsewhere, "a new process with another PYTHONHASHSEED gives another selection")


@_check()
def _name_of_the_problem(solver: Solver) -> None:
    """What a problem is called and what is noted about it changes nothing."""
    for case in _taken(solver, "generic")[:4]:
        called = dataclasses.replace(case.problem, name="layers.3.kv_heads.1.key", metadata={"layer": 3})
        again, plain = solve(called, solver), solve(case.problem, solver)
        _require(again.pruned == plain.pruned, f"{case.name}: under another name it prunes other channels")


@_check()
def _inputs_untouched(solver: Solver) -> None:
    """Nothing is written into the problem or the warm start."""
    limits = Limits()
    for case in _taken(solver, "generic")[-2:] + _taken(solver, "pairs")[-2:]:
        start = case.best.copy() if solver.capabilities.warm_start else None
        before = _bytes(case.problem, start)
        solver.solve(case.problem, limits, start, np.random.default_rng(limits.seed))
        _require_unchanged(case, before, _bytes(case.problem, start))
        if isinstance(solver, BatchSolver):
            solver.solve_batch([case.problem], limits)
            _require_unchanged(case, before, _bytes(case.problem, start))


@_check()
def _cut_short(solver: Solver) -> None:
    """Cut short by any limit, what it says is still true."""
    limits = (Limits(time_limit=0.0), Limits(node_limit=1), Limits(iteration_limit=1))
    for case in _taken(solver, "plain")[1:12:2] + _taken(solver, "pairs")[:1] + _taken(solver, "indefinite")[:1]:
        for limit in limits:
            solution = solve(case.problem, solver, limits=limit)
            _require_sound(case, solution, cut_short=True)


@_check("time_limit")
def _time_limit(solver: Solver) -> None:
    """It stops within 20 % and half a second of its time limit, on a problem that is hard to finish."""
    solve(_taken(solver, "plain")[0].problem, solver)  # what is loaded or compiled once does not count
    case = _hard(solver, 100)
    took = math.inf
    for _ in range(2):  # a busy machine may delay one run
        began = time.perf_counter()
        solution = solve(case.problem, solver, limits=Limits(time_limit=TIME_LIMIT))
        took = min(took, time.perf_counter() - began)
        _require_sound(case, solution, cut_short=True)
        if took <= TIME_ALLOWED:
            return
    raise AssertionError(f"{case.name}: took {took:.2f} s under a time limit of {TIME_LIMIT} s")


@_check("warm_start")
def _warm_start(solver: Solver) -> None:
    """It never returns worse than its warm start, and starts from any feasible one."""
    for case in _taken(solver, "generic") + _taken(solver, "pairs") + _taken(solver, "indefinite"):
        solution = solve(case.problem, solver, warm_start=case.best)
        _require_sound(case, solution)
        _require(
            solution.objective <= case.optimum + case.slack,
            f"{case.name}: started from the optimum {case.optimum}, it returned {solution.objective}",
        )
        worst = brute_force(copied(case.problem, -1.0))[1]
        solution = solve(case.problem, solver, warm_start=worst)
        _require_sound(case, solution)
        if solver.capabilities.exact:
            _require(
                solution.objective <= case.optimum + case.slack + 1e-6 * abs(solution.objective),
                f"{case.name}: started from a bad selection, it did not reach the optimum {case.optimum}",
            )
        try:
            solve(case.problem, solver, warm_start=np.zeros(case.problem.n, bool))
        except InputError:
            continue
        raise AssertionError(f"{case.name}: a warm start that prunes nothing was not refused")
    # Small problems are solved without the warm start; this one shows whether it arrives.
    able = solver.capabilities
    hidden = _hard(solver, 14 if able.exact and not able.time_limit else 60)
    limits = Limits(time_limit=1.0, node_limit=100, iteration_limit=1000)
    solution = solve(hidden.problem, solver, limits=limits, warm_start=hidden.best)
    _require(
        solution.objective <= hidden.optimum,
        f"{hidden.name}: started from the optimum 0, it returned {solution.objective}; the warm start got lost",
    )


@_check("batched")
def _batch(solver: Solver) -> None:
    """A batch of mixed problems gives what each alone gives, in the same order."""
    _require(isinstance(solver, BatchSolver) and not solver.solve_batch([], Limits()), "an empty batch must give []")
    alone = _solved(solver)
    for pairs in (alone, alone[::-1]):
        together = solve_many([case.problem for case, _ in pairs], solver)
        for (case, one), many in zip(pairs, together, strict=True):
            _require_sound(case, many)
            if "generic" in case.tags:  # where channels tie, the last digit of a sum may decide
                _require(
                    one.pruned == many.pruned, f"{case.name}: in a batch it prunes {many.pruned}, alone {one.pruned}"
                )
            else:
                _require(
                    abs(one.objective - many.objective) <= case.slack,
                    f"{case.name}: in a batch the objective is {many.objective}, alone {one.objective}",
                )


#: All checks, in the order in which `conformance` runs them.
CHECKS: tuple[Check, ...] = tuple(_registered)


def _require(condition: bool, sentence: str) -> None:
    if not condition:  # not an assert statement: python -O would drop it
        raise AssertionError(sentence)


def _taken(solver: Solver, tag: str) -> list[Case]:
    """The cases that have a tag, or a name, and that the solver takes."""
    return [c for c in problems() if (tag in c.tags or tag == c.name) and solver.supports(c.problem) is True]


_last: list[tuple[Solver, list[tuple[Case, Solution]]]] = []


def _solved(solver: Solver) -> list[tuple[Case, Solution]]:
    """Every case that the solver takes, solved without limits; remembered for the checks that follow."""
    if not (_last and _last[0][0] == solver and type(_last[0][0]) is type(solver)):
        cases = [case for case in problems() if solver.supports(case.problem) is True]
        _last[:] = [(solver, [(case, solve(case.problem, solver)) for case in cases])]
    return _last[0][1]


def _hard(solver: Solver, largest: int) -> Case:
    """A case that is hard to solve, as large as the solver takes and is meant for, up to ``largest``."""
    largest = min(largest, solver.capabilities.largest_n or largest)
    for n in sorted({largest, 50, 20, 14, 6}, reverse=True):
        case = hidden_optimum(n)
        if n <= largest and solver.supports(case.problem) is True:
            return case
    raise AssertionError("it takes no semidefinite problem of n = 6 or more")


def _require_sound(case: Case, solution: Solution, cut_short: bool = False) -> None:
    """Feasible, bounded from below by its bound, and optimal if it says so."""
    nothing_yet = solution.status is Status.NO_SOLUTION and solution.limit is not Limit.NONE
    if not (cut_short and nothing_yet):
        _require_selection(case, solution)
    _require_bound(case, solution)
    _require_optimal_if_it_says_so(case, solution)


def _require_selection(case: Case, solution: Solution) -> None:
    if solution.pruned is None:
        raise AssertionError(f"{case.name}: no selection: {_said(solution)}")
    problem, chosen = case.problem, np.array(solution.pruned, int)
    x = np.zeros(problem.n, bool)
    x[chosen] = True
    _require(len(chosen) == problem.prune == x.sum(), f"{case.name}: prunes {chosen}, and should {problem.prune}")
    if problem.protected is not None:
        _require(not (x & problem.protected).any(), f"{case.name}: prunes protected channels")
    for label in np.unique(problem.groups[problem.groups >= 0]) if problem.groups is not None else ():
        tied = x[problem.groups == label]
        _require(bool(tied.all() == tied.any()), f"{case.name}: splits the tied group {label}")
    objective = math.fsum(problem.weights[np.ix_(chosen, chosen)].ravel())
    _require(
        abs(objective - solution.objective) <= case.slack + 1e-9 * abs(objective),
        f"{case.name}: the objective of its selection is {objective}, the record says {solution.objective}",
    )


def _require_bound(case: Case, solution: Solution) -> None:
    _require(solution.status is not Status.NUMERICAL_ERROR, f"{case.name}: {_said(solution)}")
    _require(
        solution.lower_bound <= case.optimum + _bound_slack(case, solution.bound_kind),
        f"{case.name}: the {solution.bound_kind} bound {solution.lower_bound!r} is above the optimum {case.optimum!r}",
    )


def _bound_slack(case: Case, kind: BoundKind) -> float:
    if kind is BoundKind.NUMERICAL:  # as a library reported it, within its usual tolerances
        return 1e-6 * abs(case.optimum) + 1e-9 * free_magnitude(case.problem)
    return case.slack


def _require_optimal_if_it_says_so(case: Case, solution: Solution) -> None:
    if solution.status is Status.OPTIMAL:
        allowed = case.slack + Limits().gap_rel * abs(solution.objective)
        _require(
            solution.objective <= case.optimum + allowed,
            f"{case.name}: {solution.objective!r} is called optimal, and the optimum is {case.optimum!r}",
        )


def _require_same(first: dict[str, list[int] | None], second: dict[str, list[int] | None], otherwise: str) -> None:
    for name, pruned in first.items():
        _require(second.get(name) == pruned, f"{name}: {otherwise}: {pruned}, then {second.get(name)}")


def _require_unchanged(case: Case, before: dict[str, bytes], after: dict[str, bytes]) -> None:
    changed = [name for name, value in before.items() if after[name] != value]
    _require(not changed, f"{case.name}: the solver wrote into {', '.join(changed)}")


def _said(solution: Solution) -> str:
    """What a run said, for a failure's sentence."""
    words = [f"status {solution.status}", f"limit {solution.limit}", f"gap {solution.gap:.3g}", *solution.warnings]
    return "; ".join(words)


def _bytes(problem: SubsetProblem, start: BoolArray | None) -> dict[str, bytes]:
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
