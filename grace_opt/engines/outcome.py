"""What running a solver on a problem comes to, wherever it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

import numpy as np

from grace_opt.problem import BoolArray, SubsetProblem
from grace_opt.solution import BatchSolver, Limits, RawResult, Solver, Status

#: index of the problem, what the solver said, nanoseconds
Outcome = tuple[int, RawResult, int]

#: where a solver is run on problems: gives each outcome as it is there; closing the iterator ends what is not finished
Engine = Callable[[Solver, Sequence[SubsetProblem], Limits], Generator[Outcome, None, None]]


def run_one(
    solver: Solver, problem: SubsetProblem, limits: Limits, warm_start: BoolArray | None = None
) -> tuple[RawResult, int]:
    """What the solver says and the nanoseconds it took; an exception in it is a result of status ``error``."""
    began = time.perf_counter_ns()
    try:
        raw = solver.solve(problem, limits, warm_start, np.random.default_rng(limits.seed))
    except Exception as error:  # a native or third-party solver may fail in any way; one head must not end a run
        raw = failed(error)
    return raw, time.perf_counter_ns() - began


def run_batch(solver: BatchSolver, problems: Sequence[SubsetProblem], limits: Limits) -> list[tuple[RawResult, int]]:
    """As `run_one`, all problems at once; each is given an equal share of the time."""
    began = time.perf_counter_ns()
    try:
        raws = list(solver.solve_batch(problems, limits))
        if len(raws) != len(problems):
            raise ValueError(f"solve_batch returned {len(raws)} results for {len(problems)} problems")
    except Exception as error:  # as above
        raws = [failed(error)] * len(problems)
    share = (time.perf_counter_ns() - began) // len(problems)
    return [(raw, share) for raw in raws]


def is_batched(solver: Solver) -> bool:
    """Whether the solver takes many problems at once."""
    return solver.capabilities.batched and isinstance(solver, BatchSolver)


def failed(error: BaseException) -> RawResult:
    """The result of a run that ended with an exception."""
    return RawResult(None, status=Status.ERROR, raw_status=repr(error), warnings=(f"the solver failed: {error!r}",))
