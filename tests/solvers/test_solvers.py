from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from grace_opt import InputError, Limits, SubsetProblem, load_bundle, solve, solve_many
from grace_opt.solution import BoundKind, Limit, Status, rounding_slack
from grace_solvers.greedy import GreedySolver
from tests.support.reference import greedy_by_objective
from tests.support.strategies import gram_weights, problems


def brute_force(problem: SubsetProblem) -> float:
    best = np.inf
    for chosen in itertools.combinations(range(problem.n), problem.prune):
        x = np.isin(np.arange(problem.n), chosen)
        if problem.is_feasible(x):
            best = min(best, problem.objective(x))
    return best


def tolerance(problem: SubsetProblem) -> float:
    return 1e-10 * float(np.abs(problem.weights).sum())


@given(problems(largest=9))
def test_exhaustive_finds_the_optimum_and_proves_it(problem: SubsetProblem) -> None:
    solution = solve(problem, "exhaustive")
    assert solution.status is Status.OPTIMAL
    assert solution.bound_kind is BoundKind.PROVEN
    assert solution.gap == 0
    assert solution.objective == pytest.approx(brute_force(problem), rel=1e-9, abs=tolerance(problem))


@given(problems(largest=12))
def test_exhaustive_is_never_worse_than_any_other_solver(problem: SubsetProblem) -> None:
    best = solve(problem, "exhaustive")
    others = [solve(problem, "independent")]
    others += [solve(problem, "greedy", options={"direction": way}) for way in ("forward", "backward", "best")]
    for other in others:
        assert other.pruned is not None
        assert problem.is_feasible(np.isin(np.arange(problem.n), other.pruned))
        assert best.objective <= other.objective + rounding_slack(problem.weights)
        assert best.lower_bound <= other.objective + rounding_slack(problem.weights)


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("protect", [False, True])
def test_greedy_equals_the_plain_loop_on_every_real_head(real_heads: Path, ratio: float, protect: bool) -> None:
    rng = np.random.default_rng(0)
    real = load_bundle(real_heads).problems(ratio)
    given = [SubsetProblem(p.weights, p.prune, rng.random(p.n) < 0.1 if protect else None, name=p.name) for p in real]
    for problem, solution in zip(given, solve_many(given, "greedy"), strict=True):
        assert list(solution.pruned or ()) == greedy_by_objective(problem)


@given(problems(largest=14, groups=False))
def test_backward_takes_out_the_dearest_node_each_time(problem: SubsetProblem) -> None:
    inside = set(np.flatnonzero(problem.contraction.free).tolist())
    while len(inside) > problem.prune:
        saved = {
            k: problem.weights[k, k] + 2 * sum(problem.weights[k, j] for j in inside - {k}) for k in sorted(inside)
        }
        inside.remove(max(saved, key=lambda k: saved[k]))
    solution = solve(problem, "greedy", options={"direction": "backward"})
    slack = tolerance(problem)  # the two sum in different orders
    expected = problem.objective(np.isin(np.arange(problem.n), list(inside)))
    assert solution.objective == pytest.approx(expected, rel=1e-9, abs=slack)


def test_a_batch_gives_what_each_alone_gives() -> None:
    rng = np.random.default_rng(3)
    mixed = [
        SubsetProblem(gram_weights(rng, n, 8, True), int(rng.integers(0, n // 2)), rng.random(n) < 0.2, name=str(i))
        for i, n in enumerate([5, 9, 5, 16, 9, 5])
    ]
    mixed.append(SubsetProblem(gram_weights(rng, 8, 4, True), 4, groups=np.arange(8) % 4))
    for direction in ("forward", "backward", "best"):
        together = solve_many(mixed, GreedySolver(direction=direction))
        for problem, solution in zip(mixed, together, strict=True):
            assert solution.pruned == solve(problem, "greedy", options={"direction": direction}).pruned


@given(problems(largest=10))
def test_the_scale_of_the_weights_changes_nothing(problem: SubsetProblem) -> None:
    scaled = SubsetProblem(problem.weights * 2.0**20, problem.prune, problem.protected, problem.groups)
    for name in ("independent", "greedy", "exhaustive"):
        assert solve(problem, name).pruned == solve(scaled, name).pruned


def test_independent_is_the_smallest_diagonal_and_exact_on_a_diagonal_graph() -> None:
    problem = SubsetProblem(np.diag([5.0, 1.0, 4.0, 2.0, 3.0]), 2)
    for name in ("independent", "greedy", "exhaustive"):
        assert solve(problem, name).pruned == (1, 3)


def test_ties_go_to_the_lowest_channels() -> None:
    problem = SubsetProblem(np.ones((6, 6)), 3)
    for name in ("independent", "greedy", "exhaustive"):
        assert solve(problem, name).pruned == (0, 1, 2)


def test_groups_of_several_sizes_are_solved_or_refused_in_a_sentence() -> None:
    problem = SubsetProblem(np.eye(5), 3, groups=np.array([0, 0, 1, 1, -1]))
    assert solve(problem, "exhaustive").objective == 3
    for name in ("independent", "greedy"):
        with pytest.raises(InputError, match="several sizes"):
            solve(problem, name)


def test_exhaustive_refuses_what_is_too_large() -> None:
    with pytest.raises(InputError, match="at most 20 prunable nodes, and there are 21"):
        solve(SubsetProblem(np.eye(21), 3), "exhaustive")
    protected = np.arange(64) < 50
    assert solve(SubsetProblem(np.eye(64), 3, protected), "exhaustive").pruned == (50, 51, 52)


def test_a_time_limit_keeps_the_incumbent_and_gives_up_the_proof() -> None:
    weights = gram_weights(np.random.default_rng(0), 20, 30, True)
    solution = solve(SubsetProblem(weights, 5), "exhaustive", limits=Limits(time_limit=0.0))
    assert solution.status is Status.FEASIBLE
    assert solution.limit is Limit.TIME
    assert solution.lower_bound == -np.inf
    assert len(solution.pruned or ()) == 5


def test_one_huge_entry_does_not_hide_the_optimum() -> None:
    rng = np.random.default_rng(0)
    weights = np.zeros((16, 16))
    weights[0, 0] = 1e18
    weights[1:, 1:] = gram_weights(rng, 15, 20, True)
    problem = SubsetProblem(weights, 8)
    smaller = SubsetProblem(weights[1:, 1:], 8)
    assert solve(problem, "exhaustive").objective == pytest.approx(solve(smaller, "exhaustive").objective, rel=1e-12)
