"""A process that solves and can be killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import current_process, get_context, resource_tracker
from typing import TYPE_CHECKING, Any

import numpy as np

from grace_opt.engines.outcome import failed, is_batched, run_batch, run_one
from grace_opt.problem import SubsetProblem
from grace_opt.solution import BatchSolver, Limit, Limits, RawResult, Solver, Status

if TYPE_CHECKING:
    from pebble import ProcessPool

PREPARATIONS = 3  #: how often a process may fail to load a solver before that is the problem's error


class Supervisor:
    """A process that solves, one call at a time; killed when it is past its time limit, replaced when it is gone."""

    def __init__(self) -> None:
        self._pool: ProcessPool | None = None
        self._ready: set[tuple[str, str, int]] = set()
        self._stopped = False

    def solve(self, solver: Solver, problems: Sequence[SubsetProblem], limits: Limits) -> list[tuple[RawResult, int]]:
        """What the solver says of each problem, and nanoseconds; a batched solver has them all at once.

        A problem whose process dies is tried a second time in a new one, then it is a result of status ``error``. One
        that is still at work a fifth and two seconds past its time limit has status ``no_solution``, limit ``time``.
        """
        if is_batched(solver):
            return self._supervised(solver, problems, limits)
        return [pair for problem in problems for pair in self._supervised(solver, [problem], limits)]

    @property
    def stopped(self) -> bool:
        """Whether it was stopped; then it solves no more."""
        return self._stopped

    def stop(self) -> None:
        """Kill the process; a call that waits for it comes to its end."""
        self._stopped = True
        self._end()

    def _supervised(
        self, solver: Solver, problems: Sequence[SubsetProblem], limits: Limits
    ) -> list[tuple[RawResult, int]]:
        # joblib and concurrent.futures give up when a worker dies, and cannot end one that hangs; pebble can.
        from pebble import ProcessExpired

        began = time.perf_counter_ns()
        try:
            for attempt in (1, 2):
                self._prepare(solver, limits)
                began = time.perf_counter_ns()
                try:
                    done: list[tuple[RawResult, int]] = self._call(
                        _work, (solver, problems, limits), _patience(limits, len(problems))
                    )
                    return done
                except ProcessExpired:
                    if attempt == 2 or self._stopped:
                        raise
            raise AssertionError
        except TimeoutError:
            warning = "the solver did not return at its time limit and was killed"
            lost = RawResult(None, status=Status.NO_SOLUTION, limit=Limit.TIME, warnings=(warning,))
            return [(lost, round(1e9 * (limits.time_limit or 0.0)))] * len(problems)
        except ProcessExpired as error:
            lost = failed(RuntimeError(f"its process died twice, with exit code {error.exitcode}"))
        except (Exception, CancelledError) as error:  # what it said cannot be sent between processes; or stopped
            lost = failed(error)
        return [(lost, time.perf_counter_ns() - began)] * len(problems)

    def _prepare(self, solver: Solver, limits: Limits) -> None:
        """Start the process and let it load the solver, which is no problem's time and no problem's fault."""
        from pebble import ProcessExpired

        key = (type(solver).__qualname__, repr(solver), limits.threads)
        for _ in range(PREPARATIONS):
            if key in self._ready:
                return
            with suppress(TimeoutError, ProcessExpired):
                self._call(_load, (solver, limits), 120.0)
                self._ready.add(key)

    def _call(self, function: Callable[..., Any], arguments: tuple[Any, ...], patience: float | None) -> Any:
        from pebble import ProcessExpired, ProcessPool

        if self._pool is None:
            # A Dask worker is a daemonic process, which may not have children. Ours watch their parent: see _start.
            current_process()._config["daemon"] = False  # type: ignore[attr-defined]
            # spawn: a fork would take over half the state of the threads of BLAS, OpenMP and torch
            self._pool = ProcessPool(1, initializer=_start, initargs=(os.getpid(),), context=get_context("spawn"))
            with deaf_to(signal.SIGINT):
                self._pool.schedule(os.getpid)  # starts its threads and its process, which inherit that
        if self._stopped:
            self._end()
            raise CancelledError("stopped")
        try:
            future = self._pool.schedule(function, args=arguments, timeout=patience)
            while not wait([future], 0.5).done:
                if self._stopped:  # by another thread; a pool that was stopped says nothing of what it was at
                    raise CancelledError("stopped")
            return future.result()
        except (TimeoutError, ProcessExpired):
            self._end()
            raise

    def _end(self) -> None:
        pool, self._pool = self._pool, None
        self._ready.clear()
        if pool is not None:
            pool.stop()  # type: ignore[no-untyped-call]
            pool.join()


@contextmanager
def deaf_to(*signals: signal.Signals) -> Iterator[None]:
    """Threads and processes that are begun here do not hear these signals: they are for this process, which ends them.

    Terminals and service managers often send them to all processes at once, and one that is still importing would show
    a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it would let them hear Ctrl-C again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _patience(limits: Limits, problems: int) -> float | None:
    """Seconds after which a worker is killed: a fifth more than the limit, and two for what is not the solver's."""
    return None if limits.time_limit is None else 1.2 * limits.time_limit * problems + 2.0


def _work(solver: Solver, problems: Sequence[SubsetProblem], limits: Limits) -> list[tuple[RawResult, int]]:
    if is_batched(solver) and isinstance(solver, BatchSolver):
        return run_batch(solver, problems, limits)
    return [run_one(solver, problem, limits) for problem in problems]


def _start(parent: int) -> None:
    """A process's first work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # see deaf_to; also where signals cannot be blocked
    # By which the parent ends it; Dask's workers are deaf to it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)  # a parent that was killed ends nobody, and a solver may have no time limit

    threading.Thread(target=watch, daemon=True).start()


def _load(solver: Solver, limits: Limits) -> None:
    """Imports and compiled code are loaded, so that no problem's time has them in it."""
    from threadpoolctl import threadpool_limits

    signs = np.sign(np.random.default_rng(0).standard_normal((16, 16)))
    small = SubsetProblem(signs + signs.T, 8)
    # In a thread: a solver that never returns must not keep the process from starting.
    first = threading.Thread(target=run_one, args=(solver, small, replace(limits, time_limit=5.0)), daemon=True)
    first.start()
    first.join(60)
    threadpool_limits(limits.threads, user_api="blas")
