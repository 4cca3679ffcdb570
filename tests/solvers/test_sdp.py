"""The semidefinite relaxation: bounds that hold whatever the conic solver says, cuts that help, limits and failures."""

from __future__ import annotations

from typing import Any

import cvxpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_opt import InputError, Limits, SubsetProblem, load_bundle, solve
from grace_opt.problem import BoolArray
from grace_opt.solution import BoundKind, Limit, Solution
from grace_opt.testing import brute_force
from grace_solvers import sdp
from grace_solvers.parts.dual import Root, root
from grace_solvers.parts.undecided import Core, core_of
from tests.support import DATA
from tests.support.slack import assert_encloses
from tests.support.strategies import gram_weights, problems

OPTIONS = [
    {"backend": "scs"},
    {"backend": "clarabel"},
    {"cuts": "nonnegative"},
    {"backend": "clarabel", "cuts": "triangles"},
]


def slack(problem: SubsetProblem) -> float:
    return 1e-11 * float(np.abs(problem.weights).sum())


def loose_root(core: Core, cutoff: float, deadline: float, improve: Any) -> Root:
    """Decides nothing, so that the conic solver gets the whole of a small problem."""
    return root(core, cutoff + 1e3 * float(np.abs(core.weights).sum()), deadline, improve)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(problem=problems(largest=9))
@settings(max_examples=15)
def test_the_bound_is_below_the_optimum(options: dict[str, Any], problem: SubsetProblem) -> None:
    optimum = brute_force(problem)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdp, "root", loose_root)
        solution = solve(problem, "sdp", options=options)
    assert not solution.warnings
    assert solution.bound_kind is BoundKind.PROVEN
    assert solution.lower_bound <= optimum + slack(problem)
    assert solution.objective >= optimum - slack(problem)


@given(seed=st.integers(0, 2**32 - 1), k=st.integers(3, 8))
def test_cuts_hold_for_every_choice(seed: int, k: int) -> None:
    """t (sum of signs z_a z_b + 1) >= 0 on 0/1 points, and `moved` and `faces` say the same of it."""
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(k + 1, k + 1))
    Y = half @ half.T
    norms = np.sqrt(np.diagonal(Y))
    for only in (True, False):
        cuts = sdp.violated(Y / np.outer(norms, norms) * 1.3, only)
        t = rng.random(len(cuts.signs))
        weights = gram_weights(rng, k, 4, False)
        moved, constant = cuts.moved(weights, t)
        y = rng.random((64, k)) < 0.5
        z = np.concatenate([np.ones((64, 1)), 2.0 * y - 1], 1)
        sides = (cuts.signs * z[:, cuts.pairs[..., 0]] * z[:, cuts.pairs[..., 1]]).sum(-1)
        assert (sides >= -1).all()
        before, after = ((y @ weights) * y).sum(1), ((y @ moved) * y).sum(1) + constant
        assert after == pytest.approx(before - (sides + 1) @ t, abs=1e-9)
        faces = cuts.faces(np.eye(k + 1)).reshape(k + 1, k + 1, -1)
        assert np.einsum("sa,abc,sb->sc", z, faces, z) == pytest.approx(sides)
        if only:
            assert (cuts.pairs[:, 0, 0] == 0).all()


def heads(name: str, ratio: float = 0.6) -> list[SubsetProblem]:
    return load_bundle(DATA / f"heads-{name}.safetensors").problems(ratio)


@pytest.mark.parametrize("backend", ["scs", "clarabel"])
def test_it_is_near_the_optimum_of_a_real_head(backend: str) -> None:
    problem = heads("smollm2-135m")[1]
    if backend == "clarabel":
        problem = SubsetProblem(problem.weights[:40, :40], 24)
    ours = solve(problem, "branch-and-bound")
    solution = solve(problem, "sdp", options={"backend": backend})
    assert solution.raw_status.startswith(f"{backend}: optimal, ")
    assert solution.bound_kind is BoundKind.PROVEN
    assert_encloses(solution, ours, problem)
    assert 0.95 * ours.objective <= solution.lower_bound
    assert solution.objective <= 1.001 * ours.objective
    assert solution.lower_bound > solve(problem, "spectral").lower_bound


def test_cuts_lift_the_bound() -> None:
    problem = SubsetProblem(heads("qwen2.5-coder-1.5b")[2].weights[:40, :40], 20)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdp, "root", loose_root)
        for cuts in ("none", "nonnegative", "triangles"):
            found.append(solve(problem, "sdp", options={"cuts": cuts, "rounds": 2}))
    none, nonnegative, triangles = (each.lower_bound for each in found)
    assert none < nonnegative
    assert 0.9999 * nonnegative <= triangles
    ours = solve(problem, "branch-and-bound")
    for each in found:
        assert_encloses(each, ours, problem)


def test_channels_of_very_different_size_do_not_break_it() -> None:
    problem = heads("smollm2-135m")[0]
    factors = np.logspace(-6, 6, problem.n)[np.random.default_rng(0).permutation(problem.n)]
    scaled = SubsetProblem(problem.weights * np.outer(factors, factors), problem.prune)
    solution = solve(scaled, "sdp")
    assert not solution.warnings
    assert solution.gap <= 0.02
    assert solution.lower_bound <= solve(scaled, "branch-and-bound").objective * (1 + 1e-9)


def refuse(*arguments: Any, **options: Any) -> Any:
    raise cvxpy.error.SolverError("Solver 'SCS' failed")


def rubbish(problem: Any, *arguments: Any, **options: Any) -> None:
    for variable in problem.variables():
        variable.save_value(np.full(variable.shape, np.nan))


def rubbish_of_size(problem: Any, *arguments: Any, **options: Any) -> None:
    rng = np.random.default_rng(0)
    for variable in problem.variables():
        variable.save_value(1e9 * rng.normal(size=variable.shape))


@pytest.mark.parametrize(("unpack", "warning"), [(refuse, "scs failed"), (rubbish, "scs gave no multipliers")])
def test_a_failing_conic_solver_leaves_a_cheap_bound(
    unpack: Any, warning: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = heads("smollm2-135m")[2]
    monkeypatch.setattr(cvxpy.Problem, "unpack_results", unpack)
    monkeypatch.setattr(cvxpy.Problem, "solver_stats", Stats())
    solution = solve(problem, "sdp")
    assert warning in solution.warnings[0]
    assert_sound(solution, problem)
    assert solution.lower_bound > 0


class Stats:
    num_iters = 7


def test_wrong_multipliers_make_no_wrong_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = heads("smollm2-135m")[2]
    monkeypatch.setattr(cvxpy.Problem, "unpack_results", rubbish_of_size)
    monkeypatch.setattr(cvxpy.Problem, "solver_stats", Stats())
    assert_sound(solve(problem, "sdp"), problem)


def assert_sound(solution: Solution, problem: SubsetProblem) -> None:
    assert solution.bound_kind is BoundKind.PROVEN
    assert solution.lower_bound > -np.inf
    assert_encloses(solution, solve(problem, "branch-and-bound"), problem)


def test_limits_end_it() -> None:
    problem = heads("smollm2-135m")[2]
    few = solve(problem, "sdp", limits=Limits(iteration_limit=3))
    assert few.limit is Limit.ITERATION
    assert few.iterations == 3
    assert_sound(few, problem)
    none = solve(problem, "sdp", limits=Limits(time_limit=0.0))
    assert none.limit is Limit.TIME
    assert_sound(none, problem)


def test_choices_from_the_relaxation_have_the_count() -> None:
    core = core_of(heads("smollm2-135m")[0])
    half = np.random.default_rng(0).normal(size=(core.k + 1, 5))
    choices: list[BoolArray] = sdp._rounded(core, half @ half.T, seed=0)
    assert [int(y.sum()) for y in choices] == [core.count] * 3


def test_options_are_checked() -> None:
    for options in ({"backend": "mosek"}, {"cuts": "all"}, {"samples": 3}):
        with pytest.raises(InputError, match="solver 'sdp'"):
            solve(SubsetProblem(np.eye(4), 2), "sdp", options=options)
