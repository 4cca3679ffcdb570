"""grace-opt demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grace_opt.cli.options import OutputFolder, RatioOption, SolverOption, Talk, TrustOption, option
from grace_opt.cli.output import Format, hush_transformers, print_records, print_rich
from grace_opt.cli.progress import progress
from grace_opt.cli.provenance import explain


def demo(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="As in the other commands.")] = "smollm2-135m",
    *,
    output: OutputFolder = Path("demo"),
    ratio: RatioOption = 0.5,
    solver: SolverOption = None,
    context: Annotated[int, typer.Option("--context", help="Tokens of the long prompt.")] = 1024,
    max_new_tokens: Annotated[int, option("--max-new-tokens", help="Tokens to generate.")] = 64,
    trust_remote_code: TrustOption = False,
    talk: Talk,
) -> None:
    """The whole path on a real model: calibrate, solve, generate with full and pruned cache, one table, one picture."""
    explain(ctx, talk.verbose)
    from grace_opt.evaluate.demo import run
    from grace_opt.files import check_writable

    check_writable(output / "graphs.safetensors")
    hush_transformers(talk.quiet)
    with progress(talk.quiet) as show:
        result = run(
            model,
            output,
            ratio=ratio,
            solver=solver,
            context=context,
            new_tokens=max_new_tokens,
            trust_remote_code=trust_remote_code,
            progress=show,
        )
    if talk.format is Format.JSON:
        print_records(result.records, talk.format)
        return
    print_rich(result.table())
    for record in result.records:
        print(f"{record['cache']}: {record['text'][:100]!r}")
    print(f"picture: {result.picture}")
