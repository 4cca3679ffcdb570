"""OR-Tools' solvers on the reformulated problem: right, honest about their bounds, and safe when they fail."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_opt import Limits, SubsetProblem, load_bundle, solve
from grace_opt.problem import FloatArray
from grace_opt.solution import BoundKind, Limit, Status, rounding_slack
from grace_opt.testing import brute_force
from grace_opt.testing import problems as cases
from grace_solvers import miqp
from grace_solvers.parts.dual import Root, root
from grace_solvers.parts.undecided import Core
from tests.support import DATA
from tests.support.slack import assert_encloses
from tests.support.strategies import gram_weights, problems

BACKENDS = ["gscip", "cp-sat"]


@contextmanager
def nothing_fixed() -> Iterator[None]:
    """The root decides nothing, so that the back end gets the whole of a small problem."""

    def loose(core: Core, cutoff: float, deadline: float = np.inf) -> Root:
        return root(core, cutoff + 1e3 * float(np.abs(core.weights).sum()), deadline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miqp, "root", loose)
        yield


def slack(problem: SubsetProblem) -> float:
    return 1e-11 * float(np.abs(problem.weights).sum())


@st.composite
def mixed_sizes(draw: st.DrawFn) -> SubsetProblem:
    """Tied groups of one, two and three channels, some protected, any scale, definite or not."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = np.array([0, 0, 0, 1, 1, 2, 2, 3, -1, -1, -1])
    weights = 10.0 ** draw(st.integers(-12, 12)) * gram_weights(rng, 11, 6, draw(st.booleans()))
    return SubsetProblem(weights, draw(st.integers(0, 8)), rng.permutation(11) == 8, groups[rng.permutation(11)])


@pytest.mark.parametrize("backend", BACKENDS)
@given(problem=problems(largest=10) | mixed_sizes().filter(lambda p: p.prunable >= p.prune))
@settings(max_examples=40)
def test_the_optimum_of_small_problems(backend: str, problem: SubsetProblem) -> None:
    optimum = brute_force(problem)[0]
    with nothing_fixed():
        solution = solve(problem, "miqp", options={"backend": backend}, limits=Limits(gap_abs=slack(problem)))
    assert not solution.warnings
    assert solution.limit is Limit.NONE
    assert solution.objective == pytest.approx(optimum, rel=1e-6, abs=slack(problem))
    if solution.bound_kind is BoundKind.PROVEN:
        assert solution.lower_bound <= optimum + 1e-9 * abs(optimum) + slack(problem)
    if backend == "cp-sat":
        assert solution.status is Status.OPTIMAL
    assert solution.objective - solution.lower_bound <= 1e-5 * abs(optimum) + 1e3 * slack(problem)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_every_known_answer_is_proven_where_rounding_lets_it(backend: str) -> None:
    for case in cases():
        solution = solve(case.problem, "miqp", options={"backend": backend}, limits=Limits(gap_abs=case.slack))
        assert solution.objective == pytest.approx(case.optimum, rel=1e-6, abs=case.slack), case.name
        if backend != "gscip" or solution.raw_status == "closed at the root by our own bound":
            assert solution.status is Status.OPTIMAL, (case.name, solution.raw_status)


@pytest.mark.parametrize("bits", [6, 12, 50])
def test_what_cp_sat_rounds_away_is_taken_from_its_bound(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(miqp, "_CP_SAT_BITS", bits)
    rng = np.random.default_rng(bits)
    for _ in range(10):
        problem = SubsetProblem(gram_weights(rng, 9, 6, True), 4)
        with nothing_fixed():
            solution = solve(problem, "miqp", options={"backend": "cp-sat"})
        assert solution.raw_status.startswith("cp-sat (k = 9): OPTIMAL")
        exact = exact_optimum(problem.weights, 4)
        assert Fraction(solution.lower_bound) <= exact * (1 + Fraction(1, 10**14))
        assert (solution.status is Status.OPTIMAL) == (bits == 50)


def exact_optimum(weights: FloatArray, prune: int) -> Fraction:
    fractions = [[Fraction(w) for w in row] for row in weights.tolist()]
    choices = itertools.combinations(range(len(weights)), prune)
    return min(sum((fractions[i][j] for i in c for j in c), Fraction(0)) for c in choices)


def test_scip_confirms_the_optimum_of_a_real_head_and_calls_it_no_proof() -> None:
    problem = load_bundle(DATA / "heads-smollm2-135m.safetensors").problems(0.6)[3]
    ours = solve(problem, "branch-and-bound")
    solution = solve(problem, "miqp", limits=Limits(time_limit=100))
    assert solution.raw_status.startswith("gscip (k = ")
    assert "the root's proven bound is" in solution.raw_status
    assert solution.pruned == ours.pruned
    assert solution.limit is Limit.NONE
    assert solution.bound_kind is BoundKind.NUMERICAL
    assert solution.status is Status.FEASIBLE
    assert solution.gap <= 1e-6
    assert_encloses(solution, ours, problem)


def test_cp_sat_proves_part_of_a_real_head() -> None:
    head = load_bundle(DATA / "heads-qwen2.5-coder-1.5b.safetensors").problems(0.6)[2]
    problem = SubsetProblem(head.weights[:40, :40], 20)
    solution = solve(problem, "miqp", limits=Limits(time_limit=100))
    assert solution.raw_status.startswith("cp-sat (k = ")
    assert solution.status is Status.OPTIMAL
    assert solution.objective == pytest.approx(solve(problem, "branch-and-bound").objective, rel=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("limits", [Limits(time_limit=1.0), Limits(node_limit=1, time_limit=100)], ids=str)
def test_a_limit_leaves_an_incumbent_and_an_honest_bound(backend: str, limits: Limits) -> None:
    problem = load_bundle(DATA / "heads-qwen2.5-coder-1.5b.safetensors").problems(0.6)[4]
    if limits.node_limit:  # the first node of the whole head takes long
        problem = SubsetProblem(problem.weights[:72, :72], 40)
    ours = solve(problem, "branch-and-bound")
    assert ours.status is Status.OPTIMAL
    solution = solve(problem, "miqp", options={"backend": backend}, limits=limits)
    assert solution.limit is (Limit.NODE if limits.node_limit else Limit.TIME)
    assert solution.status is Status.FEASIBLE
    assert_encloses(solution, ours, problem)
    assert solution.gap < 0.2  # the root's bound is not lost


def test_without_time_the_warm_start_comes_back() -> None:
    problem = load_bundle(DATA / "heads-smollm2-135m.safetensors").problems(0.6)[1]
    ours = solve(problem, "branch-and-bound")
    solution = solve(problem, "miqp", limits=Limits(time_limit=0.0), warm_start=ours.pruned)
    assert solution.pruned == ours.pruned
    assert solution.limit is Limit.TIME
    assert solution.bound_kind is BoundKind.PROVEN
    assert -np.inf < solution.lower_bound <= solution.objective


@pytest.mark.parametrize("prune", [0, 8])
def test_with_nothing_to_decide_no_back_end_is_loaded(prune: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ortools(monkeypatch)
    problem = SubsetProblem(gram_weights(np.random.default_rng(0), 8, 6, True), prune)
    solution = solve(problem, "miqp")
    assert solution.status is Status.OPTIMAL
    assert solution.raw_status == "nothing to decide"
    closed = solve(SubsetProblem(np.diag(np.arange(1.0, 9.0)), 3), "miqp")
    assert closed.status is Status.OPTIMAL
    assert closed.bound_kind is BoundKind.PROVEN
    assert closed.raw_status == "closed at the root by our own bound"


def without_ortools(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ortools.math_opt.python.mathopt", "ortools.sat.python.cp_model"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_missing_ortools_is_named(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_ortools(monkeypatch)
    problem = SubsetProblem(gram_weights(np.random.default_rng(0), 12, 6, True), 5)
    with nothing_fixed():
        solution = solve(problem, "miqp", options={"backend": backend})
        with pytest.raises(ImportError, match="needs OR-Tools, which cannot be imported .*pip install 'ortools"):
            miqp.MIQPSolver(backend).solve(problem, Limits())  # type: ignore[arg-type]
    assert solution.status is Status.ERROR
    assert "pip install 'ortools>=9.15'" in solution.warnings[0]


def test_mathopt_errors_are_told_in_their_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from ortools.math_opt.python import mathopt

    def refuse(model: Any, kind: Any, **options: Any) -> Any:
        quadratic = mathopt.Model()
        x = quadratic.add_binary_variable()
        quadratic.minimize(x * x)
        return real(quadratic, mathopt.SolverType.CP_SAT)

    real = mathopt.solve
    monkeypatch.setattr(mathopt, "solve", refuse)
    problem = SubsetProblem(gram_weights(np.random.default_rng(0), 12, 6, True), 5)
    with nothing_fixed():
        solution = solve(problem, "miqp", options={"backend": "gscip"})
    assert "quadratic objective" in solution.warnings[0]
    assert "canonical_code" not in solution.warnings[0]
    assert solution.raw_status == solution.warnings[0]
    assert solution.status is not Status.ERROR  # the incumbent and our own bound are not lost
    assert solution.bound_kind is BoundKind.PROVEN
    optimum, slack = brute_force(problem)[0], rounding_slack(problem.weights)  # which sums in another order
    assert solution.lower_bound - slack <= optimum <= solution.objective + slack


@pytest.mark.parametrize("order", ["import cvxpy, ortools.sat.python.cp_model", "import ortools.sat.python.cp_model"])
def test_cvxpy_and_ortools_solve_in_one_process(order: str) -> None:
    code = f"""
{order}
import cvxpy, numpy as np
from grace_opt import SubsetProblem, solve
rng = np.random.default_rng(0)
a, b = rng.normal(size=(2, 16, 32))
problem = SubsetProblem((a.T @ a) * (b.T @ b), 16)
for solver in ("HIGHS", "CLARABEL"):
    x = cvxpy.Variable(2)
    cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(x)), [x >= 1]).solve(solver=solver)
    print(round(float(x.value.sum()), 6))
for backend in ("gscip", "cp-sat"):
    print(solve(problem, "miqp", options={{"backend": backend}}).raw_status)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split("\n")
    assert told[:2] == ["2.0", "2.0"]
    assert told[2].startswith("gscip (k = ")
    assert "OPTIMAL" in told[2]
    assert told[3].startswith("cp-sat (k = ")
    assert "OPTIMAL" in told[3]


def test_ctrl_c_is_still_heard_after_native_solvers() -> None:
    """CP-SAT's own handler would leave the system's behind, which ends the process."""
    code = """
import os, signal, time
import numpy as np
from grace_opt import SubsetProblem, solve
rng = np.random.default_rng(0)
a, b = rng.normal(size=(2, 16, 32))
problem = SubsetProblem((a.T @ a) * (b.T @ b), 16)
for name, backend in (("miqp", "gscip"), ("miqp", "cp-sat"), ("sdp", "scs"), ("sdp", "clarabel")):
    solve(problem, name, options={"backend": backend})
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        print("heard after", backend, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split("\n")[:4] == [f"heard after {b}" for b in ("gscip", "cp-sat", "scs", "clarabel")], done
