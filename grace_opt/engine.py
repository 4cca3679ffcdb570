"""Runs a solver on problems: one after the other, in a batch, in threads, or in processes that can be killed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context

import numpy as np

from grace_opt.problem import BoolArray, SubsetProblem
from grace_opt.solution import BatchSolver, Limit, Limits, RawResult, Solver, Status

#: index of the problem, what the solver said, nanoseconds
Run = tuple[int, RawResult, int]


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


def failed(error: BaseException) -> RawResult:
    """The result of a run that ended with an exception."""
    return RawResult(None, status=Status.ERROR, raw_status=repr(error), warnings=(f"the solver failed: {error!r}",))


def runs(
    solver: Solver, problems: Sequence[SubsetProblem], limits: Limits, *, workers: int, isolate: bool
) -> Generator[Run, None, None]:
    """Each problem's run as it is finished. Closing the iterator ends what is not finished."""
    # BLAS on several threads for matrices of a hundred rows is slower than on one, and many times so beside others.
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits.threads, user_api="blas"):
        if isolate:
            yield from _in_processes(solver, problems, limits, workers)
        elif solver.capabilities.batched and isinstance(solver, BatchSolver):
            for index, (raw, elapsed) in enumerate(run_batch(solver, problems, limits)):
                yield index, raw, elapsed
        elif workers > 1:
            yield from _in_threads(solver, problems, limits, workers)
        else:
            for index, problem in enumerate(problems):
                yield index, *run_one(solver, problem, limits)


def _in_threads(
    solver: Solver, problems: Sequence[SubsetProblem], limits: Limits, workers: int
) -> Generator[Run, None, None]:
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
) -> Generator[Run, None, None]:
    # joblib and concurrent.futures give up on a pool when one worker dies, and cannot end one that hangs; pebble can.
    from pebble import ProcessExpired, ProcessPool

    batched = solver.capabilities.batched and isinstance(solver, BatchSolver)
    parts = [list(range(len(problems)))] if batched else [[index] for index in range(len(problems))]
    # spawn: a fork would take over half the state of the threads of BLAS, OpenMP and torch
    pool = ProcessPool(workers, initializer=_start, initargs=(solver, limits), context=get_context("spawn"))
    try:
        began = time.perf_counter_ns()
        indices_of: dict[Future[list[tuple[RawResult, int]]], list[int]] = {
            pool.schedule(
                _work, args=(solver, [problems[i] for i in part], limits), timeout=_patience(limits, len(part))
            ): part
            for part in parts
        }
        for future in as_completed(indices_of):
            part = indices_of[future]
            try:
                done = future.result()
            except TimeoutError:
                warning = "the solver did not return at its time limit and was killed"
                lost = RawResult(None, status=Status.NO_SOLUTION, limit=Limit.TIME, warnings=(warning,))
                done = [(lost, round(1e9 * (limits.time_limit or 0.0)))] * len(part)
            except ProcessExpired as error:
                lost = failed(RuntimeError(f"its process died with exit code {error.exitcode}"))
                done = [(lost, time.perf_counter_ns() - began)] * len(part)
            except Exception as error:  # what it said cannot be sent between processes
                done = [(failed(error), time.perf_counter_ns() - began)] * len(part)
            for index, (raw, elapsed) in zip(part, done, strict=True):
                yield index, raw, elapsed
    except BaseException:  # interrupted, or the caller wants no more
        pool.stop()  # type: ignore[no-untyped-call]
        raise
    else:
        pool.close()  # type: ignore[no-untyped-call]
    finally:
        pool.join()


def _patience(limits: Limits, problems: int) -> float | None:
    """Seconds after which a worker is killed: a fifth more than the limit, and two for what is not the solver's."""
    return None if limits.time_limit is None else 1.2 * limits.time_limit * problems + 2.0


def _work(solver: Solver, problems: Sequence[SubsetProblem], limits: Limits) -> list[tuple[RawResult, int]]:
    if solver.capabilities.batched and isinstance(solver, BatchSolver):
        return run_batch(solver, problems, limits)
    return [run_one(solver, problem, limits) for problem in problems]


def _start(solver: Solver, limits: Limits) -> None:
    """A worker's first work: imports and compiled code are loaded, so that no problem's time has them in it."""
    from threadpoolctl import threadpool_limits

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    signs = np.sign(np.random.default_rng(0).standard_normal((16, 16)))
    small = SubsetProblem(signs + signs.T, 8)
    # In a thread: a solver that never returns must not keep the worker from starting.
    first = threading.Thread(target=run_one, args=(solver, small, replace(limits, time_limit=5.0)), daemon=True)
    first.start()
    first.join(60)
    threadpool_limits(limits.threads, user_api="blas")
