"""Weights of any scale, and of scales that differ: the same selections, proven bounds, gaps that are closed or told."""

from __future__ import annotations

import numpy as np
import pytest

from grace_opt import BoundKind, Limits, Status, SubsetProblem, solve
from grace_opt.problem import FloatArray
from grace_opt.solution import rounding_slack

SOLVERS = ["independent", "greedy", "local-search", "spectral", "sdp", "miqp", "branch-and-bound", "auto", "exhaustive"]


def head(seed: int, n: int) -> FloatArray:
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(4, n)), rng.normal(size=(6, n))
    weights: FloatArray = (q.T @ q) * (k.T @ k)
    return weights


def scaled(weights: FloatArray, scales: FloatArray) -> FloatArray:
    both = scales[:, None] * weights * scales
    return (both + both.T) / 2


def ten_decades(seed: int, n: int) -> FloatArray:
    """The diagonal spans ten decades."""
    scales = 10.0 ** np.linspace(-2.5, 2.5, n)[np.random.default_rng(seed).permutation(n)]
    return scaled(head(seed, n), scales)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("make", [head, ten_decades])
def test_a_factor_changes_nothing(name: str, make: object) -> None:
    weights = make(3, 12)  # type: ignore[operator]
    plain, best = (solve(SubsetProblem(weights, 8), each) for each in (name, "exhaustive"))
    assert plain.status in (Status.OPTIMAL, Status.FEASIBLE)
    assert plain.lower_bound <= best.objective + rounding_slack(weights)
    for power in (-300, -40, 40, 300):
        other = solve(SubsetProblem(weights * 2.0**power, 8), name)
        assert (other.pruned, other.status) == (plain.pruned, plain.status)
        assert other.objective == plain.objective * 2.0**power
    for factor in (1e-12, 1e12):  # these round
        other = solve(SubsetProblem(weights * factor, 8), name)
        assert other.objective == pytest.approx(plain.objective * factor, rel=1e-9)


@pytest.mark.parametrize("loudness", [1e3, 1e5, 1e7])
def test_scip_closes_the_gap_of_heads_with_loud_channels(loudness: float) -> None:
    u = np.sign(head(0, 12)[0])
    for weights in (
        scaled(head(1, 12), np.where(np.arange(12) % 4 == 1, loudness, 1.0)),
        head(2, 12) + loudness**1.5 * np.outer(u, u),  # loud together, quiet where they cancel
    ):
        problem = SubsetProblem(weights, 6)
        found, best = (solve(problem, name) for name in ("miqp", "exhaustive"))
        by_scip = solve(problem, "miqp", options={"backend": "gscip"}, limits=Limits(time_limit=20))
        for solution in (found, by_scip):
            assert solution.objective <= best.objective + 1e-6 * abs(best.objective) + rounding_slack(weights)
            closed = solution.gap <= 2e-6 or solution.objective - solution.lower_bound <= rounding_slack(weights)
            assert closed or solution.limit != "none" or any("gap" in warning for warning in solution.warnings)
        assert by_scip.gap <= 1e-3 or by_scip.bound_kind is BoundKind.PROVEN or loudness == 1e7
