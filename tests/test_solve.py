"""The front end trusts no solver."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from grace_opt import InputError, Limits, Solution, SubsetProblem, solve, solve_many
from grace_opt.solution import BoundKind, Capabilities, RawResult, Solver, Status, relative_gap

PROBLEM = SubsetProblem(np.diag([1.0, 2.0, 3.0, 4.0]), 2, name="layers.0.kv_heads.0.key")


@dataclass(frozen=True)
class Says:
    """A solver that returns what it is told to."""

    result: Any
    name: ClassVar[str] = "says"
    capabilities: ClassVar[Capabilities] = Capabilities()

    def supports(self, problem: SubsetProblem) -> bool | str:
        return True

    def solve(self, problem: Any, limits: Any, warm_start: Any = None, rng: Any = None) -> RawResult:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def says(**fields: Any) -> Solution:
    fields.setdefault("pruned", np.array([1, 1, 0, 0], bool))
    return solve(PROBLEM, Says(RawResult(**fields)))


def test_objective_is_recomputed_and_a_proven_bound_makes_it_optimal() -> None:
    solution = says(lower_bound=3.0, bound_kind=BoundKind.PROVEN)
    assert (solution.objective, solution.gap, solution.status) == (3.0, 0.0, Status.OPTIMAL)
    assert says(lower_bound=2.9, bound_kind=BoundKind.PROVEN).status is Status.FEASIBLE
    assert says(lower_bound=2.9, bound_kind=BoundKind.PROVEN).gap == pytest.approx(0.1 / 3)


def test_a_solvers_word_alone_proves_nothing() -> None:
    assert says(status=Status.OPTIMAL).status is Status.FEASIBLE
    assert says(lower_bound=3.0, bound_kind=BoundKind.NUMERICAL).status is Status.FEASIBLE
    assert says(lower_bound=3.0).lower_bound == -math.inf
    assert says(lower_bound=math.nan, bound_kind=BoundKind.PROVEN).bound_kind is BoundKind.NONE


def test_a_bound_above_the_objective_is_thrown_away() -> None:
    solution = says(lower_bound=3.5, bound_kind=BoundKind.PROVEN)
    assert solution.status is Status.NUMERICAL_ERROR
    assert solution.lower_bound == -math.inf
    assert "above" in solution.warnings[0]


@pytest.mark.parametrize("pruned", [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1]])
def test_an_infeasible_selection_is_thrown_away(pruned: list[int]) -> None:
    solution = says(pruned=np.array(pruned, bool))
    assert solution.status is Status.ERROR
    assert solution.pruned is None
    assert math.isnan(solution.objective)


def test_a_crash_is_a_record_not_an_exception() -> None:
    solution = solve(PROBLEM, Says(RuntimeError("native code")))
    assert solution.status is Status.ERROR
    assert "native code" in solution.warnings[0]
    assert solution.record()["pruned"] is None


def test_no_selection() -> None:
    assert says(pruned=None).status is Status.NO_SOLUTION
    assert says(pruned=None, status=Status.INFEASIBLE).status is Status.INFEASIBLE


@pytest.mark.parametrize(
    ("objective", "bound", "gap"),
    [(0.0, 0.0, 0.0), (2.0, 1.0, 0.5), (-1.0, -2.0, 1.0), (0.0, -1.0, math.inf), (1.0, -math.inf, math.inf)],
)
def test_the_gap_has_one_formula(objective: float, bound: float, gap: float) -> None:
    assert relative_gap(objective, bound) == gap


def test_a_record_is_strict_json_with_the_agreed_names() -> None:
    record = json.loads(json.dumps(solve(PROBLEM, "greedy").record(), allow_nan=False))
    assert list(record) == [
        "problem",
        "pruned",
        "digest",
        "n",
        "prune",
        "solver",
        "solver_version",
        "status",
        "limit",
        "raw_status",
        "objective",
        "lower_bound",
        "bound_kind",
        "gap",
        "nodes",
        "iterations",
        "timing_ns",
        "seed",
        "threads",
        "options",
        "warnings",
        "versions",
        "trace",
    ]
    assert record["problem"] == "layers.0.kv_heads.0.key"
    assert record["pruned"] == [0, 1]
    assert record["lower_bound"] is None  # not proven, and JSON has no infinity
    assert record["gap"] is None
    assert set(record["timing_ns"]) == {"build", "solve", "round", "total"}
    assert record["options"] == {"direction": "forward"}


def test_solve_many_reports_each_solution_and_takes_any_solver() -> None:
    problems = [PROBLEM, SubsetProblem(np.eye(3), 1)]
    for solver in ("greedy", "exhaustive"):
        seen: list[Solution] = []
        assert solve_many(problems, solver, progress=seen.append) == seen
        assert [s.n for s in seen] == [4, 3]
    assert solve_many([], "greedy") == []


def test_bad_input_is_a_sentence() -> None:
    with pytest.raises(InputError, match="unknown solver 'greddy'; did you mean 'greedy'"):
        solve(PROBLEM, "greddy")
    with pytest.raises(InputError, match="no option 'directoin'; did you mean 'direction'"):
        solve(PROBLEM, "greedy", options={"directoin": "forward"})
    with pytest.raises(InputError, match="option 'direction'.*'sideways'"):
        solve(PROBLEM, "greedy", options={"direction": "sideways"})
    with pytest.raises(InputError, match="takes no warm start"):
        solve(PROBLEM, "greedy", warm_start=[0, 1])
    for bad in (Limits(time_limit=-1.0), Limits(gap_rel=math.nan), Limits(threads=0), Limits(seed=-1)):
        with pytest.raises(InputError, match="must"):
            solve(PROBLEM, "greedy", limits=bad)


def test_protocols_are_met() -> None:
    from grace_opt.registry import create, solvers

    for info in solvers():
        assert isinstance(create(info.name), Solver)


def test_same_seed_same_mask_in_a_new_process_with_another_hash_seed() -> None:
    code = (
        "import numpy as np, grace_opt as g; r = np.random.default_rng(5); a = r.normal(size=(40, 16)); "
        "p = g.SubsetProblem(a.T @ a, 7); "
        "print([g.solve(p, s).pruned for s in ('independent', 'greedy', 'exhaustive')])"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1
