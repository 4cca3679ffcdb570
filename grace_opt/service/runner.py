"""Carries out the runs of a storage on a cluster. All that it must not forget is in the storage."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from sqlalchemy.exc import SQLAlchemyError

from grace_opt.compare import Index, Instance, labelled, refusal, slack_of, summarise, with_references
from grace_opt.compare.instances import place_of
from grace_opt.engines.dask import Chunk, Cluster
from grace_opt.errors import InputError
from grace_opt.service.db.database import Row
from grace_opt.service.db.outages import is_outage, reason
from grace_opt.service.db.storage import Storage
from grace_opt.service.db.tables import State
from grace_opt.service.masks import masks_of
from grace_opt.service.plan import Work, plan
from grace_opt.solution import RawResult
from grace_opt.solve import checked

log = logging.getLogger("grace_opt.service")

IDLE_SECONDS = 2.0  #: between looks at the storage for what another process has changed
PATIENCE_SECONDS = 1.0  #: before the next try when the storage or the scheduler is away
ERROR_LENGTH = 1000  #: of what is kept of a run's failure


@dataclass(frozen=True)
class Progress:
    """The newest of a run, for those who watch it."""

    state: State
    done: int
    total: int


class Runner(threading.Thread):
    """The one thread that works on runs: the oldest first, but each gets its turn.

    Every record is in the storage as soon as its chunk is back; after a kill, only what is not there is solved. While
    the storage or the scheduler is away nothing is lost: results wait here, runs wait there. Whatever else goes wrong
    with a run (a value that the database refuses, memory, a plug-in's mistake) ends that run, and the others go on.
    """

    def __init__(self, storage: Storage, cluster: Cluster) -> None:
        super().__init__(name="runner", daemon=True)
        self.storage, self.cluster = storage, cluster
        self.trouble: str | None = None  #: what it waits for, in words
        self.heads_solved: dict[tuple[str, str], int] = defaultdict(int)  #: by solver and status, for /metrics
        self.seconds_solving: dict[str, float] = defaultdict(float)  #: by solver
        self._work: dict[int, Work] = {}
        self._unsaved: dict[int, list[Row]] = defaultdict(list)
        self._given_up: set[int] = set()  # runs of which the storage does not even take that they failed
        self._paused: dict[int, tuple[float, str]] = {}  # runs that wait, until when and for what; the others go on
        self._news, self._ending = threading.Event(), threading.Event()

    def notify(self) -> None:
        """Say that the storage has changed: a new run, or a cancelled one."""
        self._news.set()

    def stop(self) -> None:
        """End after the current step."""
        self._ending.set()
        self._news.set()
        self.join(15)

    def progress(self, run: int) -> Progress | None:
        """How far a run is that is being worked on."""
        work = self._work.get(run)
        return None if work is None else Progress(State.RUNNING, work.done, work.total)

    def run(self) -> None:
        """The thread."""
        self.trouble = "the workers are starting"
        looked = -math.inf
        while not self._ending.is_set():
            try:
                self.cluster.connect()
                if self._news.is_set() or time.monotonic() - looked > IDLE_SECONDS:
                    self._news.clear()
                    looked = time.monotonic()
                    self.storage.database.hold()
                    self._look()
                self._save()
                self._feed()
                if self._work:
                    self._collect()
                    self._feed()  # before what came back is saved: a worker does not wait for the database
                    self._save()
                else:
                    self._news.wait(IDLE_SECONDS)
                self.trouble = next((why for _, why in self._paused.values()), self.cluster.trouble())
            except Exception as error:  # the storage or the scheduler is away; or a mistake of ours, which may pass
                if self._ending.is_set():
                    break
                if not isinstance(error, SQLAlchemyError | OSError | InputError):
                    log.exception("the runner goes on after")
                why = reason(error)
                if self.trouble != why:
                    log.warning("waiting: %s", why)
                self.trouble = why
                looked = -math.inf
                self._ending.wait(PATIENCE_SECONDS)

    def _look(self) -> None:
        """Begin what is new in the storage, drop what was cancelled there."""
        unfinished = self.storage.runs.unfinished()
        for run in [run for run in self._work if run not in unfinished]:
            self._forget(run)
        for run in unfinished:
            if run not in self._work and run not in self._given_up:
                self._guarded(run, partial(self._begin, run))
        self._paused = {run: pause for run, pause in self._paused.items() if run in unfinished}

    def _guarded(self, run: int, step: Callable[[], None]) -> None:
        """Take a step of one run. Raises SQLAlchemyError if the database is away; whatever else is the run's own."""
        until, why = self._paused.get(run, (-math.inf, ""))
        if time.monotonic() < until:
            return
        try:
            step()
            self._paused.pop(run, None)
        except Exception as error:
            if not is_outage(error):
                self._fail(run, error)
            elif isinstance(error, SQLAlchemyError):
                raise
            else:  # a full disk, say, which this run needs and others may not
                if not why:
                    log.warning("run %d waits: %s", run, reason(error))
                self._paused[run] = time.monotonic() + PATIENCE_SECONDS, f"run {run}: {reason(error)}"

    def _begin(self, run: int) -> None:
        """Plan a run: what it has already, what earlier runs know, what is left."""
        row = self.storage.runs.find(run)
        if row is None:  # deleted meanwhile
            return
        work, reused = plan(self.storage.blobs, row["request"]), 0
        have = {(place_of(record), record["solver"]) for record in self.storage.records.all(run)}
        records: list[Row] = []
        for solver in work.solvers:
            known = self.storage.records.known((instance.digest for instance in work.instances), solver.name)
            index = Index(known, work.limits)
            unsolved: dict[str, list[Instance]] = {}
            for instance in work.instances:
                if (place_of(instance.labels), solver.name) in have:
                    continue
                found, refused = index.find(instance, solver), refusal(solver, instance.problem)
                if found is not None:
                    records.append(labelled(found, instance, work.limits))
                    reused += 1
                elif refused is not None:
                    solution = checked(instance.problem, solver, work.limits, refused, 0)
                    records.append(labelled(solution.record(), instance, work.limits))
                else:
                    unsolved.setdefault(instance.digest, []).append(instance)
            if unsolved:
                work.waiting.append((solver, [instances[0] for instances in unsolved.values()]))
        work.done = self.storage.records.add(run, records, reused) if records else len(have)
        if row["state"] == State.QUEUED:
            self.storage.runs.move(run, State.RUNNING)
        self._work[run] = work

    def _feed(self) -> None:
        """Fill the cluster's free places, from each run in turn."""
        turn = deque((run, work) for run, work in self._work.items() if work.waiting)
        while turn and self.cluster.room() > 0:
            run, work = turn.popleft()
            try:
                self._send(run, work)
            except OSError:  # the scheduler is away, and the cluster has it
                raise
            except Exception as error:
                self._fail(run, error)
            else:
                if work.waiting:
                    turn.append((run, work))

    def _send(self, run: int, work: Work) -> None:
        """Give the cluster a chunk of a run's heads."""
        solver, instances = work.waiting[0]
        size = self.cluster.chunk_size(solver, instances[0].problem.n)
        part, rest = instances[:size], instances[size:]
        if rest:
            work.waiting[0] = (solver, rest)
        else:
            work.waiting.popleft()
        labels = [(run, work, instance) for instance in part]
        self.cluster.add(Chunk(solver, [instance.problem for instance in part], work.limits, labels))

    def _collect(self) -> None:
        """Take what workers have finished."""
        for chunk, results in self.cluster.landed(0.2):
            for (run, work, instance), (raw, elapsed) in zip(chunk.labels, results, strict=True):
                if self._work.get(run) is work:
                    try:
                        self._take(run, chunk, instance, raw, elapsed)
                    except Exception as error:
                        self._fail(run, error)

    def _take(self, run: int, chunk: Chunk, instance: Instance, raw: RawResult, elapsed: int) -> None:
        """Make records of what a worker found."""
        work = self._work[run]
        solution = checked(instance.problem, chunk.solver, work.limits, raw, elapsed)
        self.heads_solved[solution.solver, solution.status.value] += 1
        self.seconds_solving[solution.solver] += elapsed / 1e9
        record = solution.record()
        self._unsaved[run] += [labelled(record, each, work.limits) for each in work.equal[instance.digest]]

    def _save(self) -> None:
        for run in list(self._unsaved):
            self._guarded(run, partial(self._keep, run))
        for run in list(self._work):
            self._guarded(run, partial(self._complete_if_done, run))

    def _keep(self, run: int) -> None:
        self._work[run].done = self.storage.records.add(run, self._unsaved[run])
        del self._unsaved[run]

    def _fail(self, run: int, error: Exception) -> None:
        """End a run that cannot be worked on; the others go on."""
        if not isinstance(error, InputError):
            log.error("run %d failed", run, exc_info=error)
        self._forget(run)
        try:
            self.storage.runs.move(run, State.FAILED, _sentence(error))
        except Exception as worse:
            if is_outage(worse):
                raise
            log.error("that run %d failed cannot be stored: %s", run, reason(worse))
            self._given_up.add(run)

    def _forget(self, run: int) -> None:
        """Drop a run's work, also what workers are at."""
        work = self._work.pop(run, None)
        self._unsaved.pop(run, None)
        self.cluster.drop(lambda chunk: any(label[1] is work for label in chunk.labels))

    def _complete_if_done(self, run: int) -> None:
        work = self._work[run]
        if work.done < work.total:
            return
        found = {(place_of(record), record["solver"]): record for record in self.storage.records.all(run)}
        records = [
            found[place_of(instance.labels), solver.name] for instance in work.instances for solver in work.solvers
        ]
        records = with_references(records, records, slack_of(work.instances))
        masks = masks_of(records, work.bundle, work.request, self.storage.blobs)
        self.storage.runs.finish(run, records, masks, summarise(records))
        del self._work[run]


def _sentence(error: Exception) -> str:
    """Why a run failed, as any database can keep it and anybody can read it."""
    if isinstance(error, MemoryError):
        said = "the run needs more memory than the service has; submit fewer solvers and budgets, or a smaller bundle"
    elif isinstance(error, RecursionError):
        said = "the run's request is nested too deeply; submit it with plain options"
    elif isinstance(error, SQLAlchemyError | OverflowError | UnicodeError):
        said = f"the database does not take what belongs to this run ({reason(error)}); see its names and numbers"
    else:
        said = str(error) or repr(error)
    said = said.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return said if len(said) <= ERROR_LENGTH else f"{said[:ERROR_LENGTH]}..."
