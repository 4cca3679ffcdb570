"""A limit that a solver does not honour is told: once on stderr, and in every record."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grace_opt import Limits, SubsetProblem, solve
from grace_opt.registry import BUILT_IN, create
from grace_opt.solution import Limit, ignored_limits
from tests.cli.test_cli import inside, records
from tests.support import DATA

HEADS = DATA / "heads-smollm2-135m.safetensors"
LIMITS = {"time_limit": 60.0, "node_limit": 10**6, "iteration_limit": 10**6}


@pytest.mark.parametrize("name", BUILT_IN)
def test_each_solver_warns_of_just_the_limits_that_it_does_not_honour(name: str) -> None:
    problem = SubsetProblem(np.diag([3.0, 1.0, 2.0, 4.0]), 2)
    for limit, value in LIMITS.items():
        solution = solve(problem, name, limits=Limits(**{limit: value}))
        honoured = getattr(create(name).capabilities, limit) and not (name == "auto" and limit == "iteration_limit")
        told = [warning for warning in solution.warnings if limit in warning]
        assert len(told) == (0 if honoured else 1), (name, limit, solution.warnings)
    assert ignored_limits(create(name), Limits()) == ()


@pytest.mark.parametrize(
    ("name", "limits", "ended"),
    [
        ("local-search", Limits(iteration_limit=1), Limit.ITERATION),
        ("spectral", Limits(iteration_limit=1), Limit.ITERATION),
        ("branch-and-bound", Limits(node_limit=1), Limit.NODE),
        ("auto", Limits(node_limit=1), Limit.NODE),
    ],
)
def test_what_is_declared_is_honoured(name: str, limits: Limits, ended: Limit) -> None:
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(4, 60)), rng.normal(size=(12, 60))
    solution = solve(SubsetProblem((q.T @ q) * (k.T @ k), 30), name, limits=limits)
    assert (solution.limit, solution.warnings) == (ended, ())


def test_the_command_line_says_it_once(tmp_path: Path) -> None:
    line = ("solve", HEADS, "-o", tmp_path / "m", "--ratio", 0.5, "--solver", "greedy", "-f", "json")
    ended = inside(*line, "--time-limit", 5, "--node-limit", 7)
    said = [
        "greedy honours no time limit, so time_limit = 5 has no effect on it",
        "greedy honours no node limit, so node_limit = 7 has no effect on it",
    ]
    assert ended.stderr.splitlines() == [f"warning: {sentence}" for sentence in said]
    assert all(record["warnings"] == said for record in records(ended))
    assert inside(*line, "--time-limit", 5, "-q").stderr == ""
    compared = inside("compare", HEADS, "-o", tmp_path / "c", "--ratio", 0.5, "--solver", "greedy", "--node-limit", 7)
    assert compared.stderr.splitlines().count(said[1]) == 1
