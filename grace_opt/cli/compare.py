"""grace-opt compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from grace_opt.cli.budgets import BudgetOptions
from grace_opt.cli.config import named_options
from grace_opt.cli.options import (
    EngineOptions,
    LimitOptions,
    MethodOptions,
    OutputFolder,
    SolversOption,
    SolversOptions,
    Talk,
)
from grace_opt.cli.output import Format, cell, print_records
from grace_opt.cli.progress import progress
from grace_opt.cli.provenance import command_line, explain


def compare(
    ctx: typer.Context,
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE...", help="Graph bundles, from grace-opt calibrate.")
    ],
    output: OutputFolder,
    solver: SolversOption,
    *,
    asked: BudgetOptions,
    choice: MethodOptions,
    solver_option: SolversOptions = None,
    ending: LimitOptions,
    where: EngineOptions,
    talk: Talk,
) -> None:
    """Run several solvers on the same heads; what the folder already has a record of is not run again."""
    sources = explain(ctx, talk.verbose)
    from grace_opt.compare import compare as run
    from grace_opt.reports.tables import summary_columns, summary_row

    budgets = asked.budgets()
    method = choice.made(choice.given(), [each for each in budgets if not isinstance(each, float)])
    with progress(talk.quiet) as show, where.opened() as engine:

        def finished(done: int, total: int, record: dict[str, Any] | None) -> None:
            last = "compare, pairs left"
            if record is not None:
                objective, gap = cell(record["objective"]), cell(record["gap"])
                last = f"{record['solver']}: {record['problem']}, objective {objective}, gap {gap}"
            show(last, done, total)

        comparison = run(
            bundles,
            named_options("--solver-option", solver, solver_option or []),
            budgets,
            output,
            method=method,
            limits=ending.limits(),
            workers=where.workers,
            isolate=True,
            engine=engine,
            provenance={"command": command_line(), "options": sources},
            progress=finished,
            remark=talk.say,
        )
    if talk.format is Format.JSON:
        print_records(comparison.records, talk.format)
        return
    common = os.path.commonpath([str(bundle.absolute().parent) for bundle in bundles])
    rows = [{**summary_row(row), "bundle": os.path.relpath(row["bundle"], common)} for row in comparison.summary]
    print_records(rows, talk.format, summary_columns(comparison.summary))
    talk.say(f"report written to {output / 'report.html'}")
