"""Solving in this process, one by one, in a batch or in threads; or in processes that can be killed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import Queue

from grace_opt.engines.outcome import Outcome, is_batched, run_batch, run_one
from grace_opt.engines.supervisor import Supervisor
from grace_opt.problem import SubsetProblem
from grace_opt.solution import BatchSolver, Limits, RawResult, Solver


def outcomes(
    solver: Solver, problems: Sequence[SubsetProblem], limits: Limits, *, workers: int, isolate: bool
) -> Generator[Outcome, None, None]:
    """Each problem's outcome as it is there. Closing the iterator ends what is not finished."""
    # BLAS on several threads for matrices of a hundred rows is slower than on one, and many times so beside others.
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits.threads, user_api="blas"):
        if isolate:
            yield from _in_processes(solver, problems, limits, workers)
        elif is_batched(solver) and isinstance(solver, BatchSolver):
            for index, (raw, elapsed) in enumerate(run_batch(solver, problems, limits)):
                yield index, raw, elapsed
        elif workers > 1:
            yield from _in_threads(solver, problems, limits, workers)
        else:
            for index, problem in enumerate(problems):
                yield index, *run_one(solver, problem, limits)


def _in_threads(
    solver: Solver, problems: Sequence[SubsetProblem], limits: Limits, workers: int
) -> Generator[Outcome, None, None]:
    pool = ThreadPoolExecutor(workers)
    index_of = {pool.submit(run_one, solver, problem, limits): index for index, problem in enumerate(problems)}
    left = set(index_of)
    try:
        for future in as_completed(index_of):
            left.discard(future)
            yield index_of[future], *future.result()
    except KeyboardInterrupt:
        pool.shutdown(wait=True, cancel_futures=True)
        for future in left:
            if not future.cancelled():
                yield index_of[future], *future.result()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _in_processes(
    solver: Solver, problems: Sequence[SubsetProblem], limits: Limits, workers: int
) -> Generator[Outcome, None, None]:
    parts = [list(range(len(problems)))] if is_batched(solver) else [[index] for index in range(len(problems))]
    everyone = [Supervisor() for _ in range(workers)]
    supervisors: Queue[Supervisor] = Queue()
    for each in everyone:
        supervisors.put(each)

    def supervised(part: list[int]) -> list[tuple[RawResult, int]]:
        supervisor = supervisors.get()
        try:
            return supervisor.solve(solver, [problems[index] for index in part], limits)
        finally:
            supervisors.put(supervisor)

    threads = ThreadPoolExecutor(workers)
    part_of = {threads.submit(supervised, part): part for part in parts}
    try:
        for future in as_completed(part_of):
            for index, (raw, elapsed) in zip(part_of[future], future.result(), strict=True):
                yield index, raw, elapsed
    finally:  # finished, interrupted, or the caller wants no more
        threads.shutdown(wait=False, cancel_futures=True)
        for each in everyone:
            each.stop()
