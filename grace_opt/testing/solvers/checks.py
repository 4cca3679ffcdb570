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
from pathlib import Path

import numpy as np

from grace_opt.errors import InputError
from grace_opt.solution import BatchSolver, BoundKind, Capabilities, Limits, Solution, Solver, Status
from grace_opt.solve import solve, solve_many
from grace_opt.testing.solvers.cases import (
    Case,
    brute_force,
    copied,
    hidden_optimum,
    permuted,
    problems,
)
from grace_opt.testing.solvers.replay import selections, selections_in_new_process
from grace_opt.testing.solvers.requirements import (
    bound_slack,
    bytes_of,
    require,
    require_bound,
    require_optimal_if_it_says_so,
    require_same,
    require_selection,
    require_sound,
    require_unchanged,
    said,
)

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
    require(isinstance(solver, Solver), "a solver has name, capabilities, supports() and solve()")
    require(
        isinstance(solver.name, str) and solver.name.replace("-", "_").isidentifier(),
        f"the name {solver.name!r} must be of letters, digits, '_' and '-'",
    )
    able = solver.capabilities
    require(isinstance(able, Capabilities), f"capabilities must be a Capabilities, not {able!r}")
    parameters = getattr(type(solver), "__dataclass_params__", None)
    require(parameters is not None and parameters.frozen, "a solver is a frozen dataclass whose fields are its options")
    require(able.bounds or not able.exact, "capabilities say exact but not bounds; an optimum is proven by a bound")
    require(isinstance(solver, BatchSolver) or not able.batched, "capabilities say batched; solve_batch() is missing")


@_check()
def _supports(solver: Solver) -> None:
    """supports() says True or why not, as its capabilities do; plain problems are taken."""
    able = solver.capabilities
    taken = 0
    for case in problems():
        answer = solver.supports(case.problem)
        if answer is not True:
            require(
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
            require(answer is True, f"{case.name}: every solver must take plain problems, this one says: {answer}")
            taken += 1
        if "groups" in case.tags and not able.groups:
            require(answer is not True, f"{case.name}: taken, but capabilities say that it handles no tied groups")
        if "pairs" in case.tags and able.groups:
            require(answer is True, f"{case.name}: capabilities say that it handles tied groups, supports(): {answer}")
    require(taken > 0, f"largest_n = {able.largest_n} leaves no problem to check")


@_check()
def _selection(solver: Solver) -> None:
    """Every selection is feasible, and its objective is what the record says."""
    for case, solution in _solved(solver):
        require_selection(case, solution)
        try:
            json.dumps(solution.record(), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise AssertionError(f"{case.name}: the record is not JSON: {error}") from None


@_check()
def _lower_bound(solver: Solver) -> None:
    """No bound lies above the optimum; there are bounds if the solver says so, else none."""
    able = solver.capabilities
    for case, solution in _solved(solver):
        require_bound(case, solution)
        if not able.bounds:
            require(
                solution.bound_kind is BoundKind.NONE,
                f"{case.name}: gives the bound {solution.lower_bound}, but capabilities say that it gives none",
            )
        elif "plain" in case.tags:
            require(
                math.isfinite(solution.lower_bound),
                f"{case.name}: gives no bound, but capabilities say that it does ({said(solution)})",
            )


@_check()
def _optimal_status(solver: Solver) -> None:
    """What is called optimal is the optimum."""
    for case, solution in _solved(solver):
        require_optimal_if_it_says_so(case, solution)


@_check()
def _trace(solver: Solver) -> None:
    """A trace, if there is one, runs forward in time, only improves, and never crosses the optimum."""
    for case, solution in _solved(solver):
        slack = bound_slack(case, solution.bound_kind)
        for seconds, objective, bound in solution.trace:
            require(
                bound - slack <= case.optimum <= objective + case.slack,
                f"{case.name}: at {seconds} s its trace says {bound} to {objective}, the optimum is {case.optimum}",
            )
        for (t1, high1, low1), (t2, high2, low2) in pairwise(solution.trace):
            require(t1 <= t2 and high1 >= high2 and low1 <= low2, f"{case.name}: its trace goes back at {t2} s")


@_check("exact")
def _exactness(solver: Solver) -> None:
    """An exact solver proves the optimum of every problem that it takes."""
    for case, first in _solved(solver):
        solution = first
        if solution.status is not Status.OPTIMAL:
            # An optimum of 0 has no relative gap: ask for no more than rounding lets anyone prove.
            solution = solve(case.problem, solver, limits=Limits(gap_abs=case.slack))
        require(solution.status is Status.OPTIMAL, f"{case.name}: not proven optimal: {said(solution)}")
        require_optimal_if_it_says_so(case, solution)


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
            require_sound(shuffled, solution)
            objectives.append(solution.objective)
        if solver.capabilities.exact or "separated" in case.tags:
            objectives.append(solve(case.problem, solver).objective)
            spread = max(objectives) - min(objectives)
            require(
                spread <= case.slack + 1e-6 * abs(case.optimum),
                f"{case.name}: with its channels in other orders the objective is {objectives}",
            )


@_check()
def _scale(solver: Solver) -> None:
    """Weights times a power of two, which changes no rounding, give the same selection."""
    for case in _taken(solver, "generic") + _taken(solver, "decades"):
        plain = solve(case.problem, solver)
        for factor in (2.0**-40, 2.0**40):
            problem = copied(case.problem, factor)
            solution = solve(problem, solver)
            require_sound(dataclasses.replace(case, problem=problem, optimum=case.optimum * factor), solution)
            require(
                solution.pruned == plain.pruned,
                f"{case.name}: with weights times {factor:g} it prunes {solution.pruned}, without {plain.pruned}",
            )


@_check()
def _repeatable(solver: Solver) -> None:
    """The same seed gives the same selection again, and in a new process with another hash seed."""
    seed = 7
    first = selections(solver, seed)
    require(len(first) > 1, "it takes too few cases to tell")
    require_same(first, selections(solver, seed), "the second run with the same seed differs")
    hash_seed = 2 if os.environ.get("PYTHONHASHSEED") == "1" else 1
    elsewhere = selections_in_new_process(solver, seed, hash_seed)
    require_same(first, elsewhere, "a new process with another PYTHONHASHSEED gives another selection")


@_check()
def _name_of_the_problem(solver: Solver) -> None:
    """What a problem is called and what is noted about it changes nothing."""
    for case in _taken(solver, "generic")[:4]:
        called = dataclasses.replace(case.problem, name="layers.3.kv_heads.1.key", metadata={"layer": 3})
        again, plain = solve(called, solver), solve(case.problem, solver)
        require(again.pruned == plain.pruned, f"{case.name}: under another name it prunes other channels")


@_check()
def _inputs_untouched(solver: Solver) -> None:
    """Nothing is written into the problem or the warm start."""
    limits = Limits()
    for case in _taken(solver, "generic")[-2:] + _taken(solver, "pairs")[-2:]:
        start = case.best.copy() if solver.capabilities.warm_start else None
        before = bytes_of(case.problem, start)
        solver.solve(case.problem, limits, start, np.random.default_rng(limits.seed))
        require_unchanged(case, before, bytes_of(case.problem, start))
        if isinstance(solver, BatchSolver):
            solver.solve_batch([case.problem], limits)
            require_unchanged(case, before, bytes_of(case.problem, start))


@_check()
def _cut_short(solver: Solver) -> None:
    """Cut short by any limit, what it says is still true."""
    limits = (Limits(time_limit=0.0), Limits(node_limit=1), Limits(iteration_limit=1))
    for case in _taken(solver, "plain")[1:12:2] + _taken(solver, "pairs")[:1] + _taken(solver, "indefinite")[:1]:
        for limit in limits:
            solution = solve(case.problem, solver, limits=limit)
            require_sound(case, solution, cut_short=True)


@_check("time_limit")
def _time_limit(solver: Solver) -> None:
    """It stops within 20 % and half a second of its time limit, on a problem that is hard to finish."""
    solve(_taken(solver, "plain")[0].problem, solver)  # what is loaded or compiled once does not count
    case = _hard(solver, 100)
    took = math.inf
    for _ in range(2):  # a busy machine may delay one run
        began, waited = time.perf_counter(), _waited()
        solution = solve(case.problem, solver, limits=Limits(time_limit=TIME_LIMIT))
        took = min(took, time.perf_counter() - began - (_waited() - waited))
        require_sound(case, solution, cut_short=True)
        if took <= TIME_ALLOWED:
            return
    raise AssertionError(f"{case.name}: took {took:.2f} s under a time limit of {TIME_LIMIT} s")


def _waited() -> float:
    """Seconds for which this thread could have run and others had the processor; 0.0 where the system does not say."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


@_check("warm_start")
def _warm_start(solver: Solver) -> None:
    """It never returns worse than its warm start, and starts from any feasible one."""
    for case in _taken(solver, "generic") + _taken(solver, "pairs") + _taken(solver, "indefinite"):
        solution = solve(case.problem, solver, warm_start=case.best)
        require_sound(case, solution)
        require(
            solution.objective <= case.optimum + case.slack,
            f"{case.name}: started from the optimum {case.optimum}, it returned {solution.objective}",
        )
        worst = brute_force(copied(case.problem, -1.0))[1]
        solution = solve(case.problem, solver, warm_start=worst)
        require_sound(case, solution)
        if solver.capabilities.exact:
            require(
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
    require(
        solution.objective <= hidden.optimum,
        f"{hidden.name}: started from the optimum 0, it returned {solution.objective}; the warm start got lost",
    )


@_check("batched")
def _batch(solver: Solver) -> None:
    """A batch of mixed problems gives what each alone gives, in the same order."""
    require(isinstance(solver, BatchSolver) and not solver.solve_batch([], Limits()), "an empty batch must give []")
    alone = _solved(solver)
    for pairs in (alone, alone[::-1]):
        together = solve_many([case.problem for case, _ in pairs], solver)
        for (case, one), many in zip(pairs, together, strict=True):
            require_sound(case, many)
            if "generic" in case.tags:  # where channels tie, the last digit of a sum may decide
                require(
                    one.pruned == many.pruned, f"{case.name}: in a batch it prunes {many.pruned}, alone {one.pruned}"
                )
            else:
                require(
                    abs(one.objective - many.objective) <= case.slack,
                    f"{case.name}: in a batch the objective is {many.objective}, alone {one.objective}",
                )


#: All checks, in the order in which `conformance` runs them.
CHECKS: tuple[Check, ...] = tuple(_registered)


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
