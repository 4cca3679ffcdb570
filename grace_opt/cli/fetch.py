"""grace-opt fetch."""

from __future__ import annotations

from typing import Annotated

import typer

from grace_opt.cli.options import OutputFolder, QuietOption, ServiceOptions
from grace_opt.cli.output import say
from grace_opt.errors import InputError


def fetch(
    run: Annotated[int, typer.Argument(metavar="RUN", help="Id of a complete run.")],
    output: OutputFolder,
    *,
    solver: Annotated[
        str | None, typer.Option("--solver", help="Whose mask; the one of the smallest objective if left out.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option("--ratio", help="Which mask, where the run has several ratios.")
    ] = None,
    service: ServiceOptions,
    quiet: QuietOption = False,
) -> None:
    """Write a mask of a run to a folder, for grace-opt generate and export."""
    with service.client() as client:
        masks = client.masks(run)
        ratios = sorted({mask.ratio for mask in masks})
        if ratio is None and len(ratios) > 1:
            raise InputError(f"run {run} has masks of ratios {', '.join(map(str, ratios))}; choose one with --ratio")
        fitting = [mask for mask in masks if ratio in (None, mask.ratio) and solver in (None, mask.solver)]
        if not fitting:
            have = ", ".join(f"{mask.solver} at {mask.ratio}" for mask in masks) or "none"
            raise InputError(f"run {run} ({client.run(run).state}) has no such mask; its masks: {have}")
        best = min(fitting, key=lambda mask: mask.objective_sum)
        client.fetch(best, output)
        if not quiet:
            say(f"mask of {best.solver} at ratio {best.ratio:g} written to {output}")
