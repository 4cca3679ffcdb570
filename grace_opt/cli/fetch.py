"""grace-opt fetch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from grace_opt.cli.options import ConfigOption, OutputFolder, QuietOption, ServiceOptions
from grace_opt.cli.output import say
from grace_opt.errors import InputError

if TYPE_CHECKING:
    from grace_opt.service.schemas import Mask


def fetch(
    run: Annotated[int, typer.Argument(metavar="RUN", help="Id of a complete run.")],
    output: OutputFolder,
    *,
    solver: Annotated[
        str | None, typer.Option("--solver", help="Whose mask; the one of the smallest objective if left out.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option("--ratio", help="Which mask, where the run has several budgets.")
    ] = None,
    budget_bytes: Annotated[
        float | None, typer.Option("--budget-bytes", help="The same, of a budget in bytes.")
    ] = None,
    service: ServiceOptions,
    config: ConfigOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write a mask of a run to a folder, for grace-opt generate and export."""
    with service.client(quiet) as client:
        masks = client.masks(run)
        budgets = list(dict.fromkeys(_words(mask) for mask in masks))
        if ratio is None and budget_bytes is None and len(budgets) > 1:
            raise InputError(f"run {run} has masks of {', '.join(budgets)}; choose one with --ratio or --budget-bytes")
        fitting = [
            mask
            for mask in masks
            if ratio in (None, mask.ratio)
            and budget_bytes in (None, mask.budget_bytes)
            and solver in (None, mask.solver)
        ]
        if not fitting:
            have = ", ".join(f"{mask.solver} at {_words(mask)}" for mask in masks) or "none"
            raise InputError(f"run {run} ({client.run(run).state}) has no such mask; its masks: {have}")
        best = min(fitting, key=lambda mask: mask.objective_sum)
        client.fetch(best, output)
        if not quiet:
            say(f"mask of {best.solver} at {_words(best)} written to {output}")


def _words(mask: Mask) -> str:
    from grace_opt.records import budget_words

    return budget_words(mask.model_dump())
