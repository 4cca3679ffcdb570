"""Carries out the runs of a store on a cluster. All that it must not forget is in the store."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from grace_opt.compare.compare import Case, Index, cases_of, limits_of, refusal, summarise, with_references
from grace_opt.compression.mask import JSON_NAME, TENSORS_NAME, mask_from_solutions, save_mask
from grace_opt.engines.dask import Chunk, Cluster
from grace_opt.errors import InputError
from grace_opt.graphs import GraphBundle, load_bundle
from grace_opt.registry import create
from grace_opt.service.db.store import Row, Store
from grace_opt.service.db.tables import State
from grace_opt.solution import Limits, Solution, Solver
from grace_opt.solve import checked

log = logging.getLogger("grace_opt.service")

IDLE_SECONDS = 2.0  #: between looks at the store for what another process has changed
PATIENCE_SECONDS = 1.0  #: before the next try when the store or the scheduler is away


@dataclass(eq=False)
class Work:
    """One run: what is to be solved yet, and where each result belongs."""

    run: int
    request: Row
    bundle: GraphBundle
    limits: Limits
    runners: list[Solver]
    cases: list[Case]
    equal: dict[str, list[Case]]  #: digest -> its cases: a problem may come at several ratios, or under several names
    waiting: deque[tuple[Solver, list[Case]]] = field(default_factory=deque)
    done: int = 0

    @property
    def total(self) -> int:
        """Records of the complete run."""
        return len(self.cases) * len(self.runners)


@dataclass(frozen=True)
class Progress:
    """The newest of a run, for those who watch it."""

    state: State
    done: int
    total: int


class Runner(threading.Thread):
    """The one thread that works on runs: the oldest first, but each gets its turn.

    Every record is in the store as soon as its chunk is back; after a kill, only what is not there is solved. While
    the store or the scheduler is away nothing is lost: results wait here, runs wait there.
    """

    def __init__(self, store: Store, cluster: Cluster) -> None:
        super().__init__(name="runner", daemon=True)
        self.store, self.cluster = store, cluster
        self.trouble: str | None = None  #: what it waits for, in words
        self.heads_solved: dict[tuple[str, str], int] = defaultdict(int)  #: by solver and status, for /metrics
        self.seconds_solving: dict[str, float] = defaultdict(float)  #: by solver
        self._work: dict[int, Work] = {}
        self._unsaved: dict[int, list[Row]] = defaultdict(list)
        self._news, self._ending = threading.Event(), threading.Event()

    def notify(self) -> None:
        """Say that the store has changed: a new run, or a cancelled one."""
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
                    self.store.hold()
                    self._look()
                self._save()
                self._feed()
                if self._work:
                    self._collect()
                    self._feed()  # before what came back is saved: a worker does not wait for the database
                    self._save()
                else:
                    self._news.wait(IDLE_SECONDS)
                self.trouble = None
            except Exception as error:  # the store or the scheduler is away; or a mistake of ours, which may pass
                if not isinstance(error, SQLAlchemyError | OSError | InputError):
                    log.exception("the runner goes on after")
                reason = str(getattr(error, "orig", error)).strip().partition("\n")[0]
                if self.trouble != reason:
                    log.warning("waiting: %s", reason)
                self.trouble = reason
                looked = -math.inf
                self._ending.wait(PATIENCE_SECONDS)

    def _look(self) -> None:
        """Begin what is new in the store, drop what was cancelled there."""
        rows = {row["id"]: row for row in self.store.unfinished()}
        for run in [run for run in self._work if run not in rows]:
            self._forget(run)
        for run, row in rows.items():
            if run not in self._work:
                try:
                    work = self._begin(row)
                except (SQLAlchemyError, OSError):
                    raise
                except Exception as error:  # what could not be known when it was accepted, a plug-in's failure
                    self._fail(run, error)
                else:
                    self._work[run] = work

    def _begin(self, row: Row) -> Work:
        """Plan a run: what it has already, what earlier runs know, what is left."""
        work = plan(self.store, row)
        run, reused = work.run, 0
        have = {_key(record) for record in map(json.loads, self.store.records(run)[0])}
        records: list[Row] = []
        for runner in work.runners:
            index = Index(self.store.known((case.digest for case in work.cases), runner.name), work.limits)
            unsolved: dict[str, list[Case]] = {}
            for case in work.cases:
                if (case.ratio, runner.name, case.problem.name) in have:
                    continue
                found, refused = index.find(case, runner), refusal(runner, case.problem)
                if found is not None:
                    records.append(_labelled(found, case, work.limits))
                    reused += 1
                elif refused is not None:
                    solution = checked(case.problem, runner, work.limits, refused, 0)
                    records.append(_labelled(solution.record(), case, work.limits))
                else:
                    unsolved.setdefault(case.digest, []).append(case)
            if unsolved:
                work.waiting.append((runner, [cases[0] for cases in unsolved.values()]))
        work.done = self.store.add_records(run, records, reused) if records else len(have)
        if row["state"] == State.QUEUED:
            self.store.move(run, State.RUNNING)
        return work

    def _feed(self) -> None:
        """Fill the cluster's free places, from each run in turn."""
        turn = deque(work for work in self._work.values() if work.waiting)
        while turn and self.cluster.room() > 0:
            work = turn.popleft()
            runner, cases = work.waiting[0]
            size = self.cluster.chunk_size(runner, cases[0].problem.n)
            part, rest = cases[:size], cases[size:]
            if rest:
                work.waiting[0] = (runner, rest)
            else:
                work.waiting.popleft()
            labels = [(work, case) for case in part]
            if work.waiting:
                turn.append(work)
            self.cluster.add(Chunk(runner, [case.problem for case in part], work.limits, labels))

    def _collect(self) -> None:
        """Take what workers have finished."""
        for chunk, results in self.cluster.landed(0.2):
            for (work, case), (raw, elapsed) in zip(chunk.labels, results, strict=True):
                solution = checked(case.problem, chunk.solver, work.limits, raw, elapsed)
                self.heads_solved[solution.solver, solution.status.value] += 1
                self.seconds_solving[solution.solver] += elapsed / 1e9
                record = solution.record()
                if work.run in self._work:
                    self._unsaved[work.run] += [
                        _labelled(record, each, work.limits) for each in work.equal[case.digest]
                    ]

    def _save(self) -> None:
        for run in list(self._unsaved):
            work = self._work[run]
            work.done = self.store.add_records(run, self._unsaved[run])
            del self._unsaved[run]
        for work in list(self._work.values()):
            try:
                self._complete_if_done(work)
            except (SQLAlchemyError, OSError):
                raise
            except Exception as error:
                self._fail(work.run, error)

    def _fail(self, run: int, error: Exception) -> None:
        """End a run that cannot be worked on; the others go on."""
        if not isinstance(error, InputError):
            log.exception("run %d failed", run)
        self.store.move(run, State.FAILED, str(error) or repr(error))
        self._forget(run)

    def _forget(self, run: int) -> None:
        """Drop a run's work, also what workers are at."""
        work = self._work.pop(run, None)
        self._unsaved.pop(run, None)
        self.cluster.drop(lambda chunk: any(label[0] is work for label in chunk.labels))

    def _complete_if_done(self, work: Work) -> None:
        if work.done < work.total:
            return
        found = [json.loads(body) for body in self.store.records(work.run)[0]]
        by_key = {_key(record): record for record in found}
        records = [by_key[case.ratio, runner.name, case.problem.name] for case in work.cases for runner in work.runners]
        slack = {case.digest: 1e-12 * float(np.abs(case.problem.weights).sum()) for case in work.cases}
        records = with_references(records, records, slack)
        self.store.finish(work.run, records, self._masks(work, records), summarise(records))
        del self._work[work.run]

    def _masks(self, work: Work, records: Sequence[Row]) -> list[Row]:
        """Write the mask of each solver and ratio that has a selection for every head."""
        rows = []
        for ratio in dict.fromkeys(case.ratio for case in work.cases):
            for runner in work.runners:
                mine = {r["problem"]: r for r in records if r["ratio"] == ratio and r["solver"] == runner.name}
                heads = [mine[head.name] for head in work.bundle.heads]
                if any(record["pruned"] is None for record in heads):
                    continue
                config = work.request["config"]
                try:
                    mask = mask_from_solutions(
                        work.bundle,
                        [Solution.from_record(record) for record in heads],
                        recent_window=config["recent_window"],
                        sinks=config["sinks"],
                        readout=config["readout"],
                    )
                except InputError as error:  # no mask can be made of this bundle; its records are still worth having
                    log.warning("run %d has no mask: %s", work.run, error)
                    continue
                with tempfile.TemporaryDirectory(dir=self.store.folder / "tmp") as folder:
                    try:
                        save_mask(mask, folder)
                    except InputError as error:  # a full disk, say: wait
                        raise OSError(str(error)) from error
                    description, tensors = ((Path(folder) / name).read_bytes() for name in (JSON_NAME, TENSORS_NAME))
                rows.append(
                    {
                        "ratio": ratio,
                        "solver": runner.name,
                        "digest": self.store.put(description),
                        "tensors": self.store.put(tensors),
                        "objective_sum": math.fsum(record["objective"] for record in heads),
                    }
                )
        return rows


def plan(store: Store, row: Row) -> Work:
    """A run's heads and solvers. Raises InputError for whatever is wrong with its request or its bundle."""
    request = row["request"]
    bundle = bundle_of(store, request["bundle"])
    runners = [create(each["solver"], each["options"]) for each in request["solvers"]]
    cases = cases_of({request["bundle"]: bundle}, request["ratios"], request["config"]["protect"])
    equal = defaultdict(list)
    for case in cases:
        equal[case.digest].append(case)
    return Work(row["id"], request, bundle, Limits(**request["limits"]), runners, cases, equal)


def bundle_of(store: Store, digest: str) -> GraphBundle:
    """A bundle of the store; the last few are kept in memory. Raises InputError if its file is lost or damaged."""
    return _loaded(str(store.blob(digest)))


@lru_cache(maxsize=4)
def _loaded(path: str) -> GraphBundle:
    return load_bundle(path)


def _labelled(record: Row, case: Case, limits: Limits) -> Row:
    labels: dict[str, Any] = {"bundle": case.bundle, "ratio": case.ratio, "problem": case.problem.name}
    bare = {name: value for name, value in record.items() if name not in REFERENCES}
    return {**bare, **labels, "limits": record.get("limits", limits_of(limits))}


REFERENCES = ("best_known", "over_best", "best_bound", "best_bound_solver", "reference_gap")


def _key(record: Row) -> tuple[float, str, str]:
    return record["ratio"], record["solver"], record["problem"]
