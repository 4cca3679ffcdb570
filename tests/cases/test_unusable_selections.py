"""A selection whose numbers contradict each other, or none at all, never becomes a mask; what was there stays."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from grace_opt import (
    InputError,
    Solution,
    Status,
    SubsetProblem,
    load_bundle,
    mask_from_solutions,
    registry,
    solve,
    solve_many,
)
from grace_opt.solution import BoundKind, Capabilities, Limit, RawResult
from grace_solvers.independent import IndependentSolver
from tests.cli.test_cli import inside, records, sentence
from tests.support import DATA

HEADS = DATA / "heads-smollm2-135m.safetensors"


class Lying(IndependentSolver):
    """Its bounds lie above its own selections."""

    capabilities = Capabilities(bounds=True)

    def solve(self, problem, *more):  # type: ignore[no-untyped-def]
        raw = super().solve(problem, *more)
        return replace(raw, lower_bound=2 * problem.objective(raw.pruned) + 1, bound_kind=BoundKind.PROVEN)


class OutOfTime(IndependentSolver):
    """It finds nothing in time."""

    capabilities = Capabilities(time_limit=True)

    def solve(self, problem, *more):  # type: ignore[no-untyped-def]
        return RawResult(None, status=Status.NO_SOLUTION, limit=Limit.TIME)


@pytest.mark.parametrize(("solver", "said"), [(Lying(), "numerical_error"), (OutOfTime(), "no_solution")])
def test_no_mask_is_made_of_it(solver: IndependentSolver, said: str) -> None:
    bundle = load_bundle(HEADS)
    problems = bundle.problems(0.5)
    solutions = solve_many(problems[:1], solver) + solve_many(problems[1:], "independent")
    with pytest.raises(InputError, match=rf"{problems[0].name} has no solution of \S+ that can be used \({said}"):
        mask_from_solutions(bundle, solutions)


@pytest.mark.parametrize(("solver", "said"), [(Lying(), "numerical_error"), (OutOfTime(), "no_solution")])
def test_the_command_line_leaves_the_folder_as_it_was(
    solver: IndependentSolver, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("solve", HEADS, "-o", tmp_path / "m", "--ratio", 0.5, "--solver", "independent")
    records(inside(*base, "-f", "json"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    monkeypatch.setattr(registry, "create", lambda *_: solver)
    assert said in sentence(inside(*base, "-q"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before


def test_solutions_of_other_heads_are_refused() -> None:
    bundle = load_bundle(HEADS)
    solutions = solve_many(bundle.problems(0.5), "independent")
    with pytest.raises(InputError, match="there are 11 solutions for the bundle's 12 heads"):
        mask_from_solutions(bundle, solutions[1:])
    small = solve(SubsetProblem(np.eye(4), 2), "independent")
    with pytest.raises(InputError, match="is of 4 channels, and .* has 64"):
        mask_from_solutions(bundle, [small, *solutions[1:]])


def test_a_record_without_an_objective_makes_no_mask() -> None:
    bundle = load_bundle(HEADS)
    solutions = solve_many(bundle.problems(0.5), "independent")
    record = solutions[3].record() | {"objective": None}
    solutions[3] = Solution.from_record(record)
    assert math.isnan(solutions[3].objective)
    with pytest.raises(InputError, match=rf"{solutions[3].problem} has no solution of independent that can be used"):
        mask_from_solutions(bundle, solutions)
