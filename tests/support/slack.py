"""What is proven of an optimum, compared as it is proven: up to rounding, and to the gap at which it is called one."""

from __future__ import annotations

from grace_opt.problem import SubsetProblem
from grace_opt.solution import Solution, rounding_slack


def assert_encloses(found: Solution, best: Solution, problem: SubsetProblem) -> None:
    """The bound of ``found`` is not above what ``best`` selects, nor its selection below the bound of ``best``.

    Two solvers sum in different orders, and a proven optimum may lie above the true one by the gap tolerance.
    """
    slack = rounding_slack(problem.weights)
    assert found.lower_bound <= best.objective + slack
    assert best.lower_bound <= found.objective + slack
