"""grace-opt demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grace_opt.cli.config import own_options
from grace_opt.cli.options import (
    CalibrationOptions,
    LimitOptions,
    ModelOptions,
    OutputFolder,
    RatioOption,
    SolverOption,
    SolverOptionsOption,
    Talk,
    option,
)
from grace_opt.cli.output import Format, print_records, print_rich
from grace_opt.cli.progress import progress
from grace_opt.cli.provenance import explain


def demo(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="As in the other commands.")] = "smollm2-135m",
    *,
    output: OutputFolder = Path("demo"),
    ratio: RatioOption = 0.5,
    solver: SolverOption = None,
    solver_option: SolverOptionsOption = None,
    context: Annotated[int, typer.Option("--context", help="Tokens of the long prompt.")] = 1024,
    max_new_tokens: Annotated[int, option("--max-new-tokens", help="Tokens to generate.")] = 64,
    reading: CalibrationOptions,
    ending: LimitOptions,
    loading: ModelOptions,
    talk: Talk,
) -> None:
    """The whole path on a real model: calibrate, solve, generate with full and pruned cache, one table, one picture."""
    explain(ctx, talk.verbose)
    from grace_opt.compression.method import METHODS
    from grace_opt.evaluate.demo import run
    from grace_opt.files import check_writable
    from grace_opt.registry import create
    from grace_opt.solution import ignored_limits

    name = solver or METHODS["grace-opt"].selection.offline_solver
    chosen = create(name, own_options("--solver-option", solver_option or [], name))
    calibration, limits = reading.calibration(), ending.limits()
    talk.warn(ignored_limits(chosen, limits))
    check_writable(output / "graphs.safetensors")
    with progress(talk.quiet) as show:
        result = run(
            model,
            lambda: loading.load(model, talk.quiet),
            output,
            ratio=ratio,
            solver=chosen,
            limits=limits,
            text=reading.text,
            calibration=calibration,
            context=context,
            new_tokens=max_new_tokens,
            progress=show,
        )
    if talk.format is Format.JSON:
        print_records(result.records, talk.format)
        return
    print_rich(result.table())
    for record in result.records:
        print(f"{record['cache']}: {record['text'][:100]!r}")
    print(f"picture: {result.picture}")
