"""Solvers against each other on the heads of bundles: one record for each head, ratio and solver (docs/compare.md)."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ValidationError

from grace_opt.engines.local import Engine, failed
from grace_opt.errors import InputError
from grace_opt.files import check_writable, read_json, write_json
from grace_opt.graphs import GraphBundle, load_bundle
from grace_opt.problem import SubsetProblem
from grace_opt.registry import create
from grace_opt.reports.report import Record, grouped, write_report
from grace_opt.solution import BoundKind, Limit, Limits, RawResult, Solution, Solver, Status, relative_gap
from grace_opt.solve import checked, options_of, solve_many

NOT_SUPPORTED = "not supported"  #: raw_status of a head that its solver does not take
TIME_SHIFT = 0.01  #: seconds, of the shifted geometric mean


@dataclass(frozen=True, eq=False)
class Case:
    """One head of one bundle at one ratio."""

    bundle: str
    ratio: float
    problem: SubsetProblem
    digest: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison says: records in the order bundle, ratio, head, solver, and a row of figures for each solver.

    ``records`` hold the fields of `Solution.record`, ``bundle``, ``ratio``, ``limits``, and what `with_references`
    adds. ``summary`` is what `summarise` makes of them. ``run`` is this run's entry of run.json.
    """

    records: list[Record]
    summary: list[Record]
    run: Record


def compare(
    bundles: Sequence[str | Path],
    solvers: Mapping[str, Mapping[str, Any]],
    ratios: Sequence[float],
    folder: str | Path,
    *,
    limits: Limits | None = None,
    workers: int = 1,
    isolate: bool = False,
    engine: Engine | None = None,
    protect: bool = True,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, Record | None], None] | None = None,
    remark: Callable[[str], None] | None = None,
) -> Comparison:
    """Run every solver on every head at every ratio, and write records.jsonl, run.json, summary.json, report.html.

    A pair of head and solver that ``folder`` already has a record of is not run again: see `stands`. An interrupt
    (Ctrl-C) keeps the finished heads, writes the report of them and goes on as KeyboardInterrupt.

    Args:
        bundles: graph bundles, of any models.
        solvers: solver name -> its options.
        ratios: fractions of each head's channels to prune, in [0, 1).
        limits: of every run.
        workers: heads solved at the same time; they share the machine, and their times show it.
        isolate: solve in processes of their own, as `grace_opt.solve_many` does: a solver that crashes, or does not
            return at its time limit, costs its head alone.
        engine: in place of ``workers`` and ``isolate``, as in `grace_opt.solve_many`.
        protect: keep the bundles' protected channels.
        provenance: stands in run.json, e.g. the command line.
        progress: called with (done, total, record) at the start, where the record is None, and after each run.
        remark: called with a sentence on anything worth knowing that is not an error.

    Raises:
        InputError: before anything is run, for an unknown solver or option, a bad bundle, ratio or limit, a folder
            that cannot be written or belongs to a running comparison, or a line in records.jsonl that is no record.
    """
    folder, limits = Path(folder), limits or Limits()
    progress, remark = progress or (lambda done, total, record: None), remark or (lambda sentence: None)
    if not (bundles and solvers and ratios):
        raise InputError("a comparison needs at least one bundle, one solver and one ratio")
    runners = [create(name, options) for name, options in solvers.items()]
    for runner in runners:
        solve_many([], runner, limits=limits, workers=workers)  # checks limits and workers
    graphs = {str(path): load_bundle(path) for path in bundles}
    cases = cases_of(graphs, ratios, protect)
    check_writable(folder / "records.jsonl")
    with RecordsFile(folder / "records.jsonl", remark) as file:
        earlier = _earlier_runs(folder / "run.json")
        run = {
            **(provenance or {}),
            "started": now(),
            "ended": None,
            "state": "running",
            "bundles": {name: dict(bundle.metadata) for name, bundle in graphs.items()},
            "ratios": list(ratios),
            "protect": protect,
            "solvers": {runner.name: options_of(runner) for runner in runners},
            "limits": limits_of(limits),
            "seed": limits.seed,
            "threads": limits.threads,
            "workers": workers,
            "isolate": isolate,
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "versions": {"python": platform.python_version()},
        }
        _write_runs(folder / "run.json", [*earlier, run])
        try:
            run_solver = partial(solve_many, limits=limits, workers=workers, isolate=isolate, engine=engine)
            _run_pairs(cases, runners, limits, run_solver, file, progress)
            run["state"] = "complete"
        except KeyboardInterrupt:
            run["state"] = "interrupted"
        records = _own_records(cases, runners, limits, file)
        for record in records:
            run["versions"] |= record["versions"]
        run["ended"] = now()
        _write_runs(folder / "run.json", [*earlier, run])
        slack = {case.digest: 1e-12 * float(np.abs(case.problem.weights).sum()) for case in cases}
        records = with_references(records, file.records, slack)
        _remark_contradiction(records, remark)
        summary = summarise(records)
        if records:
            write_json(folder / "summary.json", {"summary": summary})
            problems = {(case.bundle, case.problem.name): case.problem for case in cases}
            write_report(folder / "report.html", records, summary, problems, run)
    if run["state"] == "interrupted":
        raise KeyboardInterrupt
    return Comparison(records, summary, run)


def stands(record: Record, limits: Limits) -> bool:
    """Whether a run under ``limits`` would have ended as the recorded one did, so that it need not be repeated.

    Failures and interrupted runs are repeated. So is a run under other gap tolerances. A run stands under other
    time, node or iteration limits if it used no more than they allow, and the limit that ended it, if one did, is
    unchanged: what ended by itself (a proven optimum, say) stays valid under a larger limit, what hit its time
    limit is run again.
    """
    if record["status"] == Status.ERROR or record["limit"] == Limit.INTERRUPTED:
        return False
    before, now = record["limits"], limits_of(limits)
    if (before["gap_rel"], before["gap_abs"]) != (now["gap_rel"], now["gap_abs"]):
        return False
    used = {"time": record["timing_ns"]["total"] / 1e9, "node": record["nodes"], "iteration": record["iterations"]}
    return all(
        before[f"{kind}_limit"] == now[f"{kind}_limit"]
        or (record["limit"] != kind and (now[f"{kind}_limit"] is None or amount <= now[f"{kind}_limit"]))
        for kind, amount in used.items()
    )


def with_references(records: Sequence[Record], known: Iterable[Record], slack: Mapping[str, float]) -> list[Record]:
    """The records, each with what all of ``known`` say of the same problem (digest).

    Adds ``best_known`` (smallest objective), ``best_bound`` (largest proven lower bound) and ``best_bound_solver``
    (whose), ``over_best`` = (objective - best_known) / |best_known| and ``reference_gap`` = the gap of the objective
    to ``best_bound``. None where there is none. A bound above the best objective by at most ``slack[digest]`` (plus
    1e-9 of that objective, as in the front end) is rounding, and lowered to it.
    """
    best_known: dict[str, float] = {}
    best_bound: dict[str, tuple[float, str]] = {}
    for record in known:
        digest = record["digest"]
        if record["objective"] is not None:
            best_known[digest] = min(record["objective"], best_known.get(digest, math.inf))
        if record["bound_kind"] == "proven" and record["lower_bound"] is not None:
            mine = (record["lower_bound"], record["solver"])
            best_bound[digest] = max(best_bound.get(digest, mine), mine, key=lambda pair: pair[0])
    completed = []
    for record in records:
        best = best_known.get(record["digest"])
        bound: float | None = None
        whose: str | None = None
        if record["digest"] in best_bound:
            bound, whose = best_bound[record["digest"]]
            if best is not None and best < bound <= best + slack.get(record["digest"], 0.0) + 1e-9 * abs(best):
                bound = best
        objective, over_best, reference_gap = record["objective"], None, None
        if objective is not None and best is not None:
            over_best = 0.0 if objective == best else _finite((objective - best) / abs(best) if best else math.inf)
        if objective is not None and bound is not None:
            reference_gap = _finite(relative_gap(objective, bound))
        added = {
            "best_known": best,
            "over_best": over_best,
            "best_bound": bound,
            "best_bound_solver": whose,
            "reference_gap": reference_gap,
        }
        completed.append({**record, **added})
    return completed


def summarise(records: Iterable[Record]) -> list[Record]:
    """A row for each bundle, ratio and solver, in order of appearance.

    ``gap_mean`` is over the heads with a proven bound of the solver's own, ``reference_gap_mean`` over those with a
    proven bound of any solver. ``time`` is the shifted geometric mean in seconds (shift 10 ms) over the heads where
    the solver gave a selection or came to a limit: a run that hit its limit counts as long as it took.
    ``no_selection`` counts limits that came too early, ``not_supported`` heads that the solver does not take.
    """
    rows = []
    for (bundle, ratio, solver), group in grouped(records, "bundle", "ratio", "solver").items():
        over = [r["over_best"] for r in group if r["over_best"] is not None]
        own = [r["gap"] for r in group if r["gap"] is not None and r["bound_kind"] == "proven"]
        reference = [r["reference_gap"] for r in group if r["reference_gap"] is not None]
        failed = [r for r in group if r["status"] in (Status.ERROR, Status.NUMERICAL_ERROR)]
        refused = [r for r in group if r["raw_status"] == NOT_SUPPORTED]
        empty = [r for r in group if r["pruned"] is None and r["status"] != Status.ERROR]
        timed = [r for r in group if r["pruned"] is not None or r["limit"] != Limit.NONE]
        rows.append(
            {
                "bundle": bundle,
                "ratio": ratio,
                "solver": solver,
                "heads": len(group),
                "over_best_mean": _mean(over),
                "over_best_max": max(over, default=None),
                "gap_mean": _mean(own),
                "reference_gap_mean": _mean(reference),
                "optimal_share": sum(r["status"] == Status.OPTIMAL for r in group) / len(group),
                "time": shifted_geometric_mean([r["timing_ns"]["total"] / 1e9 for r in timed]),
                "errors": len(failed),
                "no_selection": len(empty) - len(refused),
                "not_supported": len(refused),
            }
        )
    return rows


def shifted_geometric_mean(values: Sequence[float], shift: float = TIME_SHIFT) -> float | None:
    """exp(mean(log(t + shift))) - shift; None of no values."""
    if not values:
        return None
    return math.exp(math.fsum(math.log(value + shift) for value in values) / len(values)) - shift


class RecordsFile:
    """records.jsonl: one JSON object a line, each written when its head is finished. Never rewritten.

    A kill loses at most the line that was being written: such a torn last line is dropped, with a remark. One
    process at a time; the lock goes with the process, however that ends.
    """

    def __init__(self, path: Path, remark: Callable[[str], None]) -> None:
        self.path = path
        self.records: list[Record] = []
        try:
            self._file = path.open("a+b", buffering=0)  # nothing is left over to fail again when it is closed
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
        try:
            self._lock()
            self._read(remark)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def append(self, record: Record) -> None:
        """Add a record to the end of the file."""
        line = json.dumps(record, allow_nan=False, default=str).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}; free some space") from error
        self.records.append(record)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another comparison is writing {self.path}; wait for it, or choose another folder"
            ) from None

    def _read(self, remark: Callable[[str], None]) -> None:
        self._file.seek(0)
        *lines, torn = self._file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                _Line.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                where = "".join(f"{part}: " for part in first["loc"])
                raise InputError(
                    f"{self.path}, line {number}, is not a record ({where}{first['msg']}); delete that line, or write "
                    "to another folder"
                ) from None
            self.records.append(json.loads(line))
        self.loaded = len(self.records)
        if torn:
            self._file.truncate(self._file.tell() - len(torn))
            remark(f"{self.path}: the last line was cut off and is dropped; its head is solved again")


class _LimitFields(BaseModel):
    time_limit: float | None
    gap_rel: float
    gap_abs: float
    node_limit: int | None
    iteration_limit: int | None


class _TimingFields(BaseModel):
    total: int


class _Line(BaseModel, allow_inf_nan=False):
    """What a line of records.jsonl must hold; it may hold more."""

    bundle: str
    ratio: float
    problem: str
    pruned: list[int] | None
    digest: str
    n: int
    prune: int
    solver: str
    status: Status
    limit: Limit
    raw_status: str
    objective: float | None
    lower_bound: float | None
    bound_kind: BoundKind
    gap: float | None
    nodes: int
    iterations: int
    timing_ns: _TimingFields
    seed: int
    threads: int
    options: dict[str, Any]
    warnings: list[str]
    versions: dict[str, str]
    trace: list[tuple[float | None, float | None, float | None]]
    limits: _LimitFields


def cases_of(graphs: Mapping[str, GraphBundle], ratios: Iterable[float], protect: bool) -> list[Case]:
    return [
        Case(name, ratio, problem, problem.digest())
        for name, bundle in graphs.items()
        for ratio in dict.fromkeys(ratios)
        for problem in bundle.problems(ratio, protect=protect)
    ]


def _run_pairs(
    cases: Sequence[Case],
    runners: Sequence[Solver],
    limits: Limits,
    run_solver: Callable[..., Any],
    file: RecordsFile,
    progress: Callable[[int, int, Record | None], None],
) -> None:
    """Run what has no record that stands, and append a record for every case."""
    equal = defaultdict(list)  # the same problem may come under several names, or at several ratios
    for case in cases:
        equal[case.digest].append(case)
    index, planned, batches = Index(file.records, limits), set(), []
    for group in _by_set(cases):  # a batched solver gets all heads of a bundle and ratio at once
        for runner in runners:
            unsolved = []
            for case in group:
                found = index.find(case, runner)
                if found is not None and not is_of(found, case):
                    index.add(_store(file, found, case, limits))
                elif found is None and (case.digest, runner.name) not in planned:
                    planned.add((case.digest, runner.name))
                    unsolved.append(case.problem)
            batches.append((runner, unsolved))
    done = 0

    def finished(solution: Solution) -> None:
        nonlocal done
        done += 1
        record = solution.record()
        for case in equal[solution.digest]:
            _store(file, record, case, limits)
        progress(done, len(planned), record)

    progress(done, len(planned), None)
    for runner, unsolved in batches:
        supported = []
        for problem in unsolved:
            refused = refusal(runner, problem)
            if refused is None:
                supported.append(problem)
            else:
                finished(checked(problem, runner, limits, refused, 0))
        run_solver(supported, runner, progress=finished)


def refusal(runner: Solver, problem: SubsetProblem) -> RawResult | None:
    """What is recorded of a head that the solver does not take."""
    try:
        answer = runner.supports(problem)
    except Exception as error:  # a third party's
        return failed(error)
    if answer is True:
        return None
    why = f"{runner.name} does not take this head: {answer or 'it says no'}"
    return RawResult(None, status=Status.NO_SOLUTION, raw_status=NOT_SUPPORTED, warnings=(why,))


class Index:
    """The newest record of each problem and solver that stands under the limits of this run."""

    def __init__(self, records: Iterable[Record], limits: Limits) -> None:
        self._limits, self._found = limits, dict[tuple[Any, ...], dict[tuple[str, float, str], Record]]()
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        if not stands(record, self._limits):
            return
        options = json.dumps(record["options"], sort_keys=True, default=str)
        key = (record["digest"], record["solver"], options, record["seed"], record["threads"])
        self._found.setdefault(key, {})[record["bundle"], record["ratio"], record["problem"]] = record

    def find(self, case: Case, runner: Solver) -> Record | None:
        """The record of this case, or else of an equal problem."""
        options = json.dumps(options_of(runner), sort_keys=True, default=str)
        key = (case.digest, runner.name, options, self._limits.seed, self._limits.threads)
        found = self._found.get(key, {})
        record = found.get((case.bundle, case.ratio, case.problem.name)) or next(iter(reversed(found.values())), None)
        if record is not None and record["raw_status"] == NOT_SUPPORTED and not refusal(runner, case.problem):
            return None  # the solver has learnt it since
        return record


def _store(file: RecordsFile, record: Record, case: Case, limits: Limits) -> Record:
    labels = {"bundle": case.bundle, "ratio": case.ratio, "problem": case.problem.name}
    labelled = {**record, **labels, "limits": record.get("limits", limits_of(limits))}
    file.append(labelled)
    return labelled


def is_of(record: Record, case: Case) -> bool:
    return (record["bundle"], record["ratio"], record["problem"]) == (case.bundle, case.ratio, case.problem.name)


def _own_records(cases: Sequence[Case], runners: Sequence[Solver], limits: Limits, file: RecordsFile) -> list[Record]:
    """The records of this invocation: those that stand, and the failures among the new ones."""
    index = Index(file.records, limits)
    new = {(r["bundle"], r["ratio"], r["problem"], r["solver"]): r for r in file.records[file.loaded :]}
    found = []
    for case in cases:
        for runner in runners:
            key = (case.bundle, case.ratio, case.problem.name, runner.name)
            record = index.find(case, runner) or new.get(key)
            if record is not None:
                found.append(record)
    return found


def _remark_contradiction(records: Iterable[Record], remark: Callable[[str], None]) -> None:
    for record in records:
        best, bound = record["best_known"], record["best_bound"]
        if best is not None and bound is not None and bound > best:
            remark(
                f"{record['problem']}: the proven bound {bound!r} of {record['best_bound_solver']} lies above a known "
                f"selection's objective {best!r}; one of the two is wrong"
            )
            return


def _earlier_runs(path: Path) -> list[Any]:
    if not path.exists():
        return []
    history = read_json(path)
    if not isinstance(history, dict) or not isinstance(history.get("runs"), list):
        raise InputError(f"{path} is not of a comparison; write to another folder")
    return list(history["runs"])


def _write_runs(path: Path, runs: Sequence[Any]) -> None:
    write_json(path, {"runs": json.loads(json.dumps(runs, default=str))})


def _by_set(cases: Iterable[Case]) -> list[list[Case]]:
    sets: dict[tuple[str, float], list[Case]] = {}
    for case in cases:
        sets.setdefault((case.bundle, case.ratio), []).append(case)
    return list(sets.values())


def limits_of(limits: Limits) -> dict[str, Any]:
    """The limits of a record; seed and threads are fields of their own."""
    return {name: value for name, value in asdict(limits).items() if name not in ("seed", "threads")}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
