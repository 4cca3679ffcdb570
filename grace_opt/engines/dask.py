"""Solving on Dask workers: on this machine, or on a cluster that a scheduler's address names (docs/service.md)."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any, Self

from grace_opt.engines.dask_workers import dask_package, deaf_workers, own_defaults
from grace_opt.engines.outcome import Outcome, failed, is_batched
from grace_opt.engines.supervisor import Supervisor
from grace_opt.errors import InputError
from grace_opt.problem import SubsetProblem
from grace_opt.solution import Limits, RawResult, Solver
from grace_opt.versions import versions_of

if TYPE_CHECKING:
    from distributed import Client, Future, LocalCluster

CHUNK_SECONDS = 0.5  #: of work that is sent at once: a hundred times what sending takes, and little to do again
LARGEST_CHUNK = 64
CONNECT_SECONDS = 10.0
WATCH_SECONDS = 0.5
PATIENCE_SECONDS = 5.0  #: without a worker, before that is said: one that died is replaced in less


@dataclass(eq=False)
class Chunk:
    """Problems that one worker solves in one go. ``labels``, one a problem, are the caller's own."""

    solver: Solver
    problems: list[SubsetProblem]
    limits: Limits
    labels: list[Any]


class Cluster:
    """Dask workers, and what is in flight to them. For one thread, but for `close`. A context, or used after `connect`.

    Solvers run in a process of their own beside each worker's thread (`Supervisor`), which is what
    enforces time limits and outlives crashes. A worker that dies has its work sent to another one, up to three times
    (Dask's ``distributed.scheduler.allowed-failures``); what comes back is checked by the front end as ever.

    Args:
        scheduler: address of a running Dask scheduler, e.g. ``tcp://10.0.0.1:8786``. None: start one in this process,
            with workers that are processes of this machine and talk TLS over its loopback.
        workers: how many to start; not for a running scheduler, which has its own.
    """

    def __init__(self, scheduler: str | None = None, workers: int = 1) -> None:
        if workers < 1:
            raise InputError(f"workers must be at least 1, got {workers}")
        self.scheduler, self._workers = scheduler, workers
        self._local: LocalCluster | None = None
        self._client: Client | None = None
        self._log_level: int | None = None  # of Dask, as it was found
        self._flying: dict[Future, Chunk] = {}
        self._landed: Queue[Future] = Queue()
        self._unsent: list[Chunk] = []  # for want of a scheduler
        self._refused: list[tuple[Chunk, list[tuple[RawResult, int]]]] = []  # cannot be sent at all
        self._seconds: dict[tuple[str, int], float] = {}  # of a problem, by solver and n; smoothed
        self.workers, self.width, self._looked = 0, 1, -1.0  #: worker threads, as last seen; of a width, none is one
        self._seen = -math.inf  # when there was a worker, at last

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is in flight, and end the workers that this object started."""
        for closing in (self._client, self._local):
            if closing is not None:
                with suppress(Exception):  # a scheduler that is gone is closed
                    closing.close(timeout=5)
        self._client = self._local = None
        if self._log_level is not None:
            logging.getLogger("distributed").setLevel(self._log_level)
            self._log_level = None

    def room(self) -> int:
        """How many chunks can be added so that none waits behind another one. At least one worker is assumed."""
        self._look()
        return self.width - len(self._flying) - len(self._unsent)

    def trouble(self) -> str | None:
        """That there is no worker, in words; None if there is one, or the last one was there a moment ago."""
        self._look()
        if self._client is None or time.monotonic() - self._seen < PATIENCE_SECONDS:
            return None
        if self.scheduler is None:
            return "no worker process of the service is running; restart it"
        return f"there is no Dask worker at {self.scheduler}; start some with grace-opt worker {self.scheduler}"

    def _look(self) -> None:
        """Count the workers, at most once a second."""
        if self._client is None or time.monotonic() - self._looked <= 1.0:
            return
        with suppress(OSError, TimeoutError):
            self.workers = sum(self._client.nthreads().values())
            self.width = max(1, self.workers)
        self._looked = time.monotonic()
        if self.workers:
            self._seen = self._looked

    def chunk_size(self, solver: Solver, n: int) -> int:
        """How many problems of n channels make a chunk of about `CHUNK_SECONDS`."""
        first = CHUNK_SECONDS / 8 if is_batched(solver) else CHUNK_SECONDS
        seconds = self._seconds.get((repr(solver), n), first)
        return max(1, min(LARGEST_CHUNK, int(CHUNK_SECONDS / max(seconds, 1e-9))))

    def add(self, chunk: Chunk) -> None:
        """Take a chunk, to be sent to a worker.

        Raises:
            OSError: if the scheduler is gone. The chunk is kept, and `landed` tries again.
        """
        self._unsent.append(chunk)
        self._send()

    def landed(self, timeout: float) -> list[tuple[Chunk, list[tuple[RawResult, int]]]]:
        """The chunks that came back, with a result and its nanoseconds for each problem; waits for the first one.

        Raises:
            OSError: if the scheduler is gone; call again later, nothing is lost.
        """
        self._send()
        futures: list[Future] = []
        done, self._refused = self._refused, []
        with suppress(Empty):
            futures.append(self._landed.get(timeout=0 if done else timeout))
            while True:
                futures.append(self._landed.get_nowait())
        for future in futures:
            chunk = self._flying.pop(future, None)
            if chunk is not None:
                results = self._results(future, chunk)
                if results is None:
                    self._unsent.extend(_parts(chunk) if future.status == "error" else [chunk])
                else:
                    done.append((chunk, results))
        return done

    def drop(self, unwanted: Any) -> None:
        """Forget the chunks in flight of which ``unwanted(chunk)`` is true; what solves them is killed."""
        self._unsent = [chunk for chunk in self._unsent if not unwanted(chunk)]
        self._refused = [each for each in self._refused if not unwanted(each[0])]
        for future, chunk in list(self._flying.items()):
            if unwanted(chunk):
                del self._flying[future]
                future.cancel()

    def outcomes(
        self, solver: Solver, problems: Sequence[SubsetProblem], limits: Limits
    ) -> Generator[Outcome, None, None]:
        """The engine of `grace_opt.solve_many`: each problem's outcome as it is there.

        Raises InputError if the scheduler is lost.
        """
        waiting, left = list(range(len(problems))), len(problems)
        try:
            while left:
                while waiting and self.room() > 0:
                    size = self.chunk_size(solver, problems[waiting[0]].n)
                    part, waiting = waiting[:size], waiting[size:]
                    self.add(Chunk(solver, [problems[index] for index in part], limits, part))
                for chunk, results in self.landed(1.0):
                    left -= len(results)
                    for index, (raw, elapsed) in zip(chunk.labels, results, strict=True):
                        yield index, raw, elapsed
        except OSError as error:
            raise InputError(f"the connection to the Dask scheduler was lost ({error}); run again") from None
        finally:
            self.drop(lambda chunk: chunk.solver is solver)

    def _results(self, future: Future, chunk: Chunk) -> list[tuple[RawResult, int]] | None:
        """What a worker said; None if the chunk is to be sent again."""
        from distributed import KilledWorker

        if future.status == "finished":
            try:
                results: list[tuple[RawResult, int]] = future.result()
            except OSError:  # lost on the way
                return None
            except Exception as error:  # what it said cannot be read here
                return [(failed(error), 0)] * len(chunk.problems)
            key = (repr(chunk.solver), chunk.problems[0].n)
            mean = sum(elapsed for _, elapsed in results) / len(results) / 1e9
            self._seconds[key] = 0.7 * self._seconds.get(key, mean) + 0.3 * mean
            return results
        if future.status != "error":  # cancelled or lost, with the scheduler
            return None
        failure = future.exception()
        if isinstance(failure, KilledWorker) and len(chunk.problems) > 1:
            return None  # one of them may be at fault
        return [(failed(failure or RuntimeError("no result")), 0)] * len(chunk.problems)

    def _send(self) -> None:
        try:
            self.connect()
        except InputError as error:
            raise OSError(str(error)) from None
        assert self._client is not None
        while self._unsent:
            chunk = self._unsent[0]
            try:
                future = self._client.submit(
                    solve_chunk,
                    chunk.solver,
                    chunk.problems,
                    chunk.limits,
                    versions_of(chunk.solver.capabilities.requires),
                    pure=False,
                )
            except OSError:
                raise
            except Exception as error:  # a solver, of a plug-in, that cannot be sent: its heads' error, no others'
                del self._unsent[0]
                self._refused.append((chunk, [(failed(error), 0)] * len(chunk.problems)))
                continue
            del self._unsent[0]
            self._flying[future] = chunk
            future.add_done_callback(self._landed.put)

    def connect(self) -> None:
        """Start the workers, or find the scheduler again; nothing if that is done.

        Raises:
            InputError: if the scheduler does not answer, or runs another Python or grace-opt.
        """
        if self._client is not None and self._client.status == "running":
            return
        self._unsent = [*self._flying.values(), *self._unsent]  # what was in flight is lost with the scheduler
        self._flying = {}
        self.close()
        log = logging.getLogger("distributed")
        self._log_level = log.level
        log.setLevel(logging.CRITICAL)  # what matters of it, we say
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        dask = dask_package()
        from distributed import Client

        # What is made here, workers that are started later too, keeps these settings; those of the process stay. What
        # the environment and Dask's files say (DASK_*) is for a cluster of the user's, not for processes of ours.
        settings = {
            **({} if self.scheduler else {"distributed": own_defaults(dask), "temporary-directory": None}),
            "distributed.worker.http.routes": [],
            "distributed.scheduler.http.routes": [],
            "distributed.comm.timeouts.connect": CONNECT_SECONDS,
        }
        with dask.config.set(settings):
            if self.scheduler is None:
                try:
                    with deaf_workers():
                        self._local = _local_cluster(self._workers)
                except (OSError, RuntimeError, TimeoutError) as error:
                    raise InputError(
                        f"the workers cannot be started ({error}); see that memory is left, or start fewer"
                    ) from error
                self._client = Client(self._local, set_as_default=False)
                return
            try:
                self._client = Client(self.scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
                theirs = self._client.run_on_scheduler(_own_versions)
            except (OSError, TimeoutError, ValueError) as error:
                why = error or "timeout"
                raise InputError(
                    f"no Dask scheduler answers at {self.scheduler} ({why}); start one with dask scheduler"
                ) from None
            except ModuleNotFoundError:
                theirs = {"grace-opt": "not installed"}
        _require_same("scheduler", self.scheduler, theirs)


def _local_cluster(workers: int) -> LocalCluster:
    """A scheduler in this process, and workers that are processes of this machine."""
    from distributed import LocalCluster, Security

    return LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        host="127.0.0.1",
        protocol="tls",
        security=Security.temporary(),
        dashboard_address="127.0.0.1:0",  # None would listen everywhere; without routes it says nothing
        worker_dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"timeout": CONNECT_SECONDS},
        silence_logs=logging.CRITICAL,
    )


def _parts(chunk: Chunk) -> list[Chunk]:
    """A chunk for each of its problems."""
    return [
        Chunk(chunk.solver, [problem], chunk.limits, [label])
        for problem, label in zip(chunk.problems, chunk.labels, strict=True)
    ]


def solve_chunk(
    solver: Solver, problems: Sequence[SubsetProblem], limits: Limits, versions: Mapping[str, str]
) -> list[tuple[RawResult, int]]:
    """A worker's task. Raises InputError if its packages are not those of who sent it."""
    _require_same("worker", os.uname().nodename, versions_of(solver.capabilities.requires), versions)
    if not hasattr(_supervisors, "own") or _supervisors.own.stopped:
        _supervisors.own = Supervisor()
    supervisor: Supervisor = _supervisors.own
    with _stopped_if_dropped(supervisor):
        return supervisor.solve(solver, problems, limits)


_supervisors = threading.local()


@contextmanager
def _stopped_if_dropped(supervisor: Supervisor) -> Iterator[None]:
    """Kill the solver's process when nobody wants the result of this task any more; Dask itself lets tasks run on."""
    from distributed import get_worker

    worker, ended = get_worker(), threading.Event()
    key = worker.get_current_task()

    def watch() -> None:
        while not ended.wait(WATCH_SECONDS):
            task = worker.state.tasks.get(key)
            if task is None or task.state == "cancelled":
                supervisor.stop()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _own_versions() -> dict[str, str]:
    return versions_of(())


def _require_same(what: str, where: str, theirs: Mapping[str, str], ours: Mapping[str, str] | None = None) -> None:
    """Raise InputError unless the versions are the same; of Python the first two numbers count."""
    for name, version in (ours or versions_of(())).items():
        other = theirs.get(name, "not installed")
        parts = 2 if name == "python" else None
        if version.split(".")[:parts] != other.split(".")[:parts]:
            raise InputError(
                f"the {what} at {where} has {name} {other} and this process {version}; install the same on both"
            )
