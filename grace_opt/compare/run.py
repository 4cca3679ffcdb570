"""Solvers against each other on the heads of bundles: one record for each head, ratio and solver (docs/compare.md)."""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from grace_opt.compare.index import Index
from grace_opt.compare.instances import (
    Instance,
    instances_of,
    labelled,
    limits_of,
    place_of,
    refusal,
    slack_of,
)
from grace_opt.compare.summary import summarise, with_references
from grace_opt.compression.budget import Budget
from grace_opt.compression.method import METHODS, Method
from grace_opt.engines.outcome import Engine
from grace_opt.errors import InputError
from grace_opt.files import check_writable, json_text, write_json
from grace_opt.graphs import load_bundle
from grace_opt.reading import read_json
from grace_opt.records import InstanceRecord, budget_name, now
from grace_opt.records_file import RecordsFile
from grace_opt.registry import create
from grace_opt.reports.report import write_report
from grace_opt.solution import Limits, Solution, Solver, ignored_limits
from grace_opt.solve import checked, options_of, solve_many

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a comparison says: records in the order bundle, budget, head, solver, and a row of figures for each solver.

    ``records`` hold the fields of `Solution.record`, ``bundle``, the budget, ``limits``, and what `with_references`
    adds. ``summary`` is what `summarise` makes of them. ``run`` is this run's entry of run.json.
    """

    records: list[Record]
    summary: list[Record]
    run: Record


def compare(
    bundles: Sequence[str | Path],
    solvers: Mapping[str, Mapping[str, Any]],
    budgets: Sequence[float | Budget],
    folder: str | Path,
    *,
    method: Method | None = None,
    limits: Limits | None = None,
    workers: int = 1,
    isolate: bool = False,
    engine: Engine | None = None,
    provenance: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, Record | None], None] | None = None,
    remark: Callable[[str], None] | None = None,
) -> Comparison:
    """Run every solver on every head at every budget, and write records.jsonl, run.json, summary.json, report.html.

    A pair of head and solver that ``folder`` already has a record of is not run again: see `stands`. An interrupt
    (Ctrl-C) keeps the finished heads, writes the report of them and goes on as KeyboardInterrupt.

    Args:
        bundles: graph bundles, of any models.
        solvers: solver name -> its options.
        budgets: how much of the heads' channels to prune; a number is a ratio of keys and values, in [0, 1).
        method: allots a budget to the heads, and says whether the bundles' protected channels are kept; ``grace-opt``
            if left out.
        limits: of every run.
        workers: heads solved at the same time; they share the machine, and their times show it.
        isolate: solve in processes of their own, as `grace_opt.solve_many` does: a solver that crashes, or does not
            return at its time limit, costs its head alone.
        engine: in place of ``workers`` and ``isolate``, as in `grace_opt.solve_many`.
        provenance: stands in run.json, e.g. the command line.
        progress: called with (done, total, record) at the start, where the record is None, and after each run.
        remark: called with a sentence on anything worth knowing that is not an error.

    Raises:
        InputError: before anything is run, for an unknown solver or option, a bad bundle, budget or limit, a folder
            that cannot be written or belongs to a running comparison, or a line in records.jsonl that is no record.
    """
    folder, limits = Path(folder), limits or Limits()
    progress, remark = progress or (lambda done, total, record: None), remark or (lambda sentence: None)
    if not (bundles and solvers and budgets):
        raise InputError("a comparison needs at least one bundle, one solver and one budget")
    chosen = [create(name, options) for name, options in solvers.items()]
    for solver in chosen:
        solve_many([], solver, limits=limits, workers=workers)  # checks limits and workers
        for sentence in ignored_limits(solver, limits):
            remark(sentence)
    graphs = {str(path): load_bundle(path) for path in bundles}
    method = method or METHODS["grace-opt"]
    instances = instances_of(graphs, budgets, method)
    check_writable(folder / "records.jsonl")
    with RecordsFile(folder / "records.jsonl", InstanceRecord, remark) as file:
        earlier = _earlier_runs(folder / "run.json")
        run = {
            **(provenance or {}),
            "started": now(),
            "ended": None,
            "state": "running",
            "bundles": {name: dict(bundle.metadata) for name, bundle in graphs.items()},
            "budgets": [asdict(each) if isinstance(each, Budget) else each for each in budgets],
            "method": method.options(),
            "solvers": {solver.name: options_of(solver) for solver in chosen},
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
            _run_pairs(instances, chosen, limits, run_solver, file, progress)
            run["state"] = "complete"
        except KeyboardInterrupt:
            run["state"] = "interrupted"
        records = _own_records(instances, chosen, limits, file)
        for record in records:
            run["versions"] |= record["versions"]
        run["ended"] = now()
        _write_runs(folder / "run.json", [*earlier, run])
        records = with_references(records, file.records, slack_of(instances))
        _remark_contradiction(records, remark)
        summary = summarise(records)
        if records:
            write_json(folder / "summary.json", {"summary": summary})
            problems = {(instance.bundle, instance.problem.name): instance.problem for instance in instances}
            write_report(folder / "report.html", records, summary, problems, run)
    if run["state"] == "interrupted":
        raise KeyboardInterrupt
    return Comparison(records, summary, run)


def _run_pairs(
    instances: Sequence[Instance],
    solvers: Sequence[Solver],
    limits: Limits,
    run_solver: Callable[..., Any],
    file: RecordsFile,
    progress: Callable[[int, int, Record | None], None],
) -> None:
    """Run what has no record that stands, and append a record for every instance."""
    equal = defaultdict(list)  # the same problem may come under several names, or at several budgets
    for instance in instances:
        equal[instance.digest].append(instance)
    index, planned, batches = Index(file.records, limits), set(), []
    for group in _by_set(instances):  # a batched solver gets all heads of a bundle and budget at once
        for solver in solvers:
            unsolved = []
            for instance in group:
                found = index.find(instance, solver)
                if found is not None and not instance.has(found):
                    index.add(file.append(labelled(found, instance, limits)))
                elif found is None and (instance.digest, solver.name) not in planned:
                    planned.add((instance.digest, solver.name))
                    unsolved.append(instance.problem)
            batches.append((solver, unsolved))
    done = 0

    def finished(solution: Solution) -> None:
        nonlocal done
        done += 1
        record = solution.record()
        for instance in equal[solution.digest]:
            file.append(labelled(record, instance, limits))
        progress(done, len(planned), record)

    progress(done, len(planned), None)
    for solver, unsolved in batches:
        supported = []
        for problem in unsolved:
            refused = refusal(solver, problem)
            if refused is None:
                supported.append(problem)
            else:
                finished(checked(problem, solver, limits, refused, 0))
        run_solver(supported, solver, progress=finished)


def _own_records(
    instances: Sequence[Instance], solvers: Sequence[Solver], limits: Limits, file: RecordsFile
) -> list[Record]:
    """The records of this invocation: those that stand, and the failures among the new ones."""
    index = Index(file.records, limits)
    new = {(*place_of(r), r["solver"]): r for r in file.records[file.loaded :]}
    found = []
    for instance in instances:
        for solver in solvers:
            record = index.find(instance, solver) or new.get((*place_of(instance.labels), solver.name))
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
    write_json(path, {"runs": json.loads(json_text(runs, default=str))})


def _by_set(instances: Iterable[Instance]) -> list[list[Instance]]:
    sets: dict[tuple[Any, ...], list[Instance]] = {}
    for instance in instances:
        sets.setdefault((instance.bundle, budget_name(instance.labels)), []).append(instance)
    return list(sets.values())
